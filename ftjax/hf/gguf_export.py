"""Writes a model as one GGUF file, for llama.cpp and Ollama, with a Modelfile beside it.

Tensors are written one at a time into a temporary file that is renamed to the target when it is
complete. What a family is in such a file is in families/gguf.py, the tokenizer in
gguf_vocabulary.py, the format in gguf_writer.py.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ftjax.data.tokenizer import Tokenizer
from ftjax.families import gguf, gguf_rope, table
from ftjax.families.family import Family
from ftjax.families.gguf import Form, Gguf
from ftjax.families.gguf_file import GgufFile
from ftjax.hf import gguf_kept, gguf_vocabulary, gguf_writer, layout, modelfile
from ftjax.hf.gguf import interleaved
from ftjax.hf.gguf_writer import Tensor
from ftjax.hf.safetensors import check_finite
from ftjax.models.architecture import Architecture
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files as files_lib

_MAGIC = b'GGUF'
_KINDS = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'q8_0': 'Q8_0'}
DTYPES = tuple(_KINDS)
# Float32 in all files, as they are computed: routers of experts, and convolutions.
_FLOAT32 = ('ffn_gate_inp.weight', 'ssm_conv1d.weight')


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


def check_outside(target: str, folder: Path):
  """Raises ConfigError for a GGUF file in a model folder."""
  parent = files_lib.as_path(target).parent
  is_remote = files_lib.is_remote(parent) or files_lib.is_remote(folder)
  if parent == folder if is_remote else parent.resolve() == folder.resolve():
    raise ConfigError(
      f'--target={target} is in the folder of the source, which would hold two models; give '
      'another folder'
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
  head_dim, forms = gguf.attention(arch).mixer.head_dim, known.forms(arch)
  rope = gguf_rope.tensors(gguf.file_rope(arch), head_dim)
  shapes = _shapes(arch, known, names, forms)
  gguf_kept.check(arch, GgufFile(str(path), known.arch, metadata, shapes, rope))
  metadata |= gguf_vocabulary.metadata(
    tokenizer, arch.vocab_size, config, normalizes=known.normalizes
  )
  kinds = {name: _kind(name, shapes[name], dtypes[parts[0]]) for name, parts in names.items()}
  tensors = [Tensor(name, shape, kinds[name]) for name, shape in shapes.items()]
  metadata |= _file_type(tensors)
  tensors += [Tensor(name, factors.shape, 'F32') for name, factors in rope.items()]

  def parts(name: str) -> Iterator[np.ndarray]:
    if name in rope:
      yield rope[name]
      return
    for hf in names[name]:
      found = read(hf)
      check_finite(hf, found)
      found = _as_stored(found, hf, known, head_dim, gguf.form(forms, hf))
      check_finite(name, found)  # -exp(x) may be none
      yield found[None] if _is_stacked(name) else found

  beside = path.with_name(modelfile.NAME), modelfile.text(path.name, tokenizer)
  with _whole_file(path) as file:
    gguf_writer.write(file, metadata, tensors, parts)
  files_lib.write_text(*beside)
  size = sum(t.nbytes for t in tensors)
  return f'{path}: {len(tensors)} tensors, {size / 1e6:.1f} MB, and {modelfile.NAME} beside it'


def _known(family: Family, arch: Architecture) -> Gguf:
  """Returns what the family is in GGUF files; checks that they can hold the model."""
  known = family.gguf
  if known is None:
    raise DataError(
      f'model_type {family.model_types[0]} is not written as GGUF; supported: '
      f'{", ".join(table.gguf_archs())}. Export a Hugging Face folder'
    )
  if arch.num_labels:
    raise DataError('a reward model has no form in GGUF files; export a Hugging Face folder')
  mixer = gguf.attention(arch).mixer
  if set(gguf_rope.tensors(gguf.file_rope(arch), mixer.head_dim)) - set(known.rope_tensors):
    raise DataError(
      f'config.json: rope_scaling is not applied by llama.cpp for the architecture '
      f'{known.arch!r}; export a Hugging Face folder'
    )
  if known.tied is not None and arch.tied != known.tied:
    raise DataError(
      f'config.json: tie_word_embeddings={arch.tied} is not computed by llama.cpp for the '
      f'architecture {known.arch!r}; export a Hugging Face folder'
    )
  width = mixer.num_heads * mixer.head_dim
  if known.square and width != arch.model_dim:
    raise DataError(
      f'config.json: {mixer.num_heads} heads of {mixer.head_dim} are {width} wide and the model '
      f'{arch.model_dim}; llama.cpp requires equal widths for the architecture {known.arch!r}. '
      'Export a Hugging Face folder'
    )
  return known


def _names(family: Family, arch: Architecture) -> dict[str, list[str]]:
  """Returns {name in the file: HF names} of all tensors: one, or those of all experts in order."""
  out: dict[str, list[str]] = {}
  for name in layout.by_tensor(arch):
    stored = gguf.gguf_name(family.rows, name)
    if stored is None:
      raise DataError(f'{name} has no name in GGUF files')
    out.setdefault(stored, []).append(name)
  return out


def _shapes(
  arch: Architecture,
  known: Gguf,
  names: Mapping[str, Sequence[str]],
  forms: Mapping[str, Form],
) -> dict[str, tuple[int, ...]]:
  """Returns {name in the file: shape}, rows first."""
  found, out = layout.by_tensor(arch), {}
  for name, parts in names.items():
    shape = found[parts[0]][0].hf_shape
    shape = shape[::-1] if parts[0].endswith(known.transposed) else shape
    if (form := gguf.form(forms, parts[0])) and form.squeezed:
      shape = (shape[0], *shape[2:])
    out[name] = (len(parts), *shape) if _is_stacked(name) else shape
  return out


def _is_stacked(name: str) -> bool:
  """Returns whether a tensor holds those of all experts, also of one."""
  return '_exps.' in name


def _as_stored(
  value: np.ndarray, name: str, known: Gguf, head_dim: int, form: Form | None
) -> np.ndarray:
  """Returns a tensor of HF's in the layout of the file; name: HF's."""
  if form:
    return _formed(value, form)
  if name.endswith(known.transposed):
    return value.T
  if name.endswith(known.interleaved):
    return interleaved(value, head_dim)
  if name.endswith(known.shifted):
    # Rounded to float32 as llama.cpp's converter does, and as the norm itself adds them.
    return value.astype(np.float32) + np.float32(1)
  return value


def _formed(value: np.ndarray, form: Form) -> np.ndarray:
  if form.squeezed:
    value = value[:, 0]
  if form.order:
    value = value.take(np.argsort(form.order), form.axis)
  if form.decay:
    with np.errstate(over='ignore'):
      return (-np.exp(value.astype(np.float64))).astype(np.float32)
  return value


def _metadata(arch: Architecture, known: Gguf, name: str) -> dict[str, Any]:
  """Returns the metadata of the model, without its tokenizer."""
  out: dict[str, Any] = {
    'general.architecture': known.arch,
    'general.type': 'model',
    'general.name': name.removesuffix('.gguf'),
  }
  return out | {f'{known.arch}.{key}': value for key, value in known.write(arch).items()}


def _kind(name: str, shape: tuple[int, ...], dtype: str) -> str:
  if name.endswith(_FLOAT32):
    return 'F32'
  kind = _KINDS.get(dtype, 'F32')  # of another stored type, float64 say
  if len(shape) < 2 or (kind == 'Q8_0' and shape[-1] % 32):
    return 'F32'
  return kind


def _file_type(tensors: Iterable[Tensor]) -> dict[str, int]:
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
