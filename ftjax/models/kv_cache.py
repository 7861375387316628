"""The key/value cache of a decoder: arrays that ride in a loop's carry, one slice written per layer
and step.

Rows are written at one common index (prompts are padded on the left), and which entries count is
said by segments and positions, as everywhere else. Slices are written along `seq`, so a mesh that
decodes has context=1."""

import dataclasses

import jax
import jax.numpy as jnp

from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens
from ftjax.runtime.sharding import spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of every block, and where the cached tokens stand.

  keys, values: {`stack{i}/block{j}`: [L, B, S, K, H]}; tokens: segments and positions int32[B, S]
  (segment 0: not yet written)."""

  keys: dict[str, jax.Array]
  values: dict[str, jax.Array]
  tokens: Tokens


def empty(arch: Architecture, batch: int, capacity: int, dtype: jnp.dtype) -> Cache:
  """A cache with room for `capacity` tokens a row."""
  where = spec(None, 'batch', 'seq', 'kv_heads', None)
  zeros = {
    f'stack{i}/block{j}': jnp.zeros(
      (repeats, batch, capacity, arch.num_kv_heads, arch.head_dim), dtype, out_sharding=where
    )
    for i, (pattern, repeats) in enumerate(arch.stacks)
    for j in range(len(pattern))
  }
  none = jnp.zeros((batch, capacity), jnp.int32, out_sharding=spec('batch', 'seq'))
  return Cache(keys=zeros, values=dict(zeros), tokens=Tokens(none, none))
