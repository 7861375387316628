"""Reads rows from sources: files, folders, patterns, hub names; each row with its file and line.

data_folder.py and hub_dataset.py find the files of a source, containers.py reads one. formats.py
gives the rows their meaning; token_cache.py reads a source once and keeps its tokens.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterator

from ftjax.data import containers, data_folder, formats, hub_dataset, preference_rows
from ftjax.data.containers import File, Row, kind_of
from ftjax.data.formats import Bad
from ftjax.runtime.errors import ConfigError, DataError

FORMATS = (*formats.FORMATS, *preference_rows.FORMATS)

_TEXT_FORMATS = ('text', 'lines')


@dataclasses.dataclass(frozen=True)
class Spec:
  """Holds one entry of data.train or data.eval.

  path: of files, or a hub name. format: of the rows; None detects it. weight: share of rows.
  """

  path: str
  format: str | None = None
  weight: float | None = None


def parse_spec(text: str) -> Spec:
  """Reads `path[::format][@weight]`; only a number after the last '@' is a weight.

  Raises:
    ConfigError: an unknown format, a weight that is not positive, an empty path.
  """
  rest, weight = text.strip(), None
  if found := re.fullmatch(r'(.+)@(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)', rest):
    rest, weight = found[1], float(found[2])
    if not 0 < weight < float('inf'):
      raise ConfigError(f'data: {text!r} has weight {weight}; expected a positive number')
  path, colons, form = rest.rpartition('::')
  if not colons:
    path, form = rest, None
  if form is not None and form not in FORMATS:
    raise ConfigError(f'data: {text!r} names format {form!r}; expected one of {list(FORMATS)}')
  if not path:
    raise ConfigError(f'data: {text!r} names no path; expected path[::format][@weight]')
  return Spec(path, form, weight)


def parse_specs(value: str | tuple[str, ...] | list[str]) -> list[Spec]:
  """Reads a comma-separated string or a sequence of `path[::format][@weight]`; '' is no source."""
  entries = value.split(',') if isinstance(value, str) else value
  return [parse_spec(entry) for entry in entries if entry.strip()]


def list_files(spec: Spec) -> list[File]:
  """Returns the files behind a spec, in the order they are read; downloads those of a hub name.

  Raises:
    DataError: nothing is there, or it cannot be read as one source. ConfigError: a format that
      such files do not have, or no such name, config or split on the hub.
  """
  if hub_dataset.is_name(spec.path):
    found = list(hub_dataset.list_files(spec.path))
  else:
    found = data_folder.list_files(spec.path)
  for file in found:
    is_text = (kind_of(file.name) or ('',))[0] == '.txt'
    if is_text and spec.format not in (None, *_TEXT_FORMATS):
      raise ConfigError(
        f'data: {spec.path}::{spec.format}: {file.name} holds documents; name the format text (the '
        'file is one, as without a name) or lines (one a line)'
      )
    if not is_text and spec.format == 'lines':
      raise ConfigError(f'data: {spec.path}::lines: {file.name} is no .txt; expected ::text')
  return found


def scan(spec: Spec) -> Iterator[tuple[int, int, Row | Bad]]:
  """Yields rows, and what could not be parsed among them: (file number, line, row or Bad).

  The file number counts in `source_names`; the line counts from 1, and for files without lines
  (JSON lists, Parquet, Arrow) it is the row's number.

  Raises:
    DataError: a file that cannot be read on after this point.
  """
  for number, file in enumerate(list_files(spec)):
    for line, row in containers.read(file, one_a_line=spec.format == 'lines'):
      yield number, line, row


def source_names(spec: Spec) -> list[str]:
  """Returns names for messages of the files that `scan` numbers."""
  return [str(p) for p in list_files(spec)]


def rows(spec: Spec) -> Iterator[tuple[str, Row]]:
  """Yields rows with their place: ('file.jsonl:17', row).

  Raises:
    DataError: a file that cannot be read, or the first row that cannot be parsed.
  """
  names = source_names(spec)
  for number, line, row in scan(spec):
    if isinstance(row, Bad):
      raise DataError(f'{names[number]}:{line}: {row.reason}')
    yield f'{names[number]}:{line}', row


def fingerprint(spec: Spec) -> str:
  """Returns the SHA-256, in hex, of a source's content: the bytes of its files in order, wherever
  they are and however named.
  """
  digest = hashlib.sha256(b'ftjax source 1\n')
  for file in list_files(spec):
    kind, compression = kind_of(file.name) or ('.arrow', '')
    digest.update(f'{kind} {compression} {file.member is not None}\n'.encode())
    size = 0
    with containers.opened(file) as stream:
      while block := stream.read(1 << 22):
        digest.update(block)
        size += len(block)
    digest.update(f'\n{size}\n'.encode())
  return digest.hexdigest()
