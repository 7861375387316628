"""The head: losses and log-probs straight from hidden states, a chunk of tokens at a time.

Inside `shard_map` each shard sorts its supervised positions to the front and loops
ceil(supervised / chunk) times over chunks with its part of the vocabulary; no array of
tokens x vocabulary exists, and
unsupervised positions cost nothing. Ids from `vocab` on are padding and have the logit -inf. SFT
computes the gradients inside that one loop (the loss is
linear in its cotangent), so nothing is recomputed. Log-probs have cotangents that are known only
later: a second loop in the backward pass computes their logits again. The only collective in the
loop is over `tensor`, whose members hold the same tokens and so loop equally often."""

import functools

import jax
import jax.numpy as jnp

from ftjax.losses import cross_entropy
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models.architecture import LogitSpec
from ftjax.runtime.sharding import (
  BATCH,
  axis_size,
  gather,
  index,
  is_alone,
  scatter_sum,
  shard_map,
  spec,
  total,
)

# Bytes of one chunk's float32 logits, per device: large enough for full-speed matrix products.
CHUNK_BYTES = 96 * 2**20
PLAIN = LogitSpec()

_STATES, _TABLE, _TOKENS = (
  spec('batch', 'seq', 'act_embed'),
  spec('vocab', 'embed'),
  spec('batch', 'seq'),
)


def chunk_tokens(vocab: int, tokens: int) -> int:
  """Tokens per chunk: a multiple of 128 whose logits fill about CHUNK_BYTES, no more than there are
  tokens.
  """
  return min(max(128, CHUNK_BYTES // (4 * vocab) // 128 * 128), tokens)


def _vocab_axis() -> str | None:
  return None if is_alone() else 'tensor'


def _padded_from(vocab: int | None, rows: int) -> int | None:
  """Returns the first id of the padding of a table of `rows` rows; None where there is none."""
  return None if vocab == rows else vocab


def _shaped(product: jax.Array, spec: LogitSpec) -> jax.Array:
  """Returns the logits of products of hidden states and head weights, float32[..., V]."""
  if spec.scale != 1:
    product = product * spec.scale
  if spec.soft_cap is None:
    return product
  return spec.soft_cap * jnp.tanh(product / spec.soft_cap)


class _Chunks:
  """One shard's tokens [B, T], flattened to n, weighted ones first, padded to whole chunks. `more`:
  float32[B, T] arrays that go along."""

  def __init__(self, spec, x, w, labels, weights, *more):
    self.shape, self.tokens = x.shape, labels.size
    self.w = gather(w.astype(x.dtype), 'fsdp', 1)
    self.offset = index('tensor') * self.w.shape[0]
    self.spec = spec
    self.vocab = _padded_from(spec.vocab, self.w.shape[0] * axis_size('tensor'))
    self.size = chunk_tokens(self.w.shape[0], self.tokens)
    flat = weights.reshape(-1)
    self.order = jnp.argsort(flat == 0, stable=True)
    self.count = -(-(flat != 0).sum() // self.size)
    self.arrays = tuple(
      jnp.pad(a[self.order], ((0, -self.tokens % self.size),) + ((0, 0),) * (a.ndim - 1))
      for a in (
        x.reshape(-1, x.shape[-1]),
        labels.reshape(-1),
        flat,
        *(m.reshape(-1) for m in more),
      )
    )

  def take(self, i):
    """(x [n, D], labels [n], weights [n], logits float32[n, V'], *more [n]) of chunk i."""
    x, labels, weights, *more = (
      jax.lax.dynamic_slice_in_dim(a, i * self.size, self.size) for a in self.arrays
    )
    logits = jnp.einsum('nD,VD->nV', x, self.w, preferred_element_type=jnp.float32)
    logits = cross_entropy.without_padding(_shaped(logits, self.spec), self.offset, self.vocab)
    return x, labels, weights, logits, *more

  def product_gradient(self, g, logits):
    """Returns the gradient of the product x w, float32[n, V'], from that of the logits."""
    if self.spec.soft_cap is not None:
      slope = 1 - jnp.square(logits / self.spec.soft_cap)
      g = jnp.where(jnp.isfinite(logits), g * slope, 0.0)  # not where a logit is -inf
    return g if self.spec.scale == 1 else g * self.spec.scale

  def put(self, buffer, i, values):
    return jax.lax.dynamic_update_slice_in_dim(
      buffer, values.astype(buffer.dtype), i * self.size, 0
    )

  def scatter(self, buffer):
    """Back from weighted-first order to [B, T, ...]."""
    buffer = buffer[: self.tokens]
    return (
      jnp.zeros_like(buffer).at[self.order].set(buffer).reshape(*self.shape[:2], *buffer.shape[1:])
    )


def _train_local(x, w, labels, weights, *, terms: LossConfig, logit_spec: LogitSpec):
  chunks = _Chunks(logit_spec, x, w, labels, weights)

  def body(i, carry):
    loss, nll, dx, dw = carry
    a, y, m, logits = chunks.take(i)
    more_loss, more_nll, g = cross_entropy.loss_and_gradient(
      logits, y, m, terms, _vocab_axis(), chunks.offset, chunks.vocab
    )
    g = chunks.product_gradient(g, logits).astype(a.dtype)
    da = jnp.einsum('nV,VD->nD', g, chunks.w, preferred_element_type=jnp.float32)
    dx = chunks.put(dx, i, total(da, 'tensor'))
    dw = dw + jnp.einsum('nV,nD->VD', g, a, preferred_element_type=jnp.float32)
    return loss + more_loss, nll + more_nll, dx, dw

  zero = jnp.zeros((), jnp.float32)
  start = (zero, zero, jnp.zeros_like(chunks.arrays[0]), jnp.zeros(chunks.w.shape, jnp.float32))
  loss, nll, dx, dw = jax.lax.fori_loop(0, chunks.count, body, start)
  dw = scatter_sum(dw, 'fsdp', 1)
  dw = total(dw, ('data', 'expert', 'context'))
  loss, nll = total((loss, nll), (*BATCH, 'context'))
  return loss, nll, chunks.scatter(dx), dw.astype(w.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sums(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  terms: LossConfig,
  logit_spec: LogitSpec = PLAIN,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sums of the loss over all tokens of all devices.

  Differentiable by x and w, through the first result alone (the second is for the log).

  Args:
    x: hidden states [B, T, D] in the compute dtype.
    w: head weights [V, D]; products are in x's dtype with float32 sums.
    labels: int32[B, T], the token that follows (shifted on the host).
    weights: float32[B, T]; 0 skips the position.
    terms: label smoothing and z-loss.
    logit_spec: how logits follow from x and w; static.

  Returns:
    (sum of weight * loss, sum of weight * nll), float32[], nats.
  """
  return _train(x, w, labels, weights, terms, logit_spec)[:2]


def _train(x, w, labels, weights, terms, logit_spec):
  return shard_map(
    functools.partial(_train_local, terms=terms, logit_spec=logit_spec),
    (_STATES, _TABLE, _TOKENS, _TOKENS),
    (spec(), spec(), _STATES, _TABLE),
  )(x, w, labels, weights)


def _forward(x, w, labels, weights, terms, logit_spec):
  loss, nll, dx, dw = _train(x, w, labels, weights, terms, logit_spec)
  return (loss, nll), (dx, dw)


def _backward(terms, logit_spec, gradients, cotangents):
  del terms, logit_spec
  dx, dw = gradients
  scale = cotangents[0]
  return (dx * scale.astype(dx.dtype), dw * scale.astype(dw.dtype), None, None)


cross_entropy_sums.defvjp(_forward, _backward)


def token_logprobs(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  temperature: float = 1.0,
  logit_spec: LogitSpec = PLAIN,
) -> jax.Array:
  """float32[B, T]: log p(label) where weights is not 0, else 0; see `logprobs_and_entropies`."""
  return _readout(x, w, labels, weights, temperature, False, logit_spec)[0]


def logprobs_and_entropies(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  temperature: float,
  logit_spec: LogitSpec = PLAIN,
) -> tuple[jax.Array, jax.Array]:
  """Log p(label) and the entropy of p = softmax(logits / temperature), where weights is not 0.

  Differentiable by x and w. The backward pass computes the logits again, chunk by chunk.

  Args:
    x: hidden states [B, T, D] in the compute dtype.
    w: head weights [V, D].
    labels: int32[B, T], the token that follows.
    weights: float32[B, T]; 0 skips the position, other values do not scale.
    temperature: of the softmax, static.
    logit_spec: how logits follow from x and w; static.

  Returns:
    (float32[B, T] nats, float32[B, T] nats), 0 where weights is 0.
  """
  return _readout(x, w, labels, weights, temperature, True, logit_spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _readout(x, w, labels, weights, temperature, with_entropy, logit_spec):
  """(log-probs, entropies or zeros)."""

  def local(x, w, labels, weights):
    chunks = _Chunks(logit_spec, x, w, labels, weights)

    def body(i, carry):
      out, entropies = carry
      _, y, m, logits = chunks.take(i)
      logits = logits / temperature
      z = cross_entropy.logsumexp(logits, _vocab_axis())
      picked = cross_entropy.label_logits(logits, y, _vocab_axis(), chunks.offset)
      out = chunks.put(out, i, jnp.where(m != 0, picked - z, 0.0))
      if with_entropy:
        h = cross_entropy.entropy(logits, z, _vocab_axis())
        entropies = chunks.put(entropies, i, jnp.where(m != 0, h, 0.0))
      return out, entropies

    zeros = jnp.zeros(chunks.arrays[1].shape, jnp.float32)
    found = jax.lax.fori_loop(0, chunks.count, body, (zeros, zeros))
    return tuple(chunks.scatter(a) for a in found)

  specs = (_STATES, _TABLE, _TOKENS, _TOKENS)
  return shard_map(local, specs, (_TOKENS, _TOKENS))(x, w, labels, weights)


def _readout_forward(x, w, labels, weights, temperature, with_entropy, logit_spec):
  found = _readout(x, w, labels, weights, temperature, with_entropy, logit_spec)
  return found, (x, w, labels, weights)


def _readout_backward(temperature, with_entropy, logit_spec, saved, cotangents):
  def local(x, w, labels, weights, d_logp, d_entropy):
    chunks = _Chunks(logit_spec, x, w, labels, weights, d_logp, d_entropy)

    def body(i, carry):
      dx, dw = carry
      a, y, m, logits, dp, dh = chunks.take(i)
      dp, dh = (jnp.where(m != 0, d, 0.0) for d in (dp, dh))
      g = cross_entropy.logprob_gradient(
        logits / temperature, y, dp, dh if with_entropy else None, _vocab_axis(), chunks.offset
      )
      g = chunks.product_gradient(g / temperature, logits).astype(a.dtype)
      da = jnp.einsum('nV,VD->nD', g, chunks.w, preferred_element_type=jnp.float32)
      dx = chunks.put(dx, i, total(da, 'tensor'))
      return dx, dw + jnp.einsum('nV,nD->VD', g, a, preferred_element_type=jnp.float32)

    start = (jnp.zeros_like(chunks.arrays[0]), jnp.zeros(chunks.w.shape, jnp.float32))
    dx, dw = jax.lax.fori_loop(0, chunks.count, body, start)
    dw = total(scatter_sum(dw, 'fsdp', 1), ('data', 'expert', 'context'))
    return chunks.scatter(dx), dw.astype(w.dtype)

  specs = (_STATES, _TABLE, *(_TOKENS,) * 4)
  dx, dw = shard_map(local, specs, (_STATES, _TABLE))(*saved, *cotangents)
  return dx, dw, None, None


_readout.defvjp(_readout_forward, _readout_backward)


def divergence_sums(
  first: tuple[jax.Array, jax.Array],
  second: tuple[jax.Array, jax.Array],
  weights: jax.Array,
  logit_spec: LogitSpec = PLAIN,
) -> jax.Array:
  """Returns the sum over the tokens whose weight is not 0 of the KL divergence from the first to
  the second model's distribution of the next token, float32[], nats.

  Args:
    first: hidden states [B, T, D] and head weights [V, D].
    second: those of another model with the same vocabulary.
    weights: float32[B, T].
    logit_spec: how logits follow from x and w; static.
  """

  def local(x, w, y, v, weights):
    labels = jnp.zeros(weights.shape, jnp.int32)
    ours, theirs = (_Chunks(logit_spec, *model, labels, weights) for model in ((x, w), (y, v)))

    def body(i, sum_):
      _, _, m, logits = ours.take(i)
      others = theirs.take(i)[3]
      found = cross_entropy.divergence(logits, others, _vocab_axis())
      return sum_ + jnp.where(m != 0, found, 0.0).sum()

    found = jax.lax.fori_loop(0, ours.count, body, jnp.zeros((), jnp.float32))
    return total(found, (*BATCH, 'context'))

  specs = (_STATES, _TABLE, _STATES, _TABLE, _TOKENS)
  return shard_map(local, specs, spec())(*first, *second, weights)


def logits(x: jax.Array, w: jax.Array, logit_spec: LogitSpec = PLAIN) -> jax.Array:
  """float32[B, V] of the last hidden states [B, D]: for decoding, where B is small. Those of ids
  of the padding are -inf.
  """
  w = jax.sharding.reshard(w.astype(x.dtype), spec('vocab', None))
  found = jnp.einsum(
    'BD,VD->BV', x, w, preferred_element_type=jnp.float32, out_sharding=spec('batch', 'vocab')
  )
  found = _shaped(found, logit_spec)
  vocab = _padded_from(logit_spec.vocab, w.shape[0])
  if vocab is None:
    return found
  ids = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1, out_sharding=spec('batch', 'vocab'))
  return jnp.where(ids < vocab, found, -jnp.inf)
