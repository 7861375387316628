"""What models give for the rows of a rollout: log-probs of policy and reference, values, scores."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from ftjax.config import algorithms
from ftjax.data.batches import ARRAYS
from ftjax.experiment.run import Run
from ftjax.runtime.sharding import spec, zigzag
from ftjax.training.prefetch import place

# (parameters, batch of arrays [B, T]) -> float32[B, T] or float32[B].
Measure = Callable[[dict, dict], jax.Array]


class Measurements:
  """Runs measures over the rows of a rollout, on the mesh of training.

  Args:
    run: the run.
    measures: by name.
  """

  def __init__(self, run: Run, measures: Mapping[str, Measure]):
    c = run.config
    self._micro_batch = algorithms.rows_per_step(c) // c.grad_accum
    shardings = run.batch_shardings(micro=False)
    self._shardings = {k: shardings[k] for k in ARRAYS}
    self._order = zigzag(c.seq_len, run.mesh.shape['context'])
    self._measures = {name: jax.jit(_replicated(f)) for name, f in measures.items()}

  def __call__(
    self,
    arrays: Mapping[str, np.ndarray],
    wanted: Mapping[str, tuple[str, dict]],
    size: int = 0,
  ) -> dict[str, np.ndarray]:
    """Returns {name: float32[R, T] or float32[R]}.

    Every array of ARRAYS moves to the devices once, and every result back once.

    Args:
      arrays: ARRAYS of R rows.
      wanted: {name of the result: (name of a measure, its parameters)}.
      size: rows at a time; 0: a micro-batch, as an update reads them.
    """
    rows, size = len(arrays['tokens']), size or self._micro_batch
    filled = {k: np.pad(arrays[k], ((0, -rows % size), (0, 0))) for k in ARRAYS}
    parts = []
    for at in range(0, rows, size):
      batch = place({k: v[at : at + size] for k, v in filled.items()}, self._shardings)
      found = {k: self._measures[name](params, batch) for k, (name, params) in wanted.items()}
      parts.append(jax.device_get(found))
    return {k: self._natural(np.concatenate([p[k] for p in parts])[:rows]) for k in wanted}

  def _natural(self, values: np.ndarray) -> np.ndarray:
    """Returns tokens in their natural order, which `context` changes on the devices."""
    if values.ndim == 1:
      return values
    out = np.empty_like(values)
    out[:, self._order] = values
    return out


def _replicated(measure: Measure) -> Measure:
  """Returns the measure with its result on every device, so that every process can read it."""

  def replicated(params, batch):
    out = measure(params, batch)
    return jax.sharding.reshard(out, spec(*[None] * out.ndim))

  return replicated
