"""The head where a distribution is known by its k likeliest tokens: finds those of a teacher, and
computes the loss of distillation from them.

As in head.py a chunk of tokens at a time, and of the vocabulary this device's part."""

import functools

import jax
import jax.numpy as jnp

from ftjax.losses import cross_entropy, top_k_distillation
from ftjax.losses.cross_entropy import LossConfig
from ftjax.losses.distillation import Distillation
from ftjax.models.architecture import LogitSpec
from ftjax.models.logit_chunks import Chunks, LowRank, vocab_axis
from ftjax.runtime.sharding import BATCH, gather, shard_map, spec, total

_TOKENS, _OUTCOMES = spec('batch', 'seq'), spec('batch', 'seq', None)


def _model(update: LowRank | None) -> tuple:
  """Returns how (hidden states, head weights, update) of a model are split over devices."""
  low_rank = None
  if update is not None:
    gain = None if update.gain is None else spec('vocab')
    low_rank = LowRank(_OUTCOMES, spec('rank', 'vocab'), gain)
  return spec('batch', 'seq', 'act_embed'), spec('vocab', 'embed'), low_rank


def _likeliest(logits: jax.Array, k: int, offset: jax.Array) -> jax.Array:
  """Returns the ids of the k largest logits of all parts of the vocabulary, int32[n, k]; of equal
  ones the smaller id first.
  """
  values, ids = jax.lax.top_k(logits, min(k, logits.shape[-1]))
  values, ids = (gather(a, 'tensor', 1) for a in (values, ids + offset))
  return jnp.take_along_axis(ids, jax.lax.top_k(values, k)[1], -1)


def top_logprobs(
  model: tuple[jax.Array, jax.Array, LowRank | None],
  weights: jax.Array,
  k: int,
  temperature: float,
  logit_spec: LogitSpec,
) -> tuple[jax.Array, jax.Array]:
  """Returns the k likeliest tokens where the weight is not 0, with their log-probs and that of any
  other token under p = softmax(logits / temperature).

  Not differentiable.

  Args:
    model: hidden states [B, T, D], head weights [V, D], and the update of an adapter of the head.
    weights: float32[B, T].
    k: at most the vocabulary without its padding; static.
    temperature: static.
    logit_spec: how logits follow; static.

  Returns:
    (ids int32[B, T, k], log-probs float32[B, T, k + 1] in nats, the last of any other token); 0
    where the weight is 0.
  """

  def local(model, weights):
    x, w, update = model
    chunks = Chunks(logit_spec, x, w, jnp.zeros(weights.shape, jnp.int32), weights, update)

    def body(i, carry):
      tokens, found = chunks.take(i)
      logits, is_read = found.logits / temperature, tokens.weights[:, None] != 0
      ids = _likeliest(logits, k, chunks.offset)
      logp = top_k_distillation.outcome_logprobs(logits, ids, vocab_axis(), chunks.offset)
      values = jnp.where(is_read, ids, 0), jnp.where(is_read, logp, 0.0)
      return tuple(chunks.put(out, i, value) for out, value in zip(carry, values, strict=True))

    size = len(chunks.tokens.labels)
    empty = jnp.zeros((size, k), jnp.int32), jnp.zeros((size, k + 1), jnp.float32)
    found = jax.lax.fori_loop(0, chunks.count, body, empty)
    return tuple(chunks.scatter(a) for a in found)

  specs = (_model(model[2]), _TOKENS)
  return shard_map(local, specs, (_OUTCOMES, _OUTCOMES))(model, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def distillation_sums(
  student: tuple[jax.Array, jax.Array, LowRank | None],
  ids: jax.Array,
  teacher: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  terms: Distillation,
  logit_spec: LogitSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Weighted sums over all tokens of the loss of distillation from a teacher's likeliest tokens;
  see losses/top_k_distillation.py.

  Differentiable by the student's arrays, through the first result alone.

  Args:
    student: hidden states [B, T, D], head weights [V, D], and the update of an adapter of the head.
    ids, teacher: as `top_logprobs` returns them, at the temperature of `terms`.
    labels: int32[B, T], the token that follows.
    weights: float32[B, T]; 0 skips the position.
    terms: of the loss; static.
    logit_spec: how logits follow; static.

  Returns:
    (sum of weight * loss, of weight * nll, of weight * divergence), float32[], nats.
  """
  return _distill(student, ids, teacher, labels, weights, terms, logit_spec)[:3]


def _distill(student, ids, teacher, labels, weights, terms, logit_spec):
  local = functools.partial(_distill_local, terms=terms, logit_spec=logit_spec)
  model = _model(student[2])
  specs = (model, _OUTCOMES, _OUTCOMES, _TOKENS, _TOKENS)
  outs = (spec(), spec(), spec(), *model)
  return shard_map(local, specs, outs)(student, ids, teacher, labels, weights)


def _distill_local(student, ids, teacher, labels, weights, *, terms, logit_spec):
  x, w, update = student
  chunks = Chunks(logit_spec, x, w, labels, weights, update, ids, teacher)

  def body(i, carry):
    (loss, nll, divergence), state = carry
    tokens, found = chunks.take(i)
    _, more_nll, g_nll = cross_entropy.loss_and_gradient(
      found.logits,
      tokens.labels,
      tokens.weights,
      LossConfig(),
      vocab_axis(),
      chunks.offset,
      chunks.vocab,
    )
    of_tokens, g = top_k_distillation.divergence_and_gradient(
      found.logits, *tokens.more, terms, vocab_axis(), chunks.offset
    )
    more = (of_tokens * tokens.weights).sum()
    scale = terms.share * terms.temperature**2
    g = (1 - terms.share) * g_nll + scale * g * tokens.weights[:, None]
    loss = loss + (1 - terms.share) * more_nll + scale * more
    return (loss, nll + more_nll, divergence + more), chunks.add(state, i, tokens, found, g)

  zero = jnp.zeros((), jnp.float32)
  sums, state = jax.lax.fori_loop(0, chunks.count, body, ((zero,) * 3, chunks.zeros()))
  return *total(sums, (*BATCH, 'context')), *chunks.gradients(state, w.dtype)


def _forward(student, ids, teacher, labels, weights, terms, logit_spec):
  *sums, dx, dw, update = _distill(student, ids, teacher, labels, weights, terms, logit_spec)
  return tuple(sums), (dx, dw, update)


def _backward(terms, logit_spec, gradients, cotangents):
  del terms, logit_spec
  student = jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradients)
  return student, None, None, None, None


distillation_sums.defvjp(_forward, _backward)
