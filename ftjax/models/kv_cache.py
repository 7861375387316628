"""The key/value cache of a decoder: arrays in a loop's carry, one slice written per layer and step.

Rows are written at one common index (prompts are padded on the left). Segments and positions mark
the entries that count. Slices are written along `seq`, so a mesh that decodes has context=1."""

import dataclasses

import jax
import jax.numpy as jnp

from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens
from ftjax.runtime import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of every block, and segments and positions of the cached tokens.

  keys, values: {`stack{i}/block{j}`: [L, B, S, K, H]}; tokens: segments and positions int32[B, S]
  (segment 0: not yet written)."""

  keys: dict[str, jax.Array]
  values: dict[str, jax.Array]
  tokens: Tokens


def empty(arch: Architecture, batch: int, capacity: int, dtype: jnp.dtype) -> Cache:
  """Returns a cache with room for `capacity` tokens a row."""
  where = sharding.spec(None, 'batch', 'seq', 'kv_heads', None)
  zeros = {
    name: jnp.zeros(
      (repeats, batch, capacity, spec.mixer.num_kv_heads, spec.mixer.head_dim),
      dtype,
      out_sharding=where,
    )
    for name, spec, repeats in arch.blocks()
  }
  none = jnp.zeros((batch, capacity), jnp.int32, out_sharding=sharding.spec('batch', 'seq'))
  return Cache(keys=zeros, values=dict(zeros), tokens=Tokens(none, none))
