"""Preference tuning: the loss of pairs or of single labeled completions, and its evaluation.

The losses are the table in losses/preference_table.py: DPO and its variants on pairs, KTO on single
completions. A loss that compares with a reference reads its parameters under `reference/` of the
state; its log-probs are computed in the step, by the same function. With `dpo.reference='cache'`
they are computed before the first step, and come with the batches (reference_logps.py)."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import ml_collections
import numpy as np

from ftjax.algorithms import pair_metrics, reference_logps
from ftjax.algorithms import preference as preference_loss
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.losses import masked, preference
from ftjax.models.forward import Forward

make_loss = preference_loss.make_loss


def make_measure(forward: Forward, c: ml_collections.ConfigDict) -> pair_metrics.Measure:
  """Returns the measure of `preference_loss.measured` of each row."""
  forward, row = forward.without_remat(), preference_loss.row(c)
  return pair_metrics.jit_measure(
    lambda params, batch: preference_loss.measured(forward, params, batch, row.needs_reference)
  )


def evaluate(
  measure: pair_metrics.Measure,
  run: Run,
  params: dict,
  is_cancelled: Callable[[], bool],
) -> dict[str, float] | None:
  """Returns loss and rewards over all evaluation rows; for pairs also the accuracy."""
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


def build(run: Run) -> fit.Parts:
  """Returns loss, evaluation, alarm and, with a cached reference, the source of a run."""
  c = run.config
  measured = functools.partial(evaluate, make_measure(run.forward, c), run)
  reference = run.auxiliary.find('reference')
  is_cached = reference is not None and reference.is_cached
  source = reference_logps.RowsWithReference(run) if is_cached else None
  return fit.Parts(make_loss(run.forward, c), measured, source, preference_loss.Alarm(c, is_cached))
