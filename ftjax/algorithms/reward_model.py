"""Reward models: the loss of labeled completions, and its evaluation.

The score of a completion is Forward.sequence_rewards."""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import ml_collections
import numpy as np

from ftjax.algorithms import pair_metrics
from ftjax.algorithms import preference as preference_loss
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.losses import reward_model as reward_losses
from ftjax.models.forward import Forward
from ftjax.training.step import LossFn


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns loss(params, batch, keys) -> (sum over pairs or completions, their number, metrics as
  sums).
  """
  centring, paired = c.reward_model.centring, c.reward_model.objective == 'pairs'

  def loss(params, batch, keys):
    weights = pair_metrics.present(batch)
    found = forward.with_dropout(keys).sequence_rewards(params, batch, 1 + paired)
    if paired:
      return reward_losses.bradley_terry(*found, weights, margin=batch['values'], centring=centring)
    return reward_losses.reward_regression(*found, batch['values'], weights)

  return loss


def make_measure(forward: Forward, c: ml_collections.ConfigDict) -> pair_metrics.Measure:
  """Returns the measure of the scores of each row."""
  forward, paired = forward.without_remat(), c.reward_model.objective == 'pairs'

  def measure(params, batch):
    found = forward.sequence_rewards(params, batch, 1 + paired)
    named = dict(zip(('first', 'second'), found, strict=False))
    return named | {'values': batch['values'], 'weights': pair_metrics.present(batch)}

  return pair_metrics.jit_measure(measure)


def evaluate(
  measure: pair_metrics.Measure,
  run: Run,
  params: dict,
  is_cancelled: Callable[[], bool],
) -> dict[str, float] | None:
  """Returns, for pairs, loss, accuracy with interval, margin and calibration error; for scored
  completions the squared error, and the share of the scores' variance that it leaves unexplained.
  """
  found = pair_metrics.collect(measure, run, params, is_cancelled)
  if not found:
    return found
  rows = {k: jnp.asarray(v) for k, v in found.items()}
  if run.config.reward_model.objective == 'scores':
    total, weight, _ = reward_losses.reward_regression(
      rows['first'], rows['values'], rows['weights']
    )
    variance = float(np.var(found['values'].astype(np.float64)))
    mse = float(total / weight)
    return {'loss': mse, 'unexplained': mse / variance if variance else math.nan}
  total, weight, _ = reward_losses.bradley_terry(
    rows['first'],
    rows['second'],
    rows['weights'],
    margin=rows['values'],
    centring=run.config.reward_model.centring,
  )
  margins = found['first'].astype(np.float64) - found['second']
  out = {'loss': float(total / weight), 'ece': reward_losses.calibration_error(margins)}
  return out | pair_metrics.accuracy(margins)


def build(run: Run) -> fit.Parts:
  """Returns loss, evaluation and alarm of a run."""
  c = run.config
  measured = functools.partial(evaluate, make_measure(run.forward, c), run)
  watch = preference_loss.Alarm(c) if c.reward_model.objective == 'pairs' else fit.ignore
  return fit.Parts(make_loss(run.forward, c), measured, watch=watch)
