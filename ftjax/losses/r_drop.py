"""R-Drop (Liang et al. 2021, "R-Drop: Regularized dropout for neural networks", eq. 2 and 4): two
passes with other dropout masks give distributions p and q, which are pulled to each other by

  (KL(p || q) + KL(q || p)) / 2 = sum_v (p_v - q_v) (log p_v - log q_v) / 2

Pure functions on arrays. `axis` names the mapped axis over which a vocabulary is split; None: it is
not split. Ids of a padded vocabulary have the logit -inf in both."""

import jax
import jax.numpy as jnp

from ftjax.losses.cross_entropy import logsumexp


def symmetric_kl(first: jax.Array, second: jax.Array, kind: str = 'softmax') -> jax.Array:
  """Returns the symmetric divergence of two passes of a label head, float32[B], in nats; both
  passes have a gradient.

  Args:
    first: numbers of the labels, float32[B, R].
    second: those of the other pass.
    kind: 'softmax', one label of R; 'sigmoid', each label by itself, summed; 'value', no
      distribution: half the squared difference, which is the divergence of normal distributions of
      variance 1, summed.

  Raises:
    ValueError: another kind.
  """
  if kind == 'softmax':
    logp, logq = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return ((jnp.exp(logp) - jnp.exp(logq)) * (logp - logq)).sum(-1) / 2
  if kind == 'sigmoid':  # log(p / (1 - p)) is the number itself
    return ((jax.nn.sigmoid(first) - jax.nn.sigmoid(second)) * (first - second)).sum(-1) / 2
  if kind == 'value':
    return jnp.square(first - second).sum(-1) / 2
  raise ValueError(f'kind={kind!r}; expected softmax, sigmoid or value')


def divergence_and_gradients(
  first: jax.Array, second: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (symmetric divergence of each token float32[n], in nats, its gradient by the logits of
  the first pass and by those of the second, float32[n, V']).

  By a logit of the first: (p (log(p / q) - KL(p || q)) + p - q) / 2.

  Args:
    first: logits, float32[n, V'].
    second: those of the other pass.
    axis: name of the axis the vocabulary is split over.
  """
  logp = first - logsumexp(first, axis)[:, None]
  logq = second - logsumexp(second, axis)[:, None]
  p, q = jnp.exp(logp), jnp.exp(logq)
  ratio = jnp.where(jnp.isfinite(logp) & jnp.isfinite(logq), logp - logq, 0.0)

  def mean(weights):
    found = (weights * ratio).sum(-1, keepdims=True)
    return found if axis is None else jax.lax.psum(found, axis)

  there, back = mean(p), mean(q)  # KL(p || q), and -KL(q || p)
  by_first = (p * (ratio - there) + p - q) / 2
  by_second = (q * (back - ratio) + q - p) / 2
  return (there - back)[:, 0] / 2, by_first, by_second
