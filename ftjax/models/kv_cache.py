"""What a decoder keeps of the tokens that it has read: arrays in a loop's carry, one slice written
per layer and step.

Each kind of mixer declares what it keeps (`kept` of its spec). Entries, such as keys and values,
have a place for each token; they are written at one common index (prompts are padded on the left),
and segments and positions mark those that count. States, such as those of a delta net, hold what
the mixer needs of all earlier tokens. Slices are written along `seq`, so a mesh that decodes has
context=1."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens
from ftjax.runtime import sharding

# {`stack{i}/block{j}`: {name: array}}.
Arrays = dict[str, dict[str, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What every block keeps, and segments and positions of the cached tokens.

  entries: arrays [L, B, S, ...]; states: arrays [L, B, ...]; tokens: segments and positions
  int32[B, S] (segment 0: not yet written). source: of an encoder-decoder, those of what its encoder
  read; `states` then hold its keys and values."""

  entries: Arrays
  states: Arrays
  tokens: Tokens
  source: Tokens | None = None


@dataclasses.dataclass(frozen=True)
class Memory:
  """What a mixer reads and writes of the cache, in one layer and one step.

  arrays: {name: [L, B, ...]} of the layer's block. layer: int32[], the index along L. at: int32[],
  index of the first new token."""

  arrays: Mapping[str, jax.Array]
  layer: jax.Array
  at: jax.Array

  def append(self, **new: jax.Array) -> tuple[list[jax.Array], 'Memory']:
    """Writes entries [B, T, ...] of the new tokens.

    Returns:
      (for each name the layer's entries of all tokens [B, S, ...], the memory after it).
    """
    zero = jnp.zeros((), jnp.int32)
    written = {}
    for name, x in new.items():
      start = (self.layer, zero, self.at, *[zero] * (x.ndim - 2))
      old = self.arrays[name]
      written[name] = jax.lax.dynamic_update_slice(old, x[None].astype(old.dtype), start)
    after = dataclasses.replace(self, arrays=dict(self.arrays) | written)
    return [after.read(name) for name in new], after

  def read(self, name: str) -> jax.Array:
    """Returns the layer's array [B, ...]."""
    return jax.lax.dynamic_index_in_dim(self.arrays[name], self.layer, 0, keepdims=False)

  def write(self, **states: jax.Array) -> 'Memory':
    """Returns the memory with other states [B, ...] of this layer."""
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=self.layer, axis=0)
    new = {n: put(self.arrays[n], x.astype(self.arrays[n].dtype)) for n, x in states.items()}
    return dataclasses.replace(self, arrays=dict(self.arrays) | new)


def empty(arch: Architecture, batch: int, capacity: int, dtype: jnp.dtype) -> Cache:
  """Returns a cache with room for `capacity` tokens a row, in which no token was read."""
  entries, states = {}, {}
  stacks = tuple(f'stack{i}/' for i in arch.side(is_encoder=False))
  for slot, spec, repeats in arch.blocks():
    if not slot.startswith(stacks):
      continue
    for name, kept in spec.mixer.kept().items():
      into, lead, axes = (
        (entries, (repeats, batch, capacity), (None, 'batch', 'seq'))
        if kept.grows
        else (states, (repeats, batch), (None, 'batch'))
      )
      where = sharding.spec(*axes, *kept.axes)
      zeros = jnp.zeros((*lead, *kept.sizes), kept.dtype or dtype, out_sharding=where)
      into.setdefault(slot, {})[name] = zeros
  none = jnp.zeros((batch, capacity), jnp.int32, out_sharding=sharding.spec('batch', 'seq'))
  return Cache(entries, states, Tokens(none, none))


def has_states(arch: Architecture) -> bool:
  """Returns whether some layer keeps a state, which no earlier token can be taken out of."""
  return any(not k.grows for spec in arch.layers() for k in spec.mixer.kept().values())
