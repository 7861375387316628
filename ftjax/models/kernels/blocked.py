"""Attention a block of queries at a time, for long rows on any device: memory grows with T, not
with T x S.

Scores of a block are computed again for the gradient, from the saved log of their sum (Dao et al.
2022, algorithm 2, without its blocks of keys). Arrays are one device's.
"""

import functools

import jax
import jax.numpy as jnp

from ftjax.models.kernels.dense import (
  fold_keys,
  fold_queries,
  product,
  unfold_keys,
  unfold_queries,
)

_SIZES = (512, 256, 128)


def block_size(queries: int) -> int:
  """Queries per block: the largest of 512, 256, 128 that divides; 0 where none does."""
  return next((size for size in _SIZES if queries % size == 0), 0)


def _scores(rows, keys, where, begin, size: int, heads: int):
  """float32[B K, G n, S] of a block of `size` queries, -1e30 where they may not look."""
  q_segments, q_positions, k_segments, k_positions = where
  segments, positions = (
    jax.lax.dynamic_slice_in_dim(a, begin, size, 1) for a in (q_segments, q_positions)
  )
  mask = segments[:, :, None] == k_segments[:, None, :]
  mask &= positions[:, :, None] >= k_positions[:, None, :]
  scores = product(rows, keys, 2, 2) * rows.shape[-1] ** -0.5
  b, s = k_segments.shape
  scores = scores.reshape(b, -1, heads, size, s)
  return jnp.where(mask[:, None, None], scores, -1e30).reshape(rows.shape[0], -1, s)


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array, where: tuple[jax.Array, ...]) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v.

  Args:
    q: [B, T, N, H], T a multiple of 128.
    k: [B, S, K, H], N a multiple of K.
    v: [B, S, K, H].
    where: segments and positions of the queries, int32[B, T], then of the keys, int32[B, S]; see
      attention.py for the rule.

  Returns:
    [B, T, N, H] in q's dtype; scores and softmax are float32.
  """
  return _forward(q, k, v, where)[0]


def _forward(q, k, v, where):
  size, num_kv = block_size(q.shape[1]), k.shape[2]
  heads = q.shape[2] // num_kv
  keys, values = fold_keys(k), fold_keys(v)

  def block(i):
    part = jax.lax.dynamic_slice_in_dim(q, i * size, size, 1)
    scores = _scores(fold_queries(part, num_kv), keys, where, i * size, size, heads)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = (product((weights / total).astype(v.dtype), values, 2, 1)).astype(q.dtype)
    return unfold_queries(out, part.shape, num_kv), top + jnp.log(total)

  out, logs = jax.lax.map(block, jnp.arange(q.shape[1] // size))
  out = out.swapaxes(0, 1).reshape(q.shape)
  return out, (q, k, v, where, out, logs)


def _backward(saved, cotangent):
  q, k, v, where, out, logs = saved
  size, num_kv = block_size(q.shape[1]), k.shape[2]
  heads = q.shape[2] // num_kv
  keys, values = fold_keys(k), fold_keys(v)

  def block(carry, i):
    dk, dv = carry
    part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
    rows, g, y = (fold_queries(part(a, axis=1), num_kv) for a in (q, cotangent, out))
    weights = jnp.exp(_scores(rows, keys, where, i * size, size, heads) - logs[i])
    inner = jnp.sum(g.astype(jnp.float32) * y, axis=-1, keepdims=True)
    ds = (weights * (product(g, values, 2, 2) - inner) * q.shape[-1] ** -0.5).astype(q.dtype)
    dk += product(ds, rows, 1, 1)
    dv += product(weights.astype(q.dtype), g, 1, 1)
    dq = product(ds, keys, 2, 1).astype(q.dtype)
    return (dk, dv), unfold_queries(dq, (q.shape[0], size, *q.shape[2:]), num_kv)

  zero = jnp.zeros(keys.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(block, (zero, zero), jnp.arange(q.shape[1] // size))
  dk, dv = (unfold_keys(a.astype(k.dtype), k.shape) for a in (dk, dv))
  return dq.swapaxes(0, 1).reshape(q.shape), dk, dv, None


attend.defvjp(_forward, _backward)
