"""Supervised fine-tuning: the loss of a batch.

The loss is the cross-entropy of supervised tokens, summed here and divided by their number over the
whole optimizer step in training/step.py. The loss over the evaluation rows is in token_loss.py."""

import functools

import jax
import jax.numpy as jnp
import ml_collections

from ftjax.algorithms import token_loss
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models.forward import Forward
from ftjax.runtime import sharding
from ftjax.training.step import LossFn


def embedding_noise(alpha: float, batch: dict, dim: int, keys: jax.Array) -> jax.Array:
  """Returns the noise of NEFTune (Jain et al. 2023, algorithm 1), float32[B, T, D]: uniform in
  +-alpha / sqrt(n * D), n the tokens of a document.

  keys: key[B], so that a row's noise does not depend on the other rows.
  """
  segments = batch['segments']
  same = (
    segments[:, :, None]
    == jax.sharding.reshard(segments, jax.P(jax.typeof(segments).sharding.spec[0], None))[
      :, None, :
    ]
  )
  scale = alpha / jnp.sqrt(same.sum(-1) * dim)
  order = sharding.zigzag(segments.shape[1], sharding.axis_size('context'))

  def draw(key):
    return jax.random.uniform(key, (segments.shape[1], dim), minval=-1.0)[order]

  uniform = jax.sharding.reshard(
    jax.vmap(draw)(keys), jax.P(*jax.typeof(segments).sharding.spec, None)
  )
  return uniform * scale[..., None]


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns loss(params, batch, keys) -> (sum of the loss, supervised tokens, {'nll': sums}); with
  R-Drop also 'divergence': sums of that between its two passes.
  """
  config = LossConfig(c.loss.label_smoothing, c.loss.z_loss, c.loss.dynamic)
  alpha, strength = c.loss.neftune, c.loss.r_drop

  def noise(batch, keys):
    return embedding_noise(alpha, batch, forward.arch.model_dim, keys) if alpha else None

  def loss(params, batch, keys):
    dropped = forward.with_dropout(keys)
    total, nll = dropped.cross_entropy(params, batch, config, noise(batch, keys))
    weight = batch['weights'].sum()
    return total, weight, {'nll': (nll, weight)}

  def paired(params, batch, keys):
    total, nll, divergence = forward.paired_cross_entropy(
      params, batch, config, strength, keys, functools.partial(noise, batch)
    )
    weight = batch['weights'].sum()
    return total, weight, {'nll': (nll, weight), 'divergence': (divergence, weight)}

  return paired if strength else loss


def build(run: Run) -> fit.Parts:
  """Returns loss and evaluation of a run."""
  evaluate = token_loss.evaluation(run)
  return fit.Parts(make_loss(run.forward, run.config), evaluate)
