"""The loss of a chunk and its gradient: hand arithmetic, optax, and a vocabulary in parts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ftjax.losses.cross_entropy import LossConfig, label_logits, logsumexp, loss_and_gradient


def split(logits, parts):
  """[parts, n, V / parts], with the first id of each part."""
  n, vocab = logits.shape
  pieces = jnp.moveaxis(jnp.asarray(logits).reshape(n, parts, vocab // parts), 1, 0)
  return pieces, jnp.arange(parts, dtype=jnp.int32) * (vocab // parts)


def run(logits, labels, weights, terms=None, parts=1):
  """(loss, nll, gradient [n, V]) of a vocabulary in parts, each on its member of an axis."""
  logits = np.asarray(logits, np.float32)
  labels, weights = jnp.asarray(labels, jnp.int32), jnp.asarray(weights, jnp.float32)

  @functools.partial(jax.vmap, axis_name='tensor', out_axes=(None, None, 1))
  def one(piece, offset):
    return loss_and_gradient(piece, labels, weights, terms or LossConfig(), 'tensor', offset)

  loss, nll, gradient = one(*split(logits, parts))
  return float(loss), float(nll), np.asarray(gradient).reshape(logits.shape)


def example(n=7, vocab=12, seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(n, vocab)).astype(np.float32) * 3
  return logits, rng.integers(0, vocab, n), rng.uniform(0.2, 2, n).astype(np.float32)


TERMS = [LossConfig(), LossConfig(0.1), LossConfig(0.0, 1e-2), LossConfig(0.3, 1e-2)]
TERMS += [LossConfig(dynamic=True), LossConfig(0.3, 1e-2, dynamic=True)]


@pytest.mark.parametrize('terms', TERMS, ids=str)
@pytest.mark.parametrize('parts', [1, 2, 4])
def test_the_gradient_is_that_of_the_loss_written_plainly(terms, parts):
  logits, labels, weights = example()

  def plain(logits):
    logp = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logp, labels[:, None], 1)[:, 0]
    e, z = terms.label_smoothing, jax.nn.logsumexp(logits, axis=-1)
    loss = (1 - e) * nll - e * logp.mean(-1) + terms.z_loss * z**2
    if terms.dynamic:
      loss = loss * jax.lax.stop_gradient(jnp.exp(-nll))
    return (loss * weights).sum()

  loss, nll, gradient = run(logits, labels, weights, terms, parts)
  value, expected = jax.value_and_grad(plain)(jnp.asarray(logits))
  assert loss == pytest.approx(float(value), rel=2e-6)
  assert nll == pytest.approx(float((optax_nll(logits, labels) * weights).sum()), rel=2e-6)
  np.testing.assert_allclose(gradient, expected, atol=2e-6)


def optax_nll(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(labels))


def test_label_smoothing_is_optax_with_smoothed_labels():
  logits, labels, weights = example()
  targets = optax.smooth_labels(jax.nn.one_hot(labels, 12), 0.1)
  expected = float((optax.softmax_cross_entropy(jnp.asarray(logits), targets) * weights).sum())
  assert run(logits, labels, weights, LossConfig(0.1))[0] == pytest.approx(expected, rel=2e-6)


def test_by_hand():
  """Probabilities 1/2, 1/4, 1/4; label 1; weight 3; smoothing 0.3; z-loss 0.1.

  nll = log 4; mean of -log p over the vocabulary = (log 2 + 2 log 4) / 3 = 5/3 log 2.
  logsumexp of (log 2, 0, 0) = log 4.
  """
  log2 = math.log(2)
  loss, nll, gradient = run([[log2, 0.0, 0.0]], [1], [3.0], LossConfig(0.3, 0.1))
  assert nll == pytest.approx(3 * 2 * log2, rel=1e-6)
  expected = 0.7 * 2 * log2 + 0.3 * 5 / 3 * log2 + 0.1 * (2 * log2) ** 2
  assert loss == pytest.approx(3 * expected, rel=1e-6)
  scale = 1 + 2 * 0.1 * 2 * log2
  by_hand = 3 * np.array([0.5 * scale - 0.1, 0.25 * scale - 0.7 - 0.1, 0.25 * scale - 0.1])
  np.testing.assert_allclose(gradient[0], by_hand, rtol=1e-6)


def test_dynamic_by_hand():
  """The label has p = 1/4, so the loss is log 4 / 4 and the gradient a quarter of the plain one."""
  logits, labels, weights = [[math.log(2), 0.0, 0.0]], [1], [3.0]
  loss, nll, gradient = run(logits, labels, weights, LossConfig(dynamic=True))
  assert loss == pytest.approx(3 * math.log(4) / 4, rel=1e-6) and nll == pytest.approx(4 * loss)
  np.testing.assert_allclose(gradient[0], [3 / 8, -9 / 16, 3 / 16], rtol=1e-6)


def test_a_uniform_guess_costs_log_v():
  assert run(np.zeros((4, 12)), [0, 3, 7, 11], np.ones(4))[0] == pytest.approx(4 * math.log(12))


def test_gradients_of_a_token_sum_to_zero_without_z_loss():
  logits, labels, weights = example()
  for terms in (LossConfig(), LossConfig(0.2)):
    assert np.abs(run(logits, labels, weights, terms)[2].sum(-1)).max() <= 1e-6


def test_a_weight_of_zero_is_no_loss_and_no_gradient():
  logits, labels, weights = example()
  weights[2] = 0
  gradient = run(logits, labels, weights, LossConfig(0.1, 0.01))[2]
  assert (gradient[2] == 0).all() and (gradient[3] != 0).any()


@pytest.mark.parametrize('parts', [1, 3])
def test_extreme_logits_stay_finite(parts):
  logits = np.full((3, 12), -1e4, np.float32)
  logits[0, 5], logits[1, 5], logits[2] = 1e4, 1e4, 88.0
  loss, _, gradient = run(logits, [5, 6, 1], [1.0, 1.0, 1.0], parts=parts)
  assert loss == pytest.approx(2e4 + math.log(12))
  assert np.isfinite(gradient).all()
  np.testing.assert_allclose(gradient[1, [5, 6]], [1, -1])


@pytest.mark.parametrize('parts', [1, 2, 3, 4])
def test_pieces_of_logsumexp_and_labels(parts):
  logits, labels, _ = example()

  @functools.partial(jax.vmap, axis_name='tensor', out_axes=None)
  def one(piece, offset):
    picked = label_logits(piece, jnp.asarray(labels, jnp.int32), 'tensor', offset)
    return logsumexp(piece, 'tensor'), picked

  z, picked = one(*split(logits, parts))
  np.testing.assert_allclose(z, jax.nn.logsumexp(jnp.asarray(logits), axis=-1), rtol=1e-6)
  np.testing.assert_array_equal(picked, logits[np.arange(7), labels])
