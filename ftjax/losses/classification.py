"""Losses of labels of texts or tokens, of any number of axes [...]; R labels. All jnp and
elementwise; sums are (total, weight)."""

import jax
import jax.numpy as jnp

from ftjax.losses import masked


def single_label(
  logits: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  *,
  class_weights: tuple[float, ...] = (),
  focal_gamma: float = 0.0,
  label_smoothing: float = 0.0,
) -> masked.Pair:
  """Computes the cross-entropy of one label for each text or token.

  With class weights w the mean is sum w[y] l / sum w[y], as torch's CrossEntropyLoss has it; with
  smoothing e every label r gets e / R of the target, with its own w[r]. The focal loss (Lin et al.
  2017) multiplies a text's loss by (1 - p(y))^gamma.

  Args:
    logits: float32[..., R].
    labels: int32[...], numbers of the labels.
    weights: float32[...], 0 for what has no label.
    class_weights: one for each label; () for 1.
    focal_gamma: exponent of the focal loss; 0: none.
    label_smoothing: e, in [0, 1).

  Returns:
    (total float32[], weight float32[]), in nats.
  """
  count = logits.shape[-1]
  logp = jax.nn.log_softmax(jnp.where(weights[..., None] != 0, logits, 0.0))
  is_label = jax.nn.one_hot(labels, count)
  factors = jnp.broadcast_to(jnp.array(class_weights or (1.0,) * count, jnp.float32), logp.shape)
  own = (factors * is_label).sum(-1)
  right = (logp * is_label).sum(-1)
  losses = -own * right
  if label_smoothing:
    spread = -(factors * logp).sum(-1) / count
    losses = (1 - label_smoothing) * losses + label_smoothing * spread
  if focal_gamma:
    losses = losses * _focus(-jnp.expm1(jnp.minimum(right, 0.0)), focal_gamma)
  total, _ = masked.mean(losses, weights)
  return total, (own * weights).sum()


def _focus(miss: jax.Array, gamma: float) -> jax.Array:
  """Returns miss^gamma, with a finite gradient at 0."""
  return jnp.power(jnp.maximum(miss, 1e-12), gamma)


def multi_label(
  logits: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  class_weights: tuple[float, ...] = (),
  focal_gamma: float = 0.0,
) -> masked.Pair:
  """Computes the binary cross-entropy of each label, as a mean over the labels.

  Args:
    logits, targets: float32[..., R]; targets are probabilities.
    weights: float32[...], 0 for what has no label.
    class_weights: factors of the losses of the labels, as `weight` of torch's BCEWithLogitsLoss;
      () for 1.
    focal_gamma: exponent of the focal loss; 0: none.

  Returns:
    (total float32[], weight float32[]), in nats.
  """
  logits = jnp.where(weights[..., None] != 0, logits, 0.0)
  losses = jax.nn.softplus(logits) - targets * logits
  if focal_gamma:
    # 1 - p of what is there: s(-x) where the target is 1, s(x) where it is 0.
    miss = targets * jax.nn.sigmoid(-logits) + (1 - targets) * jax.nn.sigmoid(logits)
    losses = losses * _focus(miss, focal_gamma)
  if class_weights:
    losses = losses * jnp.broadcast_to(jnp.array(class_weights, jnp.float32), losses.shape)
  return masked.mean(losses.mean(-1), weights)


def squared_error(found: jax.Array, targets: jax.Array, weights: jax.Array) -> masked.Pair:
  """Computes the squared error of one number for each text, float32[...] each: (total, weight)."""
  return masked.mean(jnp.square(masked.keep(found, weights) - targets), weights)
