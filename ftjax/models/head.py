"""The head: losses and log-probs straight from hidden states, a chunk of tokens at a time.

An island. Each shard sorts its supervised positions to the front and loops ceil(supervised / chunk)
times over chunks with its part of the vocabulary; no array of tokens x vocabulary exists, and
unsupervised positions cost nothing. Training computes the gradients inside that one loop (the loss
is linear in its cotangent), so nothing is recomputed. The only collective in the loop is over
`tensor`, whose members hold the same tokens and so loop equally often."""

import functools

import jax
import jax.numpy as jnp

from ftjax.losses import cross_entropy
from ftjax.losses.cross_entropy import Terms
from ftjax.runtime.sharding import BATCH, gather, index, is_alone, island, scatter_sum, spec, total

# Bytes of one chunk's float32 logits, per device: large enough for full-speed matrix products.
CHUNK_BYTES = 96 * 2**20

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


class _Chunks:
  """One shard's tokens [B, T], flattened to n, weighted ones first, padded to whole chunks."""

  def __init__(self, x, w, labels, weights):
    self.shape, self.tokens = x.shape, labels.size
    self.w = gather(w.astype(x.dtype), 'fsdp', 1)
    self.offset = index('tensor') * self.w.shape[0]
    self.size = chunk_tokens(self.w.shape[0], self.tokens)
    flat = weights.reshape(-1)
    self.order = jnp.argsort(flat == 0, stable=True)
    self.count = -(-(flat != 0).sum() // self.size)
    self.arrays = tuple(
      jnp.pad(a[self.order], ((0, -self.tokens % self.size),) + ((0, 0),) * (a.ndim - 1))
      for a in (x.reshape(-1, x.shape[-1]), labels.reshape(-1), flat)
    )

  def take(self, i):
    """(x [n, D], labels [n], weights [n], logits float32[n, V']) of chunk i."""
    x, labels, weights = (
      jax.lax.dynamic_slice_in_dim(a, i * self.size, self.size) for a in self.arrays
    )
    logits = jnp.einsum('nD,VD->nV', x, self.w, preferred_element_type=jnp.float32)
    return x, labels, weights, logits

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


def _train_local(x, w, labels, weights, *, terms: Terms):
  chunks = _Chunks(x, w, labels, weights)

  def body(i, carry):
    loss, nll, dx, dw = carry
    a, y, m, logits = chunks.take(i)
    more_loss, more_nll, g = cross_entropy.loss_and_gradient(
      logits, y, m, terms, _vocab_axis(), chunks.offset
    )
    g = g.astype(a.dtype)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sums(
  x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array, terms: Terms
) -> tuple[jax.Array, jax.Array]:
  """Weighted sums of the loss over all tokens of all devices.

  Differentiable by x and w, through the first result alone (the second is for the log).

  Args:
    x: hidden states [B, T, D] in the compute dtype.
    w: head weights [V, D]; products are in x's dtype with float32 sums.
    labels: int32[B, T], the token that follows (shifted on the host).
    weights: float32[B, T]; 0 skips the position.
    terms: label smoothing and z-loss.

  Returns:
    (sum of weight * loss, sum of weight * nll), float32[], nats.
  """
  return _train(x, w, labels, weights, terms)[:2]


def _train(x, w, labels, weights, terms):
  return island(
    functools.partial(_train_local, terms=terms),
    (_STATES, _TABLE, _TOKENS, _TOKENS),
    (spec(), spec(), _STATES, _TABLE),
  )(x, w, labels, weights)


def _forward(x, w, labels, weights, terms):
  loss, nll, dx, dw = _train(x, w, labels, weights, terms)
  return (loss, nll), (dx, dw)


def _backward(terms, gradients, cotangents):
  dx, dw = gradients
  scale = cotangents[0]
  return (dx * scale.astype(dx.dtype), dw * scale.astype(dw.dtype), None, None)


cross_entropy_sums.defvjp(_forward, _backward)


def token_logprobs(x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
  """float32[B, T]: log p(label) where weights is not 0, else 0. It has no gradient."""

  def local(x, w, labels, weights):
    chunks = _Chunks(x, w, labels, weights)

    def body(i, out):
      _, y, m, logits = chunks.take(i)
      picked = cross_entropy.label_logits(logits, y, _vocab_axis(), chunks.offset)
      return chunks.put(
        out, i, jnp.where(m != 0, picked - cross_entropy.logsumexp(logits, _vocab_axis()), 0.0)
      )

    out = jnp.zeros(chunks.arrays[1].shape, jnp.float32)
    return chunks.scatter(jax.lax.fori_loop(0, chunks.count, body, out))

  return island(local, (_STATES, _TABLE, _TOKENS, _TOKENS), _TOKENS)(x, w, labels, weights)


def logits(x: jax.Array, w: jax.Array) -> jax.Array:
  """float32[B, V] of the last hidden states [B, D]: for decoding, where B is small."""
  w = jax.sharding.reshard(w.astype(x.dtype), spec('vocab', None))
  return jnp.einsum(
    'BD,VD->BV', x, w, preferred_element_type=jnp.float32, out_sharding=spec('batch', 'vocab')
  )
