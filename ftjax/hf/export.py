"""Writes HF model folders that transformers loads: from parameters on devices, or straight from
another tensor source.

Tensors are written one at a time in HF's names and layout (families/, `layout.py`), into a
temporary folder that is renamed to the target when it is complete; in a bucket, whose objects
cannot be renamed, config.json is written last and removed first. config.json and the tokenizer
files keep the source's content.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftjax.families import table, tensor_map
from ftjax.families.tensor_map import Binding
from ftjax.hf import layout, model_card, model_folder, peft_config
from ftjax.hf.gguf_tokenizer import dump_json
from ftjax.hf.safetensors import MAX_SHARD_BYTES, write_folder
from ftjax.hf.tensor_source import TensorInfo
from ftjax.hf.weight_files import INDEX_FILE, parse_json
from ftjax.models.architecture import Architecture
from ftjax.runtime import trees
from ftjax.runtime.errors import DataError
from ftjax.storage import files as files_lib

if TYPE_CHECKING:
  # `convert` writes through here without jax; only `export` needs it.
  import jax

log = logging.getLogger(__name__)


def is_ours(path: Path) -> bool:
  """Returns whether a file belongs to a model folder, so that replacing the folder loses nothing
  else.
  """
  if path.name in model_folder.FOLDERS and path.is_dir():
    return all(p.is_file() for p in path.iterdir())
  if not path.is_file():
    return False
  if path.name == model_card.FILE:
    return model_card.is_card(path.read_bytes())
  return model_folder.is_model_file(path.name)


@contextlib.contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
  """Yields a temporary folder that replaces `target` when the block ends well, else is removed.

  Raises:
    DataError: the target is a file, or holds a file that no model folder has.
  """
  target = files_lib.as_path(target)
  if target.is_file():
    raise DataError(f'{target} is a file; give the name of a folder')
  foreign = sorted(p.name for p in target.iterdir() if not is_ours(p)) if target.is_dir() else []
  if foreign:
    raise DataError(
      f'{target} holds {foreign[0]}, which no model folder has; it is not replaced. Give another '
      'folder'
    )
  if files_lib.is_remote(target):
    with _whole_prefix(target) as temp:
      yield temp
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  temp, old = (target.with_name(f'.{target.name}.{end}') for end in ('partial', 'old'))
  # A killed process may have left half a folder, or the old one between the two renames below.
  if old.is_dir() and not target.exists():
    old.rename(target)
  for left in (temp, old):
    shutil.rmtree(left, ignore_errors=True)
  temp.mkdir()
  try:
    yield temp
    if target.exists():
      target.rename(old)
    temp.rename(target)
    shutil.rmtree(old, ignore_errors=True)
  finally:
    shutil.rmtree(temp, ignore_errors=True)


@contextlib.contextmanager
def _whole_prefix(target: Path) -> Iterator[Path]:
  """Implements `whole_folder` in a bucket: the block writes below another prefix, and its objects
  are copied inside the store. During the copy the target has no config.json, and no reader takes it
  for a model. A process that is killed or refused there leaves the new folder complete below the
  other prefix; the next export completes the target.
  """
  temp = target.with_name(f'.{target.name}.partial')
  temp.remove_tree()
  try:
    yield temp
  except BaseException:
    temp.remove_tree()
    raise
  new, old = _objects(temp), _objects(target)
  # Removed in this order, written in the reverse.
  marks = ('config.json', peft_config.CONFIG_FILE, INDEX_FILE)
  try:
    for name in (*(m for m in marks if m in old), *sorted(old.keys() - new.keys() - {*marks})):
      with contextlib.suppress(FileNotFoundError):  # a second try whose first one came through
        old[name].unlink()
    late = [m for m in reversed(marks) if m in new]
    for name in (*sorted(new.keys() - {*late}), *late):
      new[name].copy_to(target / name)
  except OSError as error:
    text = f'could not be replaced ({error}); the new one is whole in {temp}'
    raise OSError(5, text, str(target)) from error
  temp.remove_tree()


def _objects(folder: Path) -> dict[str, Path]:
  """Returns the objects of a model folder in a bucket, by their names below it."""
  found = {p.name: p for p in folder.iterdir()} if folder.is_dir() else {}
  for inner in [found.pop(name) for name in model_folder.FOLDERS if name in found]:
    found |= {f'{inner.name}/{p.name}': p for p in inner.iterdir()}
  return found


def write_model(
  target: str | os.PathLike,
  tensors: Mapping[str, TensorInfo],
  read: Callable[[str], np.ndarray],
  files: Mapping[str, bytes],
  max_shard_bytes: int = MAX_SHARD_BYTES,
):
  """Writes weights and small files as one HF folder, completely or not at all.

  Raises:
    NonFiniteError: a tensor holds NaN or infinity. Nothing is left behind, an older target stays.
    DataError: the target is there and is not a model folder.
  """
  with whole_folder(target) as folder:
    for name, content in (dict(files) | edited_card(files_lib.as_path(target))).items():
      place = folder / name
      place.parent.mkdir(exist_ok=True)
      place.write_bytes(content)
    write_folder(folder, tensors, read, max_shard_bytes)


def edited_card(target: Path) -> dict[str, bytes]:
  """Returns the model card of a folder that is replaced, if somebody edited it."""
  path = target / model_card.FILE
  if not path.is_file() or model_card.is_unchanged(content := path.read_bytes()):
    return {}
  log.warning(
    '%s was edited since ftjax wrote it: it is kept, and describes the model before. Remove it '
    'for a new one',
    path,
  )
  return {model_card.FILE: content}


def replace_card(target: str | os.PathLike, content: str) -> None:
  """Replaces README.md of a model folder atomically."""
  path = files_lib.as_path(target) / model_card.FILE
  if files_lib.is_remote(target):
    files_lib.write_text(path, content)
    return
  # Beside the folder: a process that is killed here must leave no foreign file in it.
  temp = path.parent.with_name(f'.{path.parent.name}.card')
  files_lib.write_text(temp, content)
  temp.replace(path)


def config_file(source: Mapping[str, Any], original: bytes | None, dtype: np.dtype) -> bytes:
  """Returns config.json: the source's own bytes, or with its dtype key replaced when the weights
  have another dtype.

  transformers 5 writes `dtype`, 4 wrote `torch_dtype`; whichever is there is kept.
  """
  stated = {key: source[key] for key in ('dtype', 'torch_dtype') if key in source}
  name = np.dtype(dtype).name
  # Without the key, readers take float32.
  if all(value == name for value in (stated or {'': 'float32'}).values()):
    unchanged = original is not None and parse_json(original, 'config.json') == source
    return original if unchanged else dump_json(source)
  return dump_json(dict(source) | dict.fromkeys(stated or ('torch_dtype',), name))


def generation_file(
  original: bytes | None, config: Mapping[str, Any], stop_ids: tuple[int, ...]
) -> bytes | None:
  """Returns a generation_config.json whose eos_token_id holds all of `stop_ids`; the original's
  bytes if it does already.
  """
  if original is None and not stop_ids:
    return None
  content = {} if original is None else parse_json(original, 'generation_config.json')
  ids = content.get('eos_token_id', config.get('eos_token_id'))
  known = [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
  stops = list(dict.fromkeys([*known, *map(int, stop_ids)]))
  if original is not None and (not stop_ids or (stops == known and 'eos_token_id' in content)):
    return original
  if original is None:
    own = ('bos_token_id', 'pad_token_id', 'decoder_start_token_id')
    content = {k: config[k] for k in own if config.get(k) is not None}
  content['eos_token_id'] = stops[0] if len(stops) == 1 else stops
  return dump_json(content)


def export(
  params: Mapping,
  arch: Architecture,
  target: str | os.PathLike,
  *,
  source_config: Mapping[str, Any] | None,
  tokenizer_files: Mapping[str, bytes],
  dtype: np.dtype,
  stop_ids: tuple[int, ...],
  card: bytes | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
):
  """Writes parameters as a HF folder: HF names and layout, unstacked, one tensor on the host at a
  time.

  Every process of a run calls this, since gathering a tensor needs all of them; process 0 writes.
  An adapter is merged (`kinds.with_merged`), one tensor at a time. Derived leaves are not written.

  Args:
    params: nested dict of (possibly sharded) arrays.
    arch: the model; from `kinds.with_merged`, base and adapter are written as one model, each layer
      merged when it is written.
    target: folder to write, replaced if it is a model folder.
    source_config: the model's config.json as `load.read_config` gave it, whose keys and values are
      kept; None for a random model.
    tokenizer_files: as `load.tokenizer_files` gave them; written byte for byte, but for the stop
      tokens and dtype.
    dtype: of the written tensors.
    stop_ids: token ids that end a completion.
    card: README.md; None for none.

  Raises:
    NonFiniteError: a tensor holds NaN or infinity. Nothing is left behind, an older target stays.
  """
  from ftjax.cluster import processes  # imports jax

  dtype = np.dtype(dtype)
  read = host_reader(params, arch, dtype)
  if not processes.is_main():
    for name in layout.by_tensor(arch):
      read(name)
    return
  config = table.config(arch) if source_config is None else source_config
  files = dict(tokenizer_files)
  files['config.json'] = config_file(config, files.get('config.json'), dtype)
  generation = generation_file(files.get('generation_config.json'), config, stop_ids)
  if generation is not None:
    files['generation_config.json'] = generation
  if card is not None:
    files[model_card.FILE] = card
  write_model(target, layout.hf_tensors(arch, dtype), read, files, max_shard_bytes)


def host_reader(
  params: Mapping, arch: Architecture, dtype: np.dtype
) -> Callable[[str], np.ndarray]:
  """Returns a function that gives a HF tensor by its name, on the host, in HF's layout.

  Every process of a run calls it for the same names in the same order.

  Args:
    params: nested dict of (possibly sharded) arrays.
    arch: the model; an adapter is merged, derived leaves are no HF tensors.
    dtype: of the tensors.
  """
  bindings = layout.by_tensor(arch)
  pick = _merged_leaves(params, arch) if arch.adapter else _leaves(params, arch)

  def read(name: str) -> np.ndarray:
    return tensor_map.whole_tensor(((b, on_host(*pick(b))) for b in bindings[name]), dtype)

  return read


# What picks the part of a leaf that a binding names: (array, its index in it).
Picker = Callable[[Binding], tuple['jax.Array', Sequence[int]]]


def _leaves(params: Mapping, arch: Architecture) -> Picker:
  """Returns what picks from the parameters of a model without adapters.

  Raises:
    ValueError: the parameters are not those of the architecture.
  """
  from ftjax.models import kinds

  leaves, wanted = trees.flatten(params), layout.leaf_shapes(arch)
  # Derived leaves are no tensors of the model's files.
  own = {n for n, p in kinds.declared(arch).items() if p.origin != 'base'}
  found = {name: tuple(leaf.shape) for name, leaf in leaves.items() if name not in own}
  padded = {n: p.shape for n, p in kinds.declared(arch).items() if p.padding}
  found |= {n: wanted[n] for n, shape in padded.items() if found.get(n) == shape}
  if found != wanted:
    wrong = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
    raise ValueError(
      f'{wrong[0]} is {found.get(wrong[0])}, expected {wanted.get(wrong[0])}; {len(wrong)} differ '
      'in all'
    )
  return lambda binding: (leaves[binding.leaf], binding.at)


def _merged_leaves(params: Mapping, arch: Architecture) -> Picker:
  """Returns what picks from the model after merging its adapter, one layer at a time."""
  import jax.numpy as jnp

  from ftjax.models import kinds

  held: dict[tuple[str, int], jax.Array] = {}  # of the layer whose experts are written

  def pick(binding):
    layer, *rest = binding.at or (None,)
    which = None if layer is None else jnp.int32(layer)
    if not rest:
      return kinds.merged(arch, params, binding.leaf, which), rest
    # One tensor after the other: all experts of a layer are merged at once.
    if (binding.leaf, layer) not in held:
      held.clear()
      held[binding.leaf, layer] = kinds.merged(arch, params, binding.leaf, which)
    return held[binding.leaf, layer], rest

  return pick


def _of_split_axis(x: jax.Array, i: int) -> jax.Array:
  """Returns x[i], bit for bit, of an axis that is split over devices: the other experts stay where
  they are.
  """
  import jax
  import jax.numpy as jnp

  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}'))
  place = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0, out_sharding=x.sharding)
  found = jnp.where(place == i, bits, 0).sum(0, dtype=bits.dtype)
  return jax.lax.bitcast_convert_type(found, x.dtype)


def _whole_axes(x: jax.Array, limit: int) -> int:
  """Returns how many of the first `limit` axes of x no device holds a part of, up to the first that
  is split.
  """
  if len(x.sharding.device_set) == 1:
    return limit
  spec = (*x.sharding.spec, *([None] * x.ndim))[:limit]
  return next((i for i, axis in enumerate(spec) if axis not in (None, ())), limit)


def on_host(leaf: jax.Array, at: Sequence[int]) -> np.ndarray:
  """Returns `leaf[at]` (an index of its layers, perhaps of its experts) as one host array; all
  processes call it.
  """
  import jax

  # Cut on the devices, where it stays sharded: of a stacked leaf only this layer crosses to the
  # host, and of its experts only this one.
  part, at = leaf, list(at)
  while at:
    whole = _whole_axes(part, len(at))
    if whole:
      # At once: a layer's experts would be copied for each of them.
      own, at = at[:whole], at[whole:]
      rest = part.shape[whole:]
      cut = jax.lax.dynamic_slice(part, (*own, *(0 for _ in rest)), (*(1 for _ in own), *rest))
      part = jax.lax.squeeze(cut, range(whole))
    else:
      part = _of_split_axis(part, at.pop(0))
  if part.is_fully_addressable:
    return np.asarray(part)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(part, tiled=True))
