"""Computes a checksum of an array that does not depend on its sharding.

Other bits, or the same bits at other indices, give another number.
"""

import jax
import jax.numpy as jnp


def checksum(bits: jax.Array, index: jax.Array) -> jax.Array:
  """Returns the sum, modulo 2^32, of a hash of each entry's bits and index: uint32[].

  The hash is the finalizer of MurmurHash3 (Appleby 2011); a sum has no order.

  Args:
    bits: uint32, any shape.
    index: uint32, broadcastable to that shape: the number of each entry.
  """
  x = (bits + 1) * (2 * index + 1)
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return (x ^ (x >> 16)).sum(dtype=jnp.uint32)
