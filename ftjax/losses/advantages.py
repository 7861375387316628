"""Advantages of sampled completions: relative to their group, to the batch, or to a value model.

Axes: P prompts, C completions per prompt, B completions, T tokens. Everything is jnp and runs under
jit on arrays sharded over P or B (C and T whole). Advantages are constants: none has a gradient.

A group has a signal only if two of its completions have different rewards. Every group function
returns advantages of exactly 0 for zero-variance groups and marks them (`has_signal`): a caller
gives their tokens weight 0, so that they neither count in the loss's weight nor get a KL term, or
samples other prompts instead (DAPO, Yu et al. 2025, section 3.2, 'dynamic sampling').
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.losses import masked


class Advantages(NamedTuple):
  """Advantages of groups; 0 for completions that are not scorable."""

  advantages: jax.Array  # float32[P, C]
  has_signal: jax.Array  # bool[P]


def has_signal(rewards: jax.Array, scorable: jax.Array) -> jax.Array:
  """Returns bool[P]: whether two scorable completions of a group have different rewards, bit by
  bit.

  For rewards of 0 and 1 this is DAPO's mask of the groups to keep (Yu et al. 2025, eq. 11); it is
  defined for any rewards. Arguments as in `grpo`.
  """
  lowest = jnp.where(scorable, rewards, jnp.inf).min(-1)
  highest = jnp.where(scorable, rewards, -jnp.inf).max(-1)
  return lowest < highest


def _centred(rewards: jax.Array, scorable: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (rewards - the group's mean, 0 where not scorable float32[P, C]; scorable float32[P,
  C]; number of scorable completions float32[P, 1])."""
  weights = scorable.astype(jnp.float32)
  rewards = masked.keep(rewards.astype(jnp.float32), weights)
  count = weights.sum(-1, keepdims=True)
  mean = masked.divide(rewards.sum(-1, keepdims=True), count)
  return (rewards - mean) * weights, weights, count


def _masked_by_signal(advantages: jax.Array, rewards: jax.Array, scorable: jax.Array) -> Advantages:
  # From the rewards themselves: the mean of equal numbers may differ from them by rounding.
  has_signal_N = has_signal(rewards, scorable)
  out = jnp.where(has_signal_N[:, None] & scorable, advantages, 0.0)
  return Advantages(jax.lax.stop_gradient(out), has_signal_N)


def grpo(rewards: jax.Array, scorable: jax.Array, epsilon: float = 1e-4) -> Advantages:
  """Computes (r - mean of the group) / (std of the group + epsilon).

  The standard deviation is unbiased (C - 1), as in TRL's GRPO (scale_rewards 'group'), verl and
  DeepSeek's equation read by torch. Shao et al. 2024, section 4.1.2.

  Args:
    rewards: float32[P, C].
    scorable: bool[P, C], False for completions without a reward and for padding.
    epsilon: in units of the reward.
  """
  centred, _, count = _centred(rewards, scorable)
  squares = jnp.square(centred).sum(-1, keepdims=True)
  std = jnp.sqrt(masked.divide(squares, jnp.maximum(count - 1.0, 0.0)))
  return _masked_by_signal(centred / (std + epsilon), rewards, scorable)


def dr_grpo(rewards: jax.Array, scorable: jax.Array) -> Advantages:
  """Computes r - mean of the group: Dr. GRPO, Liu et al. 2025, section 3; TRL's scale_rewards
  'none'.
  Arguments as in `grpo`."""
  return _masked_by_signal(_centred(rewards, scorable)[0], rewards, scorable)


def rloo(rewards: jax.Array, scorable: jax.Array) -> Advantages:
  """Computes r - mean of the group's other rewards, which is n / (n - 1) (r - mean of the group).

  Ahmadian et al. 2024, section 3.3; Kool et al. 2019. TRL's RLOO trainer agrees. Arguments as in
  `grpo`; n is the number of scorable completions of the group.
  """
  centred, _, count = _centred(rewards, scorable)
  scale = masked.divide(count, jnp.maximum(count - 1.0, 0.0))
  return _masked_by_signal(centred * scale, rewards, scorable)


def reinforce_pp_baseline(
  rewards: jax.Array, scorable: jax.Array, epsilon: float = 1e-8
) -> Advantages:
  """Computes (r - mean of the group) / sqrt(variance over the batch + epsilon): REINFORCE++ with
  baseline.

  Hu et al. 2025, section 3. The batch's mean of r - mean of the group is 0, so none is subtracted:
  a zero-variance group stays at exactly 0. The variance is over all scorable completions
  (number - 1), zero-variance groups included, as in the paper; to leave those out give
  `scorable & has_signal(rewards, scorable)[:, None]`. It couples all prompts: pass the rewards of
  the whole step. TRL has no such form (its scale_rewards 'batch' divides by the deviation of the
  rewards themselves); verl and OpenRLHF whiten per token instead of per completion.
  """
  centred, weights, _ = _centred(rewards, scorable)
  squares, count = masked.mean(jnp.square(centred), weights)
  variance = masked.divide(squares, jnp.maximum(count - 1.0, 0.0))
  return _masked_by_signal(centred * jax.lax.rsqrt(variance + epsilon), rewards, scorable)


def reinforce_pp(rewards: jax.Array, weights: jax.Array) -> jax.Array:
  """Computes the return of every token, whitened over all tokens of the batch: REINFORCE++.

  Hu et al. 2025, eq. 8 to 10, gamma 1; verl's reinforce_plus_plus agrees. Couples all completions:
  pass the whole step. Exactly 0 where all returns are equal.

  Args:
    rewards: float32[B, T], from `at_last_token`, minus a coefficient times `policy.kl_rewards`.
    weights: float32[B, T].

  Returns:
    float32[B, T], 0 where weights are 0.
  """
  return masked.whiten(returns_to_go(rewards, weights), weights)


def at_last_token(scores: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns float32[B, T]: the score float32[B] of each completion at its last token that has a
  weight, 0 elsewhere and for completions without one.

  The place is found by position, never by token id: TRL's PPO trainer puts the score on the first
  padding token (issue 3750).
  """
  at = jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
  last = jnp.where(weights != 0, at, -1).max(-1, keepdims=True)
  return jnp.where((at == last) & (weights != 0), scores[:, None], 0.0)


def returns_to_go(rewards: jax.Array, weights: jax.Array, gamma: float = 1.0) -> jax.Array:
  """Computes float32[B, T]: R_t = r_t + gamma R_t', t' the next token with a weight; 0 where
  weights are 0.

  Args:
    rewards: float32[B, T].
    weights: float32[B, T]; tokens without a weight are not discounted.
    gamma: discount per token.
  """
  return gae(rewards, jnp.zeros_like(rewards), weights, gamma=gamma, lam=1.0)[0]


def gae(
  rewards: jax.Array, values: jax.Array, weights: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
  """Computes generalized advantage estimates over the tokens that have a weight.

  A_t = d_t + gamma lam A_t', d_t = r_t + gamma V_t' - V_t, with t' the next token with a weight
  (tool output in between is skipped) and A = V = 0 after the last. Schulman et al. 2016, eq.
  16. Not whitened: see `masked.whiten`. TRL's PPO trainer agrees where the tokens are contiguous.

  Args:
    rewards: float32[B, T].
    values: float32[B, T], V of the state before each token.
    weights: float32[B, T], 1 or 0.
    gamma, lam: per token.

  Returns:
    (advantages float32[B, T], returns = advantages + values float32[B, T]), both 0 where weights
    are 0.
  """
  rewards, values = masked.keep(rewards, weights), masked.keep(values, weights)

  def body(carry, token):
    next_advantage, next_value = carry
    reward, value, counts = token
    delta = reward + gamma * next_value - value
    advantage = delta + gamma * lam * next_advantage
    carry = (
      jnp.where(counts, advantage, next_advantage),
      jnp.where(counts, value, next_value),
    )
    return carry, jnp.where(counts, advantage, 0.0)

  end = jnp.zeros_like(values.sum(-1))
  tokens = (rewards.T, values.T, (weights != 0).T)
  _, advantages = jax.lax.scan(body, (end, end), tokens, reverse=True)
  advantages = advantages.T
  return jax.lax.stop_gradient((advantages, advantages + values))


def overlong_penalty(lengths: jax.Array, max_len: int, cache_len: int) -> jax.Array:
  """Returns float32[B], a penalty to add to the reward: 0 up to max_len - cache_len tokens, then
  linearly down to -1 at max_len, and -1 beyond.

  DAPO, Yu et al. 2025, eq. 13; TRL's get_soft_overlong_punishment agrees.

  Args:
    lengths: int32[B], tokens of each completion.
    max_len: tokens from which on the penalty is -1.
    cache_len: tokens over which it grows.

  Raises:
    ValueError: unless 0 < cache_len <= max_len.
  """
  if not 0 < cache_len <= max_len:
    raise ValueError(
      f'cache_len is {cache_len} and max_len {max_len}; the penalty grows over the last cache_len '
      'of max_len tokens, so 0 < cache_len <= max_len'
    )
  free = max_len - cache_len
  return -jnp.clip((lengths.astype(jnp.float32) - free) / cache_len, 0.0, 1.0)
