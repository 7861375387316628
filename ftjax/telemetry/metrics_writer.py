"""Writes the metrics of a run to `<workdir>/metrics.jsonl`, TensorBoard and optional trackers.

The training loop writes through `MetricsWriter`; throughput.py computes speed and utilization, and
redaction.py removes secrets from the config that trackers get.
"""

import importlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ftjax.runtime.errors import ConfigError, caught
from ftjax.runtime.redaction import redact
from ftjax.runtime.trees import flatten
from ftjax.storage import files

_NON_FINITE = {math.inf: 'Infinity', -math.inf: '-Infinity'}


def to_json_value(value: Any) -> bool | int | float | str:
  """Converts a scalar (Python, numpy or jax) to a JSON value.

  Floats keep every bit: a float32 is widened to the float64 of the same value, whose shortest repr
  reads back exactly. JSON has no non-finite numbers, so they become the strings 'NaN', 'Infinity',
  '-Infinity', which `float(...)` in Python and `Number(...)` in JavaScript read back.

  Raises:
    ValueError: an array that is not a scalar.
  """
  if isinstance(value, str):
    return value
  array = np.asarray(value)
  if array.ndim:
    raise ValueError(f'a metric is one number, got an array of shape {array.shape}')
  if array.dtype.kind == 'b':
    return bool(array)
  if array.dtype.kind in 'iu':
    return int(array)
  number = float(array)
  if math.isnan(number):
    return 'NaN'
  return _NON_FINITE.get(number, number)


def cut_lines(text: str, step: int, drop_eval: bool = False) -> tuple[str, int]:
  """Drops the rows of a metrics.jsonl after `step`; with `drop_eval` also the evaluation of exactly
  that step, which will be repeated.

  A partial last line, written by a process that died, is dropped too, like every invalid line.

  Returns:
    (the text to keep, the number of invalid lines).
  """
  kept, torn = [], 0
  for line in text.split('\n'):  # not splitlines: a string may hold other line ends
    if not line:
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      torn += 1
      continue
    if not isinstance(row, dict) or not isinstance(row.get('step'), int):
      torn += 1
    elif row['step'] < step or (
      row['step'] == step and not (drop_eval and row.get('split') == 'eval')
    ):
      kept.append(line + '\n')
  return ''.join(kept), torn


class Tracker(Protocol):
  """An experiment tracker: one object per run."""

  def log(self, step: int, values: Mapping[str, float]) -> None: ...

  def close(self) -> None: ...


class _Wandb:
  def __init__(self, workdir: str, run_id: str, config: Mapping[str, Any]):
    wandb = _import('wandb')
    settings = wandb.Settings(
      save_code=False, x_save_requirements=False, x_disable_meta=True, console='off'
    )
    self._run = wandb.init(
      project='ftjax',
      name=os.path.basename(workdir),
      dir=None if files.is_remote(workdir) else workdir,
      id=run_id,
      resume='allow',
      config=config,
      settings=settings,
    )
    # A resumed run logs some steps twice; with an axis of its own W&B takes the later rows instead
    # of rejecting them.
    self._run.define_metric('*', step_metric='step')

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log({'step': step, **values})

  def close(self) -> None:
    self._run.finish()


class _Mlflow:
  def __init__(self, workdir: str, run_id: str, config: Mapping[str, Any]):
    mlflow = _import('mlflow')
    self._client = mlflow.MlflowClient()
    name = 'ftjax'
    found = self._client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else self._client.create_experiment(name)
    runs = self._client.search_runs([experiment], filter_string=f"tags.ftjax_id = '{run_id}'")
    if runs:
      self._id = runs[0].info.run_id
    else:
      run = self._client.create_run(
        experiment, run_name=os.path.basename(workdir), tags={'ftjax_id': run_id}
      )
      self._id = run.info.run_id
      for key, value in flatten(config).items():
        self._client.log_param(self._id, key, str(value)[:500])

  def log(self, step: int, values: Mapping[str, float]) -> None:
    for key, value in values.items():
      self._client.log_metric(self._id, key, value, step=step)

  def close(self) -> None:
    self._client.set_terminated(self._id)


_SINKS: dict[str, Callable[[str, str, Mapping[str, Any]], Tracker]] = {
  'wandb': _Wandb,
  'mlflow': _Mlflow,
}


def _import(name: str):
  try:
    return importlib.import_module(name)
  except ImportError as e:
    raise ConfigError(
      f'log.sinks: got {name!r}, which is not installed ({e}); '
      f"pip install '.[{name}]' in the checkout of ftjax, or take it out of log.sinks"
    ) from e


class MetricsWriter:
  """Writes the metrics of one run: `cut` once, then `open`, then `write`.

  Args:
    workdir: the run's folder; `metrics.jsonl` and `tensorboard/` are created in it.
    config: the resolved config, for the trackers; `redact` is applied to it.
    sinks: names of trackers: 'wandb', 'mlflow'.
    is_main: False for the other processes of a multi-host run, whose writer writes nothing.
    check: called in every process with (step, split, row) after the row was written; it may raise.

  Raises:
    ConfigError: a sink that is unknown or not installed.
  """

  def __init__(
    self,
    workdir: str,
    *,
    config: Mapping[str, Any],
    sinks: Sequence[str] = (),
    is_main: bool = True,
    check: Callable[[int, str, Mapping[str, Any]], None] | None = None,
  ):
    if unknown := set(sinks) - set(_SINKS):
      raise ConfigError(f'log.sinks: got {sorted(unknown)}, expected some of {sorted(_SINKS)}')
    self._is_main, self._config, self._sinks = is_main, config, tuple(sinks)
    self._check = check
    self._trackers: list[Tracker] = []
    self._is_tracker_failing = False
    self._workdir = os.fspath(workdir)
    self._path = files.join(self._workdir, 'metrics.jsonl')
    self._step = -1  # only later steps are written

  def open(self) -> None:
    """Opens the files and trackers."""
    if not self._is_main:
      return
    files.makedirs(self._workdir)
    self._log = files.LineLog(self._path)
    from tensorboardX import SummaryWriter  # imported late: 0.3 s, and protobuf

    # TensorBoard hides events of older files from purge_step on.
    # The suffix: file names have whole seconds, and a second writer within one would empty the
    # file.
    self._events = files.Staged(files.join(self._workdir, 'tensorboard'))
    self._board = SummaryWriter(
      self._events.folder,
      purge_step=self._step + 1,
      filename_suffix=f'.{time.time_ns()}',
    )
    if self._sinks:
      run_id = _run_id(self._workdir, is_fresh=self._step < 0)
      clean = redact(self._config)
      self._trackers = [_SINKS[name](self._workdir, run_id, clean) for name in self._sinks]

  def cut(self, step: int, drop_eval: bool = False) -> None:
    """Drops the rows of metrics.jsonl after `step` and invalid lines, atomically; `open` does the
    same to TensorBoard's events.

    Args:
      step: steps done; -1 at a fresh start.
      drop_eval: whether the evaluation of exactly that step is dropped too.
    """
    self._step = step
    if not self._is_main or not files.exists(self._path):
      return
    text = files.read_bytes(self._path).decode('utf-8', errors='replace')
    kept, torn = cut_lines(text, step, drop_eval)
    if torn > 1:  # a crash leaves at most one; more is other damage
      logging.warning('%s: dropped %d invalid lines', self._path, torn)
    if kept != text:
      files.write_text(self._path, kept)

  def sync(self) -> None:
    """Makes everything written so far survive a crash of the machine."""
    if self._is_main:
      self._log.sync()
      self._push()

  def _push(self) -> None:
    if not self._events.is_remote:
      return
    self._board.flush()
    try:  # events are a second copy of the rows: a failed upload does not end the run
      self._events.push()
    except OSError as error:
      logging.warning('TensorBoard events were not uploaded: %s', error)

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Appends the row `{"step": .., "split": .., **values}` and flushes it.

    Finite numbers also go to TensorBoard and the trackers, named `split/name`.

    Args:
      step: optimizer steps done.
      split: 'train', 'eval', or another group of metrics.
      values: scalars by name; strings are only written to the file.
    """
    if clash := {'step', 'split'} & values.keys():
      raise ValueError(f'metrics may not be named {sorted(clash)}')
    row = {name: to_json_value(value) for name, value in values.items()}
    if self._is_main:
      self._append(step, split, row)
    if self._check:
      self._check(step, split, row)

  def _append(self, step: int, split: str, row: dict[str, Any]) -> None:
    self._log.write(
      json.dumps({'step': step, 'split': split, **row}, allow_nan=False, ensure_ascii=False)
    )
    finite = {
      f'{split}/{name}': float(value) for name, value in row.items() if not isinstance(value, str)
    }
    for name, value in finite.items():
      self._board.add_scalar(name, value, step)
    if self._events.is_due():
      self._push()
    for tracker in self._trackers:
      self._track(tracker, lambda t: t.log(step, finite))

  def _track(self, tracker: Tracker, call: Callable[[Tracker], None]) -> None:
    """Calls a tracker and logs its error: it has a copy of the rows, so a failure ends no run."""
    error = caught(lambda: call(tracker))
    if error and not self._is_tracker_failing:
      logging.warning('%s: %s: %s', type(tracker).__name__[1:], type(error).__name__, error)
    self._is_tracker_failing = bool(error)

  def close(self) -> None:
    """Flushes everything and ends the trackers' runs."""
    if not self._is_main:
      return
    self._log.close()
    self._push()
    self._board.close()
    self._events.close()
    for tracker in self._trackers:
      self._track(tracker, lambda t: t.close())
    self._trackers = []


def _run_id(workdir: str, *, is_fresh: bool) -> str:
  """Returns the trackers' id of this run: random at a fresh start, saved in the workdir."""
  path = files.join(workdir, 'tracker_id')
  if is_fresh or not files.exists(path):
    files.write_text(path, uuid.uuid4().hex[:12])
  return files.read_text(path)
