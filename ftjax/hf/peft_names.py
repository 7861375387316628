"""Which tensors of a PEFT folder are which leaves of an adapter, for both directions.

PEFT names a tensor by the module that it belongs to, `base_model.model.MODULE.lora_A.weight`, and
stores the factors as matrices [R, inputs] and [outputs, R] in the order of HF's own axes. Where HF
has one matrix, such as qkv_proj, for several linear maps here, the module's adapter is made of
theirs: `Adapted`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.families import multimodal, table
from ftjax.families.tensor_map import Binding
from ftjax.hf import layout
from ftjax.hf.peft_config import PREFIX
from ftjax.hf.tensor_source import RenamedSource, TensorSource
from ftjax.models import kinds
from ftjax.models.architecture import Architecture, MoeSpec
from ftjax.runtime.errors import ConfigError, DataError


class Side(NamedTuple):
  """The axes of a linear map's inputs or outputs: our letters, HF's, and tensor_map.Row.order."""

  own: str
  hf: str
  order: tuple[int, ...] = ()


class Place(NamedTuple):
  """A linear map of one layer, or of one expert in it: a matrix of HF's, or a part of a fused one.
  name: of the map; layer: its index along L, 0 without that axis.
  """

  module: str
  name: str
  layer: int
  binding: Binding

  @property
  def sides(self) -> tuple[Side, Side]:
    """Those of the inputs and of the outputs, of this part alone."""
    hf = [outer + inner for outer, inner in self.binding.words]
    own = [''.join(a for a in self.binding.axes if a in letters) for letters in hf]
    orders = self.binding.order, ()
    into, out = (Side(own[i], hf[i], orders[i]) for i in _sides(self.binding))
    return into, out

  def rows(self, x: np.ndarray) -> np.ndarray:
    """Returns this part's rows of an array [outputs of the module, ...], in HF's order."""
    b = self.binding
    if b.fused is None:
      return x
    outer, inner = (_size(b, letters) for letters in b.words[b.fused])
    apart = x.reshape(outer, b.total, *x.shape[1:])[:, b.begin : b.begin + inner]
    return apart.reshape(outer * inner, *x.shape[1:])


def _size(b: Binding, letters: str) -> int:
  return math.prod(b.sizes[a] for a in letters)


def _sides(b: Binding) -> tuple[int, int]:
  """Returns HF's axes of the inputs and of the outputs. Ours has the inputs first, but for the
  head; HF's has them last, but for GPT-2's Conv1D.
  """
  into = b.axes[-1 if b.axes[0] == 'V' else 0]
  return (0, 1) if into in ''.join(b.words[0]) else (1, 0)


class Part(NamedTuple):
  """A part of a module's adapter: rank of the part's own, 0 without an adapter; scale."""

  place: Place
  rank: int
  scale: float


class Adapted(NamedTuple):
  """The adapter of a module, by the adapters of all its parts.

  PEFT's factors of a fused module are A [R, inputs] and B [outputs, R]: R is the sum of the parts'
  ranks, their factors A lie below each other, and B has their factors as blocks. All have one
  scale, the first part's; the ratio of another one is in its block of B.
  """

  module: str
  parts: tuple[Part, ...]

  @property
  def tensors(self) -> tuple[str, str, str]:
    """The names of the tensors of A, of B and of DoRA's magnitude."""
    start = f'{PREFIX}{self.module}.lora_'
    return f'{start}A.weight', f'{start}B.weight', f'{start}magnitude_vector'

  @property
  def rank(self) -> int:
    """The sum of the parts' ranks."""
    return sum(p.rank for p in self.parts)

  @property
  def scale(self) -> float:
    """The scale of the module."""
    return next(p.scale for p in self.parts if p.rank)

  @property
  def shapes(self) -> tuple[int, int]:
    """The sizes of the inputs and of the outputs."""
    b = self.parts[0].place.binding
    into, out = _sides(b)
    return b.hf_shape[into], b.hf_shape[out]

  @property
  def is_transposed(self) -> bool:
    """Whether HF stores the matrix as [inputs, outputs]."""
    return _sides(self.parts[0].place.binding) == (0, 1)

  def begin(self, part: Part) -> int:
    """Returns where a part's rows of A begin, in units of the parts' ranks."""
    return sum(p.rank for p in self.parts[: self.parts.index(part)])

  def ratio(self, part: Part) -> np.float32:
    """Returns what a part's block of B is multiplied with in the file."""
    return np.float32(part.scale / self.scale)

  def joined(self, values: Sequence[np.ndarray]) -> np.ndarray:
    """Returns [outputs of the module, ...] from its parts' rows, the inverse of Place.rows."""
    b = self.parts[0].place.binding
    if b.fused is None:
      return values[0]
    outer = _size(b, b.words[b.fused][0])
    whole = np.concatenate([x.reshape(outer, -1, *x.shape[1:]) for x in values], axis=1)
    return whole.reshape(-1, *values[0].shape[1:])


def text_part(source: TensorSource) -> tuple[TensorSource, str]:
  """Returns (an adapter's tensors under the names of a text model, what begins the names of its
  layers in the files, which differs in adapters of the text part of a multimodal model).

  Raises:
    DataError: two tensors get one name.
  """
  for modules in multimodal.beginnings():
    start = PREFIX + modules
    if any(n.startswith(start) for n in source.tensors):
      text = PREFIX + multimodal.MODULES
      names = [text + n.removeprefix(start) if n.startswith(start) else n for n in source.tensors]
      if double := [n for n in names if names.count(n) > 1]:
        raise DataError(f'{source.place}: {double[0]} is there under two names')
      return RenamedSource(source, dict(zip(names, source.tensors, strict=True))), modules
  return source, multimodal.MODULES


def module(tensor: str) -> str:
  """Returns the module of a HF tensor."""
  return tensor.rpartition('.')[0]


def places(arch: Architecture) -> dict[str, tuple[Place, ...]]:
  """Returns {module: its parts} of the HF matrices all parts of which are linear maps."""
  maps, tensors = set(kinds.linear_maps(arch)), {}
  for b in layout.bindings(arch.plain()):
    tensors.setdefault(b.hf, []).append(b)
  out = {}
  for hf, parts in tensors.items():
    names = [b.leaf.rpartition('/') for b in parts]
    if not all(last == 'w' and name in maps for name, _, last in names):
      continue
    if all(b.fused in (None, _sides(b)[1]) for b in parts):
      out[module(hf)] = tuple(
        Place(module(hf), name, b.at[0] if b.at else 0, b)
        for b, (name, _, _) in zip(parts, names, strict=True)
      )
  return out


def adapted(arch: Architecture) -> list[Adapted]:
  """Returns the modules that have an adapter, in the order of the tensor map.

  Raises:
    ConfigError: an adapter has no form as a PEFT folder.
  """
  found = places(arch)
  known = {p.name for parts in found.values() for p in parts}
  if alone := [m.name for m in arch.adapter.maps if m.name not in known]:
    raise ConfigError(
      f'{alone[0]} is a part of a tensor of family {arch.family!r}; its adapter has no form as a '
      'PEFT folder here: leave it out of lora.targets'
    )
  out = []
  for name, parts in found.items():
    pairs = [(p, arch.adapter.find(p.name)) for p in parts]
    one = Adapted(
      name,
      tuple(
        Part(p, 0, 0.0) if m is None else Part(p, m.ranks[p.layer], m.scales[p.layer])
        for p, m in pairs
      ),
    )
    if not one.rank:
      continue
    bare = [p.place.name for p in one.parts if not p.rank]
    if arch.adapter.dora and bare:
      raise ConfigError(
        f'lora.dora: {name} is one matrix of the model, whose lengths PEFT holds together, and '
        f'{bare[0]} has no adapter; let lora.targets take all or none of '
        f'{", ".join(p.name for p in parts)}'
      )
    out.append(one)
  return out


def base_copies(arch: Architecture) -> dict[str, tuple[int, ...]]:
  """Returns {tensor: shape} of the copies of base weights that PEFT writes beside an adapter: of
  the head, where it has one.
  """
  own = (m.parts[0].place for m in adapted(arch))
  return {
    f'{PREFIX}{p.module}.base_layer.weight': p.binding.hf_shape for p in own if p.name == 'head'
  }


# Mixtral's block of experts in its files, which is `.mlp.` in transformers 5.
_RENAMED = '.block_sparse_moe.'


def obstacle(arch: Architecture) -> str:
  """Returns why PEFT 0.21 with transformers 5 cannot load the adapter; '' where it can.

  transformers 5 has one array of all experts of a layer where their files have a matrix each. PEFT
  brings an adapter of the matrices into that form, if those of all layers are alike; a module that
  is saved whole it looks for under the name of the files.
  """
  slots = {slot: spec.mlp for slot, spec, _ in arch.blocks()}
  own = {s for s, mlp in slots.items() if isinstance(mlp, MoeSpec)}
  for hf, (b, *_) in trained(arch).items():
    slot, _, leaf = b.leaf.rpartition('/mlp/')
    if slot in own and (leaf != 'router/w' or _RENAMED in hf):
      return f'{b.leaf} is trained whole, which it would leave out: it has no module {module(hf)}'
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


def trained(arch: Architecture) -> dict[str, list[Binding]]:
  """Returns {HF tensor: its parts} of the leaves that are trained whole, a score among them.

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
  inside: dict[str, list[Binding]] = {}
  for found in modules.values():
    for b in found:
      for name in _around(b.hf):
        inside.setdefault(name, []).append(b)
  for name, found in modules.items():
    chosen = [b for b in found if is_trained[b.leaf]]
    if not chosen:
      continue
    own = [b.leaf for b in inside[name] if is_trained[b.leaf]]
    if twice := [n for n in own if n.removesuffix('/w') in maps]:
      raise ConfigError(
        f'lora.train has {twice[0]}, and lora.targets gives it an adapter; leave it out of one of '
        'them'
      )
    others = [b.leaf for b in inside[name] if b.leaf not in own]
    if others:
      raise ConfigError(
        f'lora.train: {chosen[0].leaf} alone has no form as a PEFT folder, which holds all of '
        f'{name} or an adapter of it; train {others[0]} whole too and without an adapter, or leave '
        f'{chosen[0].leaf} out'
      )
    for b in found:
      out.setdefault(b.hf, []).append(b)
  return out


def _around(tensor: str) -> Iterator[str]:
  """Yields the modules that a HF tensor is in, from its own outwards."""
  while tensor := module(tensor):
    yield tensor


def outermost(modules: Sequence[str]) -> list[str]:
  """Returns the modules that are in no other one of them."""
  all_of_them = set(modules)
  return [m for m in modules if all_of_them.isdisjoint(_around(m))]


def tied_head(arch: Architecture) -> tuple[str, str] | None:
  """Returns the names of the embedding and of the head that is the same tensor; None without."""
  return table.of(arch).tied if arch.tied and not arch.num_labels else None


def to_hf(x: np.ndarray, side: Side) -> np.ndarray:
  """Returns [R, *sizes in our order] as [R, sizes in HF's order]."""
  own, hf, order = side
  x = x.transpose(0, *(1 + own.index(a) for a in hf)).reshape(len(x), -1)
  return x[:, np.argsort(order)] if order else x


def from_hf(x: np.ndarray, side: Side, sizes: Mapping[str, int]) -> np.ndarray:
  """Returns [R, sizes in HF's order] as [R, *sizes in our order], the inverse of `to_hf`."""
  own, hf, order = side
  x = x[:, order] if order else x
  apart = x.reshape(len(x), *(sizes[a] for a in hf))
  return apart.transpose(0, *(1 + hf.index(a) for a in own))


def alpha(scale: float, rank: int) -> int | float:
  """Returns the lora_alpha whose quotient by the rank is the scale, an integer where one is."""
  near = scale * rank
  found = (round(near), near, math.nextafter(near, 0), math.nextafter(near, math.inf))
  exact = next((a for a in found if a / rank == scale), near)
  return int(exact) if float(exact).is_integer() else exact
