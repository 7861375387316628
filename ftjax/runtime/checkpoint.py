"""Checkpoints of a run: sharded state and a small JSON, saved asynchronously by Orbax.

Kept are the latest n together with the best one. The newest step that Orbax finalized is the one
that counts, whatever a crash left beside it; it is found by listing the directory, never from
memory."""

import dataclasses
import logging
import math
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ftjax.runtime.errors import DataError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Retention:
  """Which checkpoints stay: the latest `keep`, and the best one by `metric` ('' for none) in
  direction `mode` ('min' or 'max').
  """

  keep: int
  metric: str
  mode: str


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, directory: str, retention: Retention):
    """Opens or creates `directory`. Finalized steps in it stay; saves that a crash tore go."""
    self._metric, self._has_failed = retention.metric, False
    keep: Any = checkpoint_managers.LatestN(n=retention.keep)
    value = None
    if retention.metric:
      value = self._value
      best = checkpoint_managers.BestN(
        get_metric_fn=value,
        reverse=retention.mode == 'min',
        n=1,
        keep_checkpoints_without_metrics=False,
      )
      keep = checkpoint_managers.AnyPreservationPolicy([keep, best])
    # The policy chooses what is kept; without best_fn Orbax would write no metrics for it, and know
    # no best step.
    self._manager = ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        best_fn=value,
        best_mode=retention.mode,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
      ),
    )

  def _value(self, metrics: dict[str, float]) -> float:
    return metrics[self._metric]

  def steps(self) -> list[int]:
    """Finalized steps in the directory, ascending."""
    self._manager.reload()
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    """The newest finalized step."""
    return max(self.steps(), default=None)

  def best(self) -> int | None:
    """The finalized step with the best metric, or None."""
    return self._manager.best_step() if self._metric else None

  def save(self, step: int, state: Any, meta: dict[str, Any], metric: float | None) -> None:
    """Begins saving; returns once the arrays are copied, so that they may be donated.

    A save whose background part failed is reported here or in `wait`, and does not count: the next
    save happens all the same. Two failures in a row are raised: a run that cannot save must not go
    on."""
    try:
      self._manager.wait_until_finished()
      self._has_failed = False
    except (OSError, ValueError, RuntimeError) as error:
      if self._has_failed:
        raise
      self._has_failed = True
      log.error('an earlier checkpoint was not committed: %s; saving step %d instead', error, step)
    if step in self.steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
      # NaN has no place in an order: a step with it is nobody's best.
      metrics={self._metric: float(metric)}
      if metric is not None and math.isfinite(metric)
      else None,
      force=True,
    )

  def restore(self, step: int, abstract_state: Any) -> Any:
    """The state saved at `step`, laid out like `abstract_state` (ShapeDtypeStructs with shardings,
    of any mesh).

    Raises:
      DataError: the step is not there, or its tree or shapes are others.
    """
    if step not in (have := self.steps()):
      raise DataError(
        f'{self._manager.directory}: step {step} is not a finalized checkpoint; there are {have}'
      )
    try:
      args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
      return self._manager.restore(step, args=args)['state']
    except (ValueError, KeyError, TypeError) as error:
      raise DataError(
        f'{self._manager.directory}/{step}: the saved state is not of this config (model, '
        f'optim.name, optim.freeze, optim.ema_decay?): {str(error)[:500]}'
      ) from error

  def meta(self, step: int) -> dict[str, Any]:
    """The JSON saved beside the state."""
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']

  def wait(self) -> None:
    """Blocks until everything begun is finalized; raises what a background save raised."""
    self._manager.wait_until_finished()
    self._manager.check_for_errors()

  def close(self) -> None:
    self._manager.close()
