"""Solves with lower triangular matrices against float64, and their gradient; what CPUs run."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.models import triangular


def problem(size, seed=0):
  """(below float32[2, 3, c, c], x float32[2, 3, c, 5]) as those of delta nets: similarities of keys
  of length 1, some of which are equal, times a share.
  """
  rng = np.random.default_rng(seed)
  keys = rng.normal(size=(2, 3, size, 4))
  keys[:, :, 1::3] = keys[:, :, :1]
  keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
  share = rng.uniform(size=(2, 3, size, 1))
  below = np.tril(share * (keys @ keys.swapaxes(-1, -2)), -1)
  return np.float32(below), np.float32(rng.normal(size=(2, 3, size, 5)))


def exact(below, x, transposed=False):
  whole = np.eye(below.shape[-1]) + np.float64(below)
  return np.linalg.solve(whole.swapaxes(-1, -2) if transposed else whole, np.float64(x))


@jax.jit
def every_way(below, x):
  ways = (triangular.by_products, triangular.by_library)
  return [way(below, x, transposed) for way in ways for transposed in (False, True)]


@pytest.mark.parametrize('size', [7, 64])
def test_both_ways_solve_the_system(size):
  below, x = problem(size)
  for i, found in enumerate(every_way(below, x)):
    expected = exact(below, x, transposed=bool(i % 2))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_the_gradient_is_that_of_the_solver_of_xla():
  below, x = problem(7)

  def total(way):
    return jax.jit(jax.grad(lambda below, x: jnp.sin(way(below, x)).sum(), (0, 1)))(below, x)

  found = total(triangular.solve)
  of_matrix, of_right = total(lambda below, x: triangular.by_library(below, x, False))
  for got, expected in zip(found, (np.tril(of_matrix, -1), of_right), strict=True):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_no_solver_of_lapack_runs_on_cpu():
  """Two of its calls that do not need each other can wait for ever."""
  below, x = problem(7)

  def text(way, platform):
    gradient = jax.jit(jax.grad(lambda below, x: way(below, x).sum(), (0, 1)))
    return gradient.trace(below, x).lower(lowering_platforms=(platform,)).as_text()

  assert 'lapack' in text(lambda below, x: triangular.by_library(below, x, False), 'cpu')
  assert 'lapack' not in text(triangular.solve, 'cpu')
  for platform in ('tpu', 'cuda'):
    assert 'triangular_solve' in text(triangular.solve, platform)


PROGRAM = """
import jax, jax.numpy as jnp
from ftjax.models import triangular
solve = jax.jit(lambda below, x: [triangular.solve(below + i, x) for i in range(4)])
below, x = jnp.tril(jnp.full((64, 64, 64), 0.01), -1), jnp.ones((64, 64, 64))
for _ in range(50):
  jax.block_until_ready(solve(below, x))
"""


@pytest.mark.full
def test_solves_side_by_side_end_on_two_threads():
  root = pathlib.Path(__file__).resolve().parents[1]
  variables = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  variables |= {'NPROC': '2', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(root)}
  subprocess.run([sys.executable, '-c', PROGRAM], env=variables, timeout=120, check=True)
