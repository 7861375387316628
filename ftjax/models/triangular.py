"""Systems of equations with a lower triangular matrix whose diagonal is 1: XLA's solver, and on CPU
products of matrices.

On CPU XLA has only LAPACK's solver. It leaves parts of its work to the threads that run the program
and waits for them: two solves that do not need each other, such as those of a policy and of its
reference, take both threads of a machine with two cores, and wait for ever (jaxlib 0.10).
"""

import functools

import jax
import jax.numpy as jnp

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def solve(below: jax.Array, x: jax.Array) -> jax.Array:
  """Returns (1 + below)^-1 x, float32[..., c, V].

  Args:
    below: float32[..., c, c], 0 on the diagonal and above.
    x: float32[..., c, V].
  """
  return _solved(below, x, False)


def _solved(below: jax.Array, x: jax.Array, transposed: bool) -> jax.Array:
  cpu, default = (functools.partial(f, transposed=transposed) for f in (by_products, by_library))
  return jax.lax.platform_dependent(below, x, cpu=cpu, default=default)


def _solve_forward(below, x):
  y = solve(below, x)
  return y, (below, y)


def _solve_backward(saved, g):
  below, y = saved
  dx = _solved(below, g, True)
  return jnp.tril(-_einsum('...tV,...sV->...ts', dx, y), -1), dx


solve.defvjp(_solve_forward, _solve_backward)


def by_library(below: jax.Array, x: jax.Array, transposed: bool) -> jax.Array:
  """Returns (1 + below)^-1 x, or with the transposed matrix, by the solver of XLA."""
  flags = {'left_side': True, 'lower': True, 'unit_diagonal': True}
  return jax.lax.linalg.triangular_solve(below, x, transpose_a=transposed, **flags)


def by_products(below: jax.Array, x: jax.Array, transposed: bool) -> jax.Array:
  """Returns the same by `inverse`."""
  return _einsum('...st,...sV->...tV' if transposed else '...ts,...sV->...tV', inverse(below), x)


def inverse(below: jax.Array) -> jax.Array:
  """Returns (1 + below)^-1, float32[..., c, c]; below: 0 on the diagonal and above.

  From the inverses of diagonal blocks come those of blocks twice as large: of [[A, 0], [C, D]] it
  is [[A^-1, 0], [-D^-1 C A^-1, D^-1]].
  """
  *lead, size, _ = below.shape
  whole = 1 << (size - 1).bit_length()
  below = jnp.pad(below, [(0, 0)] * len(lead) + [(0, whole - size)] * 2)
  found = jnp.ones((*lead, whole, 1, 1), below.dtype)
  while (width := found.shape[-1]) < whole:
    pairs = whole // (2 * width)
    blocks = below.reshape(*lead, pairs, 2, width, pairs, 2, width)[..., :, 1, :, :, 0, :]
    corners = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
    both = found.reshape(*lead, pairs, 2, width, width)
    first, second = both[..., 0, :, :], both[..., 1, :, :]
    corners = -_einsum('...ij,...jk,...kl->...il', second, corners, first)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    found = jnp.concatenate([upper, jnp.concatenate([corners, second], -1)], -2)
  return found[..., 0, :size, :size]
