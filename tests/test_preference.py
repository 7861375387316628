"""Losses of preference tuning and reward models: identities, invariances, hand arithmetic.

Parity with TRL: parity/test_trl_losses.py."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.losses import preference, reward_model
from ftjax.losses.preference import Pairs, Settings, Singles
from ftjax.losses.preference_table import DIVERGENCES, LOSSES

LOG2 = math.log(2)
# Compiled whole: operation by operation these tests take a minute.
loss = jax.jit(preference.loss, static_argnums=(0, 3))
PAIRED = [name for name, row in LOSSES.items() if row.paired]
WITH_REFERENCE = [name for name in PAIRED if LOSSES[name].needs_reference]
# z of KTO is computed before.
WHOLE_STEP = [name for name in PAIRED if LOSSES[name].whole_step]
ALL_TERMS = Settings(beta=0.3, label_smoothing=0.1, gamma=0.4, nll_coef=0.5)


def pairs(chosen, rejected, ref_chosen=0.0, ref_rejected=0.0, tokens=(1.0, 1.0), nll=0.0):
  values = (chosen, rejected, ref_chosen, ref_rejected, *tokens, nll)
  return Pairs(*(jnp.atleast_1d(jnp.asarray(v, jnp.float32)) for v in values))


def one(name, batch, settings):
  return float(LOSSES[name].function(batch, settings)[0])


def random_pairs(count=6, seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 20, (2, count))
  logp = -rng.exponential(size=(4, count)) * np.concatenate([tokens, tokens])
  rows = [*logp, *tokens, -logp[0] / tokens[0]]
  return Pairs(*(jnp.asarray(r, jnp.float32) for r in rows))


def random_singles(count=6, seed=0):
  rng = np.random.default_rng(seed)
  logp, ref = -rng.exponential(size=(2, count)) * 9
  f32 = np.float32
  return Singles(
    *map(jnp.asarray, (logp.astype(f32), ref.astype(f32), rng.random(count) < 0.5, f32(0.7)))
  )


def random_batch(name, count=6, seed=0):
  return (random_pairs if LOSSES[name].paired else random_singles)(count, seed)


def take(batch, rows):
  return type(batch)(*(a[rows] if jnp.ndim(a) else a for a in batch))


# r_w = 2, r_l = -1; r_w / |w| = 1, r_l / |l| = -1/4.
BY_HAND = pairs(-3.0, -6.0, -5.0, -5.0, tokens=(2.0, 4.0), nll=1.5)


def log_sigmoid(x):
  return -math.log1p(math.exp(-x))


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
  ('name', 'settings', 'expected'),
  [
    ('sigmoid', Settings(beta=0.5), -log_sigmoid(1.5)),
    (
      'sigmoid',
      Settings(beta=0.5, label_smoothing=0.1),
      -0.9 * log_sigmoid(1.5) - 0.1 * log_sigmoid(-1.5),
    ),
    ('sigmoid_norm', Settings(beta=2.0), -log_sigmoid(2.5)),
    ('ipo', Settings(beta=0.5), (1.25 - 1.0) ** 2),
    ('hinge', Settings(beta=0.1), 0.7),
    ('hinge', Settings(beta=0.5), 0.0),
    (
      'robust',
      Settings(beta=0.5, label_smoothing=0.25),
      (-0.75 * log_sigmoid(1.5) + 0.25 * log_sigmoid(-1.5)) / 0.5,
    ),
    (
      'exo',
      Settings(beta=0.5, label_smoothing=0.1),
      sigmoid(1.5) * (log_sigmoid(1.5) - math.log(0.9))
      + sigmoid(-1.5) * (log_sigmoid(-1.5) - math.log(0.1)),
    ),
    (
      'discopop',
      Settings(beta=0.5, tau=0.5),
      -log_sigmoid(1.5) * sigmoid(-3.0) + math.exp(-1.5) * sigmoid(3.0),
    ),
    (
      'nca',
      Settings(beta=0.5),
      -log_sigmoid(1.0) - 0.5 * log_sigmoid(-1.0) - 0.5 * log_sigmoid(0.5),
    ),
    ('sppo', Settings(beta=0.5), 1.0),
    ('apo_zero', Settings(beta=0.5), sigmoid(-1.0) + sigmoid(-0.5)),
    ('apo_down', Settings(beta=0.5), sigmoid(1.0) + sigmoid(-1.5)),
    # The mean of the rewards 1 and -1/2 is 1/4.
    ('bco', Settings(beta=0.5), -2 * log_sigmoid(0.75)),
    # exp r is e^2 and e^-1.
    (
      'sigmoid',
      Settings(beta=0.5, divergence='forward_kl'),
      -log_sigmoid(0.5 * (math.exp(1) - math.exp(-2))),
    ),
    (
      'hinge',
      Settings(beta=0.1, divergence='js'),
      1 - 0.1 * (log_sigmoid(2.0) - log_sigmoid(-1.0)),
    ),
    (
      'sigmoid_norm',
      Settings(beta=0.5, divergence='alpha', divergence_alpha=2.0),
      -log_sigmoid(0.5 * ((math.exp(2) - 1) / 2 - (math.exp(-1) - 1) / 4)),
    ),
    # Means of log-probs: -3/2 and -6/4, equal.
    ('simpo', Settings(beta=2.0, gamma=0.5), -log_sigmoid(-0.5)),
    ('simpo', Settings(beta=2.0, gamma=0.5, nll_coef=2.0), -log_sigmoid(-0.5) + 3.0),
    ('cpo', Settings(beta=0.5, nll_coef=2.0), -log_sigmoid(1.5) + 3.0),
    ('orpo', Settings(beta=0.5), 1.5 + 0.5 * LOG2),
  ],
)
def test_by_hand(name, settings, expected):
  assert one(name, BY_HAND, settings) == pytest.approx(expected, rel=1e-6)


def test_odds_by_hand():
  """q = 1/4 against 1/2: odds 1/3 against 1, so -log s(log 1/3) = log 4."""
  batch = pairs(-2 * LOG2, -LOG2)
  assert one('orpo', batch, Settings(beta=1.0)) == pytest.approx(2 * LOG2, rel=1e-6)


def test_kto_by_hand():
  """beta (r - z) = 0.5 (3 - 1) for the good one, 0.5 (0 - 1) for the bad one."""
  rows = Singles(
    jnp.array([-1.0, -4.0]), jnp.array([-4.0, -4.0]), jnp.array([True, False]), jnp.float32(1.0)
  )
  got = LOSSES['kto'].function(rows, Settings(beta=0.5, desirable=2.0, undesirable=3.0))
  np.testing.assert_allclose(got, [2 * (1 - sigmoid(1.0)), 3 * (1 - sigmoid(0.5))], rtol=1e-6)


# r_w = 3, -1 and r_l = 0, 2; the policy's differences are 4 and 0, the reference's 1 and 3.
TWO = pairs([-1.0, -4.0], [-5.0, -4.0], [-4.0, -3.0], [-5.0, -6.0], tokens=([1.0] * 2, [1.0] * 2))


def test_losses_that_sort_by_hand():
  """aot: 4 against 3 and 0 against 1; aot_unpaired: 3 against 2 and -1 against 0."""
  aot, unpaired = (LOSSES[n].function(TWO, Settings(beta=0.5)) for n in ('aot', 'aot_unpaired'))
  expected = [-log_sigmoid(0.5), -log_sigmoid(-0.5)]
  np.testing.assert_allclose(aot, expected, rtol=1e-6)
  np.testing.assert_allclose(unpaired, expected, rtol=1e-6)
  batch = random_pairs()
  both = np.sort(batch.chosen - batch.ref_chosen) - np.sort(batch.rejected - batch.ref_rejected)
  found = LOSSES['aot_unpaired'].function(batch, Settings(beta=0.01))
  np.testing.assert_allclose(
    np.sort(found)[::-1], [-log_sigmoid(0.01 * x) for x in np.sort(both)], rtol=1e-5
  )


def test_the_mean_reward_by_hand():
  """The rewards 1.5, -0.5, 0 and 1 have the mean 1/2."""
  found = LOSSES['bco'].function(TWO, Settings(beta=0.5))
  expected = [-log_sigmoid(1.0) - log_sigmoid(0.5), -log_sigmoid(-1.0) - log_sigmoid(-0.5)]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  gradient = jax.grad(lambda c: LOSSES['bco'].function(TWO._replace(chosen=c), Settings(0.5)).sum())
  np.testing.assert_allclose(  # the mean is a constant
    gradient(TWO.chosen), [-0.5 * sigmoid(-1.0), -0.5 * sigmoid(1.0)], rtol=1e-6
  )


@pytest.mark.parametrize('name', DIVERGENCES)
def test_divergences(name):
  """They increase with the log-ratio, are 0 at equality with slope 1 or 1/2, and stay finite."""
  c = Settings(divergence=name)
  r = jnp.linspace(-3, 3, 13)
  found = DIVERGENCES[name](r, c)
  assert float(found[6]) == pytest.approx(0, abs=1e-7) and (jnp.diff(found) > 0).all()
  slope = jax.grad(lambda r: DIVERGENCES[name](r, c))(0.0)
  assert float(slope) == pytest.approx(0.5 if name == 'js' else 1.0)
  for extreme in (-2000.0, 2000.0):
    value, gradient = jax.value_and_grad(lambda r: DIVERGENCES[name](r, c))(extreme)
    assert np.isfinite(value) and np.isfinite(gradient)


def test_alpha_lies_between_the_divergences():
  """1 is reverse_kl, and 0 is forward_kl."""
  r = jnp.linspace(-3, 3, 13)
  for order, other in ((1.0, 'reverse_kl'), (0.0, 'forward_kl'), (1.0 + 1e-7, 'reverse_kl')):
    found = DIVERGENCES['alpha'](r, Settings(divergence_alpha=order))
    np.testing.assert_allclose(found, DIVERGENCES[other](r, Settings()), rtol=1e-6)


def test_reference_point():
  total, weight = preference.kto_reference_point(
    jnp.array([-1.0, -2.0, jnp.nan]), jnp.array([-2.0, -5.0, 0.0]), jnp.array([1.0, 1.0, 0.0])
  )
  assert float(preference.kto_z(total, weight)) == 2.0
  assert float(preference.kto_z(-total, weight)) == 0.0
  assert float(preference.kto_z(jnp.float32(0), jnp.float32(0))) == 0.0


def test_step_zero():
  """Policy == reference: ln 2 to 1e-6 and margins of exactly 0, however long the answers are."""
  batch = random_pairs()
  same = batch._replace(ref_chosen=batch.chosen, ref_rejected=batch.rejected)
  ones = jnp.ones_like(batch.chosen)
  names = ('sigmoid', 'sigmoid_norm', 'robust', 'aot', 'aot_unpaired')
  zero_loss = dict.fromkeys(names, LOG2) | {
    'ipo': 25.0, 'hinge': 1.0, 'exo': -LOG2 - 0.5 * math.log(0.09), 'discopop': 0.5 * (LOG2 + 1),
    'nca': 2 * LOG2, 'sppo': 50.0, 'apo_zero': 1.0, 'apo_down': 1.0, 'bco': 2 * LOG2,
  }  # fmt: skip
  assert set(zero_loss) == set(WITH_REFERENCE)
  for name, expected in zero_loss.items():
    settings = Settings(beta=0.1, label_smoothing=0.1)
    total, weight, metrics = loss(LOSSES[name], same, ones, settings)
    assert float(total / weight) == pytest.approx(expected, abs=1e-6)
    for metric in ('rewards/chosen', 'rewards/rejected', 'rewards/margin', 'rewards/accuracy'):
      assert float(metrics[metric][0]) == 0.0
  singles = random_singles()
  rows = singles._replace(ref_logp=singles.logp, z=jnp.float32(0))
  total, weight, _ = loss(LOSSES['kto'], rows, ones, Settings())
  assert float(total / weight) == 0.5


@pytest.mark.parametrize('name', LOSSES)
def test_the_table_is_whole(name):
  row = LOSSES[name]
  assert row.formula and row.paper
  batch = random_batch(name)
  assert row.function(batch, ALL_TERMS).shape == (6,)
  if row.paired and not row.needs_reference:
    other = batch._replace(ref_chosen=batch.chosen, ref_rejected=batch.chosen)
    np.testing.assert_array_equal(row.function(batch, ALL_TERMS), row.function(other, ALL_TERMS))
  elif row.paired:
    other = batch._replace(ref_chosen=batch.ref_chosen - 1)
    assert (row.function(batch, ALL_TERMS) != row.function(other, ALL_TERMS)).any()


@pytest.mark.parametrize('name', WHOLE_STEP)
def test_the_order_of_a_whole_step_does_not_matter(name):
  batch, ones = random_batch(name), jnp.ones(6)
  total = loss(LOSSES[name], batch, ones, ALL_TERMS)[0]
  other = loss(LOSSES[name], take(batch, jnp.array([3, 1, 5, 0, 2, 4])), ones, ALL_TERMS)[0]
  assert float(other) == pytest.approx(float(total), rel=1e-6)


@pytest.mark.parametrize('name', [n for n in LOSSES if n not in WHOLE_STEP])
def test_micro_batches_add_up_and_order_does_not_matter(name):
  batch, ones = random_batch(name), jnp.ones(6)
  total, weight, metrics = loss(LOSSES[name], batch, ones, ALL_TERMS)
  perm = jnp.array([3, 1, 5, 0, 2, 4])
  parts = [
    loss(LOSSES[name], take(batch, rows), ones[rows], ALL_TERMS)
    for rows in (perm[:2], perm[2:4], perm[4:])
  ]
  assert float(sum(p[1] for p in parts)) == float(weight) == 6.0
  assert float(sum(p[0] for p in parts)) == pytest.approx(float(total), rel=1e-6)
  for key, (value, count) in metrics.items():
    assert float(sum(p[2][key][0] for p in parts)) == pytest.approx(float(value), rel=1e-6)
    assert float(sum(p[2][key][1] for p in parts)) == float(count)


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('bad', [0.0, np.nan, np.inf])
def test_padding_is_never_seen(name, bad):
  batch = random_batch(name)
  weights = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
  spoiled = type(batch)(
    *(jnp.where(weights == 0, bad, a).astype(a.dtype) if jnp.ndim(a) else a for a in batch)
  )
  kept = take(batch, weights > 0)

  def total(first, batch, weights):
    batch = batch._replace(**{batch._fields[0]: first})
    return loss(LOSSES[name], batch, weights, ALL_TERMS)[0]

  value, gradient = jax.value_and_grad(total)(spoiled[0], spoiled, weights)
  expected, kept_gradient = jax.value_and_grad(total)(kept[0], kept, jnp.ones(4))
  assert float(value) == pytest.approx(float(expected), rel=1e-6)
  np.testing.assert_array_equal(gradient[weights == 0], [0, 0])
  np.testing.assert_allclose(gradient[weights > 0], kept_gradient, rtol=1e-6)


@pytest.mark.parametrize('name', LOSSES)
def test_extremes_stay_finite(name):
  """Log-ratios of +-2000, answers without tokens, answers that are certain."""
  big, zero = jnp.array([-2000.0, -1e-3, 0.0, 0.0]), jnp.zeros(4)
  if LOSSES[name].paired:
    batch = Pairs(big, big[::-1], big[::-1], zero, jnp.array([9.0, 1.0, 0.0, 3.0]), zero, zero)
  else:
    batch = Singles(big, big[::-1], jnp.array([True, False, True, False]), jnp.float32(3.0))

  def total(first):
    batch_ = batch._replace(**{batch._fields[0]: first})
    return loss(LOSSES[name], batch_, jnp.ones(4), Settings(beta=1.0, label_smoothing=0.1))[0]

  value, gradient = jax.value_and_grad(total)(batch[0])
  assert np.isfinite(value) and np.isfinite(gradient).all()


# apo_down lowers both likelihoods, and discopop has a local minimum.
@pytest.mark.parametrize('name', [n for n in PAIRED if n not in ('apo_down', 'discopop')])
def test_a_step_downhill_widens_the_gap(name):
  batch = random_pairs()

  def total(chosen, rejected):
    batch_ = batch._replace(chosen=chosen, rejected=rejected)
    return LOSSES[name].function(batch_, Settings(0.01, 0.1)).sum()

  chosen, rejected = jax.grad(total, (0, 1))(batch.chosen, batch.rejected)
  assert (chosen < 0).all() and (rejected > 0).all()


def test_sigmoid_gradient_by_hand():
  """d/d(chosen) of -log s(beta gap) is -beta s(-beta gap)."""
  gradient = jax.grad(
    lambda c: LOSSES['sigmoid'].function(BY_HAND._replace(chosen=c), Settings(0.5))[0]
  )
  expected = -0.5 / (1 + math.exp(1.5))
  assert float(gradient(BY_HAND.chosen)[0]) == pytest.approx(expected, rel=1e-6)


def test_robust_is_unbiased_under_flips():
  """(1 - e) loss(pair) + e loss(flipped pair) = the clean loss, for each pair."""
  batch, e = random_pairs(), 0.2
  flipped = Pairs(batch.rejected, batch.chosen, batch.ref_rejected, batch.ref_chosen, *batch[4:])
  robust = lambda b: LOSSES['robust'].function(b, Settings(0.3, e))  # noqa: E731
  clean = LOSSES['sigmoid'].function(batch, Settings(0.3))
  np.testing.assert_allclose((1 - e) * robust(batch) + e * robust(flipped), clean, rtol=2e-6)


def test_nll_of_every_pair_counts_the_same():
  """Two answers of 1 and 3 tokens, -1 and -6 in all."""
  logp, tokens = jnp.array([-1.0, -6.0]), jnp.array([1.0, 3.0])
  np.testing.assert_array_equal(preference.nll_per_pair(logp, tokens), [1.0, 2.0])


@pytest.mark.parametrize(
  'changes', [{'label_smoothing': 0.5}, {'label_smoothing': -0.1}, {'beta': 0}]
)
def test_impossible_settings_are_refused(changes):
  with pytest.raises(ValueError, match='must be'):
    Settings(**changes)


def test_bradley_terry_by_hand():
  total, weight, metrics = reward_model.bradley_terry(
    jnp.array([2.0, 1.0, 9.0]),
    jnp.array([1.0, 1.0, 9.0]),
    jnp.array([1.0, 1.0, 0.0]),
    margin=jnp.array([0.5, 0.0, jnp.nan]),
    centring=0.01,
  )
  expected = -log_sigmoid(0.5) + 0.09 + LOG2 + 0.04
  assert float(total) == pytest.approx(expected, rel=1e-6) and float(weight) == 2.0
  assert float(metrics['rewards/margin'][0]) == 1.0
  assert float(metrics['rewards/accuracy'][0]) == 1.0


def test_centring_is_all_that_sees_a_shift():
  chosen, rejected, ones = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0]), jnp.ones(2)
  plain = reward_model.bradley_terry(chosen, rejected, ones)[0]
  assert float(reward_model.bradley_terry(chosen + 8, rejected + 8, ones)[0]) == float(plain)
  shifted = reward_model.bradley_terry(chosen + 8, rejected + 8, ones, centring=0.1)[0]
  assert shifted > reward_model.bradley_terry(chosen, rejected, ones, centring=0.1)[0]


def test_regression_by_hand():
  total, weight, metrics = reward_model.reward_regression(
    jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 4.0, jnp.nan]), jnp.array([1.0, 1.0, 0.0])
  )
  assert (float(total), float(weight)) == (5.0, 2.0)
  assert float(metrics['error/absolute'][0]) == 3.0


def test_calibration():
  # Surely right and surely wrong; a coin; two thirds right with p = 2/3.
  assert reward_model.calibration_error(np.full(4, 50.0)) == pytest.approx(0, abs=1e-9)
  assert reward_model.calibration_error(np.full(4, -50.0)) == pytest.approx(1, abs=1e-9)
  assert reward_model.calibration_error(np.zeros(3)) == 0.0
  assert reward_model.calibration_error(LOG2 * np.array([1, 1, -1])) == pytest.approx(0, abs=1e-9)
  # p = 0.9 twice, one of them wrong, and p = 1 right: (2/3) * 0.4.
  margins = np.array([math.log(9), -math.log(9), 60.0])
  assert reward_model.calibration_error(margins, bins=5) == pytest.approx(0.8 / 3, abs=1e-9)
  with pytest.raises(ValueError, match='no pairs'):
    reward_model.calibration_error(np.array([]))
