"""Where the batches of a run come from: rows of files, or completions of the model in training
(rl/rollout_source.py).
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from ftjax.experiment.run import Run
from ftjax.training.prefetch import Prefetch
from ftjax.training.state import State

WriteMetrics = Callable[[int, dict[str, float]], None]  # (step, metrics)


class Source(Protocol):
  """The source of a run's batches. The methods do nothing where a source does not define them."""

  def prepare(self) -> None:
    """Computes what the source needs before weights and optimizer state are on the devices. Called
    only where there is something to train.
    """

  def cut(self, step: int, drop_eval: bool) -> None:
    """See experiment/resume.StepWriter."""

  def begin(self, write: WriteMetrics, start: int, saved: dict[str, Any]) -> None:
    """Called before the first batch.

    Args:
      write: (step, values) writes a row of the split 'rollout'.
      start: steps done.
      saved: what `saving` returned for the checkpoint that the run resumes from, or nothing.
    """

  def take(self, state: State, step: int) -> dict[str, jax.Array]:
    """Returns the device batch [A, M, ...] of a step; steps are taken in order."""
    raise NotImplementedError

  def saving(self, step: int) -> dict[str, Any]:
    """Called when a checkpoint of `step` steps begins: what a resume from it needs must stay.
    Returns the JSON of it that belongs into the checkpoint.
    """
    return {}

  def close(self) -> None:
    """Frees everything that the source holds. Called after the last batch, and may be called
    twice.
    """


class Rows(Source):
  """Batches that are read from files, ahead of the step."""

  def __init__(self, run: Run):
    self._run, self._prefetch = run, None

  def begin(self, write: WriteMetrics, start: int, saved: dict[str, Any]) -> None:
    """See Source."""
    run = self._run
    self._prefetch = Prefetch(run.data.stream, run.abstract_batch(), start, run.steps)

  def take(self, state: State, step: int) -> dict[str, jax.Array]:
    """See Source."""
    return self._prefetch.take(step)

  def close(self) -> None:
    """See Source."""
    if self._prefetch:
      self._prefetch.close()
      self._prefetch = None
