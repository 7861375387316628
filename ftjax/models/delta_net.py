"""The gated delta net (Yang et al. 2025, "Gated delta networks"), as Qwen3.5 has it.

Per value head a state S [key size, value size] is a map from keys to values. Each token decays it,
corrects what it returns for the token's key, and asks it for the token's query:

  S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  y = S^T q

Queries, keys and values come through a causal convolution of each channel; queries and keys have
length 1. Training computes chunks of tokens at once: within a chunk the corrections are the
solution of a triangular system (Yang et al. 2025, section 3.2), from chunk to chunk the state is
carried.

Documents of a packed row: a term that would cross a border is replaced by zero where it is made (a
tap of the convolution, a pair of tokens within a chunk, the state that a chunk begins with), so
nothing crosses it, in values and in gradients. A document is a run of equal segments. Padding
neither decays nor corrects a state.

Layout: the channels of a key head stand together (its query, its key, the values that it serves),
so that `tensor` splits the heads of all of them alike.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.models import triangular
from ftjax.models.architecture import DeltaNetSpec
from ftjax.models.attention import Tokens
from ftjax.models.kv_cache import Memory
from ftjax.models.layers import Linear, declare
from ftjax.runtime import sharding
from ftjax.runtime.sharding import spec

# Tokens of a chunk: with the usual head sizes of 128 the products within a chunk then cost less
# than those with the state.
CHUNK = 64
# The initial decay of a state is exp(-exp(A_log) softplus(dt_bias)) = 0.99 a token.
_A_LOG, _DT_BIAS = 0.0, -4.6
# A state that decays by exp(-20) is lost in the rounding of float32. A longer decay would only take
# digits from those of the tokens behind it, which are differences of sums within the chunk.
_FORGOTTEN = -20.0

# The state is float32, and so are its products: errors stay in it for as long as it remembers.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class DeltaNet(nnx.Module):
  """A gated delta net with its projections. x [B, T, D] in the compute dtype."""

  def __init__(self, model_dim: int, spec: DeltaNetSpec):
    d, k, n, v = model_dim, spec.num_key_heads, spec.num_value_heads, spec.value_dim
    lead = ('batch', 'seq')
    self.spec = spec
    self.qkv = Linear(
      *((d,), (k, spec.channels), ('embed', 'kv_heads', 'channels')),
      (*lead, 'kv_heads', 'channels'),
    )
    self.z = Linear((d,), (n, v), ('embed', 'heads', 'channels'), (*lead, 'heads', 'channels'))
    self.b = Linear((d,), (n,), ('embed', 'heads'), (*lead, 'heads'))
    self.a = Linear((d,), (n,), ('embed', 'heads'), (*lead, 'heads'))
    self.out = Linear((n, v), (d,), ('heads', 'channels', 'embed'), (*lead, 'act_embed'))
    width = spec.conv_width
    self.conv = declare((width, k, spec.channels), ('taps', 'kv_heads', 'channels'), width)
    self.a_log = declare((n,), ('heads',), 0, _A_LOG)
    self.dt_bias = declare((n,), ('heads',), 0, _DT_BIAS)
    self.norm = declare((v,), ('norm',), 0, 1.0)

  def __call__(self, x: jax.Array, context, memory: Memory | None):
    """Returns (y [B, T, D], memory).

    context: block.Context, of which segments and dropout are read. memory: in decoding, of
    rows that are one document each, padded on the left.
    """
    drop = context.dropout
    y, memory = self._mixed(
      self.qkv(x, drop), self.b(x, drop), self.a(x, drop), context.query, memory
    )
    y32 = y.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(y32 * y32, axis=-1, keepdims=True) + self.spec.eps)
    scale = self.norm[...].astype(jnp.float32)[None, None, None]
    gate = jax.nn.silu(self.z(x, drop).astype(jnp.float32))
    return self.out((y32 * inverse * scale * gate).astype(x.dtype), drop), memory

  def _mixed(self, qkv, b, a, query: Tokens, memory: Memory | None):
    """Returns (y [B, T, N, value size], memory): convolution and recurrence, whole heads and whole
    rows on a device.
    """
    heads, keys = spec('batch', 'seq', 'heads'), spec('batch', 'seq', 'kv_heads', None)
    arguments = [qkv, b, a, query.segments, self.conv[...], self.a_log[...], self.dt_bias[...]]
    specs = [keys, heads, heads, spec('batch', 'seq'), spec(None, 'kv_heads', None)]
    specs += [spec('heads')] * 2
    results = [spec('batch', 'seq', 'heads', None)]
    if memory is not None:
      arguments += [memory.read('inputs'), memory.read('state')]
      states = [spec('batch', None, 'kv_heads', None), spec('batch', 'heads', None, None)]
      specs, results = specs + states, results + states
    local = functools.partial(_local, self.spec, sharding.axis_size('context'))
    y, *states = sharding.shard_map(local, tuple(specs), tuple(results))(*arguments)
    if memory is not None:
      memory = memory.write(inputs=states[0], state=states[1])
    return y, memory


def _local(net: DeltaNetSpec, ways: int, qkv, b, a, segments, conv, a_log, dt_bias, *states):
  """Returns (y, *states) of the heads and rows of this device; ways: size of `context`.

  Where `context` splits the sequence, the devices exchange it for heads, in natural order; where
  the heads cannot be split, each computes all of them.
  """
  split = ways > 1 and qkv.shape[2] % ways == 0
  qkv, b, a = (_whole_rows(x, ways, split) for x in (qkv, b, a))
  segments = sharding.unzigzag(sharding.gather(segments, 'context', 1), ways)
  if split:
    conv, a_log, dt_bias = (_own(x, x.ndim // 2, ways) for x in (conv, a_log, dt_bias))
  # Float32, as A_log is stored: an error in a rate grows with the length of the memory.
  is_token = (segments > 0)[..., None]
  beta = jnp.where(is_token, jax.nn.sigmoid(b.astype(jnp.float32)), 0.0)
  step = jax.nn.softplus(a.astype(jnp.float32) + dt_bias.astype(jnp.float32)[None, None])
  g = jnp.where(is_token, -jnp.exp(a_log.astype(jnp.float32))[None, None] * step, 0.0)

  batch, length, k, _ = qkv.shape
  group, inner = b.shape[2] // k, (net.key_dim, net.value_dim)
  if states:
    inputs, state = states
    history, run = continued(inputs, qkv, segments), jnp.zeros_like(segments)
    inputs = history[:, length:]
    state = state.reshape(batch, k, group, *inner)
  else:
    edge = ((0, 0), (net.conv_width - 1, 0), (0, 0), (0, 0))
    history, run = jnp.pad(qkv, edge), runs(segments)
    state = jnp.zeros((batch, k, group, *inner), jnp.float32)
  mixed = convolve(history, conv, None if states else run)
  q, keys, values = jnp.split(mixed, (net.key_dim, 2 * net.key_dim), axis=3)
  values = values.reshape(batch, length, k, group, net.value_dim)
  g, beta = (x.reshape(batch, length, k, group) for x in (g, beta))
  y, state = recur(q, keys, values, g, beta, run, state)
  y = _own_rows(y.reshape(batch, length, k * group, net.value_dim), ways, split)
  return (y, inputs, state.reshape(batch, k * group, *inner)) if states else (y,)


def _whole_rows(x: jax.Array, ways: int, split: bool) -> jax.Array:
  """Returns [B, T, heads, ...] in natural order from this device's part of the rows."""
  if split:
    x = jax.lax.all_to_all(x, 'context', split_axis=2, concat_axis=1, tiled=True)
  elif ways > 1:
    x = sharding.gather(x, 'context', 1)
  return sharding.unzigzag(x, ways)


def _own_rows(x: jax.Array, ways: int, split: bool) -> jax.Array:
  """Returns this device's part of the rows from [B, T, heads, ...]: undoes `_whole_rows`."""
  x = sharding.rezigzag(x, ways)
  if split:
    return jax.lax.all_to_all(x, 'context', split_axis=1, concat_axis=2, tiled=True)
  return _own(x, 1, ways)


def _own(x: jax.Array, axis: int, ways: int) -> jax.Array:
  """Returns the part of an axis that belongs to this device of `context`."""
  if ways == 1:
    return x
  size = x.shape[axis] // ways
  return jax.lax.dynamic_slice_in_dim(x, sharding.index('context') * size, size, axis)


def runs(segments: jax.Array) -> jax.Array:
  """Returns the number of the run of equal segments that each token is in: int32[B, T]."""
  begins = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
  return jnp.cumsum(begins, axis=1, dtype=jnp.int32)


def continued(inputs: jax.Array, new: jax.Array, segments: jax.Array) -> jax.Array:
  """Returns earlier inputs [B, W - 1, K, C] and new ones [B, T, K, C] as [B, W - 1 + T, K, C]: the
  earlier ones stand before the first new token, behind the padding (segment 0) on its left.
  """
  padding = jnp.sum(segments == 0, axis=1, dtype=jnp.int32)
  kept = jnp.where((segments > 0)[..., None, None], new, 0)
  rows = jnp.pad(kept, ((0, 0), (inputs.shape[1], 0), (0, 0), (0, 0)))

  def put(row, earlier, start):
    return jax.lax.dynamic_update_slice_in_dim(row, earlier, start, 0)

  return jax.vmap(put)(rows, inputs.astype(new.dtype), padding)


# For the gradient the inputs are kept, and not float32 copies of them.
@functools.partial(jax.checkpoint, prevent_cse=False)
def convolve(history: jax.Array, taps: jax.Array, run: jax.Array | None) -> jax.Array:
  """Returns silu of the causal convolution of each channel, [B, T, K, C] in history's dtype.

  Args:
    history: [B, W - 1 + T, K, C], the inputs with those before them.
    taps: [W, K, C], the last one of the token itself.
    run: int32[B, T], as of `runs`: taps see tokens of their own run only; None: all.
  """
  width = len(taps)
  length = history.shape[1] - width + 1
  earlier = None if run is None else jnp.pad(run, ((0, 0), (width - 1, 0)))  # runs count from 1
  total = jnp.zeros((), jnp.float32)
  for i in range(width):
    x = history[:, i : i + length].astype(jnp.float32) * taps[i].astype(jnp.float32)[None, None]
    if run is not None and i < width - 1:
      x = jnp.where((earlier[:, i : i + length] == run)[..., None, None], x, 0.0)
    total = total + x
  return jax.nn.silu(total).astype(history.dtype)


def recur(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array,
  beta: jax.Array,
  run: jax.Array,
  state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes the gated delta rule, chunk by chunk. G: value heads of a key head.

  The backward pass keeps the state of each chunk and computes the rest again.

  Args:
    q, k: [B, T, K, key size]; they are normalized here.
    v: [B, T, K, G, value size].
    g: float32[B, T, K, G], log of the decay, at most 0; 0 where there is padding.
    beta: float32[B, T, K, G], share of the error that is corrected; 0 where there is padding.
    run: int32[B, T], not falling; the state is zero at the first token of each run but the first.
    state: float32[B, K, G, key size, value size], before the first token.

  Returns:
    (y [B, T, K, G, value size] in v's dtype, the state after the last token).
  """
  batch, length = run.shape
  size = min(CHUNK, length)
  count = -(-length // size)

  def cut(x, mode):
    edge = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, edge, mode=mode).reshape(batch, count, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  chunks = [cut(x, 'constant') for x in (q, k, v, g, beta)] + [cut(run, 'edge')]
  begin = (state, run[:, 0])
  if count == 1:
    (state, _), y = _chunk(begin, [x[0] for x in chunks])
    return y[:, :length], state
  (state, _), y = jax.lax.scan(jax.checkpoint(_chunk, prevent_cse=False), begin, chunks)
  y = jnp.moveaxis(y, 0, 1).reshape(batch, count * size, *y.shape[3:])
  return y[:, :length], state


def _chunk(carry, chunk):
  """Computes one chunk; see `recur`. Every factor is masked before it is used, and every exponent
  before exp: no product, sum or gradient holds anything of another run.
  """
  state, before = carry
  q, k, v, g, beta, run = chunk
  dtype = v.dtype
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  q, k = _unit(q) * q.shape[-1] ** -0.5, _unit(k)
  g, beta = (jnp.moveaxis(x, 1, -1) for x in (jnp.maximum(g, _FORGOTTEN), beta))  # [B, K, G, c]
  size = run.shape[1]
  order = jnp.arange(size)
  sees = (run[:, :, None] == run[:, None]) & (order[:, None] >= order[None])[None]
  sees = sees[:, None, None]  # [B, 1, 1, c, c]: query, key
  # The decay from the beginning of the run or of the chunk, whichever is later.
  since = jnp.sum(jnp.where(sees, g[..., None, :], 0.0), axis=-1)
  decay = _masked_exp(since[..., :, None] - since[..., None, :], sees)
  carried = _masked_exp(since, (run == before[:, None])[:, None, None])
  last = run[:, -1:]
  rest = _masked_exp(since[..., -1:] - since, (run == last)[:, None, None])

  strictly = (order[:, None] > order[None])[None, None, None]
  similar = _einsum('BtKH,BsKH->BKts', k, k)[:, :, None]
  system = jnp.where(strictly, beta[..., None] * decay * similar, 0.0)
  known = carried[..., None] * _einsum('BtKH,BKGHV->BKGtV', k, state)
  errors = beta[..., None] * (jnp.moveaxis(v, 1, 3) - known)
  if size > 1:
    errors = triangular.solve(system, errors)
  scores = decay * _einsum('BtKH,BsKH->BKts', q, k)[:, :, None]
  y = carried[..., None] * _einsum('BtKH,BKGHV->BKGtV', q, state)
  y = y + _einsum('BKGts,BKGsV->BKGtV', scores, errors)
  state = carried[..., -1][..., None, None] * state
  state = state + _einsum('BsKH,BKGsV->BKGHV', k, rest[..., None] * errors)
  return (state, last[:, 0]), jnp.moveaxis(y, 3, 1).astype(dtype)


def _masked_exp(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns exp(x) where the mask is true, else 0; the gradient is finite in both."""
  return jnp.where(mask, jnp.exp(jnp.where(mask, x, 0.0)), 0.0)


def _unit(x: jax.Array) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
