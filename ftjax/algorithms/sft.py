"""Supervised fine-tuning, top to bottom: rows -> loss -> step -> run.

The loss is the cross-entropy of supervised tokens, summed here and divided by their number over the
whole optimizer step in training/step.py. What is not of SFT (mesh, weights, data, checkpoints) is
wired in experiment.py."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from ftjax.experiment import fit
from ftjax.experiment import run as experiment
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models.forward import Forward
from ftjax.runtime import sharding
from ftjax.training.step import LossFn


def embedding_noise(alpha: float, batch: dict, dim: int, keys: jax.Array) -> jax.Array:
  """NEFTune: uniform in +-alpha / sqrt(n * D), n the tokens of a document (Jain et al. 2023,
  algorithm 1); float32[B, T, D]. keys: key[B], so that a row's noise does not depend on the others.
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
  """loss(params, batch, keys) -> (sum of loss, supervised tokens, {'nll': sums})."""
  config, alpha = LossConfig(c.loss.label_smoothing, c.loss.z_loss), c.loss.neftune

  def loss(params, batch, keys):
    noise = embedding_noise(alpha, batch, forward.arch.model_dim, keys) if alpha else None
    total, nll = forward.cross_entropy(params, batch, config, noise)
    weight = batch['weights'].sum()
    return total, weight, {'nll': (nll, weight)}

  return loss


def make_eval_loss(forward: Forward):
  """jitted (params, batch) -> (sum of nll, supervised tokens), float32[]; plain."""
  forward = forward.without_remat()

  @jax.jit
  def sums(params, batch):
    logp = forward.token_logprobs(params, batch)
    return -(logp * batch['weights']).sum(), batch['weights'].sum()

  return sums


def evaluate_loss(
  eval_sums, run: experiment.Run, params: dict, is_cancelled: Callable[[], bool]
) -> dict[str, float] | None:
  """Loss (nats per supervised token over the whole set) and perplexity of run.data.eval; empty
  without such a set; None when cancelled.
  """
  total = count = 0.0
  for batch in run.eval_batches():
    if is_cancelled():
      return None
    more, tokens = eval_sums(params, batch)
    total, count = total + float(more), count + float(tokens)
  return {'loss': total / count, 'perplexity': math.exp(min(total / count, 700.0))} if count else {}


def run(c: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs a config to its end: train, export, compare with the base."""
  r = experiment.start(c, workdir)
  eval_loss = functools.partial(evaluate_loss, make_eval_loss(r.forward), r)
  fit.fit(r, make_loss(r.forward, c), eval_loss)
