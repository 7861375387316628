"""Attention as batched matrix products over all scores, with a gradient written out.

The K key/value heads are batch entries and their G query heads extra rows, so keys are never
repeated; the gradient reuses weights and output, where the compiler's own makes copies of the
scores. Arrays are one device's.
"""

import functools

import jax
import jax.numpy as jnp


def product(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
  """Batched over axis 0, contracting axis i of a with axis j of b; float32 sums."""
  dims = (((i,), (j,)), ((0,), (0,)))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def fold_queries(x: jax.Array, num_kv: int) -> jax.Array:
  """[B, T, N, H] -> [B K, G T, H]."""
  b, t, n, h = x.shape
  x = x.reshape(b, t, num_kv, n // num_kv, h).transpose(0, 2, 3, 1, 4)
  return x.reshape(b * num_kv, n // num_kv * t, h)


def unfold_queries(x: jax.Array, shape: tuple[int, ...], num_kv: int) -> jax.Array:
  """[B K, G T, H] -> [B, T, N, H] = shape."""
  b, t, n, h = shape
  x = x.reshape(b, num_kv, n // num_kv, t, h).transpose(0, 3, 1, 2, 4)
  return x.reshape(shape)


def fold_keys(x: jax.Array) -> jax.Array:
  """[B, S, K, H] -> [B K, S, H]."""
  b, s, k, h = x.shape
  return x.transpose(0, 2, 1, 3).reshape(b * k, s, h)


def unfold_keys(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B K, S, H] -> [B, S, K, H] = shape."""
  b, s, k, h = shape
  return x.reshape(b, k, s, h).transpose(0, 2, 1, 3)


def visible(where: tuple[jax.Array, ...], window: int | None, causal: bool = True) -> jax.Array:
  """bool[B, T, S]: which keys a query may look at, by the rule of attention.py.

  Args:
    where: segments and positions of the queries, int32[B, T], then of the keys, int32[B, S].
    window: keys that a query sees, itself among them; None: all before it.
    causal: False: keys after the query too, with a window as many on either side.
  """
  q_segments, q_positions, k_segments, k_positions = where
  behind = q_positions[:, :, None] - k_positions[:, None, :]
  mask = q_segments[:, :, None] == k_segments[:, None, :]
  if causal:
    mask = mask & (behind >= 0)
  if window is None:
    return mask
  return mask & (behind < window) if causal else mask & (jnp.abs(behind) < window)


def cap(scores: jax.Array, soft_cap: float | None) -> jax.Array:
  """soft_cap tanh(scores / soft_cap) (Gemma 2, 2024, section 2)."""
  return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def uncap(ds: jax.Array, capped: jax.Array, soft_cap: float | None) -> jax.Array:
  """The gradient of uncapped scores from that of `capped`: tanh' = 1 - tanh^2."""
  return ds if soft_cap is None else ds * (1 - jnp.square(capped / soft_cap))


def _scores(rows, keys, soft_cap):
  """float32[B K, G T, S], capped."""
  return cap(product(rows, keys, 2, 2) * rows.shape[-1] ** -0.5, soft_cap)


def thinned(x: jax.Array, kept: jax.Array | None, share: float) -> jax.Array:
  """x where `kept`, divided by the share that is kept, else 0: dropout of probabilities, and of
  their gradient. kept: bool[B, N, T, S], or None for all; x may have other axes of the same size.
  """
  return x if kept is None else jnp.where(kept.reshape(x.shape), x / share, 0).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 6))
def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  soft_cap: float | None,
  kept: jax.Array | None = None,
  share: float = 1.0,
) -> jax.Array:
  """softmax(cap(q k^T / sqrt(H))) v.

  Args:
    q: [B, T, N, H].
    k: [B, S, K, H], N a multiple of K.
    v: [B, S, K, H].
    mask: bool[B, T, S], True where a query may look; the same for all heads.
    soft_cap: see `cap`.
    kept: bool[B, N, T, S], the probabilities that dropout keeps; None: all.
    share: of them; see `thinned`.

  Returns:
    [B, T, N, H] in q's dtype; scores and softmax are float32.
  """
  return _forward(q, k, v, mask, soft_cap, kept, share)[0]


def _forward(q, k, v, mask, soft_cap, kept, share):
  b, t, n, _ = q.shape
  num_kv, s = k.shape[2], k.shape[1]
  rows, keys, values = fold_queries(q, num_kv), fold_keys(k), fold_keys(v)
  scores = _scores(rows, keys, soft_cap).reshape(b, num_kv, n // num_kv, t, s)
  weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
  weights = weights.astype(q.dtype).reshape(b * num_kv, -1, s)
  out = product(thinned(weights, kept, share), values, 2, 1).astype(q.dtype)
  return unfold_queries(out, q.shape, num_kv), (rows, keys, values, weights, kept, out)


def _backward(soft_cap, share, saved, cotangent):
  rows, keys, values, weights, kept, out = saved
  b, *_, h = cotangent.shape
  num_kv = keys.shape[0] // b
  shape = (b, keys.shape[1], num_kv, h)
  g = fold_queries(cotangent, num_kv)
  inner = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)
  ds = weights * (thinned(product(g, values, 2, 2), kept, share) - inner)
  if soft_cap is not None:  # the scores again, rather than saved beside the weights
    ds = uncap(ds, _scores(rows, keys, soft_cap), soft_cap)
  ds = (ds * h**-0.5).astype(rows.dtype)
  dq = unfold_queries(product(ds, keys, 2, 1).astype(rows.dtype), cotangent.shape, num_kv)
  dk = unfold_keys(product(ds, rows, 1, 1).astype(rows.dtype), shape)
  dv = product(thinned(weights, kept, share), g, 1, 1).astype(rows.dtype)
  return dq, dk, unfold_keys(dv, shape), None, None


attend.defvjp(_forward, _backward)
