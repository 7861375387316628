"""Products of rows with the matrix of their group, where the sizes of the groups are known at run
time: `jax.lax.ragged_dot`, and on CPU a loop over blocks of rows.

On CPU XLA has no such product: JAX makes E masked copies of the rows and multiplies all of them (E
64, 2,048 rows of 128: 160 ms and 69 MB, against 3 ms here).
"""

import jax
import jax.numpy as jnp

from ftjax.runtime.sharding import is_alone

# Rows of a block on CPU. Small groups are not padded to more than twice their rows.
_LARGEST, _SMALLEST = 128, 8

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
    sizes: int32[G], rows of each group. Rows behind the last group become 0, whatever they hold.
  """
  y = jax.lax.platform_dependent(x, w, sizes, cpu=_blocked, default=_ragged)
  return _kept(y, sizes)


def _kept(x, sizes):
  """Returns rows with 0 behind the last group: there a kernel may leave anything."""
  return jnp.where((jnp.arange(len(x)) < sizes.sum())[:, None], x, 0)


def _forward(x, w, sizes):
  return dot(x, w, sizes), (x, w, sizes)


def _backward(saved, g):
  x, w, sizes = saved
  g = _kept(g, sizes)
  dx = dot(g, w.swapaxes(1, 2), sizes)
  dw = jax.lax.platform_dependent(x, g, sizes, cpu=_blocked_sums, default=_ragged_sums)
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


def _blocks(rows: int, sizes: jax.Array):
  """Returns (rows of a block, number of blocks, group of each block, its first row): each group's
  rows are cut into blocks of their own, the last of which reaches into the next groups.
  """
  groups = len(sizes)
  size = _SMALLEST
  while size < _LARGEST and size * groups < rows:
    size *= 2
  counts = -(-sizes // size)
  ends, starts = jnp.cumsum(counts), jnp.cumsum(sizes) - sizes
  block = jnp.arange(-(-rows // size) + groups, dtype=jnp.int32)
  group = jnp.minimum(jnp.searchsorted(ends, block, side='right'), groups - 1).astype(jnp.int32)
  first = starts[group] + (block - (ends - counts)[group]) * size
  return size, ends[-1], group, first


def _take(x, first, size):
  return jax.lax.dynamic_slice_in_dim(x, first, size)


def _blocked(x, w, sizes):
  size, count, group, first = _blocks(len(x), sizes)
  padded = jnp.pad(x, ((0, size), (0, 0)))

  def body(i, out):
    y = jnp.matmul(_take(padded, first[i], size), w[group[i]])
    # In order: the next group overwrites the rows that a block has of it.
    return jax.lax.dynamic_update_slice_in_dim(out, y.astype(x.dtype), first[i], 0)

  out = jnp.zeros((len(padded), w.shape[2]), x.dtype)
  return jax.lax.fori_loop(0, count, body, out)[: len(x)]


def _blocked_sums(x, g, sizes):
  size, count, group, first = _blocks(len(x), sizes)
  ends = jnp.cumsum(sizes)
  x, g = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, g))

  def body(i, out):
    e = group[i]
    is_own = first[i] + jnp.arange(size) < ends[e]
    rows = jnp.where(is_own[:, None], _take(x, first[i], size), 0)
    more = jnp.matmul(rows.T, _take(g, first[i], size), preferred_element_type=jnp.float32)
    return out.at[e].add(more)

  out = jnp.zeros((len(sizes), x.shape[1], g.shape[1]), jnp.float32)
  return jax.lax.fori_loop(0, count, body, out).astype(x.dtype)
