"""Products of rows with the matrix of their group, as Pallas kernels for NVIDIA GPUs: there, XLA
makes a masked copy of the rows for each group.

A program computes a block of rows of one group, or of the gradient of one group's matrix; groups
have blocks of their own (grouped.Blocks). Arrays are one device's.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton

# Fewest and most rows of a block, and the width of a tile along a matrix's inputs and outputs. Not
# tuned: no GPU was at hand. A product of tiles needs at least 16 of each. Larger tiles do not fit
# everywhere: for float32, Triton takes 96 KiB of shared memory for these, and GPUs of compute
# capability 8.6 and 8.9 have 99 for a block of threads.
ROWS = (16, 128)
WIDTH = 64
_PARAMS = pallas_triton.CompilerParams(num_warps=4, num_stages=3)


def _width(size: int) -> int:
  """Returns the block along an axis: a power of two."""
  return min(WIDTH, max(16, pl.next_power_of_2(size)))


def _tile(ref, rows, columns, limits, *group):
  """Returns ref[*group, rows, columns] with zeros from the limits on. rows, columns: (first, how
  many).
  """
  place = ref.at[(*group, pl.ds(*rows), pl.ds(*columns))]
  return pallas_triton.load(place, mask=_inside(rows, columns, limits), other=0)


def _inside(rows, columns, limits):
  """bool[n, m]: which places of a tile are below both limits."""
  own = rows[0] + jnp.arange(rows[1]) < limits[0]
  return own[:, None] & (columns[0] + jnp.arange(columns[1]) < limits[1])[None, :]


def _rows_kernel(x, w, group, first, end, out, *, size, tiles):
  block, column = pl.program_id(0), pl.program_id(1) * tiles[1]
  rows, columns = (first[block], size), (column, tiles[1])
  (_, inputs), outputs, e = x.shape, w.shape[2], group[block]

  def body(k, total):
    inner = (k * tiles[0], tiles[0])
    a = _tile(x, rows, inner, (end[block], inputs))
    b = _tile(w, inner, columns, (inputs, outputs), e)
    return total + pallas_triton.dot(a, b)

  # 0 for a block without rows. A select (jnp.where) does not compile as the bound of a loop.
  count = jnp.clip(end[block] - first[block], 0, 1) * pl.cdiv(inputs, tiles[0])
  total = jax.lax.fori_loop(0, count, body, jnp.zeros((size, tiles[1]), jnp.float32))
  mask = _inside(rows, columns, (end[block], outputs))
  place = out.at[pl.ds(*rows), pl.ds(*columns)]
  pallas_triton.store(place, total.astype(out.dtype), mask=mask)


def product(
  x: jax.Array,
  w: jax.Array,
  group: jax.Array,
  first: jax.Array,
  end: jax.Array,
  size: int,
  interpret: bool = False,
) -> jax.Array:
  """Returns the product of each row with the matrix of its block's group, [M, O] in x's dtype, with
  float32 sums; rows that no block has are undefined.

  Args:
    x: [M, I].
    w: [G, I, O] in x's dtype.
    group, first, end: int32[blocks]: the group of a block, its first row, and one past its last.
    size: most rows of a block, a power of two from 16 on.
    interpret: run the kernel step by step on any device, for tests.
  """
  (rows, inputs), outputs = x.shape, w.shape[2]
  tiles = _width(inputs), _width(outputs)
  return pl.pallas_call(
    functools.partial(_rows_kernel, size=size, tiles=tiles),
    grid=(len(group), pl.cdiv(outputs, tiles[1])),
    out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
    compiler_params=_PARAMS,
    interpret=interpret,
    name='grouped_product',
  )(x, w, group, first, end)


def _sums_kernel(x, g, first, end, out, *, size, tiles):
  e = pl.program_id(0)
  left, right = ((pl.program_id(1 + i) * tiles[i], tiles[i]) for i in (0, 1))
  inputs, outputs = x.shape[1], g.shape[1]

  def body(i, total):
    rows = (first[e] + i * size, size)
    a = _tile(x, rows, left, (end[e], inputs))
    b = _tile(g, rows, right, (end[e], outputs))
    return total + pallas_triton.dot(a.T, b)

  count = pl.cdiv(end[e] - first[e], size)
  total = jax.lax.fori_loop(0, count, body, jnp.zeros(tiles, jnp.float32))
  mask = _inside(left, right, (inputs, outputs))
  place = out.at[e, pl.ds(*left), pl.ds(*right)]
  pallas_triton.store(place, total.astype(out.dtype), mask=mask)


def sums(
  x: jax.Array, g: jax.Array, first: jax.Array, end: jax.Array, size: int, interpret: bool = False
) -> jax.Array:
  """Returns the sum of x_m^T g_m over the rows of each group, [G, I, O] in x's dtype, with float32
  sums.

  Args:
    x: [M, I].
    g: [M, O].
    first, end: int32[G]: the first row of a group, and one past its last.
    size: rows that are summed at once, a power of two from 16 on.
    interpret: see `product`.
  """
  tiles = _width(x.shape[1]), _width(g.shape[1])
  blocks = pl.cdiv(x.shape[1], tiles[0]), pl.cdiv(g.shape[1], tiles[1])
  return pl.pallas_call(
    functools.partial(_sums_kernel, size=size, tiles=tiles),
    grid=(len(first), *blocks),
    out_shape=jax.ShapeDtypeStruct((len(first), x.shape[1], g.shape[1]), x.dtype),
    compiler_params=_PARAMS,
    interpret=interpret,
    name='grouped_sums',
  )(x, g, first, end)
