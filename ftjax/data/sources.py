"""Rows out of files: JSON lines, JSON, CSV, Parquet, `datasets` folders, hub names; each with its
file and line.

`formats.py` gives the rows their meaning; `cache.py` reads a source once and keeps its tokens.
"""

import csv
import dataclasses
import gzip
import hashlib
import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from ftjax.data import formats, judged
from ftjax.data.formats import Bad
from ftjax.runtime import files
from ftjax.runtime.errors import ConfigError, DataError

FORMATS = (*formats.FORMATS, *judged.FORMATS)

_HUB_NAME = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?')
_MAX_CSV_FIELD = 1 << 28  # characters
_BATCH = 1024

Row = dict[str, Any]


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


def _json_object(line: bytes | str) -> Row | Bad:
  try:
    row = json.loads(line)
  except UnicodeDecodeError as error:
    return Bad(f'not UTF-8: {error.reason} at byte {error.start}')
  except RecursionError:
    return Bad('not usable JSON: nested too deep')
  except ValueError as error:
    return Bad(f'not JSON: {error}')
  return row if isinstance(row, dict) else Bad(f'a JSON {type(row).__name__}, expected an object')


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row | Bad]]:
  number = 0
  with path.open('rb') as raw, gzip.open(raw) if path.suffix == '.gz' else raw as file:
    try:
      for number, line in enumerate(file, 1):
        if number == 1:
          line = line.removeprefix(b'\xef\xbb\xbf')
        if line.strip():
          yield number, _json_object(line)
    except (gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
      raise DataError(f'{path}:{number + 1}: cannot be read: {error}') from error


def _json_rows(path: Path) -> Iterator[tuple[int, Row | Bad]]:
  try:
    value = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise DataError(
      f'{path}: not JSON: {error}; one object per line belongs in a .jsonl'
    ) from error
  if isinstance(value, dict) and isinstance(value.get('data'), list):
    value = value['data']
  if not isinstance(value, list):
    raise DataError(f'{path}: expected a list of rows or {{"data": [...]}}')
  for number, row in enumerate(value, 1):
    kind = type(row).__name__
    yield number, row if isinstance(row, dict) else Bad(f'a JSON {kind}, expected an object')


def _csv_rows(path: Path) -> Iterator[tuple[int, Row | Bad]]:
  csv.field_size_limit(_MAX_CSV_FIELD)  # the default of 131,072 is shorter than real documents
  with path.open(encoding='utf-8-sig', newline='') as file:
    reader = csv.DictReader(file, delimiter='\t' if path.suffix == '.tsv' else ',', strict=True)
    line = 1
    try:
      for row in reader:
        line = reader.line_num
        if None in row or None in row.values():
          got = sum(v is not None for k, v in row.items() if k is not None) + len(
            row.get(None) or ()
          )
          yield line, Bad(f'{got} fields, expected {len(reader.fieldnames or ())} as in the header')
        else:
          yield line, row
    except UnicodeDecodeError as error:
      raise DataError(f'{path}:{line + 1} or later: not UTF-8: {error.reason}') from error
    except csv.Error as error:
      raise DataError(f'{path}:{reader.line_num}: not CSV: {error}') from error


def _without_nulls(value: Any) -> Any:
  """Arrow gives every struct of a column the keys of all of them: what is null was never there."""
  if isinstance(value, dict):
    return {k: _without_nulls(v) for k, v in value.items() if v is not None}
  return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row | Bad]]:
  number = 0
  try:
    # A local file by its name: Arrow then reads it without Python's lock.
    with pq.ParquetFile(path.open('rb') if files.is_remote(path) else path) as file:
      for batch in file.iter_batches(batch_size=_BATCH):
        for row in batch.to_pylist():
          number += 1
          yield number, _without_nulls(row)
  except (pa.ArrowException, OSError) as error:
    raise DataError(f'{path}:{number + 1}: not readable Parquet: {error}') from error


def _arrow_rows(path: Path) -> Iterator[tuple[int, Row | Bad]]:
  number = 0
  try:
    opened = path.open('rb') if files.is_remote(path) else pa.memory_map(str(path))
    with opened as file, pa.ipc.open_stream(file) as stream:
      for batch in stream:
        for start in range(0, batch.num_rows, _BATCH):
          for row in batch.slice(start, _BATCH).to_pylist():
            number += 1
            yield number, _without_nulls(row)
  except (pa.ArrowException, OSError) as error:
    raise DataError(f'{path}:{number + 1}: not a readable Arrow stream: {error}') from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row | Bad]]]] = {
  '.jsonl': _jsonl_rows,
  '.jsonl.gz': _jsonl_rows,
  '.ndjson': _jsonl_rows,
  '.json': _json_rows,
  '.csv': _csv_rows,
  '.tsv': _csv_rows,
  '.parquet': _parquet_rows,
}


def _reader(path: Path):
  for suffix, reader in _READERS.items():
    if path.name.endswith(suffix):
      return reader
  return None


def _saved_dataset_files(folder: Path) -> list[Path]:
  """The Arrow files of a folder written by `datasets`' save_to_disk, in order."""
  try:
    state = json.loads((folder / 'state.json').read_bytes())
    names = [entry['filename'] for entry in state['_data_files']]
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f'{folder}/state.json: not as `datasets` writes it: {error!r}') from error
  if strange := [n for n in names if PurePosixPath(n).name != n]:
    raise DataError(f'{folder}/state.json: {strange[0]!r} is not a file name inside the folder')
  return [folder / name for name in names]


# What a folder of data may hold and we cannot read: left out silently it would be missing.
_DATA_LIKE = {'.jsonl', '.json', '.csv', '.tsv', '.parquet', '.arrow', '.gz', '.zst', '.bz2', '.xz'}
_DATA_LIKE |= {'.zip', '.tar'}


def _is_hub(spec: Spec) -> bool:
  return bool(_HUB_NAME.fullmatch(spec.path)) and not files.as_path(spec.path).exists()


def list_files(spec: Spec) -> list[Path]:
  """The files behind a spec, in the order they are read; empty for a hub name.

  Raises:
    DataError: nothing is there, or nothing in it can be read.
  """
  path = files.as_path(spec.path)
  if _is_hub(spec) and _reader(path) is None:
    return []
  if path.is_file():
    if _reader(path) is None:
      raise DataError(f'{path}: unknown kind of file; expected one of {list(_READERS)}')
    return [path]
  if not path.is_dir():
    raise DataError(f'{path}: no such file or folder (data.train, data.eval)')
  if (path / 'dataset_dict.json').is_file():
    splits = sorted(p.name for p in path.iterdir() if (p / 'state.json').is_file())
    raise DataError(
      f'{path}: holds the splits {splits}; name one of them, as in {path}/{splits[0]}'
    )
  if (path / 'state.json').is_file() and (path / 'dataset_info.json').is_file():
    return _saved_dataset_files(path)
  shown = [p for p in path.iterdir() if not p.name.startswith(('.', '_'))]
  found = sorted(p for p in shown if p.is_file() and _reader(p))
  if not found:
    raise DataError(f'{path}: no data file in this folder; expected one of {list(_READERS)}')
  other = [p for p in shown if p not in found]
  if lost := sorted(p.name for p in other if p.is_dir() or _DATA_LIKE & {*p.suffixes}):
    raise DataError(
      f'{path}: {lost[0]!r} lies beside {len(found)} data files and would not be read; move it, '
      f'or name the files one by one (kinds that are read: {list(_READERS)})'
    )
  return found


def _hub_rows(spec: Spec) -> Iterator[tuple[int, Row | Bad]]:
  """Rows of a data set on a hub, `org/name` (split train) or `org/name:split`.

  This needs the `datasets` extra and a network; it was not exercised where ftjax is developed.
  """
  try:
    datasets = importlib.import_module('datasets')
  except ImportError as error:
    raise ConfigError(
      f'data: {spec.path!r} is no file and looks like a hub name, which needs the `datasets` '
      "library: pip install 'ftjax[datasets]', or give a path that exists"
    ) from error
  name, _, split = spec.path.partition(':')
  try:
    rows = datasets.load_dataset(name, split=split or 'train')
  except Exception as error:  # the library raises many kinds, for a network as for a name
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    raise DataError(
      f'data: {spec.path!r} is no file here, and as a hub name it cannot be loaded: {reason}'
    ) from error
  yield from enumerate(rows, 1)


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
  for number, path in enumerate(found):
    for line, row in (_reader(path) or _arrow_rows)(path):
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
  for path in found:
    reader = _reader(path) or _arrow_rows
    digest.update(f'{reader.__name__} {path.suffix} {path.stat().st_size}\n'.encode())
    with path.open('rb') as file:
      while block := file.read(1 << 22):
        digest.update(block)
  return digest.hexdigest()
