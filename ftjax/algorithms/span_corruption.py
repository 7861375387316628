"""Continued pretraining of encoder-decoders on documents (Raffel et al. 2020, section 3.1.4): the
loss of a batch.

The encoder reads a document with sentinels in place of some spans, which data/span_corruption.py
draws; the loss is the cross-entropy of the spans, which the decoder writes (token_loss.py).
"""

import ml_collections

from ftjax.algorithms import token_loss
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.models.forward import Forward
from ftjax.training.step import LossFn


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns loss(params, batch, keys) -> (sum of the loss, supervised tokens, {'nll': sums})."""
  return token_loss.make_loss(forward, c)


def build(run: Run) -> fit.Parts:
  """Returns loss and evaluation of a run."""
  return fit.Parts(make_loss(run.forward, run.config), token_loss.evaluation(run))
