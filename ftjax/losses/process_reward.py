"""The loss of a process reward model: cross-entropy at the ends of steps.

Pure functions on arrays of any axes [...]; sums are (total, weight)."""

import jax
import jax.numpy as jnp

from ftjax.losses import masked


def step_cross_entropy(
  logits: jax.Array, values: jax.Array, weights: jax.Array
) -> tuple[masked.Pair, masked.Pair]:
  """Computes the cross-entropy of whether each step is right, and how many are found right.

  With y the probability that a step is right, the loss of a step is -(1 - y) log p(wrong) -
  y log p(right): for y of 0 and 1 that of torch's CrossEntropyLoss at the step ends, as TRL's
  PRMTrainer has it.

  Args:
    logits: float32[..., 2], of wrong and of right.
    values: y, float32[...] in [0, 1].
    weights: float32[...], 0 where no step ends.

  Returns:
    ((sum of weight * loss float32[] in nats, sum of weights), (steps whose likelier label is that
    of y >= 1/2, steps)).
  """
  logp = jax.nn.log_softmax(jnp.where(weights[..., None] != 0, logits, 0.0))
  losses = -(1 - values) * logp[..., 0] - values * logp[..., 1]
  right = ((logp[..., 1] >= logp[..., 0]) == (values >= 0.5)).astype(jnp.float32)
  present = (weights > 0).astype(jnp.float32)
  return masked.mean(losses, weights), masked.mean(right, present)
