"""Stochastic rounding of bfloat16 parameters.

Neighbours in bfloat16 are 1/256 to 1/128 of a number apart; a smaller step that is rounded to the
nearest one changes nothing, however often it is made. Rounded up with the probability of its place
between the two, a step moves the parameter by its own size on average.
"""

import zlib

import jax
import jax.numpy as jnp

from ftjax.runtime import trees


def to_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
  """Returns bfloat16[...]: of the two neighbours of each x float32[...] the one away from zero with
  probability (|x| - |lower|) / (|upper| - |lower|), so that the mean is x. What is not finite stays
  so.

  Args:
    x: numbers.
    key: each number's own 16 random bits follow from it and the number's index, on any mesh.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  # bfloat16 is the upper half of float32; what is carried into it rounds away from zero.
  rounded = ((bits + noise) >> 16).astype(jnp.uint16)
  drawn = jax.lax.bitcast_convert_type(rounded, jnp.bfloat16)
  return jnp.where(jnp.isfinite(x), drawn, x.astype(jnp.bfloat16))


def apply_updates(params: dict, updates: dict, key: jax.Array) -> dict:
  """Returns params + updates, summed in float32; bfloat16 leaves are rounded stochastically, by a
  key of their own that follows from `key` and their name.
  """

  def one(name, p, u):
    x = p.astype(jnp.float32) + u.astype(jnp.float32)
    if p.dtype != jnp.bfloat16:
      return x.astype(p.dtype)
    return to_bfloat16(x, jax.random.fold_in(key, zlib.crc32(name.encode())))

  return trees.map_named(one, params, updates)
