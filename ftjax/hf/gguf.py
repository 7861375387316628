"""Presents a GGUF file (llama.cpp's format) as a tensor source with HF's names and layout, and as a
HF config.

Quantized tensors are dequantized row by row to float32 by the `gguf` package. Where llama.cpp's
layout differs from HF's it is undone here: Q and K that are stored for interleaved rotary embedding
(`llama`), the 1 in norm weights (`gemma3`), transposed matrices (`gpt2`), the matrices of all
experts in one tensor, the order of value heads and the rates of decay (`qwen35`). Names and
metadata keys are in families/gguf.py, the tokenizer is in `gguf_tokenizer.py`, the way out in
`gguf_export.py`.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ftjax.families import gguf, table
from ftjax.families.gguf import Form, Gguf
from ftjax.families.gguf_file import GgufFile
from ftjax.hf import gguf_files
from ftjax.hf.tensor_source import Index, TensorInfo, TensorSource, full_index
from ftjax.models.architecture import Architecture
from ftjax.runtime.errors import DataError
from ftjax.storage import files

# Those of the `gguf` package whose numbers tests/parity/test_llama_cpp.py compares with ggml's own.
TYPES = (
  'F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K',
  'Q6_K', 'TQ1_0', 'TQ2_0', 'MXFP4',
)  # fmt: skip


class _Values(Mapping):
  """The metadata of a file as Python values, each read when it is asked for."""

  def __init__(self, place: str, fields: Mapping[str, Any]):
    self._place = place
    self._fields = {k: v for k, v in fields.items() if not k.startswith('GGUF.')}

  def __getitem__(self, key: str) -> Any:
    try:
      return self._fields[key].contents()
    except gguf_files.READ_ERRORS as error:
      if key not in self._fields:
        raise
      raise DataError(f'{self._place}: metadata {key} cannot be read: {error}') from error

  def __contains__(self, key: object) -> bool:
    return key in self._fields

  def __iter__(self) -> Iterator[str]:
    return iter(self._fields)

  def __len__(self) -> int:
    return len(self._fields)


class _Stored(NamedTuple):
  """A tensor of a file, or the part of one expert.

  tensor: of the `gguf` package's reader. expert: its number where the tensor holds those of all.
  """

  path: Path
  tensor: Any
  expert: int | None = None

  @property
  def data(self) -> np.ndarray:
    """The stored rows, mapped; of a file in a bucket zeros that stand for them."""
    return self.tensor.data if self.expert is None else self.tensor.data[self.expert]

  @property
  def offset(self) -> int:
    """The first byte in the file."""
    return self.tensor.data_offset + (self.expert or 0) * self.data.nbytes

  def part(self, begin: int, out: np.ndarray) -> np.ndarray:
    """Fills `out` with the bytes from `begin` on, of a file in a bucket."""
    with self.path.open('rb', buffering=0) as file:
      file.seek(self.offset + begin)
      if file.readinto(out.reshape(-1).view(np.uint8)) != out.nbytes:
        raise DataError(f'{self.path}: {self.tensor.name} ends with the file; truncated download?')
    return out


class GGUFSource(TensorSource):
  """Reads tensors, as float32, from one GGUF file of a family that families/ knows.

  Of a model in several parts any is given; the others are in the same folder.

  Raises:
    DataError: not a GGUF file, damaged, a part is missing, another architecture, or a tensor type
      or name that is not supported.
  """

  def __init__(self, path: str | os.PathLike):
    super().__init__()
    self.place = str(path)
    parts = gguf_files.open_parts(files.as_path(path))
    self.metadata = _Values(self.place, parts[0].reader.fields)
    arch = self.field('general.architecture')
    family = table.of_gguf(arch, self.metadata)
    if family is None or family.gguf is None:
      raise DataError(
        f'{path}: general.architecture={arch!r} is not supported; supported: '
        f'{", ".join(table.gguf_archs())}. Other families are read from their HF folder'
      )
    self._family, self._gguf = family, family.gguf
    self.normalizes = family.gguf.normalizes
    self._stored: dict[str, _Stored] = {}
    self.tensors: dict[str, TensorInfo] = {}
    header = GgufFile(self.place, arch, self.metadata, {}, {})
    self._surplus = gguf.surplus(header, self._gguf)
    shapes: dict[str, tuple[int, ...]] = {}
    rope: dict[str, np.ndarray] = {}
    for part in parts:
      for tensor in part.reader.tensors:
        # GGUF lists the fastest axis first.
        shapes[tensor.name] = tuple(int(n) for n in reversed(tensor.shape))
        self._add(part.path, tensor, shapes[tensor.name])
        if tensor.name in self._gguf.rope_tensors:
          rope[tensor.name] = self._dequantize(tensor.name, slice(None))
    self.file = GgufFile(self.place, arch, self.metadata, shapes, rope)
    self._forms = self._read_forms()

  def _read_forms(self) -> dict[str, Form]:
    """Returns {HF name: form} of the tensors that are stored in another one; gives HF's shapes."""
    out = {}
    if self._gguf.forms is not Gguf.forms:  # only then are the sizes needed to open a file
      forms = self._gguf.forms(self.architecture())
      for name, info in self.tensors.items():
        if found := gguf.form(forms, name):
          out[name] = found
          if found.squeezed:
            shape = (info.shape[0], 1, *info.shape[1:])
            self.tensors[name] = TensorInfo(shape, info.dtype)
    return out

  def _is_surplus(self, name: str) -> bool:
    """Returns whether a tensor is of a block that is no layer of the model."""
    found = re.match(r'blk\.(\d+)\.', name)
    return found is not None and int(found[1]) in self._surplus

  def _add(self, path: Path, tensor: Any, shape: tuple[int, ...]) -> None:
    if self._is_surplus(tensor.name):
      return
    kind = tensor.tensor_type.name
    if kind not in TYPES:
      raise DataError(
        f'{path}: {tensor.name} is {kind}; supported: {", ".join(TYPES)}. Requantize, e.g. to Q8_0'
      )
    is_rope = tensor.name in self._gguf.rope_tensors
    name = tensor.name if is_rope else gguf.hf_name(self._family.rows, tensor.name)
    if name is None:
      raise DataError(
        f'{path}: no HF name is known for tensor {tensor.name}; this decoder does not compute with '
        'it'
      )
    experts = range(shape[0]) if '{e}' in name else (None,)
    if '{e}' in name:
      shape = shape[1:]
    if name.endswith(self._gguf.transposed):
      shape = shape[::-1]
    for e in experts:
      own = name.replace('{e}', str(e))
      if own in self._stored:
        raise DataError(f'{path}: {tensor.name} is also in {self._stored[own].path.name}')
      self._stored[own] = _Stored(path, tensor, e)
      if not is_rope:
        self.tensors[own] = TensorInfo(shape, np.dtype(np.float32))

  def key(self, name: str) -> str:
    """Returns the metadata key of a setting of the architecture: 'llama.block_count'."""
    return f'{self._gguf.arch}.{name}'

  def field(self, key: str, default: Any = None) -> Any:
    """Returns a metadata value as a Python value, or `default`."""
    return self.metadata.get(key, default)

  def need(self, key: str) -> Any:
    """Returns a metadata value that must be there."""
    if key not in self.metadata:
      raise DataError(f'{self.place}: metadata {key} is missing')
    return self.field(key)

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns a tensor or a part of it as float32; dequantizes only the rows that it needs."""
    shape = self.tensors[name].shape
    index = full_index(shape, index)
    if name in self._forms:
      return self._read_formed(name, self._forms[name], index)
    if name.endswith(self._gguf.transposed):
      return np.ascontiguousarray(self._dequantize(name, index[1])[:, index[0]].T)
    if name.endswith(self._gguf.interleaved):
      return self._read_half_rotated(name, index)
    value = self._dequantize(name, index[0])[(slice(None), *index[1:])]
    if name.endswith(self._gguf.shifted):
      value = value - 1
    return np.ascontiguousarray(value)

  def _read_formed(self, name: str, form: Form, index: Index) -> np.ndarray:
    shape = self.tensors[name].shape
    inner = index[1:]
    if form.squeezed:
      outer, inner = index[1], index[2:]
    if form.order and form.axis == 0:
      places = np.array(form.order)[index[0]]
      begin, end = (places.min(), places.max() + 1) if places.size else (0, 0)
      value = self._dequantize(name, slice(int(begin), int(end)))[places - begin]
    else:
      value = self._dequantize(name, index[0])
    if form.order and form.axis == 1:
      value = value[:, np.array(form.order)[inner[0]]]
      inner = (slice(None), *inner[1:])
    value = value[(slice(None), *inner)]
    if form.squeezed:
      value = value[:, None][:, slice(*outer.indices(shape[1]))]
    if form.decay:
      with np.errstate(divide='ignore', invalid='ignore'):  # a check of the numbers names them
        value = np.log(-value.astype(np.float64)).astype(np.float32)
    return np.ascontiguousarray(value)

  def _read_half_rotated(self, name: str, index: Index) -> np.ndarray:
    head_dim = self.file.head_dim()
    begin, end, _ = index[0].indices(self.tensors[name].shape[0])
    # Rows move within a head only: read whole heads, undo the order, cut.
    first, last = begin // head_dim * head_dim, -(-end // head_dim) * head_dim
    rows = half_rotation(self._dequantize(name, slice(first, last)), head_dim)
    return np.ascontiguousarray(rows[(slice(begin - first, end - first), *index[1:])])

  def _dequantize(self, name: str, rows: slice) -> np.ndarray:
    from gguf import dequantize

    found = self._stored[name]
    begin, end, _ = rows.indices(found.data.shape[0])
    row_bytes = found.data.nbytes // max(1, found.data.shape[0])
    if files.is_remote(found.path):
      shape = (max(0, end - begin), *found.data.shape[1:])
      stored = found.part(begin * row_bytes, np.empty(shape, found.data.dtype))
    else:
      stored = found.data[rows]
    self.was_read(name, begin * row_bytes, stored.reshape(-1).view(np.uint8))
    # A broken f16 scale may overflow; the non-finite value is found by the check on export.
    with np.errstate(over='ignore', invalid='ignore'):
      return np.array(dequantize(stored, found.tensor.tensor_type), np.float32)

  def stored(self) -> dict[str, tuple[str, int]]:
    """Returns (quantization and shape, bytes) of every tensor, by its HF name."""
    return {
      name: (f'{s.tensor.tensor_type.name} {[int(n) for n in s.tensor.shape]}', s.data.nbytes)
      for name, s in self._stored.items()
    }

  def read_bytes(self, name: str, begin: int, end: int) -> memoryview:
    """Returns a range of a tensor's quantized bytes."""
    found = self._stored[name]
    if files.is_remote(found.path):
      return memoryview(found.part(begin, np.empty(end - begin, np.uint8)))
    return memoryview(found.data.reshape(-1).view(np.uint8)[begin:end])

  def architecture(self) -> Architecture:
    """Returns sizes and constants from the metadata.

    Raises:
      DataError: a key is missing, or something that is not computed here.
    """
    return table.gguf_architecture(self._family, self.file)

  def config(self) -> dict[str, Any]:
    """Returns a HF config.json."""
    ids = {key: self.field(f'tokenizer.ggml.{name}') for key, name in TOKEN_ID_KEYS.items()}
    ids = {key: int(value) for key, value in ids.items() if value is not None}
    return table.config(self.architecture()) | ids | {'torch_dtype': 'float32', 'use_cache': True}


TOKEN_ID_KEYS = {
  'bos_token_id': 'bos_token_id',
  'eos_token_id': 'eos_token_id',
  'pad_token_id': 'padding_token_id',
}


def half_rotation(rows: np.ndarray, head_dim: int) -> np.ndarray:
  """Puts each head's rows, stored in the order 0, H/2, 1, H/2 + 1, ..., in the order 0 .. H-1.

  Args:
    rows: float[(N H), D], whole heads.
    head_dim: H.
  """
  heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
  return heads.swapaxes(1, 2).reshape(rows.shape)


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
  """Undoes `half_rotation`: puts each head's rows in the order 0, H/2, 1, H/2 + 1, ..."""
  heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
  return heads.swapaxes(1, 2).reshape(rows.shape)
