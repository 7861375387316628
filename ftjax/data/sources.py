"""Sources of rows: files, folders, patterns, hub names; each row with its file and line.

`data_folder.py` finds the files of a source, `containers.py` reads one. `formats.py` gives the rows
their meaning; `cache.py` reads a source once and keeps its tokens.
"""

import dataclasses
import hashlib
import importlib
import json
import re
from collections.abc import Iterator

from ftjax.data import containers, data_folder, formats, preference_rows
from ftjax.data.containers import File, Row, Rows, kind_of
from ftjax.data.formats import Bad
from ftjax.runtime.errors import ConfigError, DataError

FORMATS = (*formats.FORMATS, *preference_rows.FORMATS)

_HUB_NAME = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?')
_BATCH = 1024
_TEXT_FORMATS = ('text', 'lines')


@dataclasses.dataclass(frozen=True)
class Spec:
  """One entry of data.train or data.eval: a path or hub name, its row format and its share of
  rows."""

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


def _is_hub(spec: Spec) -> bool:
  return bool(_HUB_NAME.fullmatch(spec.path)) and not data_folder.exists(spec.path)


def list_files(spec: Spec) -> list[File]:
  """The files behind a spec, in the order they are read; empty for a hub name.

  Raises:
    DataError: nothing is there, or it cannot be read as one source. ConfigError: a format that
      such files do not have.
  """
  if _is_hub(spec) and kind_of(spec.path) is None and not spec.path.endswith(containers.ARCHIVE):
    return []
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


def _hub_rows(spec: Spec) -> Rows:
  """Rows of a data set on a hub, `org/name` (split train) or `org/name:split`.

  This needs the `datasets` extra and a network; it was not exercised where ftjax is developed.
  """
  try:
    datasets = importlib.import_module('datasets')
  except ImportError as error:
    raise ConfigError(
      f'data: {spec.path!r} is no file and looks like a hub name, which needs the `datasets` '
      "library: pip install '.[datasets]' in the checkout of ftjax, or give a path that exists"
    ) from error
  name, _, split = spec.path.partition(':')
  try:
    rows = datasets.load_dataset(name, split=split or 'train')
  except Exception as error:  # the library raises many kinds, for a network as for a name
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    raise DataError(
      f'data: {spec.path!r} is no file here, and as a hub name it cannot be loaded: {reason}'
    ) from error
  if (with_format := getattr(rows, 'with_format', None)) is None:
    yield from enumerate(rows, 1)
    return
  # As Arrow's tables, so that nulls and JSON mean what they mean in a file of the same rows.
  yield from containers.table_rows(with_format('arrow').iter(batch_size=_BATCH), spec.path)


def scan(spec: Spec) -> Iterator[tuple[int, int, Row | Bad]]:
  """Rows with what could not be parsed among them: (file number, line, row or Bad).

  The file number counts in `source_names`; the line counts from 1, and for files without lines
  (JSON lists, Parquet, Arrow) it is the row's number.

  Raises:
    DataError: a file that cannot be read on after this point.
  """
  found = list_files(spec)
  if not found:
    for line, row in _hub_rows(spec):
      yield 0, line, row
  for number, file in enumerate(found):
    for line, row in containers.read(file, one_a_line=spec.format == 'lines'):
      yield number, line, row


def source_names(spec: Spec) -> list[str]:
  """Names for messages of the files that `scan` numbers."""
  return [str(p) for p in list_files(spec)] or [spec.path]


def rows(spec: Spec) -> Iterator[tuple[str, Row]]:
  """Rows with their place: ('file.jsonl:17', row).

  Raises:
    DataError: a file that cannot be read, or the first row that cannot be parsed.
  """
  names = source_names(spec)
  for number, line, row in scan(spec):
    if isinstance(row, Bad):
      raise DataError(f'{names[number]}:{line}: {row.reason}')
    yield f'{names[number]}:{line}', row


def fingerprint(spec: Spec) -> str:
  """sha256 hex of a source's content: the files' bytes in order, wherever they lie and however
  named."""
  digest = hashlib.sha256(b'ftjax source 1\n')
  found = list_files(spec)
  if not found:
    for _, row in rows(spec):
      digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b'\n')
  for file in found:
    kind, compression = kind_of(file.name) or ('.arrow', '')
    digest.update(f'{kind} {compression} {file.member is not None}\n'.encode())
    size = 0
    with containers.opened(file) as stream:
      while block := stream.read(1 << 22):
        digest.update(block)
        size += len(block)
    digest.update(f'\n{size}\n'.encode())
  return digest.hexdigest()
