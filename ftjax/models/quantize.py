"""Weights of a frozen base in 8 or 4 bits: packed when a model is loaded, unpacked where a block
computes with them.

int8: one scale for each output. nf4: the 16 quantiles of a normal distribution that QLoRA names
NormalFloat4 (Dettmers et al. 2023, appendix E), with one largest size ("absmax") for each block of
inputs of an output; these are 8-bit numbers in turn, with one scale for each group of outputs
(double quantization, section 3). Blocks lie along the inputs, so that a shard holds whole blocks.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

# QLoRA, appendix E.
NF4 = (
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
)
GROUP = 16  # outputs whose absmax share one scale


class Int8(NamedTuple):
  """codes int8[in, out], scales float32[out]: the weight is codes * scales."""

  codes: jax.Array
  scales: jax.Array


class Nf4(NamedTuple):
  """codes uint8[in / 2, out]: of each block the first half of its inputs in the high four bits, the
  second half in the low ones. absmax uint8[in / block, out]. scales float32[in / block, out /
  group]: an absmax is its code times its group's scale.
  """

  codes: jax.Array
  absmax: jax.Array
  scales: jax.Array


def block_size(inputs: int, most: int) -> int:
  """Returns the number of inputs that share one absmax: `most`, a power of two, or the largest
  smaller one that divides them.
  """
  return min(most, inputs & -inputs)


def group_size(outputs: int) -> int:
  """Returns the number of outputs in a group: 16, or the largest power of two that divides them."""
  return min(GROUP, outputs & -outputs)


def pack_int8(w: jax.Array, block: int) -> Int8:
  """Packs float[in, out]; the largest size of each output becomes 127. block: not read."""
  del block
  w = w.astype(jnp.float32)
  scales = jnp.max(jnp.abs(w), axis=0) / 127.0
  codes = jnp.round(w / jnp.where(scales == 0, 1.0, scales)[None])
  return Int8(codes.astype(jnp.int8), scales)


def unpack_int8(packed: Int8, dtype: jnp.dtype) -> jax.Array:
  """Returns dtype[in, out]; the product is float32."""
  return (packed.codes.astype(jnp.float32) * packed.scales[None]).astype(dtype)


def nearest_nf4(x: jax.Array) -> jax.Array:
  """Returns the index uint8[...] of the value of NF4 that is nearest to each x, float32[...]."""
  middles = [(a + b) / 2 for a, b in itertools.pairwise(NF4)]
  return sum((x > m).astype(jnp.uint8) for m in middles)


def pack_nf4(w: jax.Array, block: int) -> Nf4:
  """Packs float[in, out]. Codes are chosen with the exact absmax, as bitsandbytes does.

  block: most inputs that share one absmax.
  """
  inputs, outputs = w.shape
  block, group = block_size(inputs, block), group_size(outputs)
  if block < 2:
    raise ValueError(f'a matrix of {inputs} inputs: nf4 needs an even number')
  w = w.astype(jnp.float32).reshape(inputs // block, block, outputs)
  absmax = jnp.max(jnp.abs(w), axis=1)
  codes = nearest_nf4(w / jnp.where(absmax == 0, 1.0, absmax)[:, None])
  high, low = codes[:, : block // 2], codes[:, block // 2 :]
  codes = ((high << 4) | low).reshape(inputs // 2, outputs)
  grouped = absmax.reshape(*absmax.shape[:1], outputs // group, group)
  scales = jnp.max(grouped, axis=-1) / 255.0
  small = jnp.round(grouped / jnp.where(scales == 0, 1.0, scales)[..., None])
  # A block that is not zero must not become zero.
  small = jnp.where(grouped > 0, jnp.maximum(small, 1.0), 0.0)
  return Nf4(codes, small.astype(jnp.uint8).reshape(absmax.shape), scales)


def unpack_nf4(packed: Nf4, dtype: jnp.dtype) -> jax.Array:
  """Returns dtype[in, out]; the products are float32."""
  blocks, outputs = packed.absmax.shape
  group = outputs // packed.scales.shape[1]
  half = packed.codes.shape[0] // blocks
  absmax = packed.absmax.reshape(blocks, outputs // group, group).astype(jnp.float32)
  absmax = (absmax * packed.scales[..., None]).reshape(blocks, 1, outputs)
  codes = packed.codes.reshape(blocks, half, outputs)
  both = jnp.concatenate([codes >> 4, codes & 15], axis=1)
  return (_values(both) * absmax).astype(dtype).reshape(2 * half * blocks, outputs)


PACK = {'int8': pack_int8, 'nf4': pack_nf4}


def unpack(storage: str, packed: Mapping[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
  """Returns dtype[in, out] of the fields of Int8 or Nf4, by the name of the storage."""
  if storage == 'int8':
    return unpack_int8(Int8(**packed), dtype)
  return unpack_nf4(Nf4(**packed), dtype)


def _values(codes: jax.Array) -> jax.Array:
  """Returns NF4[codes], float32[...]."""
  return jax.lax.platform_dependent(codes, tpu=_selected, default=_looked_up)


def _looked_up(codes: jax.Array) -> jax.Array:
  return jnp.asarray(NF4, jnp.float32).at[codes].get(mode='promise_in_bounds')


def _selected(codes: jax.Array) -> jax.Array:
  """Returns the same by selections: a table look-up is slow on a TPU. On a GPU each selection would
  be an array in memory.
  """
  found: list = list(NF4)
  for bit in range(4):
    is_set = (codes >> bit) & 1 == 1
    found = [
      jnp.where(is_set, jnp.float32(high), jnp.float32(low))
      for low, high in zip(found[::2], found[1::2], strict=True)
    ]
  return found[0]
