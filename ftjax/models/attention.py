"""Softmax attention with grouped key/value heads: one mask rule for training, packing, padding and
decoding.

Query t may look at key s when both belong to the same segment and positions[t] >= positions[s].
Segment 0 is padding. Positions count within a segment, so the rule needs no index arithmetic and
survives any reordering of the sequence.

An island (`shard_map`): the reshape of N heads into K groups, and the gather of keys over
`context`, are local here. Which kernel computes it is chosen by platform and length, and logged."""

import dataclasses
import functools
import logging

import jax

from ftjax.models.kernels import blocked, dense
from ftjax.runtime import sharding
from ftjax.runtime.sharding import spec

log = logging.getLogger(__name__)

# Shorter rows are quicker with all scores at once.
_LONG = 1024


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
  mesh = jax.sharding.get_abstract_mesh()
  platform = mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()
  name = kernel(platform, mesh.shape['context'], q.shape[1], k.shape[1])
  _tell(name, platform)
  return sharding.island(functools.partial(_local, name=name), specs, heads)(q, k, v, *places)


def kernel(platform: str, context: int, queries: int, keys: int) -> str:
  """Which file of kernels/ computes attention.

  Args:
    platform: 'tpu', 'gpu' or 'cpu'.
    context: ways that the sequence is split.
    queries: T, of the whole row.
    keys: S, of the whole row.
  """
  if platform == 'tpu' and context == 1 and queries == keys and queries % 128 == 0:
    return 'splash'
  if queries >= _LONG and blocked.block_size(queries // context):
    return 'blocked'
  return 'dense'


@functools.cache
def _tell(name: str, platform: str) -> None:
  log.info('attention on %s: kernels/%s.py', platform, name)


def _local(q, k, v, q_segments, q_positions, k_segments, k_positions, *, name: str):
  if name == 'splash':
    from ftjax.models.kernels import splash  # Pallas is slow to import, and of no use elsewhere

    return splash.attend(q, k, v, q_segments)
  k, v, k_segments, k_positions = (
    sharding.gather(a, 'context', 1) for a in (k, v, k_segments, k_positions)
  )
  if name == 'blocked':
    return blocked.attend(q, k, v, (q_segments, q_positions, k_segments, k_positions))
  mask = q_segments[:, :, None] == k_segments[:, None, :]
  mask &= q_positions[:, :, None] >= k_positions[:, None, :]
  return dense.attend(q, k, v, mask)
