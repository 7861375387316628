"""Which tensors of a PEFT folder are which leaves of an adapter, for both directions.

PEFT names a tensor by the module that it belongs to, `base_model.model.MODULE.lora_A.weight`, and
stores the factors as matrices [R, inputs] and [outputs, R] in the order of HF's own axes.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ftjax.families import table
from ftjax.families.tensor_map import Binding
from ftjax.hf import layout
from ftjax.hf.peft_config import PREFIX
from ftjax.models import kinds
from ftjax.models.architecture import AdaptedMap, Architecture, MoeSpec
from ftjax.runtime.errors import ConfigError


class Place(NamedTuple):
  """A linear map of one layer, or of one expert in it. name: of the map; layer: its index along L,
  0 without that axis.
  """

  module: str
  name: str
  layer: int
  binding: Binding

  @property
  def tensors(self) -> tuple[str, str, str]:
    """The names of the tensors of A, of B and of DoRA's magnitude."""
    start = f'{PREFIX}{self.module}.lora_'
    return f'{start}A.weight', f'{start}B.weight', f'{start}magnitude_vector'

  @property
  def sides(self) -> tuple[tuple[str, str], tuple[str, str]]:
    """(letters of ours, letters of HF's) of the inputs and of the outputs."""
    hf = [outer + inner for outer, inner in self.binding.words]
    own = [''.join(a for a in self.binding.axes if a in letters) for letters in hf]
    return (own[1], hf[1]), (own[0], hf[0])

  @property
  def shapes(self) -> tuple[int, int]:
    """The sizes of the inputs and of the outputs."""
    return self.binding.hf_shape[1], self.binding.hf_shape[0]


def module(tensor: str) -> str:
  """Returns the module of a HF tensor."""
  return tensor.rpartition('.')[0]


def places(arch: Architecture) -> dict[str, Place]:
  """Returns {module: place} of the linear maps that are HF tensors of their own."""
  maps, out = set(kinds.linear_maps(arch)), {}
  for b in layout.bindings(arch.plain()):
    name, _, last = b.leaf.rpartition('/')
    if last == 'w' and name in maps and b.fused is None:
      out[module(b.hf)] = Place(module(b.hf), name, b.at[0] if b.at else 0, b)
  return out


def adapted(arch: Architecture) -> list[tuple[Place, AdaptedMap]]:
  """Returns the places that have an adapter, in the order of the tensor map.

  Raises:
    ConfigError: a HF tensor holds several maps, of which one has an adapter.
  """
  found = places(arch)
  known = {p.name for p in found.values()}
  if alone := [m.name for m in arch.adapter.maps if m.name not in known]:
    raise ConfigError(
      f'{alone[0]} is a part of a tensor of family {arch.family!r}; its adapter has no form as a '
      'PEFT folder here: leave it out of lora.targets'
    )
  pairs = ((p, arch.adapter.find(p.name)) for p in found.values())
  return [(p, m) for p, m in pairs if m is not None and m.ranks[p.layer]]


def obstacle(arch: Architecture) -> str:
  """Returns why PEFT 0.21 with transformers 5 cannot load the adapter; '' where it can.

  transformers 5 has one array of all experts of a layer where their files have a matrix each. PEFT
  brings an adapter of the matrices into that form, if those of all layers are alike.
  """
  slots = {slot: spec.mlp for slot, spec, _ in arch.blocks()}
  own = {s for s, mlp in slots.items() if isinstance(mlp, MoeSpec)}
  found = {m.name: m for m in arch.adapter.maps if '/mlp/' in m.name}
  if not own or not found:
    return ''
  if others := [n for n in found if n.rpartition('/mlp/')[0] not in own]:
    return f'{others[0]} is of a layer without experts, and has the name of a matrix of experts'
  if arch.adapter.dora:
    return 'DoRA of experts'
  gates = {tuple(n for n in ('gate', 'up') if f'{s}/mlp/{n}' in found) for s in own}
  downs = {f'{s}/mlp/down' in found for s in own}
  pairs = {p for m in found.values() for p in zip(m.ranks, m.scales, strict=True)}
  if not gates <= {(), ('gate', 'up')} or len(gates) + len(downs) + len(pairs) > 3:
    return 'experts whose gate and up, or whose layers, have unequal adapters'
  return ''


def trained(arch: Architecture) -> dict[str, Binding]:
  """Returns {HF tensor: its place} of the leaves that are trained whole, a score among them.

  Raises:
    ConfigError: a module of which PEFT would save more or less than these leaves.
  """
  declared, out = kinds.declared(arch), {}
  leaves = layout.leaf_shapes(arch)
  is_trained = {n: n in declared and declared[n].origin == 'adapter' for n in leaves}
  maps = {m.name for m in arch.adapter.maps} if arch.adapter else set()
  modules: dict[str, list[Binding]] = {}
  for b in layout.bindings(arch):
    modules.setdefault(module(b.hf), []).append(b)
  for name, found in modules.items():
    chosen = [b for b in found if is_trained[b.leaf]]
    if not chosen:
      continue
    others = [b.leaf for b in found if not is_trained[b.leaf]]
    others += [b.leaf for b in found if b.leaf.rpartition('/')[0] in maps or b.fused is not None]
    if others:
      raise ConfigError(
        f'lora.train: {chosen[0].leaf} alone has no form as a PEFT folder, which holds all of '
        f'{name} or an adapter of it; train {others[0]} whole too and without an adapter, or leave '
        f'{chosen[0].leaf} out'
      )
    out |= {b.hf: b for b in found}
  return out


def tied_head(arch: Architecture) -> tuple[str, str] | None:
  """Returns the names of the embedding and of the head that is the same tensor; None without."""
  return table.of(arch).tied if arch.tied and not arch.num_labels else None


def to_hf(x: np.ndarray, letters: tuple[str, str]) -> np.ndarray:
  """Returns [R, *sizes in our order] as [R, sizes in HF's order]; letters: of Place.sides."""
  own, hf = letters
  return x.transpose(0, *(1 + own.index(a) for a in hf)).reshape(len(x), -1)


def from_hf(x: np.ndarray, letters: tuple[str, str], sizes: Mapping[str, int]) -> np.ndarray:
  """Returns [R, sizes in HF's order] as [R, *sizes in our order], the inverse of `to_hf`."""
  own, hf = letters
  apart = x.reshape(len(x), *(sizes[a] for a in hf))
  return apart.transpose(0, *(1 + hf.index(a) for a in own))


def alpha(scale: float, rank: int) -> int | float:
  """Returns the lora_alpha whose quotient by the rank is the scale, an integer where one is."""
  near = scale * rank
  found = (round(near), near, math.nextafter(near, 0), math.nextafter(near, math.inf))
  exact = next((a for a in found if a / rank == scale), near)
  return int(exact) if float(exact).is_integer() else exact
