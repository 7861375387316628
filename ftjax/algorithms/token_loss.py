"""The loss of supervised tokens, of a batch and over the evaluation rows, for algorithms that train
on texts.
"""

import functools
import math
from collections.abc import Callable

import jax
import ml_collections

from ftjax.experiment.run import Run
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models.forward import Forward
from ftjax.training.step import LossFn


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns loss(params, batch, keys) -> (sum of the loss, supervised tokens, {'nll': sums}) of the
  cross-entropy alone.
  """
  config = LossConfig(c.loss.label_smoothing, c.loss.z_loss, c.loss.dynamic)

  def loss(params, batch, keys):
    total, nll = forward.with_dropout(keys).cross_entropy(params, batch, config)
    weight = batch['weights'].sum()
    return total, weight, {'nll': (nll, weight)}

  return loss


def make_eval_loss(forward: Forward) -> Callable:
  """Returns a jitted (params, batch) -> (sum of -log p, supervised tokens), float32[], without
  smoothing, z-loss and noise.
  """
  forward = forward.without_remat()

  @jax.jit
  def sums(params, batch):
    logp = forward.token_logprobs(params, batch)
    return -(logp * batch['weights']).sum(), batch['weights'].sum()

  return sums


def evaluate_loss(
  eval_sums, run: Run, params: dict, is_cancelled: Callable[[], bool]
) -> dict[str, float] | None:
  """Returns the loss (nats per supervised token over the whole set) and the perplexity of the
  evaluation rows; empty without such rows; None when cancelled.
  """
  total = count = 0.0
  for batch in run.eval_batches():
    if is_cancelled():
      return None
    more, tokens = eval_sums(params, batch)
    total, count = total + float(more), count + float(tokens)
  return {'loss': total / count, 'perplexity': math.exp(min(total / count, 700.0))} if count else {}


def evaluation(run: Run) -> Callable[[dict, Callable[[], bool]], dict[str, float] | None]:
  """Returns `evaluate_loss` of a run, as experiment/fit.Parts takes it."""
  return functools.partial(evaluate_loss, make_eval_loss(run.forward), run)
