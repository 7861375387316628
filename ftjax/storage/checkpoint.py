"""Checkpoints of a run: sharded state and a small JSON, saved asynchronously by Orbax.

Kept are the latest n together with the best one. The newest step that Orbax finalized and that can
be read is the one that counts, whatever a crash left beside it; it is found by listing the
directory, never from memory. Before a step counts and older ones go, its files are on the disk."""

import dataclasses
import functools
import json
import logging
import math
import os
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ftjax.cluster import processes
from ftjax.runtime.errors import DataError, attempt, caught
from ftjax.storage import files, snapshots

log = logging.getLogger(__name__)

_FOR_EVER = 30 * 24 * 3600  # seconds; Orbax wants a number


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

  def __init__(self, directory: str, retention: Retention, limit: float = 0.0):
    """Opens or creates `directory`. Finalized steps in it stay; saves that a crash tore go.

    Args:
      directory: local, or gs://.
      retention: what stays.
      limit: seconds that a save may take in the background; 0: no limit.
    """
    self._directory, self._is_remote = directory, files.is_remote(directory)
    self._metric, self._has_failed = retention.metric, False
    self._begun: int | None = None  # the step of the newest save
    processes.from_main(lambda: _remove_torn(directory))
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
        async_options=ocp.AsyncOptions(
          timeout_secs=math.ceil(limit) or _FOR_EVER,
          # Called in one process, when all have written and before the step gets its name.
          post_finalization_callback=None if self._is_remote else self._sync_begun,
        ),
        # In a bucket it would take every folder without a mark for torn, the user's among them.
        cleanup_tmp_directories=False,
      ),
    )

  def _value(self, metrics: dict[str, float]) -> float:
    return metrics[self._metric]

  def steps(self) -> list[int]:
    """Finalized steps in the directory, ascending."""
    self._manager.reload()
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    """The newest finalized step. Those that cannot be read (a machine lost its power) are put aside
    where an older one can. By process 0 alone.

    Raises:
      DataError: there are steps, and none can be read.
    """
    steps, torn = self.steps(), {}
    while steps and (reason := self._torn(steps[-1])):
      torn[steps.pop()] = reason
    if torn and not steps:
      newest = max(torn)
      raise DataError(
        f'{self._directory}/{newest} cannot be read ({torn[newest]}), and there is no other '
        'checkpoint; give another --workdir, or delete that folder to begin anew'
      )
    for step, reason in torn.items():
      aside = f'torn.{step}.{os.getpid()}'
      os.rename(files.join(self._directory, str(step)), files.join(self._directory, aside))
      log.error(
        '%s/%d cannot be read (%s): renamed to %s; going on from step %d',
        *(self._directory, step, reason, aside, steps[-1]),
      )
    return steps[-1] if steps else None

  def _torn(self, step: int) -> str:
    """Returns why a step cannot be read, '' if it can. An object in a bucket is never partial."""
    for name in () if self._is_remote else snapshots.INDEXES:
      try:
        json.loads(files.read_text(files.join(self._directory, str(step), name)))
      except (FileNotFoundError, ValueError) as error:  # another error is not about the file
        return f'{name}: {error}'
    return ''

  def best(self) -> int | None:
    """The finalized step with the best metric, or None."""
    return self._manager.best_step() if self._metric else None

  def save(self, step: int, state: Any, meta: dict[str, Any], metric: float | None) -> None:
    """Begins saving; returns once the arrays are copied, so that they may be donated.

    A save whose background part failed is reported here or in `wait`, and does not count: the next
    save happens all the same. Two failures in a row are raised: a run that cannot save must not go
    on."""
    error = self._error_of_last()
    if error and self._has_failed:
      raise error
    self._has_failed = bool(error)
    if error:
      log.error('an earlier checkpoint was not committed: %s; saving step %d instead', error, step)
    if step in self.steps():
      return
    self._begun = step
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
    """Returns the state saved at `step`, with the shardings of `abstract_state`
    (ShapeDtypeStructs, of any mesh).

    Raises:
      DataError: the step is not there or damaged, or its tree or shapes are others.
    """
    if step not in (have := self.steps()):
      raise DataError(
        f'{self._manager.directory}: step {step} is not a finalized checkpoint; there are {have}'
      )
    try:
      args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
      return self._manager.restore(step, args=args)['state']
    except Exception as error:
      place = f'{self._manager.directory}/{step}'
      if reason := snapshots.damage(error):
        older = [s for s in have if s < step]
        then = f'go on from step {older[-1]}' if older else 'begin anew'
        raise DataError(
          f'{place} is damaged ({reason}). Remove that folder to {then}, or give another --workdir'
        ) from error
      if not isinstance(error, (ValueError, KeyError, TypeError)):
        raise
      raise DataError(
        f'{place}: the saved state is not of this config (model, optim.name, optim.freeze, '
        f'optim.ema_decay, optim.plateau_factor?): {str(error)[:500]}'
      ) from error

  def meta(self, step: int) -> dict[str, Any]:
    """Returns the JSON that was saved with the state."""
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']

  def wait(self) -> None:
    """Blocks until everything begun is finalized and on the disk; raises what a background save
    raised.
    """
    if error := self._error_of_last():
      raise error
    if self._begun is not None and processes.is_main():
      files.sync_tree(files.join(self._directory, str(self._begun)))

  def _error_of_last(self) -> Exception | None:
    """Why the last save did not come to its end, of a disk or of any of a bucket's clients. It is
    none where the step is there, and what failed was to remove older ones.
    """
    error = caught(self._manager.wait_until_finished) or caught(self._manager.check_for_errors)
    if error and (self._begun is None or self._begun in self.steps()):
      log.warning('%s: tidying up failed: %s', self._directory, error)
      return None
    return error

  def _sync_begun(self) -> None:
    """The files of the step that is about to get its name."""
    for name in os.listdir(self._directory):
      if name.startswith(f'{self._begun}.'):
        files.sync_tree(files.join(self._directory, name))

  def close(self) -> None:
    self._manager.close()


def _remove_torn(directory: str) -> None:
  """Removes the saves that a crash tore. What cannot be removed ends no run."""
  for name in files.listdir(directory) if files.exists(directory) else ():
    path = files.join(directory, name)
    if files.is_remote(path):
      torn = name.isdigit() and not files.exists(files.join(path, snapshots.COMMIT))
    else:
      torn = '.orbax-checkpoint-tmp' in name
    if torn:
      attempt(f'removing {path}, a torn save,', functools.partial(files.remove_tree, path))
