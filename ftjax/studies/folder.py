"""The workdir of a study: its files, and the record of each run.

configs/NAME.json is the config of a run, runs/NAME its workdir, logs/NAME.log what it printed,
records/NAME.json what became of it. A run whose record has a result is never started again.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from ftjax.config.search_space import Point
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files

CONFIG = 'study_config.json'
# Keys that may change between two starts of a study: they change no result.
_FREE = ('study.launch', 'study.parallel', 'data.workers', 'log.', 'watchdog.')


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The end of one part of a run.

  Attributes:
    stop_at: step after which it ended; 0: the whole run.
    exit_code: of its last start.
    value: of study.metric; None where the run failed.
    reason: '' or why it failed.
    seconds: of all its starts. starts: how many there were.
  """

  stop_at: int
  exit_code: int
  value: float | None
  reason: str
  seconds: float
  starts: int


@dataclasses.dataclass(frozen=True)
class Record:
  """A run of a study: its name, the keys that it changes, and the ends of its parts in order."""

  name: str
  values: Point
  outcomes: tuple[Outcome, ...] = ()

  @property
  def last(self) -> Outcome | None:
    return self.outcomes[-1] if self.outcomes else None

  @property
  def has_failed(self) -> bool:
    return self.last is not None and self.last.value is None

  def at(self, stop_at: int) -> Outcome | None:
    """Returns the end of the part that ends at a step (0: the last one), None before it."""
    return next((o for o in self.outcomes if o.stop_at == stop_at), None)

  def value_at(self, stop_at: int) -> float | None:
    """Returns the metric after a part; None where it failed or has not ended."""
    found = self.at(stop_at)
    return found.value if found else None


class Folder:
  """The files of a study's workdir, local or gs://."""

  def __init__(self, path: str):
    self.path = files.absolute(path)

  def join(self, *parts: str) -> str:
    return files.join(self.path, *parts)

  def run(self, name: str) -> str:
    """Returns the workdir of a run."""
    return self.join('runs', name)

  def config(self, name: str) -> str:
    return self.join('configs', f'{name}.json')

  def log(self, name: str) -> str:
    return self.join('logs', f'{name}.log')

  def make(self) -> None:
    for name in ('configs', 'runs', 'logs', 'records'):
      files.makedirs(self.join(name))

  def claim(self, config: Mapping[str, Any]) -> None:
    """Writes study_config.json, or compares it with that of an earlier start.

    Raises:
      ConfigError: the folder has another study.
    """
    path = self.join(CONFIG)
    if not files.exists(path):
      write_json(path, config)
      return
    before = read_json(path)
    changed = [
      f'{k}: {before.get(k)!r} -> {v!r}'
      for k, v in config.items()
      if before.get(k, v) != v and not k.startswith(_FREE)
    ]
    if changed:
      raise ConfigError(
        f'--workdir={self.path} holds a study with another config: {"; ".join(changed)}. Undo '
        'that, or give another --workdir'
      )

  def known(self, name: str) -> Record | None:
    """Returns the record of a run; None where there is none yet.

    Raises:
      DataError: it is damaged.
    """
    path = self._record(name)
    if not files.exists(path):
      return None
    found = read_json(path)
    try:
      return Record(found['name'], found['values'], tuple(Outcome(**o) for o in found['outcomes']))
    except (KeyError, TypeError) as error:
      raise DataError(f'{path}: no record of a run ({error}); delete it to run it again') from error

  def record(self, name: str, values: Point) -> Record:
    """Returns the record of a run with these values; an empty one where there is none.

    Raises:
      DataError: it is damaged, or of a run with other values.
    """
    found = self.known(name)
    if found is None:
      return Record(name, dict(values))
    if found.values != json.loads(json.dumps(dict(values))):
      raise DataError(
        f'{self._record(name)} has the values {found.values}, expected {dict(values)}: data or '
        'code have changed since it was written; give another --workdir'
      )
    return found

  def _record(self, name: str) -> str:
    return self.join('records', f'{name}.json')

  def save(self, record: Record) -> None:
    write_json(self._record(record.name), dataclasses.asdict(record))


def read_json(path: str) -> dict[str, Any]:
  """Returns a JSON object of a file. Raises DataError where it holds something else."""
  try:
    found = json.loads(files.read_text(path))
  except ValueError as error:
    raise DataError(f'{path}: no JSON ({error}); delete it, or give another --workdir') from error
  if not isinstance(found, dict):
    raise DataError(f'{path}: expected a JSON object, got {type(found).__name__}')
  return found


def write_json(path: str, content: Any) -> None:
  """Writes a JSON file; numbers that are not finite become null."""
  text = json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False)
  files.write_text(path, text + '\n')


def _finite(value: Any) -> Any:
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if isinstance(value, Mapping):
    return {str(k): _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  return value
