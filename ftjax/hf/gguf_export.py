"""Writes a model as one GGUF file, for llama.cpp and Ollama, with a Modelfile beside it.

Tensors are written one at a time into a temporary file that is renamed to the target when it is
complete. What a family is in such a file is in families/gguf.py, the tokenizer in
gguf_vocabulary.py, the format in gguf_writer.py.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ftjax.data.tokenizer import Tokenizer
from ftjax.families import gguf, table
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.hf import gguf_vocabulary, gguf_writer, layout, modelfile
from ftjax.hf.gguf import interleaved, llama3_factors
from ftjax.hf.gguf_writer import Tensor
from ftjax.hf.safetensors import check_finite
from ftjax.models.architecture import Architecture
from ftjax.models.rope_spec import Rope, RopeScaling
from ftjax.runtime.errors import DataError
from ftjax.storage import files as files_lib

_MAGIC = b'GGUF'
_KINDS = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'q8_0': 'Q8_0'}
DTYPES = tuple(_KINDS)


def is_gguf(target: str | os.PathLike) -> bool:
  """Returns whether a target names a GGUF file."""
  return os.fspath(target).endswith('.gguf')


def check_target(target: str | os.PathLike) -> None:
  """Raises DataError where the file, or the Modelfile beside it, is somebody else's."""
  path = files_lib.as_path(target)
  if path.is_dir():
    raise DataError(f'{path} is a folder; give the name of a file')
  if path.is_file():
    with path.open('rb') as file:
      if file.read(len(_MAGIC)) != _MAGIC:
        raise DataError(f'{path} is there and is no GGUF file; it is not replaced')
  beside = path.with_name(modelfile.NAME)
  if beside.is_file() and not beside.read_bytes().startswith(modelfile.MARK.encode()):
    raise DataError(
      f'{beside} is there and was not written by ftjax.convert; it is not replaced. Write the GGUF '
      'file into another folder'
    )


def export(
  target: str | os.PathLike,
  arch: Architecture,
  config: Mapping[str, Any],
  files: Mapping[str, bytes],
  read: Callable[[str], np.ndarray],
  dtypes: Mapping[str, str],
) -> str:
  """Writes the file and its Modelfile, completely or not at all.

  Vectors (norms, biases) are float32, and so are matrices of q8_0 whose rows are no multiple of 32.

  Args:
    target: of the file; replaced if it is a GGUF file.
    arch, config, files: of the model, as `load` reads them.
    read: gives a tensor by its HF name, in HF's layout.
    dtypes: {HF name: one of DTYPES}.

  Returns:
    a line about what was written.

  Raises:
    NonFiniteError: a tensor holds NaN or infinity.
    DataError: the target is somebody else's, or llama.cpp would not compute the same model. Nothing
      is left behind, an older target stays.
  """
  check_target(target)
  path = files_lib.as_path(target)
  known = _known(table.of(arch), arch)
  tokenizer = Tokenizer(files, str(path))
  names = _names(table.of(arch), arch)
  metadata = _metadata(arch, known, path.name)
  metadata |= gguf_vocabulary.metadata(
    tokenizer, arch.vocab_size, config, normalizes=known.normalizes
  )
  shapes = {name: b[0].hf_shape for name, b in layout.by_tensor(arch).items()}
  tensors = [Tensor(g, shapes[n], _kind(shapes[n], dtypes[n])) for g, n in names.items()]
  metadata |= _file_type(tensors)
  head_dim = arch.layers()[0].mixer.head_dim

  def value(name: str) -> np.ndarray:
    if name == gguf.ROPE_TENSOR:
      return _rope_factors(arch)
    found = read(names[name])
    check_finite(names[name], found)
    return interleaved(found, head_dim) if names[name].endswith(known.interleaved) else found

  if (factors := _rope_factors(arch)) is not None:
    tensors.append(Tensor(gguf.ROPE_TENSOR, factors.shape, 'F32'))
  beside = path.with_name(modelfile.NAME), modelfile.text(path.name, tokenizer)
  with _whole_file(path) as file:
    gguf_writer.write(file, metadata, tensors, value)
  files_lib.write_text(*beside)
  size = sum(t.nbytes for t in tensors)
  return f'{path}: {len(tensors)} tensors, {size / 1e6:.1f} MB, and {modelfile.NAME} beside it'


def _known(family: Family, arch: Architecture) -> Gguf:
  """Returns what the family is in GGUF files; checks that they can hold the model."""
  if family.gguf is None:
    raise DataError(
      f'model_type {family.model_types[0]} is not written as GGUF; supported: '
      f'{", ".join(table.gguf_archs())}. Export a Hugging Face folder'
    )
  if arch.num_labels:
    raise DataError('a reward model has no form in GGUF files; export a Hugging Face folder')
  if any(spec != arch.layers()[0] for spec in arch.layers()):
    raise DataError('layers that differ have no form in GGUF files here')
  rope = arch.layers()[0].mixer.rope
  if rope is None or not _has_rope(rope):
    raise DataError(f'a model with {rope=} is not written as GGUF; export a Hugging Face folder')
  if rope.scaling and not family.gguf.scales_rope:
    raise DataError(
      f'config.json: rope_scaling is not applied by llama.cpp for the architecture '
      f'{family.gguf.arch!r}; export a Hugging Face folder'
    )
  return family.gguf


def _has_rope(rope: Rope) -> bool:
  """Returns whether the files can hold a rotary embedding: whole heads, plain or `llama3`."""
  known = rope.scaling is None or isinstance(rope.scaling, RopeScaling)
  return known and rope == Rope(rope.theta, rope.scaling)


def _names(family: Family, arch: Architecture) -> dict[str, str]:
  """Returns {name in the file: HF name} of all tensors."""
  out = {}
  for name in layout.by_tensor(arch):
    stored = gguf.gguf_name(family.rows, name)
    if stored is None:
      raise DataError(f'{name} has no name in GGUF files')
    out[stored] = name
  return out


def _metadata(arch: Architecture, known: Gguf, name: str) -> dict[str, Any]:
  """Returns the metadata of the model, without its tokenizer."""
  config, block = table.config(arch), arch.layers()[0]
  out: dict[str, Any] = {
    'general.architecture': known.arch,
    'general.type': 'model',
    'general.name': name.removesuffix('.gguf'),
    f'{known.arch}.vocab_size': arch.vocab_size,
    f'{known.arch}.attention.value_length': block.mixer.head_dim,
    f'{known.arch}.rope.dimension_count': block.mixer.head_dim,
  }
  out |= {f'{known.arch}.{key}': config[hf] for key, hf in gguf.KEYS.items()}
  if scaling := block.mixer.rope.scaling:
    # No rope.scaling.type: llama.cpp knows none of this name and applies the tensor without it.
    out[f'{known.arch}.rope.scaling.original_context_length'] = scaling.original_len
  return out


def _rope_factors(arch: Architecture) -> np.ndarray | None:
  """Returns float32[H/2], the divisors of the rotary frequencies; None where all are 1."""
  mixer = arch.layers()[0].mixer
  if not mixer.rope.scaling:
    return None
  return llama3_factors(mixer.rope.scaling, mixer.rope.theta, mixer.head_dim).astype(np.float32)


def _kind(shape: tuple[int, ...], dtype: str) -> str:
  kind = _KINDS.get(dtype, 'F32')  # of another stored type, float64 say
  if len(shape) < 2 or (kind == 'Q8_0' and shape[-1] % 32):
    return 'F32'
  return kind


def _file_type(tensors: list[Tensor]) -> dict[str, int]:
  """Returns general.file_type, which names the type of most weights, and its companion."""
  from gguf import GGML_QUANT_VERSION, LlamaFileType

  largest = max(tensors, key=lambda t: t.nbytes).kind
  names = {'F32': 'ALL_F32', 'F16': 'MOSTLY_F16', 'BF16': 'MOSTLY_BF16', 'Q8_0': 'MOSTLY_Q8_0'}
  return {
    'general.file_type': int(LlamaFileType[names[largest]]),
    'general.quantization_version': GGML_QUANT_VERSION,
  }


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
  """Yields a file that replaces `path` when the block ends well, else is removed."""
  if files_lib.is_remote(path):
    with path.open('wb') as file:  # an object appears once it is closed, and not after an error
      yield file
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.partial')
  try:
    with temporary.open('wb') as file:
      yield file
      files_lib.to_disk(file)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
