"""Mixup of rows: by hand, its draws, and the same on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import place

from ftjax.losses.mixup import mixed, mixed_loss, mixup_rows

drawn = functools.partial(jax.jit, static_argnums=(1, 2))(mixup_rows)


def test_by_hand():
  """Rows 1, 10, 100 with partners 1, 2, 0."""
  x = jnp.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
  partner, weight = jnp.array([1, 2, 0]), jnp.array([0.75, 0.5, 1.0])
  found = mixed(x, partner, weight)
  np.testing.assert_allclose(found, [[3.25, 6.5], [55, 110], [100, 200]], rtol=1e-6)
  labels = jnp.array([0, 1, 1])
  nll = -jax.nn.log_softmax(found)
  own, other = (jnp.take_along_axis(nll, y[:, None], 1)[:, 0] for y in (labels, labels[partner]))
  loss = mixed_loss(own, other, weight)
  # Row 0: 3.25 apart, label 0 with 3/4 and label 1 with 1/4.
  far = np.log1p(np.exp(3.25))
  np.testing.assert_allclose(loss[0], 0.75 * far + 0.25 * (far - 3.25), rtol=1e-6)
  # As the loss of a mixed target, which is linear in it.
  target = mixed(jax.nn.one_hot(labels, 2), partner, weight)
  np.testing.assert_allclose(loss, (nll * target).sum(-1), rtol=1e-6)


def test_each_row_has_one_partner_by_the_keys_alone():
  """The same keys in another order give the same pairs; one key stands for those of all rows."""
  keys = jax.random.split(jax.random.key(1), 16)
  turn = np.random.default_rng(0).permutation(16)
  partner, weight = map(np.asarray, drawn(keys, 1.0, 16))
  assert partner.dtype == np.int32 and weight.dtype == np.float32
  assert sorted(partner) == list(range(16)) and (partner != np.arange(16)).all()
  assert ((weight >= 0) & (weight <= 1)).all() and len(set(weight.tolist())) == 16
  moved, moved_weight = map(np.asarray, drawn(keys[turn], 1.0, 16))
  np.testing.assert_array_equal(turn[moved], partner[turn])
  np.testing.assert_array_equal(moved_weight, weight[turn])
  one = jax.random.key(5)
  rows = jax.vmap(lambda i: jax.random.fold_in(one, i))(jnp.arange(16))
  for a, b in zip(drawn(one, 1.0, 16), drawn(rows, 1.0, 16), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_row_alone_is_its_own_partner():
  assert drawn(jax.random.split(jax.random.key(0), 1), 0.4, 1)[0].tolist() == [0]


@pytest.mark.parametrize(
  'alpha', [0.2, *(pytest.param(a, marks=pytest.mark.full) for a in (1.0, 8.0))]
)
def test_weights_have_the_moments_of_beta(alpha):
  """Mean 1/2 and variance 1 / (4 (2 alpha + 1)) of 8,000 draws."""
  weight = np.asarray(drawn(jax.random.key(2), alpha, 8000)[1])
  variance = 1 / (4 * (2 * alpha + 1))
  assert abs(weight.mean() - 0.5) < 6 * np.sqrt(variance / 8000)
  assert weight.var() == pytest.approx(variance, rel=0.1)


def test_on_a_mesh_it_is_the_same(use_mesh):
  x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 8)
  partner, weight = drawn(keys, 0.4, 8)
  expected = np.asarray(mixed(jnp.asarray(x), partner, weight))
  use_mesh(data=2, fsdp=2)

  @jax.jit
  def run(x, keys):
    return mixed(x, *mixup_rows(keys, 0.4, 8))

  keys = jax.sharding.reshard(jax.random.split(jax.random.key(0), 8), jax.P(('data', 'fsdp')))
  found = run(place(x, 'batch', 'act_embed'), keys)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert found.sharding.spec[0] == ('data', 'fsdp', 'expert')


def test_what_cannot_be_mixed_is_refused():
  with pytest.raises(ValueError, match=r'alpha=0.0; expected a positive'):
    mixup_rows(jax.random.key(0), 0.0, 4)
  with pytest.raises(ValueError, match=r'keys \(3,\) for 4 rows'):
    mixup_rows(jax.random.split(jax.random.key(0), 3), 1.0, 4)
