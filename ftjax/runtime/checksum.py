"""Computes checksums of arrays that do not depend on their sharding.

Other bits, or the same bits at other indices, give another number.
"""

import jax
import jax.numpy as jnp

from ftjax.runtime import trees
from ftjax.runtime.digest import digest
from ftjax.runtime.sharding import spec

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_SECOND = 0x9E3779B9  # the entries of the second checksum: xor with it


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


def of_array(x: jax.Array, mask: int = 0) -> jax.Array:
  """Returns the checksum of an array's bits, on every device: uint32[].

  Args:
    x: entries of 1, 2 or 4 bytes, any shape and sharding.
    mask: xored to each entry's bits; another mask gives an independent checksum.
  """
  bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
  # Numbered axis by axis: one long range would stand whole on every device.
  place = jnp.zeros((1,) * bits.ndim, jnp.uint32)
  for axis, size in enumerate(bits.shape):
    shape = [1] * bits.ndim
    shape[axis] = size
    place = place * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32).reshape(shape)
  return jax.sharding.reshard(checksum(bits ^ jnp.uint32(mask), place), spec())


def fingerprint(params: dict) -> str:
  """Returns a hash of all leaves' names, shapes, dtypes and bits: hexadecimal, the same on every
  process and mesh. Each leaf counts with 64 bits.
  """
  flat = trees.flatten(params)
  with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
    sums = _twice(flat)
  return digest(
    {n: [list(x.shape), str(x.dtype), *(int(s) for s in sums[n])] for n, x in flat.items()}
  )


@jax.jit
def _twice(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
  return {n: (of_array(x), of_array(x, _SECOND)) for n, x in leaves.items()}
