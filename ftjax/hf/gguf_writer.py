"""Writes the GGUF format, version 3: header, metadata, and tensors in blocks of rows.

The `gguf` package's own writer wants a whole tensor at a time and a local file; this one writes
blocks to any file. Its quantization is used.
"""

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from ftjax.hf.tensor_source import TensorInfo, row_blocks
from ftjax.runtime.errors import DataError

TYPES = ('F32', 'F16', 'BF16', 'Q8_0')
ALIGNMENT = 32  # bytes, of the first tensor and of each one
_FLOATS = {'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'), 'BF16': np.dtype(ml_dtypes.bfloat16)}

# Types of metadata values, by the specification (ggml, docs/gguf.md).
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


class Tensor(NamedTuple):
  """A tensor of a GGUF file.

  shape: rows first, as numpy has it. kind: one of TYPES; rows of Q8_0 are multiples of 32 long.
  """

  name: str
  shape: tuple[int, ...]
  kind: str

  @property
  def nbytes(self) -> int:
    """Returns the stored size in bytes."""
    count = math.prod(self.shape)
    # Q8_0: for 32 numbers one byte each and a float16 scale.
    return count // 32 * 34 if self.kind == 'Q8_0' else count * _FLOATS[self.kind].itemsize


def _text(value: str) -> bytes:
  raw = value.encode()
  return struct.pack('<Q', len(raw)) + raw


def _value(value: Any) -> bytes:
  """Returns a metadata value with its type: bool, int (uint32), float (float32), str, or a list of
  bool, int (int32), float or str.
  """
  match value:
    case bool():
      return struct.pack('<I?', _BOOL, value)
    case int():
      return struct.pack('<II', _UINT32, value)
    case float():
      return struct.pack('<If', _FLOAT32, value)
    case str():
      return struct.pack('<I', _STRING) + _text(value)
  if not value:
    raise ValueError('an empty list has no type')
  kind = {bool: _BOOL, int: _INT32, float: _FLOAT32, str: _STRING}[type(value[0])]
  head = struct.pack('<IIQ', _ARRAY, kind, len(value))
  if kind == _STRING:
    return head + b''.join(map(_text, value))
  return head + np.array(value, {_BOOL: '?', _INT32: '<i4', _FLOAT32: '<f4'}[kind]).tobytes()


def header(metadata: Mapping[str, Any], tensors: Sequence[Tensor]) -> bytes:
  """Returns everything before the first tensor, padded.

  Args:
    metadata: general.architecture first; values as `_value` takes them.
    tensors: in the order in which they follow.
  """
  parts = [b'GGUF', struct.pack('<IQQ', 3, len(tensors), len(metadata))]
  parts += [_text(key) + _value(value) for key, value in metadata.items()]
  offset = 0
  for t in tensors:
    shape = tuple(reversed(t.shape))  # the fastest axis first
    kind = _type_number(t.kind)
    parts.append(
      _text(t.name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape, kind, offset)
    )
    offset += t.nbytes + _padding(t.nbytes)
  raw = b''.join(parts)
  return raw + b'\0' * _padding(len(raw))


def _type_number(kind: str) -> int:
  from gguf import GGMLQuantizationType

  return int(GGMLQuantizationType[kind])


def _padding(size: int) -> int:
  return -size % ALIGNMENT


def write(
  file: BinaryIO,
  metadata: Mapping[str, Any],
  tensors: Sequence[Tensor],
  read: Callable[[str], Iterable[np.ndarray]],
) -> None:
  """Writes a whole GGUF file, one part of a tensor in memory at a time, and a block of it encoded.

  Args:
    file: open for writing, empty.
    metadata, tensors: as in `header`.
    read: gives the tensor of a name, of its shape and of any float dtype, finite, in parts that
      follow each other along its first axis.

  Raises:
    DataError: a value that its type cannot hold.
  """
  file.write(header(metadata, tensors))
  for t in tensors:
    written = 0
    for value in read(t.name):
      if value.shape[1:] != t.shape[1:]:
        raise ValueError(f'{t.name}: got {value.shape}, announced {t.shape}')
      for block in encoded(Tensor(t.name, value.shape, t.kind), value):
        file.write(memoryview(block.reshape(-1).view(np.uint8)))
        written += block.nbytes
    if written != t.nbytes:
      raise ValueError(f'{t.name}: wrote {written} bytes, announced {t.nbytes}')
    file.write(b'\0' * _padding(written))


def encoded(tensor: Tensor, value: np.ndarray) -> Iterator[np.ndarray]:
  """Yields the rows of a tensor as they are stored, in blocks.

  Raises:
    DataError: a number becomes infinite.
  """
  for rows in row_blocks(TensorInfo(tensor.shape, np.dtype(np.float32))):
    with np.errstate(over='ignore'):
      block = np.ascontiguousarray(value[rows]).astype(np.float32, copy=False)
      out, scales = _encode(block, tensor.kind)
    if not np.isfinite(scales).all():
      raise DataError(
        f'{tensor.name} holds {float(np.abs(value[rows].astype(np.float64)).max()):g}, which '
        f'{tensor.kind} cannot hold: nothing was written. Choose --dtype=bfloat16 or float32'
      )
    yield out


def _encode(block: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns (the stored bytes or numbers, those numbers in them that may not be infinite)."""
  if kind != 'Q8_0':
    out = block.astype(_FLOATS[kind], copy=False)
    return out, out
  from gguf import GGMLQuantizationType, quantize

  # 1 / d overflows for blocks of denormal numbers, which become 0.
  with np.errstate(all='ignore'):
    out = quantize(block, GGMLQuantizationType.Q8_0)
  scales = out.reshape(-1, 34)[:, :2].copy().view(np.float16)
  return out, scales
