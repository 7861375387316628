"""Attention as a Pallas kernel for NVIDIA GPUs: no scores in memory, and blocks that no query of a
block may see are skipped, those of other documents too.

Forward and gradient are Dao 2023, "FlashAttention-2", algorithms 1 and 2. The mask is the rule of
attention.py, from segments and positions, so rows may lie in any order, and queries may be fewer
than keys. Arrays are one device's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton

# Queries, and keys, of a block: not tuned, no GPU was at hand.
BLOCK = 64
_NOTHING = -1e30


@dataclasses.dataclass(frozen=True)
class Rule:
  """What does not depend on the tokens; `group`: query heads of a key head, `causal`: see
  attention.attend.
  """

  window: int | None
  soft_cap: float | None
  group: int
  interpret: bool
  causal: bool = True

  def scores(self, q, k, query, key):
    """(float32[n, m] capped scores, bool[n, m] mask) of blocks [n, H] and [m, H]; query, key:
    (segments, positions) int32[n], int32[m].
    """
    scores = pallas_triton.dot(q, k.T) * q.shape[-1] ** -0.5
    if self.soft_cap is not None:
      scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
    behind = query[1][:, None] - key[1][None, :]
    mask = query[0][:, None] == key[0][None, :]
    if self.causal:
      mask = mask & (behind >= 0)
    if self.window is not None:
      mask = mask & (behind < self.window)
      mask = mask if self.causal else mask & (behind > -self.window)
    return scores, mask

  def slope(self, ds, scores):
    """Gradient of q k^T from that of the capped scores."""
    if self.soft_cap is not None:
      ds = ds * (1 - (scores / self.soft_cap) * (scores / self.soft_cap))
    return ds


def _reachable(where, window, causal: bool = True) -> jax.Array:
  """bool[B, blocks of queries, blocks of keys]: False only where no query may see any key.

  By the ranges of segments and positions in a block; exact where blocks hold one segment.
  """
  q, k = where[:2], where[2:]
  ends = lambda a: a.reshape(a.shape[0], -1, BLOCK)  # noqa: E731
  (q_seg, q_pos), (k_seg, k_pos) = (map(ends, x) for x in (q, k))
  low = [a.min(-1) for a in (q_seg, q_pos, k_seg, k_pos)]
  high = [a.max(-1) for a in (q_seg, q_pos, k_seg, k_pos)]
  rows = lambda a: a[:, :, None]  # noqa: E731
  columns = lambda a: a[:, None, :]  # noqa: E731
  meet = (rows(low[0]) <= columns(high[2])) & (columns(low[2]) <= rows(high[0]))
  one = (rows(low[0]) == rows(high[0])) & (columns(low[2]) == columns(high[2]))
  hidden = columns(low[3]) > rows(high[1]) if causal else jnp.zeros_like(meet)
  if window is not None:
    hidden |= rows(low[1]) - columns(high[3]) >= window
    if not causal:
      hidden |= columns(low[3]) - rows(high[1]) >= window
  return meet & ~(one & hidden)


def _range(reachable: jax.Array) -> tuple[jax.Array, jax.Array]:
  """int32[B, blocks] first and one past the last reachable block along the last axis."""
  count = reachable.shape[-1]
  first = jnp.argmax(reachable, axis=-1)
  last = count - jnp.argmax(reachable[..., ::-1], axis=-1)
  return first.astype(jnp.int32), jnp.where(reachable.any(-1), last, 0).astype(jnp.int32)


def _part(ref, j):
  return ref[pl.ds(j * BLOCK, BLOCK)]


def _forward_kernel(q, k, v, q_seg, q_pos, k_seg, k_pos, first, last, out, logs, *, rule):
  rows, query = q[...], (q_seg[...], q_pos[...])

  def body(j, carry):
    total, top, mass = carry
    scores, mask = rule.scores(rows, _part(k, j), query, (_part(k_seg, j), _part(k_pos, j)))
    new = jnp.maximum(top, jnp.where(mask, scores, _NOTHING).max(-1))
    weights = jnp.where(mask, jnp.exp(scores - new[:, None]), 0.0)
    keep = jnp.exp(top - new)
    values = _part(v, j)
    total = total * keep[:, None] + pallas_triton.dot(weights.astype(values.dtype), values)
    return total, new, mass * keep + weights.sum(-1)

  n, h = rows.shape
  start = jnp.zeros((n, h), jnp.float32), jnp.full((n,), _NOTHING), jnp.zeros((n,), jnp.float32)
  i = pl.program_id(0)
  total, top, mass = jax.lax.fori_loop(first[i], last[i], body, start)
  mass = jnp.where(mass == 0, 1.0, mass)  # a query that sees nothing
  out[...] = (total / mass[:, None]).astype(out.dtype)
  logs[...] = top + jnp.log(mass)


def _weights(rule, rows, keys, query, key, logs):
  scores, mask = rule.scores(rows, keys, query, key)
  return scores, jnp.where(mask, jnp.exp(scores - logs[:, None]), 0.0)


def _queries_kernel(q, k, v, q_seg, q_pos, k_seg, k_pos, first, last, logs, inner, g, dq, *, rule):
  rows, query, slopes = q[...], (q_seg[...], q_pos[...]), g[...]
  log, shift = logs[...], inner[...]

  def body(j, total):
    keys, key = _part(k, j), (_part(k_seg, j), _part(k_pos, j))
    scores, weights = _weights(rule, rows, keys, query, key, log)
    ds = weights * (pallas_triton.dot(slopes, _part(v, j).T) - shift[:, None])
    return total + pallas_triton.dot(rule.slope(ds, scores).astype(keys.dtype), keys)

  i = pl.program_id(0)
  total = jax.lax.fori_loop(first[i], last[i], body, jnp.zeros(rows.shape, jnp.float32))
  dq[...] = (total * rows.shape[-1] ** -0.5).astype(dq.dtype)


def _keys_kernel(q, k, v, q_seg, q_pos, k_seg, k_pos, first, last, logs, inner, g, dk, dv, *, rule):
  keys, values, key = k[...], v[...], (k_seg[...], k_pos[...])
  j = pl.program_id(0)

  def of_head(head, carry):
    def body(i, carry):
      dk, dv = carry
      at = pl.ds(i * BLOCK, BLOCK)
      rows, slopes, query = q[head, at], g[head, at], (q_seg[at], q_pos[at])
      scores, weights = _weights(rule, rows, keys, query, key, logs[head, at])
      ds = weights * (pallas_triton.dot(slopes, values.T) - inner[head, at][:, None])
      dv += pallas_triton.dot(weights.astype(slopes.dtype).T, slopes)
      dk += pallas_triton.dot(rule.slope(ds, scores).astype(rows.dtype).T, rows)
      return dk, dv

    return jax.lax.fori_loop(first[j], last[j], body, carry)

  zero = jnp.zeros(keys.shape, jnp.float32)
  total_k, total_v = jax.lax.fori_loop(0, rule.group, of_head, (zero, zero))
  dk[...] = (total_k * keys.shape[-1] ** -0.5).astype(dk.dtype)
  dv[...] = total_v.astype(dv.dtype)


def _specs(q, k, group: int, by_query: bool):
  """BlockSpecs by kind, for a grid (blocks, B, heads): of queries and N, or of keys and K."""
  t, s, h = q.shape[2], k.shape[2], q.shape[3]
  if by_query:
    return {
      'q': pl.BlockSpec((None, None, BLOCK, h), lambda i, b, n: (b, n, i, 0)),
      'k': pl.BlockSpec((None, None, s, h), lambda i, b, n: (b, n // group, 0, 0)),
      'q_where': pl.BlockSpec((None, BLOCK), lambda i, b, n: (b, i)),
      'k_where': pl.BlockSpec((None, s), lambda i, b, n: (b, 0)),
      'range': pl.BlockSpec((None, t // BLOCK), lambda i, b, n: (b, 0)),
      'row': pl.BlockSpec((None, None, BLOCK), lambda i, b, n: (b, n, i)),
    }
  return {
    'q': pl.BlockSpec((None, group, t, h), lambda j, b, n: (b, n, 0, 0)),
    'k': pl.BlockSpec((None, None, BLOCK, h), lambda j, b, n: (b, n, j, 0)),
    'q_where': pl.BlockSpec((None, t), lambda j, b, n: (b, 0)),
    'k_where': pl.BlockSpec((None, BLOCK), lambda j, b, n: (b, j)),
    'range': pl.BlockSpec((None, s // BLOCK), lambda j, b, n: (b, 0)),
    'row': pl.BlockSpec((None, group, t), lambda j, b, n: (b, n, 0)),
  }


_INPUTS = ('q', 'k', 'k', 'q_where', 'q_where', 'k_where', 'k_where', 'range', 'range')


def _call(kernel, rule: Rule, inputs, kinds, outputs, by_query: bool):
  """Runs a kernel over blocks of queries, or of keys. outputs: [(kind, its shape and dtype)]."""
  q, k = inputs[:2]
  specs = _specs(q, k, rule.group, by_query)
  blocks = (q if by_query else k).shape[2] // BLOCK
  return pl.pallas_call(
    functools.partial(kernel, rule=rule),
    grid=(blocks, q.shape[0], (q if by_query else k).shape[1]),
    in_specs=[specs[kind] for kind in kinds],
    out_specs=[specs[kind] for kind, _ in outputs],
    out_shape=[like for _, like in outputs],
    compiler_params=pallas_triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=rule.interpret,
    name='attention' + kernel.__name__.removesuffix('_kernel'),
  )(*inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, where, rule: Rule):
  """Heads first: q [B, N, T, H], k and v [B, K, S, H] -> [B, N, T, H]."""
  return _forward(q, k, v, where, rule)[0]


def _forward(q, k, v, where, rule):
  reachable = _reachable(where, rule.window, rule.causal)
  logs = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
  inputs = (q, k, v, *where, *_range(reachable))
  like = jax.ShapeDtypeStruct(q.shape, q.dtype)
  out, logs = _call(_forward_kernel, rule, inputs, _INPUTS, [('q', like), ('row', logs)], True)
  return out, (q, k, v, where, out, logs)


def _backward(rule, saved, g):
  q, k, v, where, out, logs = saved
  inner = jnp.sum(g.astype(jnp.float32) * out, axis=-1)
  reachable = _reachable(where, rule.window, rule.causal)
  kinds = (*_INPUTS, 'row', 'row', 'q')
  like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)  # noqa: E731
  inputs = (q, k, v, *where, *_range(reachable), logs, inner, g)
  (dq,) = _call(_queries_kernel, rule, inputs, kinds, [('q', like(q))], True)
  inputs = (q, k, v, *where, *_range(reachable.swapaxes(1, 2)), logs, inner, g)
  dk, dv = _call(_keys_kernel, rule, inputs, kinds, [('k', like(k)), ('k', like(v))], False)
  return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  where: tuple[jax.Array, ...],
  *,
  window: int | None,
  soft_cap: float | None,
  causal: bool = True,
  interpret: bool = False,
) -> jax.Array:
  """softmax(cap(q k^T / sqrt(H))) v.

  Args:
    q: [B, T, N, H], T a multiple of BLOCK, H a power of two from 16 on.
    k: [B, S, K, H], S a multiple of BLOCK, N a multiple of K.
    v: [B, S, K, H].
    where: segments and positions, as in dense.visible.
    window: as there.
    soft_cap: see dense.cap.
    causal: as in dense.visible.
    interpret: run the kernel step by step on any device, for tests.

  Returns:
    [B, T, N, H] in q's dtype; scores and softmax are float32. 0 where a query sees no key.
  """
  rule = Rule(window, soft_cap, q.shape[2] // k.shape[2], interpret, causal)
  heads_first = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
  return _attend(*heads_first, where, rule).transpose(0, 2, 1, 3)
