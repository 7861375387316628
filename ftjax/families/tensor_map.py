"""Which HF tensor is which parameter, as one table a family, used in both directions.

A row names a HF tensor and a leaf and gives both layouts in axis letters: `'NH D' -> 'DNH'` says
that HF stores a matrix [N*H, D] and the leaf is an array [D, N, H]. What a table can say:

- `{l}` in a HF name: each layer has the tensor; they are stacked along a leading axis L. The layers
  of an encoder and of its decoder both count from 0.
- `{e}`: each expert has the tensor; the leaf's first letter (after L) counts the experts.
- Letters in another order: the tensor is transposed.
- `'[NH] D'`: the tensor is fused. Rows of one HF name are its parts, in order along the axis of the
  brackets. What stands before the bracket in its word is shared: `'N[H] D'` twice is, per head, one
  part and then the other; `'F[] D'` twice interleaves two parts one by one.
- `1`: an axis of HF's of that size, which the leaf does not have.
- `order` of a row: HF's first axis has its numbers in another order than the leaf.

No jax is imported here: files are converted without it.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ftjax.models.architecture import Architecture, BlockSpec, MoeSpec

# Sizes of axis letters: those of the model for None, those of a layer for its spec.
Sizes = Callable[[Architecture, BlockSpec | None], Mapping[str, int]]
Condition = Callable[[Architecture, BlockSpec | None], bool]
Order = Callable[[BlockSpec], tuple[int, ...]]
Slices = tuple[slice, ...]


def _always(arch: Architecture, spec: BlockSpec | None) -> bool:
  del arch, spec
  return True


@dataclasses.dataclass(frozen=True)
class Row:
  """One HF tensor, or a part of one, and one leaf.

  hf, leaf: names; leaf is relative to its block where hf has `{l}`. hf_axes: a word for each axis
  of HF's. axes: a letter for each axis of the leaf, without L. needs: whether a model, or a layer
  of it, has the tensor. gguf: the tensor's name in a GGUF file, '' where there is none. order: for
  each place of the leaf along the letters of HF's first axis, the place on that axis.
  """

  hf: str
  hf_axes: str
  leaf: str
  axes: str
  needs: Condition = _always
  gguf: str = ''
  order: Order | None = None


@dataclasses.dataclass(frozen=True)
class Binding:
  """A HF tensor, or a part of one, and the place that it fills.

  hf_shape: of the whole tensor. leaf, at: the place is `leaf[at]`, its index along L and along the
  experts, () for the whole leaf. shape: of that place. words: for each HF axis, its letters before
  the bracket and those inside it (all of them inside where there is no bracket). sizes: of the
  letters. fused: the axis with the bracket, None where the tensor is no part. begin, total: where
  the part begins along the fused axis, and the parts' sum. order: see Row; () is that of the leaf.
  """

  hf: str
  hf_shape: tuple[int, ...]
  leaf: str
  at: tuple[int, ...]
  shape: tuple[int, ...]
  axes: str
  words: tuple[tuple[str, str], ...]
  sizes: Mapping[str, int]
  fused: int | None = None
  begin: int = 0
  total: int = 0
  order: tuple[int, ...] = ()

  @property
  def size(self) -> int:
    """How much of the fused axis is this part's, for each place of what stands before it."""
    return self._size('' if self.fused is None else self.words[self.fused][1])

  @property
  def letters(self) -> str:
    """The letters in HF's order."""
    return ''.join(outer + inner for outer, inner in self.words)

  def source_slices(self, index: Slices) -> tuple[Slices, tuple[int, ...], Slices]:
    """Returns what to read of the HF tensor for `index` of the place.

    Returns:
      (slices of the HF tensor: the smallest range of each axis that covers the index; the shape to
      give to the block that was read, an axis per letter, where a fused axis keeps all parts in
      place of its inner letters; the slices to cut from that).
    """
    want = {a: range(*s.indices(self.sizes[a])) for a, s in zip(self.axes, index, strict=True)}
    slices, shape, cut = [], [], []
    for axis, (outer, inner) in enumerate(self.words):
      if not outer + inner and axis != self.fused:
        slices.append(slice(0, 1))
        continue
      if axis == 0 and self.order:
        taken = self._taken(want)
        slices.append(slice(int(taken.min()), int(taken.max()) + 1))
        shape.append(int(taken.max() - taken.min()) + 1)
        cut.append(slice(None))
        continue
      size = self._size(inner)
      is_part = axis == self.fused
      whole = self.total if is_part else size
      if is_part and not outer:
        # One part lies in one piece: its own letters split the range.
        first, *rest = inner or '1'
        each = self._size(rest)
        wanted = want.get(first, range(1))
        slices.append(slice(self.begin + wanted.start * each, self.begin + wanted.stop * each))
        shape += [len(wanted), *(self.sizes[a] for a in rest)]
        cut += [slice(None), *(_slice(want[a]) for a in rest)]
        continue
      letters = outer if is_part else outer + inner
      first, *rest = letters
      each = self._size(rest) * (whole if is_part else 1)
      slices.append(slice(want[first].start * each, want[first].stop * each))
      shape += [len(want[first]), *(self.sizes[a] for a in rest)]
      cut += [slice(None), *(_slice(want[a]) for a in rest)]
      if is_part:
        shape.append(whole)
        cut.append(slice(self.begin, self.begin + size))
    return tuple(slices), tuple(shape), tuple(cut)

  def from_source(self, block: np.ndarray, index: Slices) -> np.ndarray:
    """Returns `index` of the place from the block that `source_slices` asked for."""
    want = {a: range(*s.indices(self.sizes[a])) for a, s in zip(self.axes, index, strict=True)}
    _, shape, cut = self.source_slices(index)
    value = block.reshape(shape)[cut]
    if self.order:
      taken = self._taken(want)
      value = value[(taken - taken.min()).reshape(-1)]
      value = value.reshape(*taken.shape, *value.shape[1:])
    if self.fused is not None and self.words[self.fused][0]:
      # The parts' axis is cut to this one's: now its own letters can be.
      inner = self.words[self.fused][1]
      before = sum(len(o + i) for o, i in self.words[: self.fused])
      before += len(self.words[self.fused][0])
      sizes = tuple(self.sizes[a] for a in inner)
      value = value.reshape(*value.shape[:before], *sizes, *value.shape[before + 1 :])
      place = [slice(None)] * value.ndim
      for i, a in enumerate(inner):
        place[before + i] = _slice(want[a])
      value = value[tuple(place)]
    elif self.fused is not None and not self.words[self.fused][1]:
      before = sum(len(o + i) for o, i in self.words[: self.fused])
      value = value.reshape(*value.shape[:before], *value.shape[before + 1 :])
    return value.transpose([self.letters.index(a) for a in self.axes])

  def _taken(self, want: Mapping[str, range]) -> np.ndarray:
    """Returns the places on HF's first axis of what is wanted, an axis for each of its letters."""
    letters = ''.join(self.words[0])
    places = np.asarray(self.order).reshape([self.sizes[a] for a in letters])
    return places[tuple(_slice(want[a]) for a in letters)]

  def to_hf(self, value: np.ndarray) -> np.ndarray:
    """Returns the HF tensor, or this part of it with an axis of its own size where it is fused:
    the inverse of reading the whole place. Padding of the vocabulary, beyond the place's shape, is
    left out.
    """
    value = value[tuple(map(slice, self.shape))]
    value = value.transpose([self.axes.index(a) for a in self.letters])
    shape = []
    for axis, (outer, inner) in enumerate(self.words):
      if axis == self.fused:
        shape += [self._size(outer), self._size(inner)]
      else:
        shape.append(self._size(outer + inner))
    value = value.reshape(shape)
    return value[np.argsort(self.order)] if self.order else value

  def _size(self, letters: Sequence[str]) -> int:
    return math.prod(self.sizes[a] for a in letters)


def _slice(r: range) -> slice:
  return slice(r.start, r.stop)


def whole_tensor(
  parts: Iterable[tuple[Binding, np.ndarray]], dtype: np.dtype | None = None
) -> np.ndarray:
  """Returns a HF tensor from the values of all its places, the inverse of import.

  Args:
    parts: all places of the tensor in order, each put into the result before the next is taken.
    dtype: of the result; None: that of the values.
  """
  out = shape = None
  for binding, value in parts:
    part, shape, axis = binding.to_hf(value), binding.hf_shape, binding.fused
    if axis is None:
      return np.asarray(part, dtype, order='C')
    if out is None:
      whole = (*part.shape[: axis + 1], binding.total, *part.shape[axis + 2 :])
      out = np.empty(whole, dtype or part.dtype)
    own = slice(binding.begin, binding.begin + binding.size)
    out[(*(slice(None) for _ in range(axis + 1)), own)] = part
    del part, value  # before the next one comes
  if out is None:
    raise ValueError('a tensor without a part')
  return out.reshape(shape)


def decoder_sizes(arch: Architecture, spec: BlockSpec | None) -> dict[str, int]:
  """Returns the sizes of V, D (C beside another D), R (labels), P (learned positions) and S (token
  types), and of a layer also of N heads, K kv heads, H head, F ffn and, where it has them, E
  experts.
  """
  out = {'V': arch.vocab_size, 'D': arch.model_dim, 'R': arch.num_labels}
  out |= {'C': arch.model_dim, 'P': arch.learned_positions, 'S': arch.token_types}
  if spec is None:
    return out
  m, mlp = spec.mixer, spec.mlp
  out |= {'N': m.num_heads, 'K': m.num_kv_heads, 'H': m.head_dim, 'F': mlp.ffn_dim}
  return out | ({'E': mlp.num_experts} if isinstance(mlp, MoeSpec) else {})


def bindings(rows: Sequence[Row], arch: Architecture, sizes: Sizes) -> list[Binding]:
  """Returns every HF tensor of a model with the place that it fills, in the order of the table."""
  per_layer = [row for row in rows if '{l}' in row.hf]
  out: list[Binding] = []
  for row in rows:
    if row not in per_layer:
      if row.needs(arch, None):
        out += _bind([row], '', (), sizes(arch, None))
    elif row is per_layer[0]:
      layers = zip(arch.layers(), arch.layer_numbers(), arch.layer_slots(), strict=True)
      for spec, layer, (slot, index) in layers:
        own = [
          dataclasses.replace(r, hf=r.hf.replace('{l}', str(layer)))
          for r in per_layer
          if r.needs(arch, spec)
        ]
        out += _bind(own, f'{slot}/', (index,), sizes(arch, spec), spec)
  return out


_WORD = re.compile(r'([A-Z]*)\[([A-Z]*)\]|([A-Z]+)|1')


def _bind(
  rows: Sequence[Row],
  prefix: str,
  at: tuple[int, ...],
  sizes: Mapping[str, int],
  spec: BlockSpec | None = None,
) -> list[Binding]:
  """Returns the bindings of rows whose HF names are complete but for `{e}`."""
  out, parts = [], {}
  for row in rows:
    parts.setdefault(row.hf, []).append(row)
  for row in rows:
    found = [_WORD.fullmatch(word) for word in row.hf_axes.split()]
    words = tuple((m[1] or '', m[2] or m[3] or '') for m in found)
    fused = next((i for i, m in enumerate(found) if '[' in m[0]), None)
    begin = total = 0
    if fused is not None:
      each = [_part(r, fused, sizes) for r in parts[row.hf]]
      begin, total = sum(each[: parts[row.hf].index(row)]), sum(each)
    hf_shape = tuple(
      math.prod(sizes[a] for a in outer) * total
      if axis == fused
      else math.prod(sizes[a] for a in outer + inner)
      for axis, (outer, inner) in enumerate(words)
    )
    binding = Binding(
      hf=row.hf,
      hf_shape=hf_shape,
      leaf=prefix + row.leaf,
      at=at,
      shape=tuple(sizes[a] for a in row.axes),
      axes=row.axes,
      words=words,
      sizes={a: sizes[a] for a in row.axes},
      fused=fused,
      begin=begin,
      total=total,
      order=row.order(spec) if row.order else (),
    )
    out += _experts(binding) if '{e}' in row.hf else [binding]
  return out


def _part(row: Row, fused: int, sizes: Mapping[str, int]) -> int:
  inner = _WORD.fullmatch(row.hf_axes.split()[fused])[2]
  return math.prod(sizes[a] for a in inner)


def _experts(binding: Binding) -> list[Binding]:
  """Returns a binding for each expert, whose index is the first axis of the place."""
  experts, *shape = binding.shape
  axes = binding.axes[1:]
  return [
    dataclasses.replace(
      binding,
      hf=binding.hf.replace('{e}', str(e)),
      at=(*binding.at, e),
      shape=tuple(shape),
      axes=axes,
      sizes={a: binding.sizes[a] for a in axes},
    )
    for e in range(experts)
  ]


def leaf_shapes(found: Sequence[Binding]) -> dict[str, tuple[int, ...]]:
  """Returns {leaf name: shape} of a model's bindings, with their L and expert axes."""
  shapes: dict[str, tuple[int, ...]] = {}
  for b in found:
    lead = shapes.get(b.leaf, (0,) * len(b.at))[: len(b.at)]
    shapes[b.leaf] = (*(max(i + 1, n) for i, n in zip(b.at, lead, strict=True)), *b.shape)
  return shapes
