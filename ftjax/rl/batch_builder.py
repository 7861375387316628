"""What an algorithm makes of a rollout: rows to train on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ftjax.rl.rollout_batch import RolloutBatch


class TrainBatch(NamedTuple):
  """What the updates on a rollout train on.

  arrays: algorithms.rows_per_rollout rows, with every array of a batch. metrics: by name. kept:
  JSON rows for rollouts/kept-<number>.jsonl.
  """

  arrays: dict[str, np.ndarray]
  metrics: dict[str, float]
  kept: Sequence[dict[str, Any]] = ()


class BatchBuilder:
  """Turns rollouts into rows to train on. What it remembers between them is saved with the run."""

  def build(self, sampled: RolloutBatch) -> TrainBatch:
    """Returns the rows of one rollout; called once for each, in order."""
    raise NotImplementedError

  def saved(self) -> dict[str, Any]:
    """Returns what it remembers, as JSON."""
    return {}

  def restore(self, saved: Mapping[str, Any]) -> None:
    """Takes back what `saved` returned."""
