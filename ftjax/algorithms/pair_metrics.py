"""Rows of two segments and metrics over a set of them, for dpo.py and reward_model.py.

Segment 1 of a row is the prompt with the chosen completion, segment 2 with the rejected one
(data/batches.py)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.evaluation.statistics import intervals
from ftjax.experiment.run import Run

# (parameters, batch) -> {name: float32[B]}, with 'weights' 0 for padding rows.
Measure = Callable[[dict, dict], dict[str, jax.Array]]


def present(batch: dict) -> jax.Array:
  """Returns float32[B]: 1 for a row, 0 for padding."""
  return (batch['segments'] == 1).any(-1).astype(jnp.float32)


def jit_measure(rows: Measure) -> Measure:
  """Returns `rows` jitted, with its results on every device, where every process can read them."""

  @jax.jit
  def measure(params, batch):
    return {k: jax.sharding.reshard(v, jax.P()) for k, v in rows(params, batch).items()}

  return measure


def collect(
  measure: Measure, run: Run, params: dict, is_cancelled: Callable[[], bool]
) -> dict[str, np.ndarray] | None:
  """Returns the results of `measure` over all evaluation rows, float32[rows]; empty without rows,
  None when cancelled.
  """
  parts = []
  for batch in run.eval_batches():
    if is_cancelled():
      return None
    found = {k: np.asarray(v) for k, v in measure(params, batch).items()}
    parts.append({k: v[found['weights'] > 0] for k, v in found.items()})
  return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]} if parts else {}


def accuracy(margins: np.ndarray) -> dict[str, float]:
  """Returns the share of pairs with a margin above 0, with its 95 % interval (Wilson), and the mean
  margin.
  """
  right, n = int((margins > 0).sum()), len(margins)
  low, high = intervals.wilson(right, n)
  return {
    'accuracy': right / n,
    'accuracy_low': low,
    'accuracy_high': high,
    'margin': math.fsum(margins.tolist()) / n,
    'pairs': n,
  }
