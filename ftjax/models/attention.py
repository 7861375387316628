"""Softmax attention with grouped key/value heads: one mask rule for training, packing, padding and
decoding.

Query t may look at key s when both belong to the same segment and positions[t] >= positions[s].
Segment 0 is padding. Positions count within a segment, so the rule needs no index arithmetic and
survives any reordering of the sequence.

An island (`shard_map`): the reshape of N heads into K groups, and the gather of keys over
`context`, are local here."""

import dataclasses

import jax

from ftjax.models.kernels import dense
from ftjax.runtime.sharding import spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Where tokens stand: `segments` int32[B, T] (0: padding, else a document) and `positions`
  int32[B, T] within it.
  """

  segments: jax.Array
  positions: jax.Array


def attend(q: jax.Array, k: jax.Array, v: jax.Array, query: Tokens, key: Tokens) -> jax.Array:
  """Scaled dot-product attention.

  Args:
    q: [B, T, N, H], any float dtype; scores and softmax are float32.
    k: [B, S, K, H], N a multiple of K.
    v: [B, S, K, H].
    query: segments and positions of the T queries.
    key: of the S keys.

  Returns:
    [B, T, N, H] in q's dtype. Rows of padding attend among padding; their values are finite and
    mean nothing.
  """
  heads, kv, where = (
    spec('batch', 'seq', 'heads', None),
    spec('batch', 'seq', 'kv_heads', None),
    spec('batch', 'seq'),
  )
  places = (query.segments, query.positions, key.segments, key.positions)
  specs = (heads, kv, kv, where, where, where, where)
  return jax.shard_map(_local, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, *places)


def _local(q, k, v, q_segments, q_positions, k_segments, k_positions):
  k, v, k_segments, k_positions = (
    jax.lax.all_gather(a, 'context', axis=1, tiled=True) for a in (k, v, k_segments, k_positions)
  )
  mask = q_segments[:, :, None] == k_segments[:, None, :]
  mask &= q_positions[:, :, None] >= k_positions[:, None, :]
  return dense.attend(q, k, v, mask)
