"""Reads and writes safetensors folders, tensor by tensor, with numpy alone.

Files are hostile until checked: header size, offsets and shard names are verified before a byte of
a tensor is read. Next: `layout.py`, then `load.py`.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from ftjax.hf.tensor_source import BLOCK_BYTES, Index, TensorInfo, TensorSource, full_index
from ftjax.hf.weight_files import (
  INDEX_FILE,
  MAX_HEADER_BYTES,
  SINGLE_FILE,
  file_inside,
  parse_json,
  weight_files,
  weight_map,
)
from ftjax.runtime.errors import DataError, NonFiniteError
from ftjax.storage import files

MAX_SHARD_BYTES = 5_000_000_000
_HEADER_BUFFER = 1 << 16

DTYPES = {
  'BOOL': np.dtype(bool),
  'U8': np.dtype(np.uint8),
  'I8': np.dtype(np.int8),
  'U16': np.dtype('<u2'),
  'I16': np.dtype('<i2'),
  'U32': np.dtype('<u4'),
  'I32': np.dtype('<i4'),
  'U64': np.dtype('<u8'),
  'I64': np.dtype('<i8'),
  'F16': np.dtype('<f2'),
  'F32': np.dtype('<f4'),
  'F64': np.dtype('<f8'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Entry(NamedTuple):
  path: Path
  offset: int
  info: TensorInfo


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_header(path: Path) -> dict[str, _Entry]:
  """Reads and checks the header of one safetensors file.

  Raises:
    DataError: not a safetensors file, header over 100 MB, an unknown dtype, offsets out of bounds,
      overlapping, with holes, or of another size than shape and dtype say.
  """
  size = path.stat().st_size
  with path.open('rb', buffering=_HEADER_BUFFER) as f:
    prefix = f.read(8)
    if len(prefix) < 8:
      raise DataError(f'{path}: {size} bytes are no safetensors file (truncated download?)')
    header_bytes = int.from_bytes(prefix, 'little')
    if header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > size:
      raise DataError(
        f'{path}: header of {header_bytes} bytes in a file of {size}; expected at most '
        f'{MAX_HEADER_BYTES} '
        'and inside the file. Not safetensors, or a truncated download'
      )
    header = parse_json(f.read(header_bytes), f'{path} (header)')
  if not isinstance(header, dict):
    raise DataError(f'{path}: the header is a {type(header).__name__}, expected a JSON object')
  header.pop('__metadata__', None)
  start = 8 + header_bytes
  entries = {name: _entry(path, name, row, start) for name, row in header.items()}
  end = start
  for name, entry in sorted(
    entries.items(), key=lambda item: (item[1].offset, item[1].info.nbytes)
  ):
    if entry.offset != end:
      raise DataError(
        f'{path}: {name} begins at byte {entry.offset}, expected {end}: tensors overlap or leave a '
        'hole'
      )
    end += entry.info.nbytes
  if end != size:
    raise DataError(
      f'{path}: tensors end at byte {end} of {size}: truncated, or with bytes no tensor owns'
    )
  return entries


def _entry(path: Path, name: str, row: Any, start: int) -> _Entry:
  if not isinstance(row, dict) or row.keys() != {'dtype', 'shape', 'data_offsets'}:
    raise DataError(f'{path}: {name!r} has {row!r}; expected dtype, shape and data_offsets')
  dtype = DTYPES.get(row['dtype']) if isinstance(row['dtype'], str) else None
  if dtype is None:
    raise DataError(f'{path}: {name!r} has dtype {row["dtype"]!r}; supported: {", ".join(DTYPES)}')
  shape, offsets = row['shape'], row['data_offsets']
  if not isinstance(shape, list) or not all(map(_is_count, shape)):
    raise DataError(f'{path}: {name!r} has shape {shape!r}; expected a list of counts')
  if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
    raise DataError(f'{path}: {name!r} has data_offsets {offsets!r}; expected [begin, end]')
  info = TensorInfo(tuple(shape), dtype)
  if offsets[1] - offsets[0] != info.nbytes:
    raise DataError(
      f'{path}: {name!r} has {offsets[1] - offsets[0]} bytes; {info.nbytes} expected for '
      f'{row["dtype"]}{shape}'
    )
  return _Entry(path, start + offsets[0], info)


class SafetensorsFolder(TensorSource):
  """Reads tensors from the safetensors files of a HF folder.

  Args:
    folder: the folder.
    file: the one file of it to read; '': those that are the weights of a whole model.
    rename: gives the name that a tensor of the files has here, or None where it is left out; None:
      all have their own.

  Raises:
    DataError: see `weight_files` and `read_header`; or index and shards disagree about where a
      tensor is; or two get one name.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    file: str = '',
    rename: Callable[[str], str | None] | None = None,
  ):
    super().__init__()
    root = files.as_path(folder)
    self.place = str(root / file)
    self._entries: dict[str, _Entry] = {}
    for path in [file_inside(root, file)] if file else weight_files(root):
      for name, entry in read_header(path).items():
        if name in self._entries:
          raise DataError(f'{path}: {name} is also in {self._entries[name].path.name}')
        self._entries[name] = entry
    if not file and (root / INDEX_FILE).exists():
      self._check_index(root)
    if rename is not None:
      self._entries = self._renamed(rename)
    self.tensors = {name: entry.info for name, entry in self._entries.items()}

  def _check_index(self, root: Path):
    listed = weight_map(root)
    found = {name: entry.path.name for name, entry in self._entries.items()}
    if wrong := sorted(n for n in listed.keys() | found.keys() if listed.get(n) != found.get(n)):
      n = wrong[0]
      raise DataError(
        f'{root}: {INDEX_FILE} and the shards disagree about {len(wrong)} tensors, first {n}: the '
        'index says '
        f'{listed.get(n)}, the shards {found.get(n)}'
      )

  def _renamed(self, rename: Callable[[str], str | None]) -> dict[str, _Entry]:
    found: dict[str, str] = {}
    for stored in self._entries:
      name = rename(stored)
      if name in found:
        raise DataError(f'{self.place}: {found[name]} and {stored} are both {name}')
      if name is not None:
        found[name] = stored
    return {name: self._entries[stored] for name, stored in found.items()}

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns a tensor or a part of it; reads only the rows that the index selects.

    Reads that are not whole rows pass through a buffer of 32 MB.
    """
    shape, dtype = self._entries[name].info
    if not shape:
      return self._rows(name, 0, (), dtype)
    index = full_index(shape, index)
    begin, end, _ = index[0].indices(shape[0])
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    if all(s.indices(n) == (0, n, 1) for s, n in zip(index[1:], shape[1:], strict=True)):
      return self._rows(name, begin * row_bytes, (max(0, end - begin), *shape[1:]), dtype)
    out = np.empty([len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)], dtype)
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for row in range(begin, end, step):
      rows = min(step, end - row)
      block = self._rows(name, row * row_bytes, (rows, *shape[1:]), dtype)
      out[row - begin : row - begin + rows] = block[(slice(None), *index[1:])]
    return out

  def stored(self) -> dict[str, tuple[str, int]]:
    """Returns (type and shape, bytes) of every tensor."""
    return {
      name: (f'{_DTYPE_NAMES[info.dtype]} {list(info.shape)}', info.nbytes)
      for name, info in self.tensors.items()
    }

  def read_bytes(self, name: str, begin: int, end: int) -> memoryview:
    """Returns a range of a tensor's bytes."""
    return memoryview(self._rows(name, begin, (end - begin,), np.dtype(np.uint8)))

  def _rows(self, name: str, begin: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns the bytes of a tensor from `begin` on, as an array."""
    # readinto rather than a memory map: mapped pages count as this process's memory and stay until
    # the system wants them.
    path, offset, _ = self._entries[name]
    out = np.empty(shape, dtype)
    view = memoryview(out.reshape(-1).view(np.uint8))
    with path.open('rb', buffering=0) as f:
      f.seek(offset + begin)
      done = 0
      while done < len(view):
        got = f.readinto(view[done:])
        if not got:
          raise DataError(
            f'{path}: ended at byte {offset + begin + done}; the file shrank while it was read'
          )
        self.was_read(name, begin + done, view[done : done + got])
        done += got
    return out


def write_folder(
  folder: Path,
  tensors: Mapping[str, TensorInfo],
  read: Callable[[str], np.ndarray],
  max_shard_bytes: int = MAX_SHARD_BYTES,
):
  """Writes tensors into `folder` as model.safetensors, or as shards with an index; one tensor in
  memory at a time.

  Args:
    folder: an existing folder, the caller's to discard when this raises.
    tensors: name → shape and dtype, in the order of writing.
    read: gives the named tensor, of that shape and dtype.
    max_shard_bytes: tensors are put in shards of at most this, a larger tensor in one of its own.

  Raises:
    NonFiniteError: a tensor holds NaN or infinity.
  """
  shards: list[dict[str, TensorInfo]] = [{}]
  for name, info in tensors.items():
    if shards[-1] and sum(i.nbytes for i in shards[-1].values()) + info.nbytes > max_shard_bytes:
      shards.append({})
    shards[-1][name] = info
  if len(shards) == 1:
    write_file(folder / SINGLE_FILE, shards[0], read)
    return
  weight_map = {}
  for i, shard in enumerate(shards):
    file = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    write_file(folder / file, shard, read)
    weight_map |= dict.fromkeys(shard, file)
  total = {'total_size': sum(info.nbytes for info in tensors.values())}
  text = json.dumps({'metadata': total, 'weight_map': dict(sorted(weight_map.items()))}, indent=2)
  (folder / INDEX_FILE).write_text(text + '\n')


def write_file(path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], np.ndarray]):
  """Writes one safetensors file; arguments and errors as in `write_folder`."""
  # Wide dtypes first, as the format's own writer does: every tensor is then aligned to its item
  # size.
  order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name in order:
    shape, dtype = tensors[name]
    header[name] = {
      'dtype': _DTYPE_NAMES[dtype],
      'shape': list(shape),
      'data_offsets': [end, end + tensors[name].nbytes],
    }
    end += tensors[name].nbytes
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    for name in order:
      _write_tensor(f, name, tensors[name], read(name))  # which ends with the call
    files.to_disk(f)


def _write_tensor(f: BinaryIO, name: str, info: TensorInfo, value: np.ndarray):
  if (value.shape, value.dtype) != info:
    raise ValueError(f'{name}: got {value.dtype}{value.shape}, announced {info}')
  check_finite(name, value)
  f.write(memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8)))


def check_finite(name: str, value: np.ndarray):
  """Raises NonFiniteError with the first place where a float array holds NaN or infinity."""
  if value.dtype.kind in 'biu' or not value.size:
    return
  flat = value.reshape(-1)
  block = BLOCK_BYTES // value.dtype.itemsize
  for begin in range(0, flat.size, block):
    finite = np.isfinite(flat[begin : begin + block])
    if not finite.all():
      at = np.unravel_index(begin + int(np.argmin(finite)), value.shape)
      place = tuple(int(i) for i in at)
      raise NonFiniteError(
        f'{name}{list(place)} is {value[place]}: nothing was exported. Lower optim.lr, or export '
        'an earlier checkpoint'
      )
