"""Reads HF folders and GGUF files: config, tokenizer files, and weights streamed into the sharding
they will have.

Strict in both directions: every parameter is filled, every tensor of the file is used, else an
error with the names. Next: families/ for the tensor maps, `layout.py` for the layouts,
`safetensors.py` for the files, `export.py` for the way out.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ftjax.families import hf_config, multimodal, table, tensor_map
from ftjax.families.tensor_map import Binding
from ftjax.hf import (
  file_marks,
  fused_tensors,
  gguf_tokenizer,
  layout,
  model_folder,
  stored_head,
  weight_files,
)
from ftjax.hf.gguf import GGUFSource
from ftjax.hf.new_head import with_head
from ftjax.hf.new_rows import GrownSource, NewRows
from ftjax.hf.safetensors import SafetensorsFolder
from ftjax.hf.tensor_source import RenamedSource, TensorSource, row_blocks
from ftjax.models.architecture import Architecture
from ftjax.runtime import trees
from ftjax.runtime.errors import DataError
from ftjax.storage import files

if TYPE_CHECKING:
  # Converting files needs no jax and should start quickly; `load_params` imports it.
  import jax

log = logging.getLogger(__name__)

_BLOCK_BYTES = 32 << 20


def open_source(path: str | os.PathLike) -> TensorSource:
  """Returns the tensor source of a HF folder, of a GGUF file, or of a folder with one GGUF model;
  of a PEFT folder its own tensors.

  A process opens the same files once: what their weights were hashed for is then known to whoever
  asks for the fingerprint, and headers are read once.
  """
  path = model_folder.locate_any(path)
  return _cached_source(path, file_marks.stamp(path))


@functools.lru_cache(maxsize=4)
def _cached_source(path: str, stamped: tuple) -> TensorSource:
  del stamped  # files that changed are opened again
  if model_folder.is_adapter(files.as_path(path)):
    return SafetensorsFolder(path, model_folder.ADAPTER_WEIGHTS)
  file = model_folder.gguf_file(files.as_path(path))
  if file is not None:
    return GGUFSource(file)
  has_config = (files.as_path(path) / 'config.json').is_file()
  wrapper = multimodal.of(weight_files.read_config(files.as_path(path))) if has_config else None
  return SafetensorsFolder(path, rename=wrapper.name if wrapper else None)


def read_config(path: str | os.PathLike) -> dict[str, Any]:
  """Returns the config.json of a HF folder, or one derived from the metadata of a GGUF file; of a
  model with a text part that of the text part.

  Settings that are read and not applied (dropout) are logged once.
  """
  folder = files.as_path(model_folder.locate(path, weights=False))
  file = model_folder.gguf_file(folder)
  if file is not None:
    return GGUFSource(file).config()
  if not (folder / 'config.json').is_file():
    raise model_folder.no_config(folder)
  config = weight_files.read_config(folder)
  if 'model_type' not in config and 'algorithm' in config:
    raise DataError(
      f'{path} is a workdir of ftjax.train, not a model folder. Give {path}/export, which a run '
      f'writes at its end, or make a folder of a checkpoint: python -m ftjax.convert '
      f'--source={path} --target=DIR'
    )
  config = multimodal.text_config(config, functools.partial(_stored_names, path))
  stored = functools.partial(_stored_names, path), functools.partial(open_source, path)
  config = stored_head.settle(config, *stored)
  is_encoder = table.is_known(config) and table.named(table.find(config)).is_encoder
  for line in hf_config.notices(config, is_encoder):
    _warn_once(f'{folder}/{line}')
  return config


def module_prefix(path: str | os.PathLike) -> str:
  """Returns what begins the names of a model's layers in the class that transformers opens it with,
  'model.' but for the text part of a multimodal model.
  """
  folder = files.as_path(model_folder.locate(path, weights=False))
  if model_folder.gguf_file(folder) is not None or not (folder / 'config.json').is_file():
    return multimodal.MODULES
  wrapper = multimodal.of(weight_files.read_config(folder))
  return wrapper.modules if wrapper else multimodal.MODULES


def _stored_names(path: str | os.PathLike) -> list[str]:
  """Returns the names of the tensors in the files of a HF folder, which are downloaded where no
  index lists them.
  """
  folder = files.as_path(model_folder.locate(path, weights=False))
  if (folder / weight_files.INDEX_FILE).is_file():
    return list(weight_files.weight_map(folder))
  return [*SafetensorsFolder(model_folder.locate(path, weights=True)).tensors]


@functools.cache
def _warn_once(line: str) -> None:
  """Logs a line once a process, however often a model is opened."""
  log.warning('%s', line)


def tokenizer_files(path: str | os.PathLike) -> dict[str, bytes]:
  """Returns the tokenizer's files by name, and config.json as `read_config` gives it; of a GGUF
  file: from its metadata.

  Names of further chat templates begin with 'additional_chat_templates/'.
  """
  folder = files.as_path(model_folder.locate(path, weights=False))
  file = model_folder.gguf_file(folder)
  if file is not None:
    source = GGUFSource(file)
    return gguf_tokenizer.files(source) | {'config.json': gguf_tokenizer.dump_json(source.config())}
  config = ['config.json'] if (folder / 'config.json').exists() else []
  found = [*model_folder.side_files(folder), *config]
  out = {name: model_folder.read(folder, name) for name in found}
  if config and multimodal.of(weight_files.read_config(folder)):
    out = {n: x for n, x in out.items() if n not in model_folder.PROCESSOR_FILES}
    out['config.json'] = gguf_tokenizer.dump_json(read_config(path))
  if differing := model_folder.differing_templates(str(folder), out):
    _warn_once(differing)
  return out


def open_model_source(path: str | os.PathLike, arch: Architecture) -> TensorSource:
  """Returns the tensors of a model's files under the names of its family's tensor map, without the
  heads of an encoder that `arch` does not have.
  """
  source = open_source(path)
  source = RenamedSource(source, table.of(arch).names(arch, source.tensors))
  return with_head(fused_tensors.in_family_form(source, arch), arch, None, 0)


def check_tensors(source: TensorSource, arch: Architecture):
  """Compares the names and shapes of a file with what a model needs.

  Raises:
    DataError: names every tensor that is missing, left over or of another shape; or a tied model's
      head differs from its embedding.
  """
  family = table.of(arch)
  need = {b.hf: b for b in family.bindings(arch)}
  have = dict(source.tensors)
  embed, head = family.tied
  if arch.tied and head in have:
    _check_tied(source, embed, head)
    del have[head]
  left = sorted(n for n in have if n not in need and not family.unused.fullmatch(n))
  problems = [f'missing {name} (parameter {need[name].leaf})' for name in need if name not in have]
  problems += [f'no parameter takes {name} {list(have[name].shape)}' for name in left]
  problems += [
    f'{name} is {list(have[name].shape)}, expected {list(b.hf_shape)} for parameter {b.leaf}'
    for name, b in need.items()
    if name in have and have[name].shape != b.hf_shape
  ]
  problems += [
    f'{name} is {have[name].dtype}, a float type is expected'
    for name in need
    if name in have and have[name].dtype.kind not in 'fV'
  ]
  if problems:
    more = f'; and {len(problems) - 8} more' if len(problems) > 8 else ''
    hint = ''
    if not arch.tied and head not in have:
      hint = '. If the head is the embedding, config.json needs tie_word_embeddings: true'
    raise DataError(
      f'{source.place} does not fit its config.json: {"; ".join(problems[:8])}{more}{hint}'
    )


def _check_tied(source: TensorSource, embed: str, head: str):
  same = embed in source.tensors and source.tensors[embed] == source.tensors[head]
  if same:
    blocks = row_blocks(source.tensors[embed])
    # Bytes are compared: equal for NaN too, and that is another check's matter.
    same = all(
      source.read(embed, (b,)).tobytes() == source.read(head, (b,)).tobytes() for b in blocks
    )
  if not same:
    raise DataError(
      f'{source.place}: config.json has tie_word_embeddings: true, but {head} differs from '
      f'{embed}. Set it to false if the file is right, or delete the tensor'
    )


def load_params(
  path: str | os.PathLike,
  arch: Architecture,
  shardings: Mapping,
  dtype: np.dtype,
  seed: int = 0,
  new_rows: NewRows | None = None,
  head_of: Architecture | None = None,
) -> dict[str, jax.Array]:
  """Reads the weights of a model into arrays of a given sharding, as a nested dict.

  One leaf at a time, largest first; of it one shard at a time, and of that one tensor of the file,
  in blocks of rows. So the host holds, beyond the parameters themselves, one leaf at most.

  Args:
    path: HF folder or GGUF file.
    arch: the model, from `read_config`.
    shardings: a `jax.sharding.Sharding` for each parameter, a nested dict like the result.
    dtype: of all parameters that declare none of their own.
    seed: of leaves that the files do not hold: adapters, and the head of an encoder.
    new_rows: of the vocabulary, which they do not hold either.
    head_of: the model that the files of an encoder describe, where its head is another one than
      that of `arch`; None: all of the head must be there.

  Raises:
    DataError: see `check_tensors`.
  """
  from ftjax.cluster import processes
  from ftjax.models import kinds

  source = open_model_source(path, arch)
  if head_of is not None:
    source = with_head(source, arch, head_of, seed)
  if new_rows:
    source = GrownSource(source, new_rows, table.of(arch).tied)
  check_tensors(source, arch)
  declared, places = kinds.declared(arch), trees.flatten(shardings)
  whole_model = kinds.declared(arch.plain())
  rows: dict[str, list[Binding]] = {}
  for b in layout.bindings(arch):
    rows.setdefault(b.leaf, []).append(b)
  shapes = check_leaves(arch, rows)
  if declared.keys() != places.keys():
    raise ValueError(
      f'shardings differ from the parameters in {sorted(declared.keys() ^ places.keys())}'
    )
  packed = [n for n in shapes if n not in declared]
  dtypes = {n: np.dtype(declared[n].dtype or dtype) for n in shapes if n in declared}
  # What is packed is packed from the values of the file.
  dtypes |= {n: np.dtype(source.tensors[rows[n][0].hf].dtype) for n in packed}
  size = sum(math.prod(shape) * dtypes[n].itemsize for n, shape in shapes.items())
  leaves = {}
  # Largest first: while its second copy moves to the devices, no other leaf is in memory.
  order = sorted(shapes, key=lambda name: -math.prod(shapes[name]))
  with tqdm(
    total=size,
    unit='B',
    unit_scale=True,
    desc='weights',
    disable=size < 1e9 or not processes.is_main(),
  ) as bar:
    for name in order:
      whole = whole_model[name].shape
      if name in declared:
        found = {name: _load_leaf(source, rows[name], whole, places[name], dtypes[name])}
      else:
        found = _load_packed(source, arch, rows[name], whole, places, dtypes[name])
      bar.update(math.prod(shapes[name]) * dtypes[name].itemsize)
      leaves |= found
  params = trees.unflatten({name: leaves[name] for name in sorted(leaves)})
  return kinds.completed(arch, params, places.__getitem__, seed, np.dtype(dtype))


def _load_packed(
  source: TensorSource,
  arch: Architecture,
  rows: list[Binding],
  shape: tuple[int, ...],
  places: Mapping[str, jax.sharding.Sharding],
  dtype: np.dtype,
) -> dict[str, jax.Array]:
  """Returns the packed parts of a leaf; the leaf itself is on the devices until they are made."""
  import jax

  from ftjax.models import kinds
  from ftjax.runtime import sharding

  name = rows[0].leaf
  where = places[f'{name}/codes']
  if isinstance(where, jax.sharding.NamedSharding):
    axes = kinds.declared(arch.plain())[name].axes
    where = jax.sharding.NamedSharding(where.mesh, sharding.spec(*axes))
  leaf = _load_leaf(source, rows, shape, where, dtype)
  parts = {n: s for n, s in places.items() if n.startswith(f'{name}/')}
  pack = jax.jit(lambda leaf: kinds.packed(arch, name, leaf, dtype), out_shardings=parts)
  return jax.block_until_ready(pack(leaf))


def check_leaves(
  arch: Architecture, rows: Mapping[str, Sequence[Binding]]
) -> dict[str, tuple[int, ...]]:
  """Returns {name: shape} of the leaves that model files hold.

  Args:
    arch: the model.
    rows: {leaf: its bindings}, all of the family's.

  Raises:
    ValueError: the tensor map of the family does not fit what the model declares.
  """
  from ftjax.models import kinds

  declared = kinds.declared(arch.plain())
  shapes = tensor_map.leaf_shapes([b for bound in rows.values() for b in bound])
  wanted = {n: p.file_shape for n, p in declared.items() if p.origin == 'base'}
  if shapes != wanted:
    wrong = sorted(n for n in shapes.keys() | wanted.keys() if shapes.get(n) != wanted.get(n))
    raise ValueError(
      f'the tensor map of family {arch.family!r} gives {wrong[0]} shape {shapes.get(wrong[0])}; '
      f'the model declares {wanted.get(wrong[0])}; {len(wrong)} leaves differ in all'
    )
  return shapes


def _load_leaf(
  source: TensorSource,
  rows: list[Binding],
  shape: tuple[int, ...],
  sharding: jax.sharding.Sharding,
  dtype: np.dtype,
) -> jax.Array:
  import jax

  indexes = sharding.addressable_devices_indices_map(shape).values()
  boxes = {tuple((s.indices(n)[:2]) for s, n in zip(i, shape, strict=True)) for i in indexes}
  around = tuple(
    slice(min(b for b, _ in a), max(e for _, e in a)) for a in zip(*boxes, strict=True)
  )
  # Shards along HF's second axis are columns of the file, and each would read all rows. Where the
  # shards of this process fill a box it is read once and cut; devices may hold copies of a part.
  sizes = sum(math.prod(e - b for b, e in box) for box in boxes)
  if sizes == math.prod(s.stop - s.start for s in around):
    whole = _fill(source, rows, shape, around, dtype)

    def fill(index):
      ranges = [s.indices(n) for s, n in zip(index, shape, strict=True)]
      cut = zip(ranges, around, strict=True)
      return whole[tuple(slice(b - a.start, e - a.start) for (b, e, _), a in cut)]
  else:
    parts: dict[str, np.ndarray] = {}

    def fill(index):
      key = str(index)
      if key not in parts:
        parts[key] = _fill(source, rows, shape, index, dtype)
      return parts[key]

  leaf = jax.make_array_from_callback(shape, sharding, fill)
  # The next leaf is read only when this one's buffer can go.
  return jax.block_until_ready(leaf)


def _fill(
  source: TensorSource, rows: list[Binding], shape: tuple[int, ...], index, dtype
) -> np.ndarray:
  ranges = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
  out = np.zeros([len(r) for r in ranges], dtype)
  for b in rows:
    # Of the axes that are filled index by index (layers, experts), those that are wanted.
    if all(i in r for i, r in zip(b.at, ranges, strict=False)):
      at = tuple(i - r.start for i, r in zip(b.at, ranges, strict=False))
      # Padding of the vocabulary is behind the binding's shape, and stays 0.
      held = [r[: max(0, n - r.start)] for r, n in zip(ranges[len(at) :], b.shape, strict=True)]
      _fill_tensor(source, b, held, out[at][tuple(slice(len(r)) for r in held)])
  return out


def _fill_tensor(source: TensorSource, binding: Binding, ranges: list[range], out: np.ndarray):
  # Blocks run along the axis of ours that is HF's first, so that a block is a range of rows of the
  # file.
  first = ''.join(binding.words[0])[:1]
  axis = binding.axes.index(first) if first else 0
  item = source.tensors[binding.hf].dtype.itemsize
  row_bytes = max(1, out.size // max(1, out.shape[axis])) * item
  step = max(1, _BLOCK_BYTES // row_bytes)
  for begin in range(0, len(ranges[axis]), step):
    block = ranges[axis][begin : begin + step]
    index = [slice(r.start, r.stop) for r in ranges]
    index[axis] = slice(block.start, block.stop)
    place = [slice(None)] * out.ndim
    place[axis] = slice(begin, begin + len(block))
    out[tuple(place)] = layout.read(source, binding, tuple(index))


def fingerprint(path: str | os.PathLike) -> str:
  """Returns the SHA-256 of the weights' content, in hex; see tensor_source.py.

  Bytes that `open_source(path).hash_reads()` let a load hash are not read again.
  """
  return open_source(path).fingerprint()
