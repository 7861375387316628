"""Weighted sums and means, as pairs (total, weight) that add up exactly.

A mean over a step is the sum of the totals of its micro-batches and devices, divided once by the
sum of their weights (`training/step.py` does that). A mean of means would give short sequences and
small micro-batches too much weight (transformers PR 34191 fixed such an error).

Axes: B sequences, T tokens. Weights are float32: 1 for elements that count, 0 for the others.
Elements with weight 0 never reach a sum, NaN and infinity included. All functions are jnp,
elementwise and reductions only, so they run under jit on arrays sharded over B.
"""

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]  # (total float32[], weight float32[])


def keep(x: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns x where weights (of the same shape) are not 0, else 0. The gradient is 0 there too.

  Use it on the inputs of a formula, not on its result: the gradient of an overflowing exp is
  infinite, and infinity times 0 is NaN.
  """
  return jnp.where(weights != 0, x, jnp.zeros((), x.dtype))


def mean(x: jax.Array, weights: jax.Array) -> Pair:
  """Returns (sum of weights * x, sum of weights) of arrays of one shape, each float32[]."""
  weights = weights.astype(jnp.float32)
  return (keep(x.astype(jnp.float32), weights) * weights).sum(), weights.sum()


def variance(x: jax.Array, weights: jax.Array, centre: jax.Array) -> Pair:
  """Returns (sum of weights * (x - centre)^2, sum of weights), each float32[]; `centre` is
  float32[]."""
  return mean(jnp.square(x.astype(jnp.float32) - centre), weights)


def divide(total: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns total / weight, and 0 where the weight is 0."""
  return jnp.where(weight == 0, 0.0, total / jnp.where(weight == 0, 1.0, weight))


def row_means(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes the mean of every row over its tokens, 0 for a row without any.

  Args:
    x: float32[B, T].
    weights: float32[B, T].

  Returns:
    (means float32[B]; float32[B], 1 for rows with a token that has a weight, 0 for the others).
  """
  weights = weights.astype(jnp.float32)
  tokens = weights.sum(-1)
  total = (keep(x.astype(jnp.float32), weights) * weights).sum(-1)
  return divide(total, tokens), (tokens > 0).astype(jnp.float32)


def whiten(
  x: jax.Array, weights: jax.Array, *, shift: bool = True, epsilon: float = 1e-8
) -> jax.Array:
  """Computes (x - mean) / sqrt(variance + epsilon) over the whole array; 0 where weights are 0.

  The variance is unbiased (divided by the weight - 1), as in TRL's PPO (`masked_whiten`) and
  verl. Where all weighted elements are equal the result is exactly 0. It couples all rows: pass the
  array of the whole step, not of a micro-batch.

  Args:
    x: float32, any shape.
    weights: float32, the same shape.
    shift: whether the result has mean 0; False puts the mean back after scaling.
    epsilon: added to the variance.

  Returns:
    float32 of x's shape.
  """
  x = keep(x.astype(jnp.float32), weights)
  centre = divide(*mean(x, weights))
  squares, count = variance(x, weights, centre)
  scale = jax.lax.rsqrt(divide(squares, jnp.maximum(count - 1.0, 0.0)) + epsilon)
  # The mean of equal numbers may differ from them by rounding, which `scale` would amplify.
  lowest = jnp.where(weights != 0, x, jnp.inf).min()
  highest = jnp.where(weights != 0, x, -jnp.inf).max()
  out = jnp.where(lowest < highest, (x - centre) * scale, 0.0)
  return keep(out if shift else out + centre, weights)
