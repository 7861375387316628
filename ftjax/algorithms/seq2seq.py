"""Supervised tuning of encoder-decoders, and their continued pretraining by span corruption: the
loss of a batch.

The encoder reads what data/sides.py puts into the arrays `source_*`, and the loss is the
cross-entropy of what the decoder writes. Both algorithms differ in their rows alone. The loss over
the evaluation rows is in token_loss.py.
"""

import ml_collections

from ftjax.algorithms import token_loss
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models.forward import Forward
from ftjax.training.step import LossFn


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns loss(params, batch, keys) -> (sum of the loss, supervised tokens, {'nll': sums})."""
  config = LossConfig(c.loss.label_smoothing, c.loss.z_loss, c.loss.dynamic)

  def loss(params, batch, keys):
    total, nll = forward.with_dropout(keys).cross_entropy(params, batch, config)
    weight = batch['weights'].sum()
    return total, weight, {'nll': (nll, weight)}

  return loss


def build(run: Run) -> fit.Parts:
  """Returns loss and evaluation of a run."""
  return fit.Parts(make_loss(run.forward, run.config), token_loss.evaluation(run))
