"""The moments of an optimizer in 8 bits: codes of one byte, with one largest size ("absmax") for
each block of up to 256 numbers.

Codes are those of the dynamic map of Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization", section 2.1: relative to the absmax, seven decades from 1e-7 to 1, of which each
larger one has twice as many codes. One thing differs from there: the second moment is held by its
root, which is what Adam divides by. The codes then span fourteen decades of it, as many as the
first moment's codes span when squared, and a number that is not zero never becomes zero. Otherwise
small numbers in a block with large ones become zero where the first moment does not, and their
next step is up to 1 / eps too long.

Values are computed from codes by arithmetic, not looked up: a gather is slow on accelerators.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ftjax.runtime import sharding, trees

LARGEST_BLOCK = 256
SMALLEST_BLOCK = 16  # smaller ones save little
SMALLEST_LEAF = 4096  # numbers of a layer; smaller leaves stay float32, as in bitsandbytes
# Shards of a dimension that hold whole blocks; with more, the step is right, and gathers.
_SHARDS = 8
_SCALES = tuple(10.0**-i for i in range(6, -1, -1))  # upper ends of the decades
_SIGNED, _UNSIGNED = 1, 2  # codes of a sign in the smallest decade

# Moments among the fields of optax's states: {name: codes in the smallest decade}.
ADAM = {'mu': _SIGNED, 'nu': _UNSIGNED}
LION = {'mu': _SIGNED}
SGD = {'trace': _SIGNED}


class Quantized(NamedTuple):
  """A moment. codes uint8, of the parameter's shape; absmax float32, of the same shape but for the
  dimension along which blocks lie, which has the number of blocks.
  """

  codes: jax.Array
  absmax: jax.Array


def block(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> tuple[int, int] | None:
  """Returns (dimension along which the blocks of a parameter lie, their size); None where its
  moments stay float32.

  It follows from the parameter's shape and logical axes alone, so that no mesh changes a number. A
  dimension that no mesh axis shards is preferred, then one over `tensor`, which has few shards; but
  not where the blocks would have less than 64 numbers and another dimension allows more.
  """
  stacked = axes[:1] == ('layers',)
  if math.prod(shape[stacked:]) < SMALLEST_LEAF:
    return None
  found = []
  for d in range(int(stacked), len(shape)):
    over = sharding.RULES[axes[d]] if axes[d] else None
    whole = shape[d] // (math.gcd(shape[d], _SHARDS) if over else 1)
    # Multiples of 8 are whole rows of a TPU's registers.
    size = max((n for n in range(8, LARGEST_BLOCK + 1, 8) if whole % n == 0), default=0)
    preference = 2 if over is None else int(over == 'tensor')
    found.append((min(size, 64), preference, size, d))
  _, _, size, d = max(found)
  return (d, size) if size >= SMALLEST_BLOCK else None


def encode(x: jax.Array, where: tuple[int, int], lowest: int) -> Quantized:
  """Returns a moment float32[...] in codes, each the nearest one.

  Args:
    x: the moment; not negative with `lowest` 2, which holds its root.
    where: from `block`.
    lowest: 1 for codes with a sign, 2 for those without.
  """
  dim, size = where
  count = x.shape[dim] // size
  x = x.reshape(*x.shape[:dim], count, size, *x.shape[dim + 1 :])
  x = x if lowest == _SIGNED else jnp.sqrt(x)
  absmax = jnp.max(jnp.abs(x), axis=dim + 1, keepdims=True)
  codes = _nearest(x / jnp.where(absmax == 0, 1.0, absmax), lowest)
  return Quantized(
    codes.reshape(*x.shape[:dim], count * size, *x.shape[dim + 2 :]), absmax.squeeze(dim + 1)
  )


def decode(moment: Quantized, dim: int, lowest: int) -> jax.Array:
  """Returns float32[...], the inverse of `encode` of blocks along a dimension."""
  codes, absmax = moment
  count = absmax.shape[dim]
  blocks = codes.reshape(*codes.shape[:dim], count, -1, *codes.shape[dim + 1 :])
  x = values(blocks, lowest) * jnp.expand_dims(absmax, dim + 1)
  return (x if lowest == _SIGNED else x * x).reshape(codes.shape)


def values(codes: jax.Array, lowest: int) -> jax.Array:
  """Returns the numbers float32[...] in [-1, 1] of codes uint8[...]: decade k from the smallest
  has lowest * 2^k of a sign, in the middle of as many equal parts; code 0 is 0, 1.0 is the last.
  """
  count = jnp.abs(codes.astype(jnp.int32) - (127 if lowest == _SIGNED else -1))
  # The exponent of count + 1/2 is the decade, its mantissa the place within.
  bits = jax.lax.bitcast_convert_type(count.astype(jnp.float32) + 0.5, jnp.int32)
  mantissa = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
  upper = jnp.float32(_SCALES[0])
  for k, scale in enumerate(_SCALES[1:], 1):
    upper = jnp.where(count >= lowest << k, jnp.float32(scale), upper)
  x = upper * (0.1 + 0.9 * (mantissa - 1.0))
  x = jnp.where(count == 128 * lowest, 1.0, jnp.where(count < lowest, 0.0, x))
  return jnp.where(codes < 127, -x, x) if lowest == _SIGNED else x


def _nearest(x: jax.Array, lowest: int) -> jax.Array:
  """Returns the code uint8[...] that is nearest to each x float32[...] in [-1, 1]; of a root that
  is not 0 the least that is not 0.
  """
  size = jnp.abs(x)
  first, upper = jnp.full_like(x, lowest), jnp.full_like(x, _SCALES[0])
  for k, scale in enumerate(_SCALES[:-1]):
    # The middle between the last code of this decade and the first of the next.
    is_above = size > scale * (1 + 0.9 / (lowest << k))
    first = jnp.where(is_above, float(lowest << (k + 1)), first)
    upper = jnp.where(is_above, _SCALES[k + 1], upper)
  place = jnp.floor((size / upper - 0.1) / 0.9 * first)
  count = first + jnp.clip(place, 0.0, first - 1)
  parts = lowest * 64
  count = jnp.where(size > 1 - 0.225 / parts, 128.0 * lowest, count)
  zero = lowest - 1.0  # the count of code 0
  if lowest == _UNSIGNED:
    count = jnp.where(size == 0, zero, count)
    return (count - 1).astype(jnp.uint8)
  count = jnp.where(size < _SCALES[0] * 0.275, zero, count)
  # There is no code for -1.
  return (127 + jnp.where(x < 0, -jnp.minimum(count, 127.0), count)).astype(jnp.uint8)


def _zeros(x: jax.Array, where: tuple[int, int] | None, lowest: int) -> jax.Array | Quantized:
  """Returns a moment of zeros like x, in codes where it has blocks."""
  if where is None:
    return x
  dim, size = where
  blocks = (*x.shape[:dim], x.shape[dim] // size, *x.shape[dim + 1 :])
  zero = 127 if lowest == _SIGNED else 0
  return Quantized(jnp.full_like(x, zero, jnp.uint8), jnp.zeros(blocks, jnp.float32))


def _by_layer(
  run: Callable, gradient: jax.Array, moments: dict[str, Quantized]
) -> tuple[jax.Array, dict[str, Quantized]]:
  """Returns run(gradient, moments) of every layer, in a loop that writes over its inputs: compilers
  do not fuse the search for the largest size with what follows it, and float32 moments of all
  layers would be as large as those that the codes replace.
  """

  def body(i, carry):
    layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), carry)
    return jax.tree.map(
      lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, i, 0), carry, run(*layer)
    )

  return jax.lax.fori_loop(0, gradient.shape[0], body, (gradient, moments))


def in_8bit(
  transform: optax.GradientTransformation,
  fields: Mapping[str, int],
  axes: Mapping[str, tuple[str | None, ...]],
) -> optax.GradientTransformation:
  """Returns a transformation whose state holds the moments in 8 bits between steps; a step computes
  with them in float32, and its update with the new ones before they are rounded.

  Args:
    transform: of optax, whose state is a NamedTuple; it treats numbers one by one, and reads no
      parameters.
    fields: ADAM, LION or SGD.
    axes: {parameter name: logical axes}.
  """

  def init(params):
    state = transform.init(params)  # zeros
    held = {f: trees.flatten(tree) for f, tree in state._asdict().items() if f in fields}
    zeros = {
      f: {n: _zeros(x, block(x.shape, axes[n]), fields[f]) for n, x in flat.items()}
      for f, flat in held.items()
    }
    return state._replace(**{f: trees.unflatten(flat) for f, flat in zeros.items()})

  def step(gradient, moments, state, dim):
    """Returns (update, moments) of one parameter, or of one layer of it."""
    wide = {f: {'x': decode(q, dim, fields[f])} for f, q in moments.items()}
    update, new = transform.update({'x': gradient}, state._replace(**wide))
    new = new._asdict()
    size = gradient.shape[dim] // moments[next(iter(fields))].absmax.shape[dim]
    return update['x'], {f: encode(new[f]['x'], (dim, size), fields[f]) for f in fields}

  def update(updates, state, params=None):
    held = {f: trees.flatten(state._asdict()[f]) for f in fields}
    out, new = {}, {f: {} for f in fields}
    for name, gradient in trees.flatten(updates).items():
      moments = {f: flat[name] for f, flat in held.items()}
      where = block(gradient.shape, axes[name])
      if where is None:
        one, changed = transform.update(
          {'x': gradient}, state._replace(**{f: {'x': x} for f, x in moments.items()})
        )
        out[name], moments = one['x'], {f: changed._asdict()[f]['x'] for f in fields}
      elif axes[name][0] == 'layers':
        run = functools.partial(step, state=state, dim=where[0] - 1)
        out[name], moments = _by_layer(run, gradient, moments)
      else:
        out[name], moments = step(gradient, moments, state, where[0])
      for f in fields:
        new[f][name] = moments[f]
    # The fields that are no moments, such as the number of updates.
    _, rest = transform.update({}, state._replace(**{f: {} for f in fields}))
    rest = rest._replace(**{f: trees.unflatten(flat) for f, flat in new.items()})
    return trees.unflatten(out), rest

  return optax.GradientTransformation(init, update)
