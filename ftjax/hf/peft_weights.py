"""Reads the weights of PEFT folders. `peft.py` has checked the settings and the shapes before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ftjax.families import table
from ftjax.hf import load, peft, peft_names
from ftjax.hf.peft import PeftFolder
from ftjax.hf.peft_config import BASE_FILE, PREFIX
from ftjax.hf.peft_names import Adapted, Part
from ftjax.models import kinds
from ftjax.models.architecture import Architecture
from ftjax.runtime import trees
from ftjax.runtime.errors import DataError

if TYPE_CHECKING:
  import jax


def load_adapter(
  folder: PeftFolder,
  arch: Architecture,
  shardings: Mapping[str, jax.sharding.Sharding],
  base: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """Returns the adapter's leaves {name: float32 array}, padded to the largest rank of a stack.

  Args:
    folder: the adapter's.
    arch: the model, with an adapter of the same maps, ranks and scales: `folder.architecture`, or
      that of the run which wrote the folder.
    shardings: of the leaves, by name.
    base: leaves of the base by name, the head's among them.

  Raises:
    ConfigError: `arch` has another adapter.
    DataError: a tensor holds NaN or infinity, or does not fit.
  """
  import jax

  peft.check_same(folder, arch)
  _check_copies(folder, arch, base)
  declared = kinds.declared(arch)
  out = {}
  for name, value in _leaves(folder, arch):
    if value.shape != declared[name].shape:
      raise ValueError(f'{name} is {value.shape}, declared {declared[name].shape}')

    def part(index, value=value):
      return value[index]

    # Ready: a copy that waits for its turn would hold its leaf beside the next ones.
    out[name] = jax.block_until_ready(
      jax.make_array_from_callback(value.shape, shardings[name], part)
    )
  return out


def _check_copies(folder: PeftFolder, arch: Architecture, base: Mapping[str, jax.Array]) -> None:
  """Raises DataError where a folder's copy of the base's head is another one. PEFT writes it beside
  the head's adapter, and reads it in place of the base's. It has the dtype in which PEFT held the
  base: where that is not ours, rounding may differ.
  """
  import jax
  import jax.numpy as jnp

  for name in peft_names.base_copies(arch):
    if name not in folder.source.tensors:
      continue
    head = base['head/w']
    both = jnp.finfo(folder.source.tensors[name].dtype), jnp.finfo(head.dtype)
    share = max(float(f.eps) for f in both) if both[0].dtype != both[1].dtype else 0.0
    least = share and max(float(f.smallest_subnormal) for f in both)
    found = _read(folder, name)
    found = np.pad(found, [(0, n - m) for n, m in zip(head.shape, found.shape, strict=True)])
    copy = jax.make_array_from_callback(
      head.shape, head.sharding, lambda index, found=found: found[index]
    )
    head = head.astype(copy.dtype)
    if not bool((abs(copy - head) <= share * abs(head) + least).all()):
      raise DataError(
        f'{folder.source.place}: {name} is not the head of the base {folder.base.path}, and PEFT '
        'would compute with it; give the base that the adapter was trained on, or merge it with '
        'PEFT (merge_and_unload)'
      )


def _leaves(folder: PeftFolder, arch: Architecture) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, value) of every adapter leaf that the folder holds, one at a time."""
  declared = kinds.declared(arch)
  maps: dict[str, list[tuple[Adapted, Part]]] = {}
  for found in peft_names.adapted(arch):
    for part in found.parts:
      if part.rank:
        maps.setdefault(part.place.name, []).append((found, part))
  for name, parts in maps.items():
    for leaf in ('lora_a', 'lora_b', 'lora_m', 'lora_a0', 'lora_b0'):
      if (full := f'{name}/{leaf}') in declared:
        start = np.ones if leaf == 'lora_m' else np.zeros
        value = start(declared[full].shape, np.float32)
        if padding := declared[full].padding:
          value[..., -padding:] = 0
        for found, part in parts:
          rows = _rows(folder, found, part, leaf, arch)
          rows = rows[0] if leaf == 'lora_m' else rows
          # Beyond them are the rows of larger ranks, and the padding of the vocabulary.
          value[part.place.binding.at][tuple(slice(n) for n in rows.shape)] = rows
        yield full, value
  rest: dict[str, list] = {}
  for b in (b for parts in peft_names.trained(arch).values() for b in parts):
    rest.setdefault(b.leaf, []).append(b)
  for name, bindings in rest.items():
    value = np.zeros(declared[name].shape, np.float32)  # padding of the vocabulary stays 0
    for b in bindings:
      whole = tuple(slice(0, n) for n in b.shape)
      tensor = _read(folder, PREFIX + b.hf)
      value[b.at][whole] = b.from_source(tensor[b.source_slices(whole)[0]], whole)
    yield name, value


def _rows(
  folder: PeftFolder, found: Adapted, part: Part, leaf: str, arch: Architecture
) -> np.ndarray:
  """Returns the rows of a layer's own rank, in our order of axes: float32[R, ...]."""
  a, b, magnitude = found.tensors
  place = part.place
  (inputs, outputs), sizes = place.sides, place.binding.sizes
  if leaf == 'lora_m':
    return peft_names.from_hf(place.rows(_read(folder, magnitude))[None], outputs, sizes)
  is_a = leaf.startswith('lora_a')
  x = _read(folder, a) if is_a else place.rows(_read(folder, b)).T
  if not folder.is_shared(found):
    times = 2 if arch.adapter.pissa else 1
    begin = times * found.begin(part)
    own = slice(begin, begin + times * part.rank)
    if not is_a and np.delete(x, own, axis=0).any():
      raise DataError(
        f'{folder.source.place}: {b} has numbers outside the blocks that parts in {BASE_FILE} '
        'names; delete parts there, and all parts share one factor'
      )
    x = x[own] if is_a else x[own] / found.ratio(part)
  if arch.adapter.pissa:  # [A; A0] and [B, -B0]
    rank = len(x) // 2
    x = x[:rank] if leaf in ('lora_a', 'lora_b') else x[rank:] * (1 if is_a else -1)
  return peft_names.from_hf(x, inputs if is_a else outputs, sizes)


def _read(folder: PeftFolder, name: str) -> np.ndarray:
  value = folder.source.read(name).astype(np.float32)
  if not np.isfinite(value).all():
    raise DataError(f'{folder.source.place}: {name} holds NaN or infinity')
  return value


def load_params(
  folder: PeftFolder,
  base: str,
  arch: Architecture,
  shardings: Callable[[Architecture], Mapping],
  dtype: np.dtype,
) -> dict[str, jax.Array]:
  """Returns the parameters of base and adapter as a nested dict.

  Args:
    folder: the adapter's.
    base: path of the base.
    arch: the model with its adapter, see `load_adapter`.
    shardings: (architecture) -> those of all its parameters, a nested dict.
    dtype: of base parameters that declare none of their own.

  Raises:
    ConfigError, DataError: see `load_adapter`, `load.load_params` and `check_base`.
  """
  if folder.base.sha256:
    load.open_source(base).hash_reads()
  # The head of labels is the adapter's, unless the base has one.
  found = table.architecture(load.read_config(base), arch.family)
  # Of an encoder's file the head of another task is not read.
  held, head_of = (arch, found) if arch.is_encoder else (arch.with_head_of(found), None)
  read = load.load_params(base, held, shardings(held), dtype, head_of=head_of)
  flat = trees.flatten(read)
  peft.check_base(folder, base, load.fingerprint(base) if folder.base.sha256 else '')
  flat |= load_adapter(folder, arch, trees.flatten(shardings(arch)), flat)
  return trees.unflatten({n: flat[n] for n in sorted(kinds.declared(arch))})
