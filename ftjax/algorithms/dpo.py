"""Preference tuning, top to bottom: pairs -> log-probs of both answers -> loss -> step -> run.

The losses are the table in losses/preference.py: DPO and its kin on pairs, KTO on single labelled
answers. A loss that compares with a reference reads the model as it was at the start under
`reference/` of the parameters; its log-probs are computed in the step, by the same function. With
`dpo.reference='cache'` they are computed before, and come with the batches (reference_cache.py)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ftjax.algorithms import pair_metrics, reference_logps
from ftjax.algorithms import preference as preference_loss
from ftjax.config import algorithms
from ftjax.experiment import batch_source, fit
from ftjax.experiment import run as experiment
from ftjax.losses import masked, preference
from ftjax.models.forward import Forward

make_loss = preference_loss.make_loss


def make_measure(forward: Forward, c: ml_collections.ConfigDict) -> pair_metrics.Measure:
  """jitted (params, batch) -> per row what `preference_loss.measured` tells."""
  forward, row = forward.without_remat(), preference_loss.row(c)

  @jax.jit
  def measure(params, batch):
    m = preference_loss.measured(forward, params, batch, row.needs_reference)
    return pair_metrics.replicated(m)

  return measure


def evaluate(
  measure: pair_metrics.Measure,
  run: experiment.Run,
  params: dict,
  is_cancelled: Callable[[], bool],
) -> dict[str, float] | None:
  """Loss and rewards over all evaluation rows; of pairs the accuracy with its interval."""
  found = pair_metrics.collect(measure, run, params, is_cancelled)
  if not found:
    return found
  row, coefficients = preference_loss.row(run.config), preference_loss.settings(run.config)
  rows = {k: jnp.asarray(v) for k, v in found.items()}
  batch = preference_loss.table_batch(row, rows)
  total, weight, metrics = preference.loss(row, batch, rows['weights'], coefficients)
  out = {'loss': float(total / weight)}
  out |= {k: float(masked.divide(*v)) for k, v in metrics.items() if k != 'rewards/accuracy'}
  if row.paired:
    chosen, rejected = row.reward(batch, coefficients)
    out |= pair_metrics.accuracy(np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64))
  return out


def run(c: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs a config to its end: train, export, compare with the base."""
  r = experiment.start(c, workdir)
  eval_loss = functools.partial(evaluate, make_measure(r.forward, c), r)
  cached = algorithms.place(c, 'reference') == 'cache'
  source = reference_logps.RowsWithReference(r) if cached else batch_source.Rows(r)
  alarm = preference_loss.Alarm(c, cached)
  fit.fit(r, preference_loss.make_loss(r.forward, c), eval_loss, alarm, source)
