"""Sharpness-aware minimization, SAM (Foret et al. 2021): a step takes the gradient at the weights
where the loss is largest within a small ball, to first order, and applies it to the weights
themselves.

optax.contrib.sam is not used: it takes both gradients by optimizer updates of their own, on
different batches where the caller makes them, counts both in the schedule, and holds a copy of the
parameters in the saved state. Here both gradients are of one step's rows and random keys, whatever
micro-batches and mesh are, and the state is that of a run without SAM."""

import jax
import jax.numpy as jnp


def norm(gradient: dict) -> jax.Array:
  """Returns the L2 norm over all leaves of a gradient, float32[]."""
  squares = (jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradient))
  return jnp.sqrt(sum(squares))


def ascend(params: dict, gradient: dict, radius: float) -> dict:
  """Returns params + radius * g / |g|, the weights whose gradient SAM takes (eq. 2 with p = 2); the
  norm is that of all leaves together. A gradient of 0 moves nothing.

  Args:
    params: nested dict, float32.
    gradient: of the mean loss of the step, of the same structure, 0 where layers are frozen.
    radius: rho.
  """
  factor = radius / jnp.maximum(norm(gradient), 1e-30)
  return jax.tree.map(lambda p, g: p + (factor * g).astype(p.dtype), params, gradient)
