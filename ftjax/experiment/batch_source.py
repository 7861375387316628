"""Where the batches of a run come from: rows of files, or completions of the model in training
(rl/rollout_source.py).
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from ftjax.experiment.run import Run
from ftjax.experiment.trainer import Trainer
from ftjax.training.prefetch import Prefetch
from ftjax.training.state import State

Tell = Callable[[int, dict[str, float]], None]  # (step, metrics)


class Source(Protocol):
  """Where the batches of a run come from: rows of files, or what the model in training says
  (episodes.py)."""

  def prepare(self, trainer: Trainer) -> None:
    """Before weights and optimizer state are on the devices, of a run that will train. Usually
    nothing.
    """

  def begin(self, trainer: Trainer, write: Tell, start: int, saved: dict[str, Any]) -> None:
    """Before the first batch.

    Args:
      trainer: of the run.
      write: (step, values) makes a row of the split 'rollout'.
      start: steps done.
      saved: what `saving` returned for the checkpoint that the run goes on from, or nothing.
    """

  def take(self, state: State, step: int) -> dict[str, jax.Array]:
    """The device batch [A, M, ...] of a step, in order."""

  def saving(self, step: int) -> dict[str, Any]:
    """A checkpoint of `step` steps done is begun: what going on from it needs must stay; returns
    the JSON of it that is to stand in the checkpoint.
    """

  def end(self) -> None:
    """No batch is wanted any more."""


class Rows(Source):
  """The source of batches that are read from files, ahead of the step."""

  def __init__(self, run: Run):
    self._run, self._feed = run, None

  def begin(self, trainer: Trainer, write: Tell, start: int, saved: dict[str, Any]) -> None:
    run = self._run
    self._feed = Prefetch(run.data.stream, run.abstract_batch(), start, run.steps)

  def take(self, state: State, step: int) -> dict[str, jax.Array]:
    return self._feed.take(step)

  def saving(self, step: int) -> dict[str, Any]:
    return {}

  def end(self) -> None:
    if self._feed:
      self._feed.close()
