"""Attention a block of queries at a time, for long rows on any device: memory grows with T, not
with T x S.

Scores of a block are computed again for the gradient, from the saved log of their sum (Dao et al.
2022, algorithm 2, without its blocks of keys). Arrays are one device's.
"""

import functools

import jax
import jax.numpy as jnp

from ftjax.models.dropout import Drawn, kept, kept_share
from ftjax.models.kernels.dense import (
  cap,
  fold_keys,
  fold_queries,
  product,
  thinned,
  uncap,
  unfold_keys,
  unfold_queries,
  visible,
)

_SIZES = (512, 256, 128)


def block_size(queries: int) -> int:
  """Queries per block: the largest of 512, 256, 128 that divides; 0 where none does."""
  return next((size for size in _SIZES if queries % size == 0), 0)


def _scores(rows, keys, soft_cap):
  """float32[B K, G n, S] of a block's n queries, capped."""
  return cap(product(rows, keys, 2, 2) * rows.shape[-1] ** -0.5, soft_cap)


def _masked(scores, where, begin, size: int, window, causal: bool):
  """`scores` of the queries from `begin` on, -1e30 where they may not look."""
  places = (jax.lax.dynamic_slice_in_dim(a, begin, size, 1) for a in where[:2])
  mask = visible((*places, *where[2:]), window, causal)
  b, _, s = mask.shape
  split = scores.reshape(b, -1, size, s)  # [B, N, n, S]
  return jnp.where(mask[:, None], split, -1e30).reshape(scores.shape)


def _kept(drawn: Drawn | None, rate: float, begin, size: int, keys: int):
  """bool[B, N, n, S], the probabilities of a block's n queries that dropout keeps; None: all."""
  if drawn is None:
    return None
  queries = jax.lax.dynamic_slice_in_dim(drawn.queries, begin, size, 0)
  return kept(drawn._replace(queries=queries), rate, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 8))
def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  where: tuple[jax.Array, ...],
  window: int | None,
  soft_cap: float | None,
  causal: bool = True,
  drawn: Drawn | None = None,
  rate: float = 0.0,
) -> jax.Array:
  """softmax(cap(q k^T / sqrt(H))) v.

  Args:
    q: [B, T, N, H], T a multiple of 128.
    k: [B, S, K, H], N a multiple of K.
    v: [B, S, K, H].
    where: segments and positions, as in dense.visible.
    window: as there.
    soft_cap: see dense.cap.
    causal: as in dense.visible.
    drawn: what dropout of the probabilities is drawn from; None: there is none.
    rate: its rate.

  Returns:
    [B, T, N, H] in q's dtype; scores and softmax are float32.
  """
  return _forward(q, k, v, where, window, soft_cap, causal, drawn, rate)[0]


def _forward(q, k, v, where, window, soft_cap, causal, drawn, rate):
  size, num_kv, share = block_size(q.shape[1]), k.shape[2], kept_share(rate)
  keys, values = fold_keys(k), fold_keys(v)

  def block(i):
    part = jax.lax.dynamic_slice_in_dim(q, i * size, size, 1)
    scores = _scores(fold_queries(part, num_kv), keys, soft_cap)
    scores = _masked(scores, where, i * size, size, window, causal)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    those = _kept(drawn, rate, i * size, size, k.shape[1])
    weights = thinned((weights / total).astype(v.dtype), those, share)
    out = product(weights, values, 2, 1).astype(q.dtype)
    return unfold_queries(out, part.shape, num_kv), top + jnp.log(total)

  out, logs = jax.lax.map(block, jnp.arange(q.shape[1] // size))
  out = out.swapaxes(0, 1).reshape(q.shape)
  return out, (q, k, v, where, drawn, out, logs)


def _backward(window, soft_cap, causal, rate, saved, cotangent):
  q, k, v, where, drawn, out, logs = saved
  size, num_kv, share = block_size(q.shape[1]), k.shape[2], kept_share(rate)
  keys, values = fold_keys(k), fold_keys(v)

  def block(carry, i):
    dk, dv = carry
    part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
    rows, g, y = (fold_queries(part(a, axis=1), num_kv) for a in (q, cotangent, out))
    scores = _scores(rows, keys, soft_cap)
    weights = jnp.exp(_masked(scores, where, i * size, size, window, causal) - logs[i])
    inner = jnp.sum(g.astype(jnp.float32) * y, axis=-1, keepdims=True)
    those = _kept(drawn, rate, i * size, size, k.shape[1])
    dweights = thinned(product(g, values, 2, 2), those, share)
    ds = uncap(weights * (dweights - inner), scores, soft_cap)
    ds = (ds * q.shape[-1] ** -0.5).astype(q.dtype)
    dk += product(ds, rows, 1, 1)
    dv += product(thinned(weights, those, share).astype(q.dtype), g, 1, 1)
    dq = product(ds, keys, 2, 1).astype(q.dtype)
    return (dk, dv), unfold_queries(dq, (q.shape[0], size, *q.shape[2:]), num_kv)

  zero = jnp.zeros(keys.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(block, (zero, zero), jnp.arange(q.shape[1] // size))
  dk, dv = (unfold_keys(a.astype(k.dtype), k.shape) for a in (dk, dv))
  return dq.swapaxes(0, 1).reshape(q.shape), dk, dv, None, None


attend.defvjp(_forward, _backward)
