"""Opens the file or the files of a GGUF model: one file, or parts named NAME-00001-of-00003.gguf.

The first part has the metadata of the model, each one the number of parts; they are in one folder,
and any of them may be given. What is there is checked: names, numbers of parts and of tensors. That
parts with equal numbers and shapes come from two models cannot be seen: nothing in them names the
model. gguf.py presents their tensors.
"""

import functools
import re
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ftjax.runtime.errors import DataError
from ftjax.storage import files

_HEADER_BYTES = 16 << 20  # of a file in a bucket, read at first; most headers are shorter

# What a broken or hostile file makes the reader of the `gguf` package raise.
READ_ERRORS = (
  ValueError,
  KeyError,
  IndexError,
  TypeError,
  OverflowError,
  UnicodeError,
  struct.error,
  MemoryError,
)

_PART_NAME = re.compile(r'(.+)-(\d{5})-of-(\d{5})\.gguf')


class Part(NamedTuple):
  """One file of a model and the `gguf` package's reader of it."""

  path: Path
  reader: Any


def first_part(found: Sequence[Path]) -> Path | None:
  """Returns the first part where all files are parts of one model; None where they are not.

  Raises:
    DataError: they are, and the first one is not among them.
  """
  names = [_PART_NAME.fullmatch(p.name) for p in found]
  if not names or not all(names) or len({(n[1], n[3]) for n in names if n}) > 1:
    return None
  for path, name in zip(found, names, strict=True):
    if name and int(name[2]) == 1:
      return path
  raise DataError(_missing(found[0], 1, int(names[0][3])))  # type: ignore[index]


def first_of(path: Path) -> Path:
  """Returns the first part of the model that a file is a part of, by its name; else the file.

  Raises:
    DataError: the first part is not in the same folder.
  """
  name = _PART_NAME.fullmatch(path.name)
  if name is None or int(name[2]) == 1:
    return path
  first = path.with_name(_name(path, 1, int(name[3])))
  if not first.is_file():
    raise DataError(_missing(path, 1, int(name[3])))
  return first


def _name(path: Path, number: int, count: int) -> str:
  """Returns the name of a part in the folder of another one."""
  name = _PART_NAME.fullmatch(path.name)
  return f'{name[1] if name else path.name.removesuffix(".gguf")}-{number:05d}-of-{count:05d}.gguf'


def _missing(beside: Path, number: int, count: int) -> str:
  return (
    f'{beside.parent}: part {number} of {count}, {_name(beside, number, count)}, is missing; a '
    'GGUF model in parts needs all of them in one folder, under the names they were published with'
  )


def _field(part: Part, key: str, default: int) -> int:
  if key not in part.reader.fields:
    return default
  try:
    value = part.reader.fields[key].contents()
  except READ_ERRORS as error:
    raise DataError(f'{part.path}: metadata {key} cannot be read: {error}') from error
  if not isinstance(value, int) or isinstance(value, bool) or value < 0:
    raise DataError(f'{part.path}: metadata {key} is {value!r}; a whole number is expected')
  return value


def open_parts(path: Path) -> list[Part]:
  """Returns the files of the model whose only file, or any part, is `path`; the first one first.

  Raises:
    DataError: not readable, or a part that is missing or of another model. Names the file.
  """
  path = first_of(path)
  first = Part(path, _reader(path))
  count = max(1, _field(first, 'split.count', 1))
  name = _PART_NAME.fullmatch(path.name)
  if name and int(name[3]) != count:
    raise DataError(
      f'{path}: its metadata says {count} parts, its name {int(name[3])}; rename the parts as they '
      'were published'
    )
  parts = [first]
  for number in range(2, count + 1):
    other = path.with_name(_name(path, number, count))
    if not other.is_file():
      raise DataError(_missing(path, number, count))
    parts.append(Part(other, _later_reader(other)))
  if count > 1:
    _check_parts(parts)
  return parts


def _check_parts(parts: Sequence[Part]) -> None:
  """Raises DataError where the metadata of the parts, or the number of their tensors, differ."""
  count = sum(len(p.reader.tensors) for p in parts)
  expected = _field(parts[0], 'split.tensors.count', count)
  for i, part in enumerate(parts):
    found = _field(part, 'split.no', 0) + 1, _field(part, 'split.count', 1)
    if found != (i + 1, len(parts)):
      raise DataError(
        f'{part.path}: its metadata says part {found[0]} of {found[1]}; expected part {i + 1} of '
        f'{len(parts)}'
      )
    own = _field(part, 'split.tensors.count', expected)
    if own != expected:
      raise DataError(
        f'{part.path}: split.tensors.count={own}, and {expected} in {parts[0].path.name}: parts of '
        'different models'
      )
  if count != expected:
    raise DataError(
      f'{parts[0].path}: its {len(parts)} parts hold {count} tensors, '
      f'split.tensors.count={expected}: parts of different models, or unfinished downloads'
    )


def weight_files(path: Path) -> list[Path]:
  """Returns the files that hold the tensors of the GGUF model that `path` is, or is a part of, in
  order. Raises as `open_parts`.
  """
  return [part.path for part in open_parts(path)] if _PART_NAME.fullmatch(path.name) else [path]


def _stat(path: Path) -> tuple[int, int]:
  try:
    stat = path.stat()
  except OSError as e:
    raise DataError(f'{path}: {e.strerror}') from e
  return stat.st_size, stat.st_mtime_ns


def _reader(path: Path) -> Any:
  return _cached_reader(path, *_stat(path))


def _later_reader(path: Path) -> Any:
  return _cached_later_reader(path, *_stat(path))


# The reader walks through every token of the vocabulary, some seconds: config, tokenizer and
# weights share one.
@functools.lru_cache(maxsize=1)
def _cached_reader(path: Path, size: int, mtime_ns: int) -> Any:
  del mtime_ns
  return _open(path, size)


# Later parts have no vocabulary: their readers are small.
@functools.lru_cache(maxsize=64)
def _cached_later_reader(path: Path, size: int, mtime_ns: int) -> Any:
  del mtime_ns
  return _open(path, size)


def _open(path: Path, size: int) -> Any:
  from gguf import GGUFReader

  try:
    return _remote_reader(path, size) if files.is_remote(path) else GGUFReader(path)
  except READ_ERRORS as e:
    raise DataError(
      f'{path}: not a readable GGUF file ({type(e).__name__}: {e}); truncated download?'
    ) from e


def _remote_reader(path: Path, size: int):
  """Returns a reader of the header alone: the package maps a local file, so it is given one with a
  hole in place of the tensors.
  """
  from gguf import GGUFReader

  known = 0
  while known < size:
    known = min(size, max(_HEADER_BYTES, 4 * known))
    with (
      tempfile.NamedTemporaryFile(suffix='.gguf') as file,
      path.open('rb', buffering=0) as source,
    ):
      file.write(source.read(known))
      file.truncate(size)
      file.flush()
      try:
        reader = GGUFReader(file.name)
      except READ_ERRORS:  # also what a header that is cut looks like
        if known == size:
          raise
        continue
    if reader.data_offset <= known:
      return reader
  raise ValueError('the header is as long as the file')
