"""Divergences of a student's distribution of the next token from a teacher's, on a chunk of tokens,
with the gradient by the student's logits.

Pure functions on float32[n, V'] arrays. `axis` names the mapped axis over which the vocabulary is
split; None: it is not split. Ids of a padded vocabulary have the logit -inf in both models. T is
the temperature, p = softmax(student / T), q = softmax(teacher / T)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ftjax.losses.cross_entropy import logsumexp


@dataclasses.dataclass(frozen=True)
class Distillation:
  """Terms of the loss: (1 - share) * nll + share * T^2 * divergence, per token, in nats.

  The factor T^2 keeps the size of the gradient (Hinton et al. 2015, section 2).

  Attributes:
    divergence: a name in DIVERGENCES.
    beta: weight of the teacher in the mixture of 'js'.
    temperature: T.
    share: of the divergence in the loss, in [0, 1].
  """

  divergence: str = 'forward_kl'
  beta: float = 0.5
  temperature: float = 1.0
  share: float = 0.5


def _total(x: jax.Array, axis: str | None) -> jax.Array:
  x = x.sum(-1)
  return x if axis is None else jax.lax.psum(x, axis)


def _mean(p: jax.Array, x: jax.Array, axis: str | None) -> jax.Array:
  """Returns float32[n]: the mean of x under p, where 0 times anything is 0."""
  return _total(jnp.where(p == 0, 0.0, p * x), axis)


def _forward_kl(logp, logq, c, axis):
  """KL(q || p) = sum q log(q / p); its gradient by log p's logits is p - q."""
  p, q = jnp.exp(logp), jnp.exp(logq)
  return _mean(q, logq - logp, axis), p - q


def _reverse_kl(logp, logq, c, axis):
  """KL(p || q) = sum p log(p / q); its gradient is p (log(p / q) - KL)."""
  p = jnp.exp(logp)
  found = _mean(p, logp - logq, axis)
  return found, jnp.where(p == 0, 0.0, p * (logp - logq - found[:, None]))


def _js(logp, logq, c, axis):
  """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; its gradient is
  (1 - beta) p (log(p / m) - KL(p || m)).
  """
  p, q = jnp.exp(logp), jnp.exp(logq)
  logm = jnp.logaddexp(logq + jnp.log(c.beta), logp + jnp.log1p(-c.beta))
  teacher, student = _mean(q, logq - logm, axis), _mean(p, logp - logm, axis)
  slope = jnp.where(p == 0, 0.0, p * (logp - logm - student[:, None]))
  return c.beta * teacher + (1 - c.beta) * student, (1 - c.beta) * slope


# Gu et al. 2023 (MiniLLM), section 2, on forward and reverse; generalized JS: Agarwal et al. 2023
# (GKD), eq. 1, whose limits for beta -> 0 and beta -> 1, divided by beta and by 1 - beta, are
# 'forward_kl' and 'reverse_kl'.
DIVERGENCES: dict[str, Callable] = {'forward_kl': _forward_kl, 'reverse_kl': _reverse_kl, 'js': _js}


def divergence_and_gradient(
  student: jax.Array, teacher: jax.Array, c: Distillation, axis: str | None
) -> tuple[jax.Array, jax.Array]:
  """Returns (divergence of each token float32[n] in nats, its gradient by the student's logits
  float32[n, V']); neither has the factor T^2.

  Args:
    student, teacher: logits, float32[n, V'].
    c: divergence, beta and temperature.
    axis: name of the axis the vocabulary is split over.
  """
  student, teacher = student / c.temperature, teacher / c.temperature
  logp = student - logsumexp(student, axis)[:, None]
  logq = teacher - logsumexp(teacher, axis)[:, None]
  is_token = jnp.isfinite(logp)
  logp, logq = (jnp.where(is_token, x, -jnp.inf) for x in (logp, logq))
  found, gradient = DIVERGENCES[c.divergence](logp, logq, c, axis)
  return found, jnp.where(is_token, gradient, 0.0) / c.temperature
