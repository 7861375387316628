"""The head: losses and log-probs straight from hidden states, a chunk of tokens at a time.

Inside `shard_map` each shard sorts its supervised positions to the front and loops
ceil(supervised / chunk) times over chunks with its part of the vocabulary; no array of
tokens x vocabulary exists, and unsupervised positions cost nothing. Ids from `vocab` on are padding
and have the logit -inf. SFT computes the gradients inside that one loop (the loss is linear in its
cotangent), so nothing is recomputed. Log-probs have cotangents that are known only later: a second
loop in the backward pass computes their logits again. The only collective in the loop is over
`tensor`, whose members hold the same tokens and so loop equally often."""

import functools

import jax
import jax.numpy as jnp

from ftjax.losses import cross_entropy, distillation
from ftjax.losses.cross_entropy import LossConfig
from ftjax.losses.distillation import Distillation
from ftjax.models.architecture import LogitSpec
from ftjax.models.logit_chunks import Chunks, LowRank, padded_from, shaped, vocab_axis
from ftjax.runtime.sharding import BATCH, shard_map, spec, total

PLAIN = LogitSpec()

_STATES, _TABLE, _TOKENS = (
  spec('batch', 'seq', 'act_embed'),
  spec('vocab', 'embed'),
  spec('batch', 'seq'),
)


def _low_rank(update: LowRank | None) -> LowRank | None:
  """Returns how an update is split over devices."""
  if update is None:
    return None
  gain = None if update.gain is None else spec('vocab')
  return LowRank(spec('batch', 'seq', None), spec('rank', 'vocab'), gain)


def _train_local(x, w, labels, weights, update, *, terms: LossConfig, logit_spec: LogitSpec):
  chunks = Chunks(logit_spec, x, w, labels, weights, update)

  def body(i, carry):
    loss, nll, state = carry
    tokens, found = chunks.take(i)
    more_loss, more_nll, g = cross_entropy.loss_and_gradient(
      found.logits,
      tokens.labels,
      tokens.weights,
      terms,
      vocab_axis(),
      chunks.offset,
      chunks.vocab,
    )
    return loss + more_loss, nll + more_nll, chunks.add(state, i, tokens, found, g)

  zero = jnp.zeros((), jnp.float32)
  loss, nll, state = jax.lax.fori_loop(0, chunks.count, body, (zero, zero, chunks.zeros()))
  loss, nll = total((loss, nll), (*BATCH, 'context'))
  return loss, nll, *chunks.gradients(state, w.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sums(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  terms: LossConfig,
  logit_spec: LogitSpec = PLAIN,
  update: LowRank | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sums of the loss over all tokens of all devices.

  Differentiable by x, w and the update, through the first result alone (the second is for the log).

  Args:
    x: hidden states [B, T, D] in the compute dtype.
    w: head weights [V, D]; products are in x's dtype with float32 sums.
    labels: int32[B, T], the token that follows (shifted on the host).
    weights: float32[B, T]; 0 skips the position.
    terms: label smoothing and z-loss.
    logit_spec: how logits follow from x and w; static.
    update: of an adapter of the head.

  Returns:
    (sum of weight * loss, sum of weight * nll), float32[], nats.
  """
  return _train(x, w, labels, weights, terms, logit_spec, update)[:2]


def _train(x, w, labels, weights, terms, logit_spec, update):
  low_rank = _low_rank(update)
  return shard_map(
    functools.partial(_train_local, terms=terms, logit_spec=logit_spec),
    (_STATES, _TABLE, _TOKENS, _TOKENS, low_rank),
    (spec(), spec(), _STATES, _TABLE, low_rank),
  )(x, w, labels, weights, update)


def _forward(x, w, labels, weights, terms, logit_spec, update):
  loss, nll, *gradients = _train(x, w, labels, weights, terms, logit_spec, update)
  return (loss, nll), gradients


def _backward(terms, logit_spec, gradients, cotangents):
  del terms, logit_spec
  scale = cotangents[0]
  dx, dw, update = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
  return dx, dw, None, None, update


cross_entropy_sums.defvjp(_forward, _backward)


def token_logprobs(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  temperature: float = 1.0,
  logit_spec: LogitSpec = PLAIN,
  update: LowRank | None = None,
) -> jax.Array:
  """float32[B, T]: log p(label) where weights is not 0, else 0; see `logprobs_and_entropies`."""
  return _readout(x, w, labels, weights, temperature, False, logit_spec, update)[0]


def logprobs_and_matches(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  logit_spec: LogitSpec = PLAIN,
  update: LowRank | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Log p(label), and whether the label is the likeliest token, where weights is not 0.

  Not differentiable. For the arguments see `logprobs_and_entropies`.

  Returns:
    (float32[B, T] nats, float32[B, T] of zeros and ones), 0 where weights is 0. Of equally likely
    tokens the one with the smallest id counts.
  """

  def local(x, w, labels, weights, update):
    chunks = Chunks(logit_spec, x, w, labels, weights, update)

    def body(i, carry):
      tokens, found = chunks.take(i)
      z = cross_entropy.logsumexp(found.logits, vocab_axis())
      picked = cross_entropy.label_logits(found.logits, tokens.labels, vocab_axis(), chunks.offset)
      best = cross_entropy.likeliest(found.logits, vocab_axis(), chunks.offset)
      values = picked - z, (best == tokens.labels).astype(jnp.float32)
      return tuple(
        chunks.put(out, i, jnp.where(tokens.weights != 0, value, 0.0))
        for out, value in zip(carry, values, strict=True)
      )

    zeros = jnp.zeros(chunks.tokens.labels.shape, jnp.float32)
    found = jax.lax.fori_loop(0, chunks.count, body, (zeros, zeros))
    return tuple(chunks.scatter(a) for a in found)

  specs = (_STATES, _TABLE, _TOKENS, _TOKENS, _low_rank(update))
  return shard_map(local, specs, (_TOKENS, _TOKENS))(x, w, labels, weights, update)


def logprobs_and_entropies(
  x: jax.Array,
  w: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  temperature: float,
  logit_spec: LogitSpec = PLAIN,
  update: LowRank | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Log p(label) and the entropy of p = softmax(logits / temperature), where weights is not 0.

  Differentiable by x, w and the update. The backward pass computes the logits again.

  Args:
    x: hidden states [B, T, D] in the compute dtype.
    w: head weights [V, D].
    labels: int32[B, T], the token that follows.
    weights: float32[B, T]; 0 skips the position, other values do not scale.
    temperature: of the softmax, static.
    logit_spec: how logits follow from x and w; static.
    update: of an adapter of the head.

  Returns:
    (float32[B, T] nats, float32[B, T] nats), 0 where weights is 0.
  """
  return _readout(x, w, labels, weights, temperature, True, logit_spec, update)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _readout(x, w, labels, weights, temperature, with_entropy, logit_spec, update):
  """(log-probs, entropies or zeros)."""

  def local(x, w, labels, weights, update):
    chunks = Chunks(logit_spec, x, w, labels, weights, update)

    def body(i, carry):
      out, entropies = carry
      tokens, found = chunks.take(i)
      logits = found.logits / temperature
      z = cross_entropy.logsumexp(logits, vocab_axis())
      picked = cross_entropy.label_logits(logits, tokens.labels, vocab_axis(), chunks.offset)
      out = chunks.put(out, i, jnp.where(tokens.weights != 0, picked - z, 0.0))
      if with_entropy:
        h = cross_entropy.entropy(logits, z, vocab_axis())
        entropies = chunks.put(entropies, i, jnp.where(tokens.weights != 0, h, 0.0))
      return out, entropies

    zeros = jnp.zeros(chunks.tokens.labels.shape, jnp.float32)
    found = jax.lax.fori_loop(0, chunks.count, body, (zeros, zeros))
    return tuple(chunks.scatter(a) for a in found)

  specs = (_STATES, _TABLE, _TOKENS, _TOKENS, _low_rank(update))
  return shard_map(local, specs, (_TOKENS, _TOKENS))(x, w, labels, weights, update)


def _readout_forward(x, w, labels, weights, temperature, with_entropy, logit_spec, update):
  found = _readout(x, w, labels, weights, temperature, with_entropy, logit_spec, update)
  return found, (x, w, labels, weights, update)


def _readout_backward(temperature, with_entropy, logit_spec, saved, cotangents):
  def local(x, w, labels, weights, update, d_logp, d_entropy):
    chunks = Chunks(logit_spec, x, w, labels, weights, update, d_logp, d_entropy)

    def body(i, state):
      tokens, found = chunks.take(i)
      dp, dh = (jnp.where(tokens.weights != 0, d, 0.0) for d in tokens.more)
      g = cross_entropy.logprob_gradient(
        found.logits / temperature,
        tokens.labels,
        dp,
        dh if with_entropy else None,
        vocab_axis(),
        chunks.offset,
      )
      return chunks.add(state, i, tokens, found, g / temperature)

    state = jax.lax.fori_loop(0, chunks.count, body, chunks.zeros())
    return chunks.gradients(state, w.dtype)

  low_rank = _low_rank(saved[-1])
  specs = (_STATES, _TABLE, _TOKENS, _TOKENS, low_rank, _TOKENS, _TOKENS)
  dx, dw, update = shard_map(local, specs, (_STATES, _TABLE, low_rank))(*saved, *cotangents)
  return dx, dw, None, None, update


_readout.defvjp(_readout_forward, _readout_backward)


def divergence_sums(
  first: tuple[jax.Array, jax.Array, LowRank | None],
  second: tuple[jax.Array, jax.Array, LowRank | None],
  weights: jax.Array,
  logit_spec: LogitSpec = PLAIN,
) -> jax.Array:
  """Returns the sum over the tokens whose weight is not 0 of the KL divergence from the first to
  the second model's distribution of the next token, float32[], nats.

  Args:
    first: hidden states [B, T, D], head weights [V, D], and the update of an adapter of the head.
    second: those of another model with the same vocabulary.
    weights: float32[B, T].
    logit_spec: how logits follow from x and w; static.
  """

  def local(first, second, weights):
    labels = jnp.zeros(weights.shape, jnp.int32)
    ours, theirs = (
      Chunks(logit_spec, x, w, labels, weights, update) for x, w, update in (first, second)
    )

    def body(i, sum_):
      (tokens, mine), (_, others) = ours.take(i), theirs.take(i)
      found = cross_entropy.divergence(mine.logits, others.logits, vocab_axis())
      return sum_ + jnp.where(tokens.weights != 0, found, 0.0).sum()

    found = jax.lax.fori_loop(0, ours.count, body, jnp.zeros((), jnp.float32))
    return total(found, (*BATCH, 'context'))

  specs = (*((_STATES, _TABLE, _low_rank(update)) for _, _, update in (first, second)), _TOKENS)
  return shard_map(local, specs, spec())(first, second, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def distillation_sums(
  student: tuple[jax.Array, jax.Array, LowRank | None],
  teacher: tuple[jax.Array, jax.Array, LowRank | None],
  labels: jax.Array,
  weights: jax.Array,
  terms: Distillation,
  logit_spec: LogitSpec = PLAIN,
  teacher_spec: LogitSpec = PLAIN,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Weighted sums over all tokens of the loss of distillation; see losses/distillation.py.

  Differentiable by the student's arrays, through the first result alone.

  Args:
    student: hidden states [B, T, D], head weights [V, D], and the update of an adapter of the head.
    teacher: those of another model with the same vocabulary; its width may be another.
    labels: int32[B, T], the token that follows.
    weights: float32[B, T]; 0 skips the position.
    terms: of the loss; static.
    logit_spec, teacher_spec: how the logits follow; static.

  Returns:
    (sum of weight * loss, of weight * nll, of weight * divergence), float32[], nats.
  """
  return _distill(student, teacher, labels, weights, terms, logit_spec, teacher_spec)[:3]


def _distill(student, teacher, labels, weights, terms, logit_spec, teacher_spec):
  local = functools.partial(
    _distill_local, terms=terms, logit_spec=logit_spec, teacher_spec=teacher_spec
  )
  ours, theirs = ((_STATES, _TABLE, _low_rank(m[2])) for m in (student, teacher))
  specs = (ours, theirs, _TOKENS, _TOKENS)
  return shard_map(local, specs, (spec(), spec(), spec(), *ours))(student, teacher, labels, weights)


def _distill_local(student, teacher, labels, weights, *, terms, logit_spec, teacher_spec):
  ours, theirs = (
    Chunks(how, x, w, labels, weights, update)
    for how, (x, w, update) in ((logit_spec, student), (teacher_spec, teacher))
  )

  def body(i, carry):
    (loss, nll, divergence), state = carry
    (tokens, mine), (_, others) = ours.take(i), theirs.take(i)
    _, more_nll, g_nll = cross_entropy.loss_and_gradient(
      mine.logits,
      tokens.labels,
      tokens.weights,
      LossConfig(),
      vocab_axis(),
      ours.offset,
      ours.vocab,
    )
    found, g = distillation.divergence_and_gradient(mine.logits, others.logits, terms, vocab_axis())
    found = (found * tokens.weights).sum()
    scale = terms.share * terms.temperature**2
    more = (1 - terms.share) * more_nll + scale * found
    g = (1 - terms.share) * g_nll + scale * g * tokens.weights[:, None]
    sums = loss + more, nll + more_nll, divergence + found
    return sums, ours.add(state, i, tokens, mine, g)

  zero = jnp.zeros((), jnp.float32)
  sums, state = jax.lax.fori_loop(0, ours.count, body, ((zero,) * 3, ours.zeros()))
  return *total(sums, (*BATCH, 'context')), *ours.gradients(state, student[1].dtype)


def _distill_forward(student, teacher, labels, weights, terms, logit_spec, teacher_spec):
  *sums, dx, dw, update = _distill(
    student, teacher, labels, weights, terms, logit_spec, teacher_spec
  )
  return tuple(sums), ((dx, dw, update), jax.tree.map(jnp.zeros_like, teacher))


def _distill_backward(terms, logit_spec, teacher_spec, saved, cotangents):
  del terms, logit_spec, teacher_spec
  gradients, nothing = saved
  return jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradients), nothing, None, None


distillation_sums.defvjp(_distill_forward, _distill_backward)


def logits(
  x: jax.Array, w: jax.Array, logit_spec: LogitSpec = PLAIN, update: LowRank | None = None
) -> jax.Array:
  """float32[B, V] of the last hidden states [B, D]: for decoding, where B is small. Those of ids
  of the padding are -inf. update: of an adapter of the head, with u [B, R].
  """
  w = jax.sharding.reshard(w.astype(x.dtype), spec('vocab', None))
  product = functools.partial(
    jnp.einsum, preferred_element_type=jnp.float32, out_sharding=spec('batch', 'vocab')
  )
  found = product('BD,VD->BV', x, w)
  if update is not None:
    found = found + product('BR,RV->BV', update.u, update.b)
    found = found if update.gain is None else found * update.gain[None]
  found = shaped(found, logit_spec)
  vocab = padded_from(logit_spec.vocab, w.shape[0])
  if vocab is None:
    return found
  ids = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1, out_sharding=spec('batch', 'vocab'))
  return jnp.where(ids < vocab, found, -jnp.inf)
