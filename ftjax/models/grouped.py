"""Products of rows with the matrix of their group, where the sizes of the groups are known at run
time: `jax.lax.ragged_dot` on a TPU, on CPU a loop over blocks of rows, on a GPU a kernel.

On CPU and GPU XLA has no such product: JAX makes E masked copies of the rows and multiplies all of
them (on CPU, E 64, 2,048 rows of 128: 160 ms and 69 MB, against 3 ms here).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.models.kernels import grouped_triton
from ftjax.runtime.sharding import is_alone

# Fewest and most rows of a block on CPU.
_ROWS = (8, 128)

_OF_ROWS = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((1,), (1,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[0],
)
_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)


@jax.custom_vjp
def dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """Returns x_m @ w_g(m) for each row m, [M, O] in x's dtype.

  Args:
    x: [M, I], rows sorted by group.
    w: [G, I, O].
    sizes: int32[G], rows of each group. Rows after those of the last group become 0, whatever x
      holds there.
  """
  y = jax.lax.platform_dependent(x, w, sizes, cpu=_blocked, cuda=_by_kernel, default=_ragged)
  return _kept(y, sizes)


def _kept(x, sizes):
  """Returns rows with 0 after those of the last group, which a kernel leaves undefined."""
  return jnp.where((jnp.arange(len(x)) < sizes.sum())[:, None], x, 0)


def _forward(x, w, sizes):
  return dot(x, w, sizes), (x, w, sizes)


def _backward(saved, g):
  x, w, sizes = saved
  g = _kept(g, sizes)
  dx = dot(g, w.swapaxes(1, 2), sizes)
  dw = jax.lax.platform_dependent(
    x, g, sizes, cpu=_blocked_sums, cuda=_sums_by_kernel, default=_ragged_sums
  )
  return dx, dw.astype(w.dtype), None


dot.defvjp(_forward, _backward)


def _ragged(x, w, sizes):
  # Outside of a shard_map, on one device, JAX needs the layout of the result.
  where = jax.P() if is_alone() else None
  return jax.lax.ragged_dot_general(x, w, sizes, _OF_ROWS, out_sharding=where)


def _ragged_sums(x, g, sizes):
  """Returns the sum of x_m^T g_m over the rows of each group, [G, I, O]."""
  where = jax.P() if is_alone() else None
  return jax.lax.ragged_dot_general(x, g, sizes, _OVER_ROWS, out_sharding=where)


class Blocks(NamedTuple):
  """Rows cut into blocks, each group's into blocks of its own: the last one of a group reaches into
  the next groups.

  size: rows of a block. count: int32[], how many blocks there are; those behind have no rows of
  their own. group, first, end: int32[blocks], the group of each block, its first row, and one past
  the last row of its group.
  """

  size: int
  count: jax.Array
  group: jax.Array
  first: jax.Array
  end: jax.Array


def _block_size(rows: int, groups: int, limits: tuple[int, int]) -> int:
  """Returns the rows of a block: small groups are not padded to more than twice their rows."""
  size, most = limits
  while size < most and size * groups < rows:
    size *= 2
  return size


def _blocks(rows: int, sizes: jax.Array, limits: tuple[int, int]) -> Blocks:
  groups = len(sizes)
  size = _block_size(rows, groups, limits)
  counts = -(-sizes // size)
  ends, starts = jnp.cumsum(counts), jnp.cumsum(sizes) - sizes
  block = jnp.arange(-(-rows // size) + groups, dtype=jnp.int32)
  group = jnp.minimum(jnp.searchsorted(ends, block, side='right'), groups - 1).astype(jnp.int32)
  first = starts[group] + (block - (ends - counts)[group]) * size
  return Blocks(size, ends[-1], group, first, (starts + sizes)[group])


def _by_kernel(x, w, sizes, interpret=False):
  b = _blocks(len(x), sizes, grouped_triton.ROWS)
  return grouped_triton.product(x, w, b.group, b.first, b.end, b.size, interpret)


def _sums_by_kernel(x, g, sizes, interpret=False):
  end = jnp.cumsum(sizes)
  size = _block_size(len(x), len(sizes), grouped_triton.ROWS)
  return grouped_triton.sums(x, g, end - sizes, end, min(size, grouped_triton.WIDTH), interpret)


def _take(x, first, size):
  return jax.lax.dynamic_slice_in_dim(x, first, size)


def _blocked(x, w, sizes):
  size, count, group, first, _ = _blocks(len(x), sizes, _ROWS)
  padded = jnp.pad(x, ((0, size), (0, 0)))

  def body(i, out):
    y = jnp.matmul(_take(padded, first[i], size), w[group[i]])
    # In order: the next group overwrites the rows that a block has of it.
    return jax.lax.dynamic_update_slice_in_dim(out, y.astype(x.dtype), first[i], 0)

  out = jnp.zeros((len(padded), w.shape[2]), x.dtype)
  return jax.lax.fori_loop(0, count, body, out)[: len(x)]


def _blocked_sums(x, g, sizes):
  size, count, group, first, end = _blocks(len(x), sizes, _ROWS)
  x, g = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, g))

  def body(i, out):
    e = group[i]
    is_own = first[i] + jnp.arange(size) < end[i]
    rows = jnp.where(is_own[:, None], _take(x, first[i], size), 0)
    more = jnp.matmul(rows.T, _take(g, first[i], size), preferred_element_type=jnp.float32)
    return out.at[e].add(more)

  out = jnp.zeros((len(sizes), x.shape[1], g.shape[1]), jnp.float32)
  return jax.lax.fori_loop(0, count, body, out).astype(x.dtype)
