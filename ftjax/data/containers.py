"""Reads the rows of one file: JSON lines, JSON, CSV, Parquet, Arrow, text; compressed, or in a zip.

Every container gives the same rows: keys that Arrow filled up with null are left out, values of its
JSON type are parsed, dates are ISO texts. data_folder.py finds the files, sources.py reads them in
order.

The library `datasets` could read the same kinds, and hub_dataset.py uses it to find files. It does
not read them, because users would lose by it: places FILE:LINE in errors; cells like 007, which
become numbers; whole numbers above 2^63; the difference between a null and a missing key; one bad
row among good ones; gs://; and a copy of all rows on the disk.
"""

import bz2
import contextlib
import csv
import dataclasses
import datetime
import decimal
import gzip
import io
import json
import lzma
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from ftjax.data import formats
from ftjax.data.formats import Bad
from ftjax.runtime import strict_json
from ftjax.runtime.errors import DataError
from ftjax.storage import files

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row | Bad]]

KINDS = ('.jsonl', '.ndjson', '.json', '.csv', '.tsv', '.parquet', '.arrow', '.txt')
COMPRESSIONS = ('.gz', '.bz2', '.xz', '.zst')
ARCHIVE = '.zip'

_MAX_CSV_FIELD = 1 << 28  # characters
_BATCH = 1024
_UNREADABLE = (
  OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class File:
  """Names a file of rows: `path`, local or gs://, or the member of a zip archive there."""

  path: Path
  member: str | None = None

  @property
  def name(self) -> str:
    """Returns its name without folders."""
    return (self.member or self.path.name).rpartition('/')[2]

  def __str__(self) -> str:
    return f'{self.path}/{self.member}' if self.member else str(self.path)


def describe_kinds() -> str:
  """Returns what is read, for messages."""
  return (
    f'{", ".join(KINDS)}, each but .parquet and .arrow also as {", ".join(COMPRESSIONS)}, '
    f'and {ARCHIVE} of them'
  )


def kind_of(name: str) -> tuple[str, str] | None:
  """Returns (kind, compression or '') of a file by its name; None where it holds no known rows."""
  compression = next((c for c in COMPRESSIONS if name.endswith(c)), '')
  kind = next((k for k in KINDS if name.removesuffix(compression).endswith(k)), None)
  if kind is None or (compression and kind in ('.parquet', '.arrow')):
    return None
  return kind, compression


@contextlib.contextmanager
def opened(file: File, compression: str = '') -> Iterator[Any]:
  """Opens a file's bytes, decompressed."""
  with contextlib.ExitStack() as stack:
    raw = stack.enter_context(file.path.open('rb'))
    if file.member is not None:
      raw = stack.enter_context(stack.enter_context(zipfile.ZipFile(raw)).open(file.member))
    if compression == '.gz':
      raw = stack.enter_context(gzip.open(raw))
    elif compression == '.bz2':
      raw = stack.enter_context(bz2.open(raw))
    elif compression == '.xz':
      raw = stack.enter_context(lzma.open(raw))
    elif compression == '.zst':
      raw = io.BufferedReader(stack.enter_context(pa.input_stream(raw, compression='zstd')))
    yield raw


def _json_object(line: bytes | str) -> Row | Bad:
  try:
    row = strict_json.loads(line)
  except UnicodeDecodeError as error:
    return Bad(f'not UTF-8: {error.reason} at byte {error.start}')
  except RecursionError:
    return Bad('not usable JSON: nested too deep')
  except ValueError as error:
    return Bad(f'not JSON: {error}')
  return row if isinstance(row, dict) else Bad(f'a JSON {type(row).__name__}, expected an object')


def _lines(file: File, compression: str) -> Iterator[tuple[int, bytes]]:
  """Yields (number from 1, bytes) of the lines that are not blank."""
  number = 0
  try:
    with opened(file, compression) as stream:
      for number, line in enumerate(stream, 1):
        if number == 1:
          line = line.removeprefix(b'\xef\xbb\xbf')
        if line.strip():
          yield number, line
  except _UNREADABLE as error:
    raise DataError(f'{file}:{number + 1}: cannot be read: {error}') from error


def _read_all(file: File, compression: str) -> bytes:
  try:
    with opened(file, compression) as stream:
      return stream.read()
  except _UNREADABLE as error:
    raise DataError(f'{file}: cannot be read: {error}') from error


def _jsonl_rows(file: File, compression: str) -> Rows:
  for number, line in _lines(file, compression):
    yield number, _json_object(line)


def _json_rows(file: File, compression: str) -> Rows:
  try:
    value = strict_json.loads(_read_all(file, compression))
  except (ValueError, RecursionError) as error:
    raise DataError(
      f'{file}: not JSON: {error}; one object per line belongs in a .jsonl'
    ) from error
  if isinstance(value, dict) and isinstance(value.get('data'), list):
    value = value['data']
  if not isinstance(value, list):
    raise DataError(f'{file}: expected a list of rows or {{"data": [...]}}')
  for number, row in enumerate(value, 1):
    kind = type(row).__name__
    yield number, row if isinstance(row, dict) else Bad(f'a JSON {kind}, expected an object')


def _csv_rows(file: File, compression: str, delimiter: str) -> Rows:
  csv.field_size_limit(_MAX_CSV_FIELD)  # the default of 131,072 is shorter than real documents
  line = 1
  try:
    with (
      opened(file, compression) as stream,
      io.TextIOWrapper(stream, encoding='utf-8-sig', newline='') as text,
    ):
      reader = csv.DictReader(text, delimiter=delimiter, strict=True)
      names = list(reader.fieldnames or ())
      if twice := sorted({n for n in names if names.count(n) > 1}):
        raise DataError(f'{file}:1: the header names the column {twice[0]!r} twice')
      for row in reader:
        line = reader.line_num
        if None in row or None in row.values():
          got = sum(v is not None for k, v in row.items() if k is not None)
          got += len(row.get(None) or ())
          yield line, Bad(f'{got} fields, expected {len(names)} as in the header')
        else:
          yield line, formats.from_cells(row)
  except UnicodeDecodeError as error:
    raise DataError(f'{file}:{line + 1} or later: not UTF-8: {error.reason}') from error
  except csv.Error as error:
    raise DataError(f'{file}:{line + 1}: not CSV: {error}') from error
  except _UNREADABLE as error:
    raise DataError(f'{file}:{line + 1} or later: cannot be read: {error}') from error


def _text_rows(file: File, compression: str, one_a_line: bool) -> Rows:
  if one_a_line:
    for number, line in _lines(file, compression):
      try:
        yield number, {'text': line.decode().rstrip('\r\n')}
      except UnicodeDecodeError as error:
        yield number, Bad(f'not UTF-8: {error.reason} at byte {error.start}')
    return
  try:
    yield 1, {'text': _read_all(file, compression).decode('utf-8-sig')}
  except UnicodeDecodeError as error:
    yield 1, Bad(f'not UTF-8: {error.reason} at byte {error.start}')


# Arrow


Convert = Callable[[Any], Any]


def _plain(value: Any) -> Any:
  """Converts a value that JSON does not know to one that it does; bytes stay."""
  if isinstance(value, datetime.date | datetime.time):  # datetimes are dates
    return value.isoformat()
  if isinstance(value, datetime.timedelta | uuid.UUID):
    return str(value)
  if isinstance(value, decimal.Decimal):
    return int(value) if value == value.to_integral_value() else float(value)
  return value


def _is_json(field: pa.Field) -> bool:
  """Returns whether a field holds JSON as text: by its type, or the name of an unknown type."""
  name = getattr(field.type, 'extension_name', None)
  return (
    name == 'arrow.json' or (field.metadata or {}).get(b'ARROW:extension:name') == b'arrow.json'
  )


def _converter(field: pa.Field) -> Convert | None:
  """Returns what converts a field's Python values to those of JSON lines; None: they are equal."""
  kind = field.type
  if _is_json(field):
    return json.loads
  if isinstance(kind, pa.BaseExtensionType):
    return _converter(pa.field('', kind.storage_type)) or _plain
  if pa.types.is_dictionary(kind):
    return _converter(pa.field('', kind.value_type))
  if pa.types.is_struct(kind):
    return _struct({f.name: _converter(f) for f in kind})
  if pa.types.is_map(kind):
    # The keys of a map are the row's own: what is null there was written so.
    convert = _converter(kind.item_field) or _plain
    return lambda pairs: {str(k): None if v is None else convert(v) for k, v in pairs}
  if pa.types.is_nested(kind) and not pa.types.is_union(kind):  # the lists
    convert = _converter(kind.value_field)
    if convert is None:
      return None
    return lambda items: [None if v is None else convert(v) for v in items]
  known = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean)
  return None if any(is_kind(kind) for is_kind in known) else _plain


def _struct(converters: dict[str, Convert | None]) -> Convert:
  """Returns what drops the nulls of a struct: Arrow gives each one the keys of all in a column."""

  def convert(value: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, item in value.items():
      if item is not None:
        inner = converters[key]
        found[key] = item if inner is None else inner(item)
    return found

  return convert


def table_rows(batches: Any, place: str) -> Rows:
  """Yields rows of Arrow tables or record batches, numbered from 1.

  Raises:
    DataError: a batch that cannot be read.
  """
  number, schema, convert = 0, None, None
  try:
    for batch in batches:
      if schema is None or not batch.schema.equals(schema, check_metadata=True):
        schema = batch.schema
        if len(set(schema.names)) < len(schema.names):
          raise DataError(f'{place}: two columns have one name; got {sorted(schema.names)}')
        convert = _struct({f.name: _converter(f) for f in schema})
      for start in range(0, batch.num_rows, _BATCH):
        for row in batch.slice(start, _BATCH).to_pylist():
          number += 1
          try:
            found: Row | Bad = convert(row)
          except (ValueError, RecursionError) as error:
            found = Bad(f'a value of a JSON column is no JSON: {error}')
          yield number, found
  except (pa.ArrowException, *_UNREADABLE, ValueError) as error:
    if isinstance(error, DataError):
      raise
    raise DataError(f'{place}:{number + 1}: cannot be read on: {error}') from error


def _arrow_source(file: File) -> Any:
  """Returns what Arrow reads; None: a local file, by its name, without Python's lock."""
  if file.member is not None:
    return io.BytesIO(_read_all(file, ''))
  return file.path.open('rb') if files.is_remote(file.path) else None


def _parquet_rows(file: File) -> Rows:
  source = _arrow_source(file)
  try:
    opened_file = pq.ParquetFile(str(file.path) if source is None else source)
  except (pa.ArrowException, OSError) as error:
    raise DataError(f'{file}:1: not readable Parquet: {error}') from error
  with opened_file as parquet:
    yield from table_rows(parquet.iter_batches(batch_size=_BATCH), str(file))


def _arrow_rows(file: File) -> Rows:
  source = _arrow_source(file)
  try:
    source = pa.memory_map(str(file.path)) if source is None else source
    stream = pa.ipc.open_stream(source)
  except (pa.ArrowException, OSError) as error:
    raise DataError(f'{file}:1: not a readable Arrow stream: {error}') from error
  with source, stream:
    yield from table_rows(stream, str(file))


def read(file: File, one_a_line: bool = False) -> Rows:
  """Returns rows of a file, and what could not be parsed among them: (line, row or Bad).

  Args:
    file: of a known kind.
    one_a_line: whether every line of a .txt is a document; else the file is one.

  Raises:
    DataError: a file that cannot be read on after this point.
  """
  kind, compression = kind_of(file.name) or ('.arrow', '')
  if kind in ('.jsonl', '.ndjson'):
    return _jsonl_rows(file, compression)
  if kind == '.json':
    return _json_rows(file, compression)
  if kind in ('.csv', '.tsv'):
    return _csv_rows(file, compression, '\t' if kind == '.tsv' else ',')
  if kind == '.txt':
    return _text_rows(file, compression, one_a_line)
  return _parquet_rows(file) if kind == '.parquet' else _arrow_rows(file)
