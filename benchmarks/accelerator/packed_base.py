"""A random base in nf4, made packed.

`kinds.init` draws a base in float32 and packs it, which takes more memory than a training step on
the result: the peak of the step could not be read from the device. Speed and memory of a step do
not depend on the values; here codes are uniform, and their blocks have sizes that give the weights
the usual variance of 1 / fan_in.
"""

import functools

import jax
import jax.numpy as jnp

from ftjax.models import kinds
from ftjax.models.architecture import Architecture
from ftjax.models.layers import Declared
from ftjax.runtime import sharding, trees

# Mean square of NF4's values is about a quarter, and of the blocks' codes, 64 to 255, 28,900.
_SCALE = 1 / (0.5 * 170)


def make(arch: Architecture, dtype: str) -> dict:
  """Returns all parameters of an architecture with an adapter on a packed base, on the current
  mesh; adapters begin as in training.

  dtype: of leaves that declare none.
  """
  found, mesh = kinds.declared(arch), jax.sharding.get_mesh()
  places = {n: jax.NamedSharding(mesh, sharding.spec(*p.axes)) for n, p in found.items()}
  leaves = {}
  for number, name in enumerate(kinds.names(arch, 'base')):
    folder, _, field = name.rpartition('/')
    inputs = found[f'{folder}/codes'].fan_in if f'{folder}/codes' in found else 0
    draw = functools.partial(_draw, field=field, p=found[name], inputs=inputs, dtype=dtype)
    made = jax.jit(draw, out_shardings=places[name])
    leaves[name] = made(jax.random.fold_in(jax.random.key(0), number))
  return kinds.completed(arch, trees.unflatten(leaves), places.__getitem__, 0, jnp.dtype(dtype))


def _draw(key: jax.Array, *, field: str, p: Declared, inputs: int, dtype: str) -> jax.Array:
  """Returns one leaf; inputs: of the packed matrix that it belongs to, 0 for other leaves."""
  own = jnp.dtype(p.dtype or dtype)
  if field == 'codes':
    return jax.random.bits(key, p.shape, own)
  if field == 'absmax':
    return jax.random.randint(key, p.shape, 64, 256, jnp.int32).astype(own)
  if field == 'scales' and inputs:
    return jnp.full(p.shape, inputs**-0.5 * _SCALE, own)
  if not p.fan_in:
    return jnp.full(p.shape, p.constant, own)
  return jax.random.normal(key, p.shape, own) * jnp.asarray(p.fan_in**-0.5, own)
