"""A number for the content of an array: the same for every layout on devices, another one for other
bits or for the same ones elsewhere.
"""

import jax
import jax.numpy as jnp


def checksum(bits: jax.Array, place: jax.Array) -> jax.Array:
  """uint32[]: the sum, modulo 2^32, of a mixture of each entry's bits and place.

  The mixing is the finalizer of MurmurHash3 (Appleby 2011); a sum has no order.

  Args:
    bits: uint32, any shape.
    place: uint32 of that shape, or one that it is broadcast to: the entry's number.
  """
  x = (bits + 1) * (2 * place + 1)
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return (x ^ (x >> 16)).sum(dtype=jnp.uint32)
