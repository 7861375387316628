"""Rows of a section of accelerator_check.py, kept in a file line by line, so that a section which
is killed keeps what it has measured.

The first line holds the columns of the section's table, each other line a row: measured values,
`checks`, `row_s` (seconds that it took), and `failure` where measuring it failed. Nothing here
imports jax: the runner reads rows too.
"""

import contextlib
import json
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

OUT_OF_MEMORY = 'out of memory'


def describe(error: BaseException) -> str:
  """Returns one line about an exception: 'out of memory: ...', or its type and message."""
  text = ' '.join(str(error).split())[:400]
  if isinstance(error, MemoryError) or is_memory(text):
    return f'{OUT_OF_MEMORY}: {text}'
  return f'{type(error).__name__}: {text}'


def is_memory(text: str) -> bool:
  """Returns whether a message is about too little memory of the device or the host, and not about a
  kernel's block that is too large.
  """
  marks = ('RESOURCE_EXHAUSTED', 'CUDA out of memory', 'MemoryError', 'Out of memory')
  return any(mark in text for mark in marks) and 'Shared memory size' not in text


class Record:
  """Writes the rows of one section.

  Args:
    path: of the file, which is made anew.
    columns: (key of a row's value, title with its unit, format such as '.2f' or '') of the table.
  """

  def __init__(self, path: Path, columns: Sequence[tuple[str, str, str]]):
    self._path = path
    path.write_text(json.dumps({'columns': columns}) + '\n', encoding='utf-8')

  @contextlib.contextmanager
  def row(self, name: str) -> Iterator[dict]:
    """Yields the row to fill in; writes it at the end, also when measuring it raises an exception,
    which is kept in the row and goes no further.
    """
    values: dict = {'name': name}
    begin = time.monotonic()
    try:
      yield values
    except Exception as error:  # one case may fail without the others
      traceback.print_exc()
      values['failure'] = describe(error)
    values['row_s'] = round(time.monotonic() - begin, 2)
    with self._path.open('a', encoding='utf-8') as file:
      file.write(json.dumps(_plain(values)) + '\n')


def check(row: dict, what: str, value: float, most: float) -> None:
  """Adds a check to a row: passed where `value` is finite and at most `most`."""
  row.setdefault('checks', []).append(
    {'what': what, 'value': float(value), 'most': most, 'passed': bool(value <= most)}
  )


def read(path: Path) -> tuple[list, list[dict]]:
  """Returns (columns, rows) of a file; empty lists where a section wrote none. A last line that a
  kill has cut is left out.
  """
  columns, rows = [], []
  if not path.exists():
    return columns, rows
  for line in path.read_text(encoding='utf-8').splitlines():
    try:
      found = json.loads(line)
    except json.JSONDecodeError:
      break
    if 'columns' in found:
      columns = found['columns']
    else:
      rows.append(found)
  return columns, rows


def _plain(value):
  """Returns a value as strict JSON can hold it: numpy numbers as Python's, and no NaN."""
  if isinstance(value, dict):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if isinstance(value, bool | int | str) or value is None:
    return value
  number = float(value)
  return number if math.isfinite(number) else str(number)
