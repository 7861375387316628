"""Divergences of a student's distribution of the next token from a teacher's of which only the k
likeliest tokens are known, on a chunk of tokens, with the gradient by the student's logits.

Both distributions are taken over k + 1 outcomes: each of the teacher's k likeliest tokens, and any
other token. The probability of the last one is exact on both sides, so that nothing is renormalized
and the divergence is 0 only where the student has the teacher's probabilities of these tokens. It
is never more than that of the whole distributions (data processing inequality), and equals it
where k is the size of the vocabulary.

Axes: n tokens, V' a part of the vocabulary, k tokens of the teacher. `axis` and `offset` are those
of losses/cross_entropy.py."""

import jax
import jax.numpy as jnp

from ftjax.losses.cross_entropy import logsumexp
from ftjax.losses.distillation import DIVERGENCES, Distillation


def _columns(ids: jax.Array, size: int, offset: jax.Array) -> jax.Array:
  """Returns the columns of `ids` in this part of the vocabulary, int32[n, k]; `size`, which is no
  column, for ids of another part.
  """
  local = ids - offset
  return jnp.where((local >= 0) & (local < size), local, size)


def outcome_logprobs(
  logits: jax.Array, ids: jax.Array, axis: str | None, offset: jax.Array
) -> jax.Array:
  """Returns the log-probs of the k + 1 outcomes under softmax(logits), float32[n, k + 1] in nats;
  the last one, of every other token, is -inf where there is none.

  Args:
    logits: float32[n, V'].
    ids: int32[n, k], different ones in each row.
    axis: name of the axis the vocabulary is split over.
    offset: int32[], first id of this part.
  """
  size = logits.shape[-1]
  columns = _columns(ids, size, offset)
  rows = jnp.arange(len(ids))[:, None]
  z = logsumexp(logits, axis)
  found = jnp.take_along_axis(logits, jnp.minimum(columns, size - 1), -1)
  found = jnp.where(columns < size, found, 0.0)
  others = logits.at[rows, columns].set(-jnp.inf, mode='drop')
  # By hand: logsumexp of nothing but -inf is NaN.
  most = jnp.maximum(others.max(-1), jnp.finfo(jnp.float32).min)
  if axis is not None:
    found, most = jax.lax.psum(found, axis), jax.lax.pmax(most, axis)
  rest = jnp.exp(others - most[:, None]).sum(-1)
  rest = rest if axis is None else jax.lax.psum(rest, axis)
  tail = most + jnp.log(rest)
  return jnp.concatenate([found, tail[:, None]], -1) - z[:, None]


def divergence_and_gradient(
  student: jax.Array,
  ids: jax.Array,
  teacher: jax.Array,
  c: Distillation,
  axis: str | None,
  offset: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns (divergence of each token float32[n] in nats, its gradient by the student's logits
  float32[n, V']); neither has the factor T^2.

  A token outside of the k takes its share of the gradient of the last outcome, by its probability
  among them.

  Args:
    student: logits, float32[n, V'].
    ids: the teacher's likeliest tokens, int32[n, k].
    teacher: log-probs of the k + 1 outcomes at the temperature of `c`, float32[n, k + 1].
    c: divergence, beta and temperature.
    axis: name of the axis the vocabulary is split over.
    offset: int32[], first id of this part.
  """
  logits = student / c.temperature
  logp = outcome_logprobs(logits, ids, axis, offset)
  found, by_outcome = DIVERGENCES[c.divergence](logp, teacher, c, None)
  z = logsumexp(logits, axis)
  tail = jnp.where(jnp.isfinite(logp[:, -1]), z + logp[:, -1], jnp.inf)
  gradient = by_outcome[:, -1:] * jnp.exp(logits - tail[:, None])
  rows = jnp.arange(len(ids))[:, None]
  columns = _columns(ids, logits.shape[-1], offset)
  gradient = gradient.at[rows, columns].set(by_outcome[:, :-1], mode='drop')
  return found, gradient / c.temperature
