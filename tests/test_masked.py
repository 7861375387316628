"""Sums and means over what counts: hand arithmetic, and what may not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.losses import masked

X = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [5.0, 5.0, 5.0]])
W = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def test_by_hand():
  total, weight = masked.mean(X, W)
  assert (float(total), float(weight)) == (11.0, 3.0)
  means, rows = masked.row_means(X, W)
  np.testing.assert_array_equal(means, [1.5, 8.0, 0.0])
  np.testing.assert_array_equal(rows, [1.0, 1.0, 0.0])
  # 1, 2, 8 about 4: 9 + 4 + 16.
  squares, weight = masked.variance(X, W, jnp.float32(4.0))
  assert (float(squares), float(weight)) == (29.0, 3.0)


def test_nothing_counts():
  zero = jnp.zeros_like(X)
  assert float(masked.divide(*masked.mean(X, zero))) == 0.0
  np.testing.assert_array_equal(masked.whiten(X, zero), zero)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_does_not_count_is_never_seen(bad):
  spoiled = jnp.where(W == 0, bad, X)
  assert masked.mean(spoiled, W)[0] == masked.mean(X, W)[0]
  np.testing.assert_array_equal(masked.row_means(spoiled, W)[0], masked.row_means(X, W)[0])
  np.testing.assert_array_equal(masked.whiten(spoiled, W), masked.whiten(X, W))
  gradient = jax.grad(lambda x: masked.mean(jnp.exp(masked.keep(x, W)), W)[0])(spoiled)
  np.testing.assert_array_equal(gradient != 0, W != 0)


def test_pairs_add_up_to_the_whole():
  """Micro-batches of 1 + 2 rows, one of them with nothing that counts."""
  whole = masked.divide(*masked.mean(X, W))
  parts = [masked.mean(X[a:b], W[a:b]) for a, b in ((0, 1), (1, 2), (2, 3))]
  assert float(masked.divide(sum(t for t, _ in parts), sum(w for _, w in parts))) == float(whole)


def test_whitening_by_hand():
  """3, 5 and 10 about 6: squares 9 + 1 + 16 = 26, variance 13."""
  x, w = jnp.array([[3.0, 5.0], [10.0, 99.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
  expected = np.array([[-3.0, -1.0], [4.0, 0.0]]) / np.sqrt(13.0)
  np.testing.assert_allclose(masked.whiten(x, w), expected, rtol=1e-6)
  kept = masked.whiten(x, w, shift=False)
  np.testing.assert_allclose(kept, np.where(w > 0, expected + 6, 0), rtol=1e-6)


@pytest.mark.parametrize('value', [0.1, 0.3, 1e-8, -7.7, 1e6])
def test_equal_numbers_whiten_to_exactly_zero(value):
  x = jnp.full((3, 7), value, jnp.float32)
  w = jnp.ones_like(x).at[1, 3:].set(0.0)
  np.testing.assert_array_equal(masked.whiten(x, w), jnp.zeros_like(x))


def test_bfloat16_is_summed_in_float32():
  x = jnp.full((1, 4096), 1.0, jnp.bfloat16)
  assert float(masked.mean(x, jnp.ones_like(x))[0]) == 4096.0
