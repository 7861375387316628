"""Disentangled attention (He et al. 2021, "DeBERTa", section 3.1; log buckets: He et al. 2023,
"DeBERTaV3"): scores are sums of content to content, content to position and position to content.

  score(i, j) = (q_i k_j + q_i P_k[d] + k_j P_q[d]) / sqrt(H terms),  d: the bucket of i - j

P_k and P_q are projections of one table of relative positions that all layers share. Distances are
those of positions within a document, and other documents are masked, so packed rows have the
numbers of padded ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ftjax.models.attention import Tokens, drawing
from ftjax.models.dropout import ModelDropout, kept, kept_share
from ftjax.models.kernels import dense
from ftjax.models.layers import Linear
from ftjax.models.mixer_spec import DisentangledSpec
from ftjax.runtime import sharding
from ftjax.runtime.sharding import spec

# Queries at a time in longer rows: beside the scores there are as many numbers for both tables.
_BLOCK = 256


@functools.cache
def buckets(length: int, span: int, longest: int) -> np.ndarray:
  """Returns rows of the table of relative positions for distances 1 - length to length - 1,
  int32[2 length - 1], from 0 to 2 span - 1: exact up to half of `span` on each side, and of equal
  width in logarithms beyond, up to `longest`; the distance itself where `longest` is 0.

  Computed on the host in float32, as in transformers: at the borders rounding counts.
  """
  distance = np.arange(1 - length, length, dtype=np.int32)
  if longest:
    mid = span // 2
    size = np.abs(distance)
    far = (np.maximum(size, mid) / np.float32(mid)).astype(np.float32)
    widest = np.log(np.float32((longest - 1) / mid))
    beyond = np.ceil(np.log(far) / widest * np.float32(mid - 1)) + mid
    distance = np.where(size <= mid, distance, beyond * np.sign(distance)).astype(np.int32)
  return np.clip(distance + span, 0, 2 * span - 1).astype(np.int32)


class Disentangled(nnx.Module):
  """The mixer of DeBERTa. Its projections have biases."""

  pos_q = pos_k = None

  def __init__(self, model_dim: int, spec: DisentangledSpec):
    d, n, h = model_dim, spec.num_heads, spec.head_dim
    heads, axes = ('batch', 'seq', 'heads', 'head_dim'), ('embed', 'heads', 'head_dim')
    keys, key_axes = ('batch', 'seq', 'kv_heads', 'head_dim'), ('embed', 'kv_heads', 'head_dim')
    self.spec = spec
    self.q = Linear((d,), (n, h), axes, heads, True)
    self.k = Linear((d,), (n, h), key_axes, keys, True)
    self.v = Linear((d,), (n, h), key_axes, keys, True)
    out = ('batch', 'seq', 'act_embed')
    self.o = Linear((n, h), (d,), ('heads', 'head_dim', 'embed'), out, True)
    if not spec.shares_maps:
      self.pos_q = Linear((d,), (n, h), key_axes, keys, True) if spec.has_p2c else None
      self.pos_k = Linear((d,), (n, h), key_axes, keys, True) if spec.has_c2p else None

  def __call__(self, x: jax.Array, context, memory: None):
    """Returns (the output for x [B, T, D], None). memory: there is none, no text is generated."""
    own, drop = self.spec, context.dropout
    q, k, v = self.q(x, drop), self.k(x, drop), self.v(x, drop)
    maps = (self.k, self.q) if own.shares_maps else (self.pos_k, self.pos_q)
    p_k, p_q = (
      _projected(m, context.relative) if wanted else None
      for m, wanted in zip(maps, (own.has_c2p, own.has_p2c), strict=True)
    )
    y = attend(q, k, v, p_k, p_q, context.query, context.key, own, context.inner)
    return self.o(y, drop), memory


def _projected(map_: Linear, table: jax.Array) -> jax.Array:
  """Returns the rows of the table of relative positions [P, D] as heads, [P, N, H]."""
  w = map_.whole_weights(table.dtype)
  y = jnp.einsum('PD,DO->PO', table, w, out_sharding=spec(None, 'kv_heads'))
  y = jax.lax.reshape(y, (len(table), *map_.outputs), out_sharding=spec(None, 'kv_heads', None))
  return y + map_.b[...].astype(y.dtype)[None]


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  p_k: jax.Array | None,
  p_q: jax.Array | None,
  query: Tokens,
  key: Tokens,
  own: DisentangledSpec,
  dropout: ModelDropout | None = None,
) -> jax.Array:
  """Returns softmax(score) v, [B, T, N, H]; see the file's docstring.

  Args:
    q: [B, T, N, H], any float dtype; scores and softmax are float32.
    k: [B, S, N, H].
    v: [B, S, N, H].
    p_k: [P, N, H], the keys of relative positions; None: no content to position.
    p_q: [P, N, H], their queries; None: no position to content.
    query: segments and positions of the T queries.
    key: of the S keys.
    own: buckets and terms.
    dropout: as in attention.attend.
  """
  heads, kv = spec('batch', 'seq', 'heads', None), spec('batch', 'seq', 'kv_heads', None)
  table, where = spec(None, 'kv_heads', None), spec('batch', 'seq')
  tables = tuple(None if p is None else table for p in (p_k, p_q))
  places = (query.segments, query.positions, key.segments, key.positions)
  drawn, drawn_specs = drawing(dropout, q.shape[2], q.shape[1], k.shape[1])
  specs = (heads, kv, kv, tables, (where,) * 4, drawn_specs)
  rows = buckets(k.shape[1], own.span, own.longest)
  rate = 0.0 if drawn is None else dropout.rates.attention
  local = functools.partial(_local, rows=rows, own=own, rate=rate)
  return sharding.shard_map(local, specs, heads)(q, k, v, (p_k, p_q), places, drawn)


def _local(q, k, v, tables, places, drawn, *, rows: np.ndarray, own: DisentangledSpec, rate: float):
  q_segments, q_positions, *keys = places
  k, v, *keys = (sharding.gather(a, 'context', 1) for a in (k, v, *keys))

  def block(q, segments, positions, queries):
    where = (segments, positions, *keys)
    those = None if drawn is None else kept(drawn._replace(queries=queries), rate, k.shape[1])
    return _attend(q, k, v, tables, where, jnp.asarray(rows), own, (those, kept_share(rate)))

  length, numbers = q.shape[1], None if drawn is None else drawn.queries
  if length <= _BLOCK or length % _BLOCK:
    return block(q, q_segments, q_positions, numbers)
  parts = (a.reshape(a.shape[0], -1, _BLOCK, *a.shape[2:]) for a in (q, q_segments, q_positions))
  parts = (*(a.swapaxes(0, 1) for a in parts), numbers)
  if numbers is not None:
    parts = (*parts[:3], numbers.reshape(-1, _BLOCK))
  out = jax.lax.map(lambda a: jax.checkpoint(block)(*a), parts)
  return out.swapaxes(0, 1).reshape(q.shape)


def _attend(q, k, v, tables, where, rows, own, thinning):
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores = product('BTNH,BSNH->BNTS', q, k)
  middle = len(rows) // 2  # the place of distance 0
  distance = where[1][:, :, None] - where[3][:, None, :]
  at = rows[jnp.clip(distance + middle, 0, len(rows) - 1)][:, None]  # [B, 1, T, S]
  p_k, p_q = tables
  if p_k is not None:
    scores += jnp.take_along_axis(product('BTNH,PNH->BNTP', q, p_k), at, 3)
  if p_q is not None:
    scores += jnp.take_along_axis(product('BSNH,PNH->BNPS', k, p_q), at, 2)
  terms = 1 + (p_k is not None) + (p_q is not None)
  mask = dense.visible(where, None, causal=False)
  scores = jnp.where(mask[:, None], scores * (own.head_dim * terms) ** -0.5, -1e30)
  weights = dense.thinned(jax.nn.softmax(scores, axis=-1).astype(v.dtype), *thinning)
  return product('BNTS,BSNH->BTNH', weights, v).astype(q.dtype)
