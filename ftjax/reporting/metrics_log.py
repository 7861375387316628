"""Reads metrics.jsonl into curves: numbers by split and name, as arrays, so that 100,000 steps
fit in memory."""

import array
import json

import numpy as np

from ftjax.reporting.figures import number_of
from ftjax.reporting.line_chart import Series
from ftjax.storage import files


class MetricsLog:
  """The rows of a metrics.jsonl, by column.

  Attributes:
    notes: (step, text) of rows that have a text under "note", the last 200.
    bad_lines: lines that are no rows, such as a last one that is being written.
    last_step: of the split 'train'; 0 before the first.
  """

  def __init__(self):
    self._columns: dict[tuple[str, str], tuple[array.array, array.array]] = {}
    self.notes: list[tuple[int, str]] = []
    self.bad_lines = 0
    self.rows = 0
    self.last_step = 0

  def add(self, line: str) -> None:
    """Takes a line; an empty one is no row, and one that cannot be read is counted."""
    if not line.strip():
      return
    try:
      row = json.loads(line)
    except (ValueError, RecursionError):
      self.bad_lines += 1
      return
    step = row.get('step') if isinstance(row, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or abs(step) > 1 << 53:
      self.bad_lines += 1
      return
    split = str(row.get('split', ''))
    self.rows += 1
    if split == 'train':
      self.last_step = max(self.last_step, step)
    for name, value in row.items():
      if name in ('step', 'split'):
        continue
      if name == 'note':
        self.notes = [*self.notes[-199:], (step, str(value))]
      if isinstance(value, (int, float)) or value in ('NaN', 'Infinity', '-Infinity'):
        steps, values = self._columns.setdefault(
          (split, name), (array.array('d'), array.array('d'))
        )
        steps.append(step)
        values.append(number_of(value))

  def names(self) -> list[tuple[str, str]]:
    """Returns (split, name) of each curve, in the order of their first rows."""
    return list(self._columns)

  def series(self, split: str, name: str, title: str = '') -> Series | None:
    """Returns a curve; None where there is none."""
    found = self._columns.get((split, name))
    if found is None:
      return None
    return Series(title or split, np.array(found[0]), np.array(found[1]))

  def last(self, split: str, name: str) -> float | None:
    """Returns the last value of a curve, None where there is none."""
    found = self._columns.get((split, name))
    return found[1][-1] if found else None


def read(path: str) -> MetricsLog:
  """Returns the rows of a file; none where there is no file."""
  log = MetricsLog()
  if files.exists(path):
    for line in files.read_bytes(path).decode('utf-8', 'replace').split('\n'):
      log.add(line)
  return log
