"""Defines what the rest of `hf/` reads weights from: named tensors, and the hash of their content.

`safetensors.SafetensorsFolder` and `gguf.GGUFSource` are the two sources; `load.open_source` opens
one for a path. Opening reads headers only.

The fingerprint of a model is SHA-256 over its tensors in the order of their names: name, stored
type, stored shape and SHA-256 of the stored bytes. It depends neither on the order of reading nor
on how the tensors are distributed over files. A source that was asked to hashes the bytes while
they are read for loading, so a fresh run reads its weights once:

- Each tensor has a cursor. A read that begins at or before the cursor and ends behind it extends
  the hash by the new bytes. Every read of a whole tensor does, and so do shards along the first
  stored axis when they are read in ascending order.
- `fingerprint` reads what was not hashed that way: tensors that nothing loads, and shards that
  were read in another order, or by another process.
"""

import abc
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

Index = tuple[slice, ...]

BLOCK_BYTES = 32 << 20  # unit of reading and hashing


class TensorInfo(NamedTuple):
  """Shape and dtype of a tensor."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Returns the size in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


class _Cursor:
  """The hash of a tensor's first `done` bytes."""

  def __init__(self, size: int):
    self.size, self.done, self.digest = size, 0, hashlib.sha256()

  def feed(self, begin: int, data: Any) -> None:
    """Extends the hash by those bytes of `data`, at offset `begin`, that continue it."""
    view = memoryview(data)
    if begin <= self.done < begin + len(view):
      self.digest.update(view[self.done - begin :])
      self.done = begin + len(view)


class TensorSource(abc.ABC):
  """Named tensors of a model's files, in HF's names and layout.

  tensors: shape and dtype of what `read` returns, by name. place: the folder or file, for messages.
  """

  tensors: Mapping[str, TensorInfo]
  place: str

  def __init__(self) -> None:
    self._cursors: dict[str, _Cursor] = {}
    self._fingerprint = ''

  @abc.abstractmethod
  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns the tensor, or the part that a tuple of step-1 slices selects, as a new array."""

  @abc.abstractmethod
  def stored(self) -> dict[str, tuple[str, int]]:
    """Returns (type and shape as text, bytes) of every stored tensor, by its stored name."""

  @abc.abstractmethod
  def read_bytes(self, name: str, begin: int, end: int) -> memoryview:
    """Returns a range of the bytes of a stored tensor."""

  def hash_reads(self) -> None:
    """Makes every later read extend the hash of its tensor."""
    if not self._cursors:
      self._cursors = {name: _Cursor(size) for name, (_, size) in self.stored().items()}

  def was_read(self, name: str, begin: int, data: Any) -> None:
    """Extends the hash by stored bytes that were just read; subclasses call it.

    Args:
      name: of the stored tensor.
      begin: offset of the bytes in it.
      data: contiguous bytes.
    """
    if name in self._cursors:
      self._cursors[name].feed(begin, data)

  def fingerprint(self) -> str:
    """Returns the hash of the content, in hex; reads the bytes that are not hashed yet."""
    if self._fingerprint:
      return self._fingerprint
    self.hash_reads()
    whole, stored = hashlib.sha256(b'ftjax weights 2\n'), self.stored()
    for name in sorted(stored):
      cursor = self._cursors[name]
      while cursor.done < cursor.size:
        begin, end = cursor.done, min(cursor.size, cursor.done + BLOCK_BYTES)
        cursor.feed(begin, self.read_bytes(name, begin, end))
      whole.update(f'{name}\0{stored[name][0]}\0{cursor.digest.hexdigest()}\n'.encode())
    self._fingerprint = whole.hexdigest()
    return self._fingerprint


class DerivedSource(TensorSource):
  """Tensors that are made of those of another source; its bytes are the stored ones, so the
  fingerprint is that of the other source.
  """

  def __init__(self, source: TensorSource):
    super().__init__()
    self._source, self.place, self.tensors = source, source.place, dict(source.tensors)

  def stored(self) -> dict[str, tuple[str, int]]:
    """Returns (type and shape as text, bytes) of every stored tensor, by its stored name."""
    return self._source.stored()

  def read_bytes(self, name: str, begin: int, end: int) -> memoryview:
    """Returns a range of the bytes of a stored tensor."""
    return self._source.read_bytes(name, begin, end)


class RenamedSource(DerivedSource):
  """Tensors of another source under other names.

  names: {name here: name there} of the tensors that are here.
  """

  def __init__(self, source: TensorSource, names: Mapping[str, str]):
    super().__init__(source)
    self._names = names
    self.tensors = {name: source.tensors[there] for name, there in names.items()}

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns the tensor, or the part that a tuple of step-1 slices selects, as a new array."""
    return self._source.read(self._names[name], index)


def full_index(shape: tuple[int, ...], index: Index | None) -> Index:
  """Returns an index with one slice for each axis; None means everything."""
  index = () if index is None else tuple(index)
  if any(s.step not in (None, 1) for s in index) or len(index) > len(shape):
    raise ValueError(
      f'index {index} of a tensor of shape {shape}: expected at most one step-1 slice an axis'
    )
  return index + (slice(None),) * (len(shape) - len(index))


def row_blocks(info: TensorInfo, limit: int = BLOCK_BYTES) -> Iterator[slice]:
  """Yields slices of the first axis that cover a tensor in blocks of about `limit` bytes."""
  rows = info.shape[0]
  step = max(1, limit // max(1, info.nbytes // max(1, rows)))
  for row in range(0, rows, step):
    yield slice(row, min(rows, row + step))
