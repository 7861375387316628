"""Attention with numbers that are added to the scores by the distance from the query to the key
(Raffel et al. 2020, "T5", section 2.1):

  score(i, j) = q_i k_j / sqrt(H) + table[bucket(j - i), head]

All layers of a side share one table. Distances are those of positions within a document, and other
documents are masked, so packed rows have the numbers of padded ones.

In training a row's tokens stand in the order of their positions, so that the numbers of all rows
are one matrix of equal diagonals. It is made of the vector of its diagonals by reshaping, whose
gradient is a sum and no scatter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.models.attention import Tokens
from ftjax.models.kernels import dense
from ftjax.models.mixer_spec import RelativeBias
from ftjax.runtime import sharding
from ftjax.runtime.sharding import spec

# Queries at a time in longer rows.
_BLOCK = 256


@functools.cache
def buckets(length: int, bias: RelativeBias, causal: bool) -> np.ndarray:
  """Returns the row of the table for the distances 1 - length to length - 1 from a query to a key,
  int32[2 length - 1]: exact for near ones, of equal width in logarithms beyond, up to `longest`.
  Later keys have the second half of the rows; with `causal` they have no rows, and earlier ones
  have all.

  Computed on the host in float32, as in transformers: at the borders rounding counts.
  """
  distance = np.arange(1 - length, length, dtype=np.int32)
  count, first = bias.buckets, np.zeros_like(distance)
  if causal:
    distance = np.maximum(-distance, 0)
  else:
    count //= 2
    first = np.where(distance > 0, count, 0)
    distance = np.abs(distance)
  near = count // 2
  ratio = np.maximum(distance, near).astype(np.float32) / np.float32(near)
  width = np.float32(np.log(bias.longest / near))
  far = near + (np.log(ratio) / width * np.float32(count - near)).astype(np.int32)
  found = np.where(distance < near, distance, np.minimum(far, count - 1))
  return (first + found).astype(np.int32)


def by_distance(table: jax.Array, length: int, bias: RelativeBias, causal: bool) -> jax.Array:
  """Returns what is added to the scores at the distances of `buckets`, float32[N, 2 length - 1].

  table: [P, N].
  """

  def local(table):
    return table.astype(jnp.float32)[buckets(length, bias, causal)].T

  where = spec('position', 'heads'), spec('heads', None)
  return sharding.shard_map(local, (where[0],), where[1])(table)


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array,
  query: Tokens,
  key: Tokens,
  causal: bool,
) -> jax.Array:
  """Returns softmax(score) v, [B, T, N, H]; see the file's docstring.

  Args:
    q: [B, T, N, H], any float dtype; scores and softmax are float32.
    k: [B, S, N, H].
    v: [B, S, N, H].
    bias: float32[N, 2 L - 1], of `by_distance`; L: above every position.
    query: segments and positions of the T queries. Where `key` is the same object, the tokens of a
      document stand in the order of their positions, if `context` does not split them.
    key: of the S keys.
    causal: a query sees no later key.
  """
  heads, where = spec('batch', 'seq', 'heads', None), spec('batch', 'seq')
  places = (query.segments, query.positions, key.segments, key.positions)
  specs = (heads, heads, heads, spec('heads', None), (where,) * 4)
  is_ordered = query is key and sharding.axis_size('context') == 1
  local = functools.partial(_local, causal=causal, is_ordered=is_ordered)
  return sharding.shard_map(local, specs, heads)(q, k, v, bias, places)


def _local(q, k, v, bias, places, *, causal: bool, is_ordered: bool):
  q_segments, q_positions, *keys = places
  k, v, *keys = (sharding.gather(a, 'context', 1) for a in (k, v, *keys))
  length = q.shape[1]

  def block(begin, q, segments, positions):
    where = (segments, positions, *keys)
    if is_ordered:
      added = diagonals(bias, begin, q.shape[1], length)[None]
    else:
      distance = keys[1][:, None, :] - positions[:, :, None]
      added = bias[:, distance + bias.shape[1] // 2].swapaxes(0, 1)  # [B, N, T, S]
    return _attend(q, k, v, added, dense.visible(where, None, causal))

  if length <= _BLOCK or length % _BLOCK:
    return block(0, q, q_segments, q_positions)
  parts = (a.reshape(a.shape[0], -1, _BLOCK, *a.shape[2:]) for a in (q, q_segments, q_positions))
  parts = tuple(a.swapaxes(0, 1) for a in parts)
  begins = jnp.arange(0, length, _BLOCK, dtype=jnp.int32)
  out = jax.lax.map(lambda a: jax.checkpoint(block)(*a), (begins, *parts))
  return out.swapaxes(0, 1).reshape(q.shape)


def diagonals(values: jax.Array, begin: jax.Array | int, rows: int, length: int) -> jax.Array:
  """Returns float32[N, rows, length] whose row i and column j has the value of the distance
  j - (begin + i).

  values: float32[N, 2 L - 1], of the distances 1 - L to L - 1, L at least `length`.
  """
  middle = values.shape[1] // 2
  # Of one row more: the last is the first place of the next when the rows are put end to end.
  width = rows + length - 1
  part = jax.lax.dynamic_slice_in_dim(values, middle - begin - rows + 1, width, 1)
  part = jnp.pad(part, ((0, 0), (0, 1)))
  whole = jnp.broadcast_to(part[:, None], (len(part), rows, width + 1))
  whole = whole.reshape(len(part), -1)[:, : rows * width].reshape(len(part), rows, width)
  return whole[:, :, rows - 1 :]


def _attend(q, k, v, added, mask):
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores = product('BTNH,BSNH->BNTS', q, k) * q.shape[-1] ** -0.5 + added
  weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1).astype(v.dtype)
  return product('BNTS,BSNH->BTNH', weights, v).astype(q.dtype)
