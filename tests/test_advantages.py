"""Advantages: groups without a built, invariances, hand arithmetic, parity with plain loops.

Parity with TRL: parity/test_trl_losses.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import place

from ftjax.losses import advantages, masked

# Compiled whole: operation by operation these tests take minutes.
GROUP_FORMS = {
  form.__name__: jax.jit(form)
  for form in (
    advantages.grpo,
    advantages.dr_grpo,
    advantages.rloo,
    advantages.reinforce_pp_baseline,
  )
}
gae = jax.jit(advantages.gae, static_argnames=('gamma', 'lam'))
EACH = pytest.mark.parametrize('form', GROUP_FORMS.values(), ids=GROUP_FORMS)
REWARDS = jnp.array([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]])
ALL = jnp.ones_like(REWARDS, bool)


def random_rewards(prompts=5, completions=4, seed=0):
  rng = np.random.default_rng(seed)
  offsets = rng.normal(size=(prompts, 1)) * 10
  return jnp.asarray(rng.normal(size=(prompts, completions)) + offsets, jnp.float32)


@pytest.mark.parametrize(
  ('form', 'expected'),
  [
    (lambda r, s: advantages.grpo(r, s, epsilon=0.0), [-1.0, 0.0, 1.0]),  # std 2
    (lambda r, s: advantages.grpo(r, s, epsilon=2.0), [-0.5, 0.0, 0.5]),
    (advantages.dr_grpo, [-2.0, 0.0, 2.0]),
    (advantages.rloo, [-3.0, 0.0, 3.0]),  # 1 - 4, 3 - 3, 5 - 2
    # Squares 4 + 0 + 4 and three zeros of the other group, over 6 - 1.
    (advantages.reinforce_pp_baseline, [-2 / 1.6**0.5, 0.0, 2 / 1.6**0.5]),
  ],
)
def test_by_hand(form, expected):
  got, built = form(REWARDS, ALL)
  np.testing.assert_allclose(got, [expected, [0.0, 0.0, 0.0]], rtol=1e-6)
  np.testing.assert_array_equal(built, [True, False])


@EACH
@pytest.mark.parametrize('value', [0.1, 0.3, -7.7, 1e-8, 1e6, 0.0])
@pytest.mark.parametrize('completions', [1, 3, 7])
def test_constant_rewards_are_exactly_zero(form, value, completions):
  """Also where the mean of equal numbers is off by a rounding (0.1 three times)."""
  rewards = jnp.full((4, completions), value, jnp.float32)
  got, built = form(rewards, jnp.ones_like(rewards, bool))
  np.testing.assert_array_equal(got, np.zeros_like(rewards))
  assert not built.any()


@EACH
def test_prompts_do_not_see_each_others_order_or_offset(form):
  rewards = random_rewards()
  scorable = jnp.ones_like(rewards, bool).at[3, 1].set(False)
  got, _ = form(rewards, scorable)
  perm = np.array([3, 0, 4, 1, 2])
  shuffled, _ = form(rewards[perm], scorable[perm])
  np.testing.assert_allclose(shuffled, got[perm], rtol=1e-6)
  within = np.array([2, 0, 3, 1])
  np.testing.assert_allclose(
    form(rewards[:, within], scorable[:, within])[0], got[:, within], rtol=1e-5, atol=1e-6
  )
  moved, _ = form(rewards + 64 * jnp.arange(5.0)[:, None], scorable)
  np.testing.assert_allclose(moved, got, atol=1e-4)
  np.testing.assert_allclose(got.sum(-1), np.zeros(5), atol=1e-5)  # group by group, not the batch


@EACH
def test_what_is_not_scorable_is_as_if_it_were_not_there(form):
  rewards = random_rewards(3, 4)
  wider = jnp.concatenate([rewards, jnp.full((3, 2), jnp.nan)], axis=1)
  scorable = ~jnp.isnan(wider)
  got, built = form(wider, scorable)
  np.testing.assert_allclose(got[:, :4], form(rewards, jnp.ones_like(rewards, bool))[0], rtol=1e-6)
  np.testing.assert_array_equal(got[:, 4:], 0.0)
  assert built.all()
  got, built = form(wider, scorable & False)
  np.testing.assert_array_equal(got, 0.0)
  assert not built.any()


def test_rloo_is_the_loop():
  rewards = np.asarray(random_rewards(), np.float64)
  others = [[np.delete(row, c).mean() for c in range(len(row))] for row in rewards]
  got = advantages.rloo(jnp.asarray(rewards, jnp.float32), jnp.ones_like(rewards, bool))[0]
  np.testing.assert_allclose(got, rewards - np.array(others), atol=5e-6)


def test_groups_to_keep():
  """DAPO keeps what is neither all right nor all wrong; who has no reward does not count."""
  rewards = jnp.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
  scorable = jnp.ones_like(rewards, bool).at[3, 2].set(False)
  np.testing.assert_array_equal(
    advantages.has_signal(rewards, scorable), [False, False, True, False]
  )


def test_zero_variance_groups_can_be_left_out_of_the_variance():
  rewards = jnp.concatenate([REWARDS[:1], jnp.full((9, 3), 7.0)])
  scorable = jnp.ones_like(rewards, bool)
  kept = scorable & advantages.has_signal(rewards, scorable)[:, None]
  alone = advantages.reinforce_pp_baseline(REWARDS[:1], ALL[:1])[0]
  got = advantages.reinforce_pp_baseline(rewards, kept)[0]
  np.testing.assert_array_equal(got[:1], alone)
  assert np.abs(advantages.reinforce_pp_baseline(rewards, scorable)[0][0, 2]) > np.abs(alone[0, 2])


# Per token.

VALUES = np.array([[0.5, 0.1, 0.7, 0.2], [0.3, 0.4, 0.6, 0.8]], np.float32)
TOKEN_REWARDS = np.array([[0.0, -0.1, 0.0, 2.0], [0.2, 0.0, 1.0, 0.0]], np.float32)
HOLES = np.array([[1, 0, 1, 1], [1, 1, 1, 0]], np.float32)


def plain_gae(rewards, values, weights, gamma, lam):
  out = np.zeros(rewards.shape)
  for b in range(len(rewards)):
    advantage = value = 0.0
    for t in np.flatnonzero(weights[b])[::-1]:
      advantage = rewards[b, t] + gamma * value - values[b, t] + gamma * lam * advantage
      value, out[b, t] = values[b, t], advantage
  return out


@pytest.mark.parametrize(('gamma', 'lam'), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0)])
def test_gae_is_the_loop(gamma, lam):
  got, returns = gae(*map(jnp.asarray, (TOKEN_REWARDS, VALUES, HOLES)), gamma=gamma, lam=lam)
  expected = plain_gae(TOKEN_REWARDS, VALUES, HOLES, gamma, lam)
  np.testing.assert_allclose(got, expected, atol=1e-6)
  np.testing.assert_allclose(returns, (expected + VALUES) * HOLES, atol=1e-6)


def test_gae_by_hand():
  """Two tokens, reward 1 at the end, values 0.5 and 0.25: d = (-0.25, 0.75), lam 0.5."""
  got, returns = gae(
    jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.25]]), jnp.ones((1, 2)), gamma=1.0, lam=0.5
  )
  np.testing.assert_allclose(got, [[0.125, 0.75]], rtol=1e-6)
  np.testing.assert_allclose(returns, [[0.625, 1.0]], rtol=1e-6)


def test_padding_side_and_what_it_holds_do_not_matter():
  bad = jnp.full((2, 3), jnp.nan)
  zeros = jnp.zeros((2, 3))
  plain = gae(*map(jnp.asarray, (TOKEN_REWARDS, VALUES, HOLES)), gamma=0.9, lam=0.8)
  for left in (True, False):
    parts = [
      jnp.concatenate([pad, a] if left else [a, pad], axis=1)
      for a, pad in ((TOKEN_REWARDS, bad), (VALUES, bad), (HOLES, zeros))
    ]
    for got, expected in zip(gae(*parts, gamma=0.9, lam=0.8), plain, strict=True):
      kept, padding = (got[:, 3:], got[:, :3]) if left else (got[:, :4], got[:, 4:])
      np.testing.assert_array_equal(kept, expected)
      np.testing.assert_array_equal(padding, 0.0)


def test_the_reward_lands_on_the_last_real_token():
  weights = jnp.array([[1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1.0]])
  got = advantages.at_last_token(jnp.array([5.0, 6.0, 7.0, 8.0]), weights)
  expected = np.zeros((4, 5))
  expected[0, 2], expected[1, 3], expected[3, 4] = 5, 6, 8
  np.testing.assert_array_equal(got, expected)


def test_returns_by_hand():
  """Rewards 1, (a tool's token), 4, 2 at discount one half: 1 + (4 + 2/2)/2."""
  got = advantages.returns_to_go(
    jnp.array([[1.0, 9.0, 4.0, 2.0]]), jnp.array([[1, 0, 1, 1.0]]), 0.5
  )
  np.testing.assert_array_equal(got, [[3.5, 0.0, 5.0, 2.0]])


def test_reinforce_pp_by_hand():
  """Scores 3 and 1 at the ends of two and one tokens, no divergence: returns 3, 3, 1 whitened."""
  weights = jnp.array([[1.0, 1.0], [1.0, 0.0]])
  rewards = advantages.at_last_token(jnp.array([3.0, 1.0]), weights)
  mean, std = 7 / 3, (2 * (2 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2) ** 0.5
  expected = [[(3 - mean) / std, (3 - mean) / std], [(1 - mean) / std, 0.0]]
  np.testing.assert_allclose(advantages.reinforce_pp(rewards, weights), expected, rtol=1e-6)


@pytest.mark.parametrize('score', [0.1, -3.3, 0.0])
def test_reinforce_pp_of_equal_scores_is_exactly_zero(score):
  weights = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
  rewards = advantages.at_last_token(jnp.full(2, score, jnp.float32), weights)
  np.testing.assert_array_equal(advantages.reinforce_pp(rewards, weights), 0.0)


def test_nothing_here_has_a_gradient():
  ones = jnp.ones_like(REWARDS)
  for form in GROUP_FORMS.values():
    slope = jax.jit(jax.grad(lambda r: (form(r, ALL)[0] ** 2).sum()))(REWARDS)  # noqa: B023
    np.testing.assert_array_equal(slope, 0.0)
  both = lambda v: sum(a.sum() for a in advantages.gae(REWARDS, v, ones, gamma=1.0, lam=0.9))  # noqa: E731
  np.testing.assert_array_equal(jax.grad(both)(REWARDS), 0.0)


def test_overlong_by_hand():
  """DAPO, eq. 13, with 100 tokens of which the last 20 are the cache."""
  got = advantages.overlong_penalty(jnp.array([0, 80, 85, 90, 100, 101, 500]), 100, 20)
  np.testing.assert_array_equal(got, [0, 0, -0.25, -0.5, -1, -1, -1])
  for cache in (0, 101):
    with pytest.raises(ValueError, match='cache_len'):
      advantages.overlong_penalty(jnp.array([1]), 100, cache)


def test_sharded_prompts_and_rows(use_mesh):
  """On 8 devices with Explicit axes the same numbers come out, laid out as the inputs were."""
  rewards = np.asarray(random_rewards(8, 4))
  scorable = np.ones_like(rewards, bool)
  rng = np.random.default_rng(0)
  tokens, values = rng.normal(size=(2, 8, 5)).astype(np.float32)
  weights = (np.arange(5) < rng.integers(1, 6, (8, 1))).astype(np.float32)

  def per_token(rewards, values, weights):
    a, returns = gae(rewards, values, weights, gamma=0.9, lam=0.8)
    ends = advantages.at_last_token(rewards.sum(-1), weights)
    return masked.whiten(a, weights), returns, advantages.reinforce_pp(ends, weights)

  expected = {name: form(rewards, scorable) for name, form in GROUP_FORMS.items()}
  expected_tokens = jax.jit(per_token)(*map(jnp.asarray, (tokens, values, weights)))
  use_mesh(data=2, fsdp=4)
  placed = place(rewards, 'batch', None), place(scorable, 'batch', None)
  for name, form in GROUP_FORMS.items():
    got, built = form(*placed)
    np.testing.assert_allclose(got, expected[name][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(built, expected[name][1])
    assert not got.sharding.is_fully_replicated
  rows = [place(a, 'batch', None) for a in (tokens, values, weights)]
  for got, e in zip(jax.jit(per_token)(*rows), expected_tokens, strict=True):
    np.testing.assert_allclose(got, e, rtol=1e-5, atol=1e-6)
    assert not got.sharding.is_fully_replicated
