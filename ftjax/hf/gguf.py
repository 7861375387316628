"""Presents a GGUF file (llama.cpp's format) as a tensor source with HF's names and layout, and as a
HF config.

Quantized tensors are dequantized row by row to float32 by the `gguf` package. The `llama`
architecture stores Q and K for interleaved rotary embedding; they are put back into HF's
half-rotation order here. Names and metadata keys are in families/gguf.py, the tokenizer is in
`gguf_tokenizer.py`, the way out in `gguf_export.py`.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.families import gguf, hf_rope, table
from ftjax.hf import gguf_files
from ftjax.hf.tensor_source import Index, TensorInfo, TensorSource, full_index
from ftjax.models.architecture import Architecture
from ftjax.models.rope_spec import Rope, RopeScaling
from ftjax.runtime.errors import DataError
from ftjax.storage import files

# Those of the `gguf` package whose numbers tests/parity/test_llama_cpp.py compares with ggml's own.
TYPES = (
  'F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K',
  'Q6_K', 'TQ1_0', 'TQ2_0', 'MXFP4',
)  # fmt: skip


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
    self._reader = parts[0].reader
    self.metadata = {k: v for k, v in self._reader.fields.items() if not k.startswith('GGUF.')}
    arch = self.field('general.architecture')
    family = table.of_gguf(arch)
    if family is None or family.gguf is None:
      raise DataError(
        f'{path}: general.architecture={arch!r} is not supported; supported: '
        f'{", ".join(table.gguf_archs())}. Other families are read from their HF folder'
      )
    self._family, self._gguf = family, family.gguf
    self.normalizes = family.gguf.normalizes
    self._stored: dict[str, tuple[Path, Any]] = {}  # (file, tensor of the reader)
    self.tensors: dict[str, TensorInfo] = {}
    self._rope_factors: np.ndarray | None = None
    for part in parts:
      for tensor in part.reader.tensors:
        self._add(part.path, tensor)

  def _add(self, path: Path, tensor: Any) -> None:
    kind = tensor.tensor_type.name
    if kind not in TYPES:
      raise DataError(
        f'{path}: {tensor.name} is {kind}; supported: {", ".join(TYPES)}. Requantize, e.g. to Q8_0'
      )
    is_rope = tensor.name == gguf.ROPE_TENSOR and self._gguf.scales_rope
    name = tensor.name if is_rope else gguf.hf_name(self._family.rows, tensor.name)
    if name is None:
      raise DataError(
        f'{path}: no HF name is known for tensor {tensor.name}; this decoder does not compute with '
        'it'
      )
    if name in self._stored:
      raise DataError(f'{path}: {tensor.name} is also in {self._stored[name][0].name}')
    self._stored[name] = path, tensor
    if is_rope:
      self._rope_factors = self._dequantize(name, slice(None))
      return
    # GGUF lists the fastest axis first.
    shape = tuple(int(n) for n in reversed(tensor.shape))
    self.tensors[name] = TensorInfo(shape, np.dtype(np.float32))

  def key(self, name: str) -> str:
    """Returns the metadata key of a setting of the architecture: 'llama.block_count'."""
    return f'{self._gguf.arch}.{name}'

  def field(self, key: str, default: Any = None) -> Any:
    """Returns a metadata value as a Python value, or `default`."""
    if key not in self.metadata:
      return default
    try:
      return self.metadata[key].contents()
    except gguf_files.READ_ERRORS as e:
      raise DataError(f'{self.place}: metadata {key} cannot be read: {e}') from e

  def need(self, key: str) -> Any:
    """Returns a metadata value that must be there."""
    if key not in self.metadata:
      raise DataError(f'{self.place}: metadata {key} is missing')
    return self.field(key)

  def count(self, key: str, default: int | None = None) -> int:
    """Returns a metadata value that must be a positive whole number."""
    value = self.need(key) if default is None else self.field(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise DataError(
        f'{self.place}: metadata {key} is {value!r}; a positive whole number is expected'
      )
    return value

  def number(self, key: str, default: float | None = None) -> float:
    """Returns a metadata value that must be positive, in its shortest float32 spelling."""
    value = self.need(key) if default is None else self.field(key, default)
    if not isinstance(value, int | float) or not 0 < value < math.inf:
      raise DataError(f'{self.place}: metadata {key} is {value!r}; a positive number is expected')
    return _shortest(value)

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns a tensor or a part of it as float32; dequantizes only the rows that it needs."""
    shape = self.tensors[name].shape
    index = full_index(shape, index)
    if not name.endswith(self._gguf.interleaved):
      return np.ascontiguousarray(self._dequantize(name, index[0])[(slice(None), *index[1:])])
    head_dim = self._head_dim()
    begin, end, _ = index[0].indices(shape[0])
    # Rows move within a head only: read whole heads, undo the order, cut.
    first, last = begin // head_dim * head_dim, -(-end // head_dim) * head_dim
    rows = self._dequantize(name, slice(first, last))
    rows = half_rotation(rows, head_dim)
    return np.ascontiguousarray(rows[(slice(begin - first, end - first), *index[1:])])

  def _dequantize(self, name: str, rows: slice) -> np.ndarray:
    from gguf import dequantize

    path, tensor = self._stored[name]
    stored = self._stored_rows(path, tensor, rows)
    begin, _, _ = rows.indices(tensor.data.shape[0])
    row_bytes = tensor.data.nbytes // max(1, tensor.data.shape[0])
    self.was_read(name, begin * row_bytes, stored.reshape(-1).view(np.uint8))
    # A broken f16 scale may overflow; the non-finite value is found by the check on export.
    with np.errstate(over='ignore', invalid='ignore'):
      return np.array(dequantize(stored, tensor.tensor_type), np.float32)

  def stored(self) -> dict[str, tuple[str, int]]:
    """Returns (quantization and shape, bytes) of every tensor, by its HF name."""
    return {
      name: (f'{t.tensor_type.name} {[int(n) for n in t.shape]}', t.data.nbytes)
      for name, (_, t) in self._stored.items()
    }

  def read_bytes(self, name: str, begin: int, end: int) -> memoryview:
    """Returns a range of a tensor's quantized bytes."""
    path, tensor = self._stored[name]
    if not files.is_remote(path):
      return memoryview(tensor.data.reshape(-1).view(np.uint8)[begin:end])
    with path.open('rb', buffering=0) as file:
      file.seek(tensor.data_offset + begin)
      out = file.read(end - begin)
    if len(out) != end - begin:
      raise DataError(f'{path}: {tensor.name} ends with the file; truncated download?')
    return memoryview(out)

  def _stored_rows(self, path: Path, tensor: Any, rows: slice) -> np.ndarray:
    if not files.is_remote(path):
      return tensor.data[rows]
    shape, dtype = tensor.data.shape, tensor.data.dtype  # of the zeros that stand for it locally
    begin, end, _ = rows.indices(shape[0])
    out = np.empty((max(0, end - begin), *shape[1:]), dtype)
    with path.open('rb', buffering=0) as file:
      file.seek(tensor.data_offset + begin * (tensor.data.nbytes // shape[0]))
      if file.readinto(out.reshape(-1).view(np.uint8)) != out.nbytes:
        raise DataError(f'{path}: {tensor.name} ends with the file; truncated download?')
    return out

  def _head_dim(self) -> int:
    for name in ('attention.key_length', 'rope.dimension_count'):
      if self.key(name) in self.metadata:
        return self.count(self.key(name))
    heads = self.count(self.key('attention.head_count'))
    return self.count(self.key('embedding_length')) // heads

  def architecture(self) -> Architecture:
    """Returns sizes and constants from the metadata.

    Raises:
      DataError: a key is missing, or a rotary embedding that is neither plain nor `llama3`.
    """
    stated = self._stated_config()
    try:
      return table.architecture(stated)
    except DataError as error:
      raise DataError(f'{self.place}, as {error}') from error

  def _stated_config(self) -> dict[str, Any]:
    """Returns the keys of a config.json that the metadata and the tensors give."""
    config: dict[str, Any] = {'model_type': self._family.model_types[0]} | dict(self._gguf.fixed)
    defaults: dict[str, float] = {'rope.freq_base': 10000.0}
    defaults['attention.head_count_kv'] = self.count(self.key('attention.head_count'))
    defaults['attention.key_length'] = head_dim = self._head_dim()
    for name, key in gguf.KEYS.items():
      is_number = name in ('rope.freq_base', 'attention.layer_norm_rms_epsilon')
      read = self.number if is_number else self.count
      config[key] = read(self.key(name), defaults.get(name))  # type: ignore[operator]
    embed, head = self._family.tied
    if embed not in self.tensors:
      raise DataError(f'{self.place}: {gguf.gguf_name(self._family.rows, embed)} is missing')
    config['vocab_size'] = self.tensors[embed].shape[0]
    config['tie_word_embeddings'] = head not in self.tensors
    if scaling := self._rope_scaling(config['rope_theta'], head_dim):
      config |= hf_rope.write(
        Rope(config['rope_theta'], scaling), config['max_position_embeddings']
      )
    return config

  def _rope_scaling(self, theta: float, head_dim: int) -> RopeScaling | None:
    if self.field(self.key('rope.dimension_count'), head_dim) != head_dim:
      raise DataError(
        f'{self.place}: rotary embedding of a part of the head '
        f'({self.key("rope.dimension_count")}) is not supported'
      )
    kind = self.field(self.key('rope.scaling.type'), 'none')
    if kind != 'none' and (kind != 'llama3' or self._rope_factors is None):
      raise DataError(
        f'{self.place}: {self.key("rope.scaling.type")}={kind!r} is not supported; supported: '
        'none, llama3'
      )
    if self._rope_factors is None:
      return None
    original = self.field(self.key('rope.scaling.original_context_length'))
    return llama3_scaling(self._rope_factors, theta, head_dim, original, self.place)

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


def _shortest(value: float) -> float:
  """Returns a float32 constant in its shortest spelling: 1e-05 for 9.999999747378752e-06."""
  return float(str(np.float32(value)))


def llama3_factors(s: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
  """Returns float64[H/2]: the divisor of each rotary frequency under the `llama3` rule.

  Source: Llama 3.1's reference code; transformers, modeling_rope_utils.py.
  """
  wavelen = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
  smooth = (s.original_len / wavelen - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
  smooth = np.clip(smooth, 0.0, 1.0)
  return 1 / ((1 - smooth) / s.factor + smooth)


def llama3_scaling(
  factors: np.ndarray, theta: float, head_dim: int, original_len: int | None, place: str
) -> RopeScaling | None:
  """Recovers the `llama3` parameters from the divisors float32[H/2] that a GGUF file stores instead
  of them.

  On the ramp the inverse divisor is linear in 1/wavelength, which gives two numbers for three
  unknowns: multiplying original_len and both frequency factors by one number changes nothing. So
  the scale is a convention: the file's original_len where it has one, else low_freq_factor = 1,
  as all published Llama 3 models have it.

  Raises:
    DataError: the divisors do not follow the rule, or too few lie on the ramp.
  """
  factors = np.asarray(factors, np.float64)
  if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all():
    raise DataError(
      f'{place}: {gguf.ROPE_TENSOR} has shape {factors.shape}; expected ({head_dim // 2},) finite '
      'numbers'
    )
  if (factors == 1).all():
    return None
  factor = float(factors.max())
  ramp = (factors > 1 + 1e-6) & (factors < factor * (1 - 1e-6))
  refuse = DataError(
    f'{place}: {gguf.ROPE_TENSOR} does not determine a llama3 rope scaling; put the HF folder of '
    'this model in its place'
  )
  if ramp.sum() < 2 or factors[-1] != factor:
    raise refuse
  wavelen = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
  smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
  slope, offset = np.polyfit(
    1 / wavelen[ramp], smooth[ramp], 1
  )  # original/(high-low), -low/(high-low)
  if slope <= 0 or offset >= 0:
    raise refuse
  low = original_len * -offset / slope if original_len else 1.0
  span = low / -offset
  rounded = RopeScaling(_shortest(factor), round(low, 3), round(low + span, 3), round(slope * span))
  error = np.abs(llama3_factors(rounded, theta, head_dim) / factors - 1).max()
  if error > 1e-5:
    raise refuse
  return rounded
