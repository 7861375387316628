"""Policy losses: exact enumeration of divergences, identities at step 0, hand arithmetic.

Parity with TRL: parity/test_trl_losses.py."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import place

from ftjax.losses import masked, mismatch, policy
from ftjax.losses.policy import KL_TERMS, PolicyLossConfig, Rollout


def rollout(logp, old_logp=None, advantages=1.0, weights=None, **rest):
  logp = jnp.asarray(logp, jnp.float32)
  ones, zeros = jnp.ones_like(logp), jnp.zeros_like(logp)
  fields = dict(ref_logp=zeros, entropy=zeros, correction=ones) | {
    k: jnp.asarray(v, jnp.float32) for k, v in rest.items()
  }
  return Rollout(
    logp=logp,
    old_logp=logp if old_logp is None else jnp.asarray(old_logp, jnp.float32),
    advantages=jnp.asarray(advantages, jnp.float32) * jnp.ones_like(logp[:, :1]),
    weights=ones if weights is None else jnp.asarray(weights, jnp.float32),
    **fields,
  )


def random_rollout(rows=6, steps=7, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda scale: rng.normal(size=(rows, steps)) * scale  # noqa: E731
  logp = -rng.exponential(size=(rows, steps))
  return rollout(
    logp,
    logp + draw(0.4),
    rng.normal(size=(rows, 1)),
    np.arange(steps) < rng.integers(1, steps + 1, (rows, 1)),
    ref_logp=logp + draw(0.5),
    entropy=draw(1) ** 2,
    correction=draw(1) ** 2,
  )


# Compiled whole: operation by operation these tests take minutes.
compute = jax.jit(policy.loss, static_argnums=1)


def mean(r, objective):
  return masked.divide(*compute(r, objective)[:2])


@functools.partial(jax.jit, static_argnums=1)
def jitted_gradient(r, objective):
  return jax.grad(lambda logp: mean(r._replace(logp=logp), objective))(r.logp)


def gradient(r, objective):
  return np.asarray(jitted_gradient(r, objective))


# Exact enumeration: a softmax policy of five tokens, all in float64.

LOGITS = np.array([0.3, -1.2, 0.8, 0.0, -0.4])
REFERENCE = np.array([-0.5, 0.4, 0.1, 0.9, -0.2])
SAMPLER = np.array([0.0, -0.7, 1.1, 0.3, -1.0])


def log_probs(logits):
  return jax.nn.log_softmax(jnp.asarray(logits))


def kl(p, q):
  return (jnp.exp(p) * (p - q)).sum()


@functools.partial(jax.jit, static_argnums=0)
def jitted_gradients(estimate, old, ref, at):
  def mean_estimate(logits):
    logp = log_probs(logits)
    return (jnp.exp(old) * estimate(logp - ref, logp - old)).sum()

  forward, backward = lambda z: kl(log_probs(z), ref), lambda z: kl(ref, log_probs(z))
  return tuple(jax.grad(f)(at) for f in (mean_estimate, forward, backward))


def gradients(estimate, sampler=None):
  """(mean over the sampler's tokens of the estimator's gradient, grad KL(pi || ref), grad
  KL(ref || pi)), by the policy's logits; on-policy without a sampler."""
  old = log_probs(LOGITS if sampler is None else sampler)
  out = jitted_gradients(estimate, old, log_probs(REFERENCE), jnp.asarray(LOGITS))
  return tuple(np.asarray(g) for g in out)


def relative(got, expected):
  return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize('name', ['k2', 'k3_is'])
def test_unbiased_gradients_on_policy(name):
  with jax.enable_x64(True):
    got, expected, _ = gradients(KL_TERMS[name])
  assert relative(got, expected) <= 1e-6


def test_k3_with_importance_weight_is_unbiased_off_policy_and_k2_is_not():
  with jax.enable_x64(True):
    got, expected, _ = gradients(KL_TERMS['k3_is'], SAMPLER)
    assert relative(got, expected) <= 1e-6
    got, expected, _ = gradients(KL_TERMS['k2'], SAMPLER)
    assert relative(got, expected) > 0.05


def test_the_bias_of_k3_is_the_documented_one():
  """Its mean gradient is that of KL(ref || pi): here 28.2 % off that of KL(pi || ref).

  By hand, by the logits: pi - ref against pi (log pi - log ref - KL)."""
  with jax.enable_x64(True):
    got, forward, backward = gradients(KL_TERMS['k3'])
  assert relative(got, backward) <= 1e-6
  assert relative(got, forward) == pytest.approx(0.281690067, rel=1e-6)


def test_the_bias_of_k3_vanishes_near_the_reference():
  """Halving log pi - log ref halves the relative bias."""
  biases = []
  with jax.enable_x64(True):
    for step in (0.02, 0.01):
      near = jnp.asarray(REFERENCE + step * LOGITS)
      ref = log_probs(REFERENCE)
      forward = jax.grad(lambda z: kl(log_probs(z), ref))(near)  # noqa: B023
      got = jax.grad(lambda z: kl(ref, log_probs(z)))(near)  # noqa: B023
      biases.append(relative(np.asarray(got), np.asarray(forward)))
  assert biases[1] / biases[0] == pytest.approx(0.5, rel=0.02)


def test_k1_as_a_loss_has_no_gradient_in_the_mean():
  with jax.enable_x64(True):
    got, expected, _ = gradients(lambda to_ref, to_old: to_ref)
  assert np.abs(got).max() <= 1e-12 < np.abs(expected).max()
  assert 'k1' not in KL_TERMS


def test_k1_in_the_reward_is_unbiased():
  """REINFORCE with reward -k1: mean of k1 grad log pi = grad KL(pi || ref)."""
  with jax.enable_x64(True):
    ref = log_probs(REFERENCE)

    def surrogate(logits):
      logp = log_probs(logits)
      reward = -policy.kl_rewards(logp[None], ref[None], jnp.ones((1, 5)))[0]
      return -(jax.lax.stop_gradient(jnp.exp(logp)) * reward * logp).sum()

    got = np.asarray(jax.grad(surrogate)(jnp.asarray(LOGITS)))
    _, expected, _ = gradients(KL_TERMS['k2'])
  assert relative(got, expected) <= 1e-6


def test_values_of_the_estimators():
  """k1 and k3 have the divergence as their mean, k2 has not; none but k1 is ever negative."""
  with jax.enable_x64(True):
    logp, ref = log_probs(LOGITS), log_probs(REFERENCE)
    true, x = float(kl(logp, ref)), logp - ref
    estimates = {'k1': x, 'k2': policy.k2(x), 'k3': policy.k3(x)}
    means = {name: float((jnp.exp(logp) * k).sum()) for name, k in estimates.items()}
    assert (estimates['k2'] >= 0).all() and (estimates['k3'] >= 0).all() and (x < 0).any()
  assert means['k1'] == pytest.approx(true, rel=1e-9)
  assert means['k3'] == pytest.approx(true, rel=1e-9)
  assert abs(means['k2'] / true - 1) > 0.01


def test_the_loss_has_that_gradient():
  """The whole path in float32: five rows of one token each, weighted by their probability."""
  ref = log_probs(REFERENCE).astype(jnp.float32)
  objective = PolicyLossConfig(kl='k3_is', kl_coef=1.0)

  def total(logits):
    logp = log_probs(logits)
    r = rollout(logp[:, None], logp[:, None], 0.0, ref_logp=ref[:, None])
    r = r._replace(weights=jax.lax.stop_gradient(jnp.exp(logp))[:, None])
    return policy.loss(r, objective)[0]

  got = np.asarray(jax.grad(total)(jnp.asarray(LOGITS, jnp.float32)))
  with jax.enable_x64(True):
    expected = gradients(KL_TERMS['k2'])[1]
  assert relative(got, expected) <= 2e-6


# Step 0.


@pytest.mark.parametrize('surrogate', policy.SURROGATES)
@pytest.mark.parametrize('level', policy.LEVELS)
def test_on_policy_the_ratio_is_one_and_every_surrogate_is_reinforce(surrogate, level):
  r = random_rollout()
  r = r._replace(old_logp=r.logp, ref_logp=r.logp, correction=jnp.ones_like(r.logp))
  objective = PolicyLossConfig(surrogate=surrogate, level=level, kl_coef=0.5, aggregate='sequence')
  total, weight, metrics = compute(r, objective)
  tokens = float(r.weights.sum())
  assert [float(x) for x in metrics['ratio']] == [tokens, tokens]
  for name in ('kl', 'approx_kl', 'clip/low', 'clip/high'):
    assert float(metrics[name][0]) == 0.0
  if level == 'token':
    expected = gradient(r, PolicyLossConfig(surrogate='reinforce', aggregate='sequence'))
    np.testing.assert_allclose(gradient(r, objective), expected, atol=1e-7)
  if surrogate == 'clip':
    rows = masked.row_means(r.advantages * jnp.ones_like(r.logp), r.weights)[0]
    assert float(total / weight) == pytest.approx(-float(rows.mean()), abs=1e-6)


@pytest.mark.parametrize('surrogate', policy.SURROGATES)
@pytest.mark.parametrize('aggregate', policy.AGGREGATIONS)
def test_no_advantage_no_gradient(surrogate, aggregate):
  r = random_rollout()._replace(advantages=jnp.zeros((6, 1)))
  objective = PolicyLossConfig(surrogate=surrogate, aggregate=aggregate, constant=9)
  np.testing.assert_array_equal(gradient(r, objective), 0.0)


# Hand arithmetic.


@pytest.mark.parametrize(
  ('ratio', 'advantage', 'loss', 'flows'),
  [
    (1.1, 2.0, -2.2, True),
    (1.5, 2.0, -2.6, False),  # held at 1.3
    (0.5, 2.0, -1.0, True),
    (0.5, -2.0, 1.6, False),  # held at 0.8
    (1.5, -2.0, 3.0, True),
    (9.0, -2.0, 6.0, False),  # held at the dual clip, 3
  ],
)
def test_clipping_by_hand(ratio, advantage, loss, flows):
  r = rollout([[math.log(ratio)]], [[0.0]], advantage)
  objective = PolicyLossConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0)
  assert float(mean(r, objective)) == pytest.approx(loss, rel=1e-6)
  expected = -ratio * advantage if flows else 0.0
  assert gradient(r, objective)[0, 0] == pytest.approx(expected, rel=1e-6)


def test_without_dual_clip_the_loss_grows_with_the_ratio():
  r = rollout([[math.log(9.0)]], [[0.0]], -2.0)
  assert float(mean(r, PolicyLossConfig())) == pytest.approx(18.0, rel=1e-6)


def test_cispo_by_hand():
  """min(ratio, 1.3) A is a constant weight of log pi: a held ratio still teaches."""
  objective = PolicyLossConfig(surrogate='cispo', clip_high=0.3)
  for ratio, bounded in ((0.5, 0.5), (2.0, 1.3)):
    r = rollout([[math.log(ratio)]], [[0.0]], -2.0)
    assert float(mean(r, objective)) == pytest.approx(2 * bounded * math.log(ratio), rel=1e-6)
    assert gradient(r, objective)[0, 0] == pytest.approx(2 * bounded, rel=1e-6)


def test_levels_by_hand():
  """Log-ratios 0.2 and 0.4 of a row: each its own, their mean 0.3, their sum 0.6."""
  expected = {'token': (0.2, 0.4), 'sequence': (0.3, 0.3), 'trajectory': (0.6, 0.6)}
  for level, log_ratios in expected.items():
    got = policy.LEVELS[level](jnp.array([[0.2, 0.4, 0.0]]), jnp.array([[1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(got[0, :2], log_ratios, rtol=1e-6)


def test_aggregations_by_hand():
  """Rows of 1, 3 and 0 tokens, losses 4 and 1, 2, 3."""
  x = jnp.array([[4.0, 9.0, 9.0], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
  weights = jnp.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
  expected = {'token': (10.0, 4.0), 'sequence': (6.0, 2.0), 'constant': (10.0, 10.0)}
  for name, pair in expected.items():
    got = policy.AGGREGATIONS[name](x, weights, 5)
    assert tuple(float(v) for v in got) == pair


def numpy_loss(r, aggregate, constant):
  """The clipped loss in float64, row by row, as the papers write it."""
  a = {k: np.asarray(v, np.float64) for k, v in r._asdict().items()}
  rows = []
  for b in range(len(a['logp'])):
    at = a['weights'][b] > 0
    ratio = np.exp(a['logp'][b] - a['old_logp'][b])[at]
    advantage = a['advantages'][b, 0]
    gain = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage)
    rows.append(-gain * a['correction'][b][at])
  if aggregate == 'token':
    return np.concatenate(rows).mean()
  if aggregate == 'sequence':
    return np.mean([row.mean() for row in rows])
  return np.concatenate(rows).sum() / (len(rows) * constant)


@pytest.mark.parametrize('aggregate', policy.AGGREGATIONS)
def test_against_numpy(aggregate):
  r = random_rollout()
  got = float(mean(r, PolicyLossConfig(clip_high=0.28, aggregate=aggregate, constant=11)))
  assert got == pytest.approx(numpy_loss(r, aggregate, 11), rel=1e-6)


# Invariances.

EVERYTHING = dict(clip_high=0.28, dual_clip=3.0, kl_coef=0.1, entropy_coef=0.01, constant=11)


@pytest.mark.parametrize(
  ('aggregate', 'level'), list(zip(policy.AGGREGATIONS, policy.LEVELS, strict=True))
)
def test_micro_batches_add_up(aggregate, level):
  r, objective = random_rollout(), PolicyLossConfig(level=level, aggregate=aggregate, **EVERYTHING)
  total, weight, metrics = compute(r, objective)
  perm = np.array([4, 0, 5, 2, 1, 3])
  parts = [
    compute(Rollout(*(a[rows] for a in r)), objective) for rows in (perm[:2], perm[2:4], perm[4:])
  ]
  assert float(sum(p[0] for p in parts)) == pytest.approx(float(total), rel=2e-6)
  assert float(sum(p[1] for p in parts)) == float(weight)
  for name, (value, count) in metrics.items():
    assert float(sum(p[2][name][0] for p in parts)) == pytest.approx(float(value), rel=2e-6)
    assert float(sum(p[2][name][1] for p in parts)) == float(count)


@pytest.mark.parametrize('aggregate', policy.AGGREGATIONS)
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 1e30])
def test_what_does_not_count_is_never_seen(aggregate, bad):
  """Masked tokens hold anything; a row without tokens neither counts nor dilutes."""
  objective = PolicyLossConfig(aggregate=aggregate, level='sequence', **EVERYTHING)
  r = random_rollout()
  r = r._replace(weights=r.weights.at[2].set(0.0))
  spoiled = Rollout(
    *(a if a.shape[1] == 1 else jnp.where(r.weights == 0, bad, a) for a in r[:-1]), r.weights
  )
  rest = Rollout(*(jnp.delete(a, 2, axis=0) for a in r))
  assert float(mean(spoiled, objective)) == pytest.approx(float(mean(rest, objective)), rel=1e-6)
  got = gradient(spoiled, objective)
  np.testing.assert_allclose(
    np.delete(got, 2, axis=0), gradient(rest, objective), rtol=1e-5, atol=1e-8
  )
  np.testing.assert_array_equal(got[r.weights == 0], 0.0)


@pytest.mark.parametrize('surrogate', policy.SURROGATES)
@pytest.mark.parametrize('level', policy.LEVELS)
def test_far_ratios_stay_finite(surrogate, level):
  r = rollout([[0.0, -900.0], [-900.0, 0.0]], [[-900.0, 0.0]] * 2, [[-1.0], [0.0]])
  objective = PolicyLossConfig(surrogate=surrogate, level=level, dual_clip=3.0, kl_coef=0.1)
  assert np.isfinite(mean(r, objective)) and np.isfinite(gradient(r, objective)).all()
  assert np.isfinite(mean(r._replace(weights=r.weights * 0), objective))


@pytest.mark.parametrize('aggregate', policy.AGGREGATIONS)
def test_sharded_rows_and_tokens(use_mesh, aggregate):
  """On 8 devices with Explicit axes, rows and tokens spread, loss and gradient are the same."""
  objective = PolicyLossConfig(level='sequence', aggregate=aggregate, **EVERYTHING)
  r = random_rollout(8, 6)
  expected, expected_grad = float(mean(r, objective)), gradient(r, objective)
  use_mesh(data=2, fsdp=2, context=2)
  placed = Rollout(*(place(np.asarray(a), 'batch', 'seq' if a.shape[1] > 1 else None) for a in r))
  value = jax.jit(jax.value_and_grad(lambda logp, r: mean(r._replace(logp=logp), objective)))
  got, got_grad = value(placed.logp, placed)
  assert float(got) == pytest.approx(expected, rel=1e-6)
  np.testing.assert_allclose(got_grad, expected_grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'surrogate': 'ppo'}, 'surrogate'),
    ({'level': 'word'}, 'level'),
    ({'kl': 'k1'}, 'kl'),
    ({'aggregate': 'mean'}, 'aggregate'),
    ({'aggregate': 'constant'}, 'constant'),
    ({'dual_clip': 1.1}, 'dual_clip'),
  ],
)
def test_impossible_objectives_are_refused(changes, named):
  with pytest.raises(ValueError, match=named):
    PolicyLossConfig(**changes)


# Value loss, controller.


def test_value_loss_by_hand():
  """v 1.0 from 0.5, clip 0.2, R 2: held at 0.7, (1.3^2) / 2. v 3.0: 0.7 too, worse than 1^2."""
  values, old = jnp.array([[1.0, 3.0, 9.0]]), jnp.array([[0.5, 0.5, 9.0]])
  returns, weights = jnp.array([[2.0, 2.0, jnp.nan]]), jnp.array([[1.0, 1.0, 0.0]])
  total, weight, metrics = policy.value_loss(values, old, returns, weights, 0.2)
  assert float(total) == pytest.approx(1.69, rel=1e-6) and float(weight) == 2.0
  assert float(metrics['value_clip'][0]) == 2.0
  total, _, metrics = policy.value_loss(values, old, returns, weights, 0.0)
  assert float(total) == 1.0 and float(metrics['value_clip'][0]) == 0.0
  slope = jax.grad(lambda v: policy.value_loss(v, old, returns, weights, 0.2)[0])(values)
  np.testing.assert_array_equal(slope, [[0.0, 0.0, 0.0]])


def test_adaptive_kl():
  control = policy.AdaptiveKL(target=2.0)
  assert control.update(0.5, 2.0) == 0.5
  assert control.update(0.5, 2.2) == pytest.approx(0.505)
  assert control.update(0.5, 99.0) == pytest.approx(0.51)
  assert control.update(0.5, 0.0) == pytest.approx(0.49)


# Another sampler's log-probs.


@pytest.mark.parametrize('how', mismatch.CORRECTIONS)
def test_the_same_log_probs_need_no_correction(how):
  r = random_rollout()
  weights, metrics = mismatch.correct(r.logp, r.logp, r.weights, how=how, low=0.5, high=2.0)
  np.testing.assert_array_equal(weights, r.weights)
  assert all(float(metrics[f'mismatch/{m}'][0]) == 0 for m in ('abs_diff', 'kl', 'outside'))


@pytest.mark.parametrize(
  ('how', 'expected'),
  [
    ('token_truncate', [[1.5, 2.0, 0.0], [0.5, 1.0, 1.0]]),
    ('token_mask', [[1.5, 0.0, 0.0], [0.0, 1.0, 1.0]]),
    ('sequence_truncate', [[2.0, 2.0, 0.0], [0.5, 0.5, 0.5]]),
    ('sequence_mask', [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
  ],
)
def test_corrections_by_hand(how, expected):
  """Ratios 1.5 and 4 of one row, 0.25, 1 and 1 of the other, within [0.5, 2]."""
  ratio = np.array([[1.5, 4.0, 1.0], [0.25, 1.0, 1.0]])
  weights = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
  old = jnp.asarray(np.log(ratio), jnp.float32).at[0, 2].set(jnp.nan)
  got, metrics = mismatch.correct(old, jnp.zeros((2, 3)), weights, how=how, low=0.5, high=2.0)
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  outside = 2.0 if how.startswith('token') else 5.0
  assert [float(x) for x in metrics['mismatch/outside']] == [outside, 5.0]
  assert float(metrics['mismatch/abs_diff'][0]) == pytest.approx(math.log(1.5 * 4 * 4), rel=1e-6)


def test_a_long_sequence_of_small_differences_stays_finite():
  old = jnp.full((1, 4000), -0.1)
  got, metrics = mismatch.correct(
    old, old - 0.1, jnp.ones((1, 4000)), how='sequence_truncate', low=0.0, high=2.0
  )
  np.testing.assert_array_equal(got, 2.0)
  assert all(np.isfinite(v).all() for v in metrics.values())


def test_the_correction_repairs_the_expectation():
  """Mean over the sampler's tokens of ratio * f is the mean over the trainer's, without bounds."""
  old, sampler = (log_probs(x).astype(jnp.float32)[:, None] for x in (LOGITS, SAMPLER))
  weights, metrics = mismatch.correct(
    old, sampler, jnp.ones((5, 1)), how='token_truncate', low=0.0, high=1e6
  )
  f = np.arange(5.0)[:, None]
  np.testing.assert_allclose(
    (np.exp(sampler) * weights * f).sum(), (np.exp(old) * f).sum(), rtol=1e-6
  )
  assert float(metrics['mismatch/weight'][1]) == 5.0


def test_bounds_must_hold_one():
  x = jnp.zeros((1, 1))
  with pytest.raises(ValueError, match='must hold 1'):
    mismatch.correct(x, x, x, how='token_mask', low=1.1, high=2.0)
