"""Reads the rows of a run's metrics.jsonl that a replay is compared with, and compares rows."""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from ftjax.runtime.errors import CheckError, ConfigError
from ftjax.storage import files

Key = tuple[str, int]  # (split, step)
Row = dict[str, Any]

# Of a training step, in the order of cause and effect. The first three are whole numbers, which no
# device changes.
_COUNTS = ('batch_checksum', 'tokens', 'supervised_tokens')
_TRAIN = (*_COUNTS, 'loss', 'grad_norm')
# Of an evaluation row, what depends on the clock, or on when the run was resumed.
_NOT_COMPARED = ('step', 'split', 'gap', 'in_loop_s', 'in_loop_share')
TOLERANCE = 1e-6  # relative, of losses, where the environment is another


@dataclasses.dataclass(frozen=True)
class Mismatch:
  """A value that differs; a missing one is None."""

  split: str
  step: int
  name: str
  run: Any
  here: Any

  def relative(self) -> float:
    """Returns |run - here| / the larger of both; infinite where one is no finite number."""
    return relative_difference(self.run, self.here)


def relative_difference(a: Any, b: Any) -> float:
  """Returns |a - b| / max(|a|, |b|); 0 for equal values, NaN too; infinite for no finite number.

  Non-finite numbers are texts, as `metrics_writer.to_json_value` writes them.
  """
  if a == b:
    return 0.0
  if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in (a, b)):
    return math.inf
  return abs(a - b) / max(abs(a), abs(b))


def compare(key: Key, run: Row, here: Row, is_bitwise: bool) -> Mismatch | None:
  """Returns the first value of two rows that differs; None where they are equal.

  Bitwise, every value is compared; else whole numbers exactly, and losses within TOLERANCE.

  Args:
    key: of both rows.
    run, here: the row of the run and that of its replay.
    is_bitwise: whether equal bits are expected.
  """
  split, step = key
  if split == 'train':
    names = _TRAIN
  else:  # figures of tasks are left out of a replay
    names = tuple(n for n in run if n in here and n not in _NOT_COMPARED)
  for name in names:
    a, b = run.get(name), here.get(name)
    if is_bitwise or name in _COUNTS:
      is_same = a == b
    elif name == 'loss':
      is_same = relative_difference(a, b) <= TOLERANCE
    else:
      continue
    if not is_same:
      return Mismatch(split, step, name, a, b)
  return None


def read(path: str) -> tuple[dict[Key, Row], list[str]]:
  """Returns the rows of training and evaluation in a metrics.jsonl, and what is wrong with the
  file. A last line without its end is no fault: the run may have been killed in it.
  """
  rows: dict[Key, Row] = {}
  faults: list[str] = []
  lines = (
    files.read_bytes(path).decode('utf-8', 'replace').split('\n') if files.exists(path) else []
  )
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError):
      row = None
    step = row.get('step') if isinstance(row, dict) else None
    if not isinstance(step, int) or isinstance(step, bool):
      if number < len(lines):
        faults.append(f'line {number} is no row')
      continue
    key = str(row.get('split')), step
    if key[0] not in ('train', 'eval'):
      continue
    if key in rows:
      faults.append(f'line {number} is a second row of step {step}, {key[0]}')
    rows[key] = row
  return rows, faults


def read_run(folder: str, log_every: int, steps: int) -> dict[Key, Row]:
  """Returns the rows of a run that is replayed.

  Args:
    folder: its workdir.
    log_every: steps between its rows; 0 where it changed during the run.
    steps: of the whole run, which may have ended before.

  Raises:
    CheckError: rows are missing, twice there or unreadable: the file was edited.
    ConfigError: there is no row of a training step.
  """
  path = files.join(folder, 'metrics.jsonl')
  rows, faults = read(path)
  found = [step for split, step in rows if split == 'train']
  if not found:
    raise ConfigError(f'--replay={folder}: metrics.jsonl has no row of a training step')
  last = max(found)
  if log_every:
    expected = {s for s in range(1, last + 1) if s % log_every == 0}
    missing = sorted((expected | {last}) - set(found))
    extra = sorted(s for s in set(found) - expected if s != last)
    if missing:
      faults.append(f'rows of {steps_text(missing)} are missing (log.every={log_every})')
    if extra:
      faults.append(f'rows of {steps_text(extra)} do not belong there (log.every={log_every})')
  if last > steps:
    faults.append(f'it has a row of step {last}, and the run has {steps}')
  if faults:
    more = f' and {len(faults) - 5} more' if len(faults) > 5 else ''
    raise CheckError(f'{path} was edited or is damaged: {"; ".join(faults[:5])}{more}')
  return rows


def steps_text(steps: Collection[int]) -> str:
  """Returns 'step 3', or 'steps 3, 4, ...' with at most eight."""
  shown = ', '.join(map(str, sorted(steps)[:8])) + (', ...' if len(steps) > 8 else '')
  return f'step{"s" if len(steps) > 1 else ""} {shown}'


def last_step(rows: Mapping[Key, Row]) -> int:
  """Returns the last training step that has a row."""
  return max(step for split, step in rows if split == 'train')
