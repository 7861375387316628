"""Rates and freezing by depth (Howard and Ruder 2018, "ULMFiT", sections 3.2 and 3.3), from the
per-layer names of the parameters.

- Discriminative rates: a layer learns with the rate of the one above it, times a factor.
- Gradual unfreezing: the groups of parameters from the head down are trained one after the other.

Leaves are stacks of layers, so both are numbers over the layer axis."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.runtime import trees

_LAYER = re.compile(r'(?:(.*)/)?layer(\d+)/.*')
_NO_MATRIX = ('scale', 'b')
# What comes before the blocks; see models/embed_and_head.py.
_BELOW = ('embed', 'positions', 'token_types', 'embed_norm', 'relative')


Names = Mapping[str, tuple[str, ...]]  # {leaf: the per-layer names in it}


def _depths(names: Names, leaves: Iterable[str]) -> dict[str, list[int]]:
  """Returns the depth from the top of each layer of `leaves`: 0 after the blocks, 1 the last layer,
  L + 1 the embeddings. Where only norms come after the blocks, they are with the last layer.

  names: of all parameters; those of an auxiliary model have a prefix, such as 'value/'.
  """
  every = [n for own in names.values() for n in own]
  found = {n: m for n in every if (m := _LAYER.fullmatch(n))}
  layers: dict[str, int] = {}
  for m in found.values():
    layers[m[1] or ''] = max(layers.get(m[1] or '', 0), int(m[2]) + 1)

  def depth(name):
    if m := found.get(name):
      return layers[m[1] or ''] - int(m[2])
    model = next((p for p in layers if p and name.startswith(f'{p}/')), '')
    first = name.removeprefix(f'{model}/').partition('/')[0]
    return layers.get(model, 0) + 1 if first in _BELOW else 0

  out = {leaf: [depth(n) for n in names[leaf]] for leaf in leaves}
  top = [leaf for leaf, own in out.items() if own[0] == 0]
  if all(leaf.rpartition('/')[2] in _NO_MATRIX for leaf in top):
    return {leaf: [max(d, 1) for d in own] for leaf, own in out.items()}
  return out


def decayed(names: Names, factor: float) -> dict[str, np.ndarray]:
  """Returns the factors of the learning rate of every leaf, one for each of its layers: 1 at the
  top, and each layer `factor` of the one above it; see `_depths`.

  names: of all parameters.
  """
  depths = _depths(names, names)
  least = min(d for own in depths.values() for d in own)
  return {
    leaf: np.asarray([factor ** (d - least) for d in own], np.float32)
    for leaf, own in depths.items()
  }


@dataclasses.dataclass(frozen=True)
class Unfreezing:
  """Which layers are trained after so many updates: group g from the update g * every on.

  groups: {leaf: int32 array, the group of each of its layers}, from 0. count: how many there are.
  """

  every: int
  groups: Mapping[str, np.ndarray]
  count: int

  @property
  def last_start(self) -> int:
    """The update from which on all groups are trained."""
    return (self.count - 1) * self.every

  def _is_trained(self, name: str, ndim: int, updates: jax.Array) -> jax.Array:
    """Returns bool[L, 1, ...], or bool[1, ...] of a leaf without layers."""
    groups = self.groups[name]
    shape = (-1, *(1,) * (ndim - 1)) if len(groups) > 1 else (1,) * ndim
    return (jnp.asarray(groups * self.every, jnp.int32) <= updates).reshape(shape)

  def select(self, new: dict, old: dict, updates: jax.Array) -> dict:
    """Returns the leaves of `new` where they are trained after int32[] updates, and those of `old`
    bit for bit where they are not yet. For use without explicit shardings.
    """
    return trees.map_named(
      lambda name, a, b: jnp.where(self._is_trained(name, a.ndim, updates), a, b), new, old
    )

  def masked(self, gradient: dict, updates: jax.Array) -> dict:
    """Returns a gradient times 0 where layers are not trained yet. A NaN or an infinity stays NaN:
    the moments of all layers see the gradient, so such a step must not count.
    """
    return trees.map_named(
      lambda name, g: g * self._is_trained(name, g.ndim, updates).astype(g.dtype), gradient
    )


def unfreezing(every: int, names: Names, trained: Mapping[str, np.ndarray]) -> Unfreezing:
  """Returns the schedule of gradual unfreezing: what comes after the blocks first, then one layer
  after the other from the last to the first, then the embeddings; see `_depths`. Groups without a
  trained parameter are left out.

  Args:
    every: updates between two groups.
    names: of all parameters.
    trained: {leaf: bool array, which of its layers are trained}, of the leaves that have any.
  """
  depths = _depths(names, trained)
  used = {
    d for leaf, own in depths.items() for d, is_on in zip(own, trained[leaf], strict=True) if is_on
  }
  rank = {depth: i for i, depth in enumerate(sorted(used))}
  groups = {leaf: np.asarray([rank.get(d, 0) for d in own]) for leaf, own in depths.items()}
  return Unfreezing(every, groups, len(rank))
