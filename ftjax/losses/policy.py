"""Losses of reinforcement learning on sampled tokens: surrogates, aggregation, KL divergence from
the reference, value loss. The correction for the sampler's log-probs is in `mismatch.py`.

Axes: B completions, T tokens. `weights` float32[B, T] is 1 for the tokens that the policy sampled,
0 for prompt, padding and tool output; completions of zero-variance groups (see `advantages.py`)
have weight 0 too, so that they do not lower the mean. All functions are jnp, elementwise and
reductions, and run under jit on arrays sharded over B. Log-probs are in nats.

A loss is returned as (total, weight) of its micro-batch. The loss of the step is the sum of totals
over all micro-batches and devices, divided once by the sum of weights.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.losses import masked

# Log ratios are clamped to this before exp: float32 overflows at 88, and a ratio of e^20 is beyond
# every clip. (verl clamps at the same value.)
_MAX_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True)
class PolicyLossConfig:
  """Settings of the policy loss.

  surrogate: a name of SURROGATES.
  level: a name of LEVELS: what the ratio is computed over.
  clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. 'cispo' has
    only the upper bound, 1 + clip_high. 'reinforce' reads neither.
  dual_clip: largest ratio with a negative advantage, above 1 + clip_high; 0 means none.
  kl: a name of KL_TERMS; read where kl_coef is not 0.
  kl_coef: coefficient of the KL divergence from the reference, per token.
  entropy_coef: coefficient of the entropy bonus, per token.
  aggregate: a name of AGGREGATIONS.
  constant: tokens by which a completion is divided for aggregate 'constant', such as the longest
    completion allowed; the other aggregations do not read it.
  """

  surrogate: str = 'clip'
  level: str = 'token'
  clip_low: float = 0.2
  clip_high: float = 0.2
  dual_clip: float = 0.0
  kl: str = 'k3_is'
  kl_coef: float = 0.0
  entropy_coef: float = 0.0
  aggregate: str = 'token'
  constant: int = 0

  def __post_init__(self):
    tables = dict(surrogate=SURROGATES, level=LEVELS, kl=KL_TERMS, aggregate=AGGREGATIONS)
    for field, table in tables.items():
      if getattr(self, field) not in table:
        raise ValueError(f'{field} is {getattr(self, field)!r}; it must be one of {sorted(table)}')
    if self.dual_clip and self.dual_clip <= 1 + self.clip_high:
      raise ValueError(
        f'dual_clip is {self.dual_clip}; it must be above 1 + clip_high = {1 + self.clip_high}, '
        'or 0 for none'
      )
    if self.aggregate == 'constant' and self.constant < 1:
      raise ValueError(
        f"constant is {self.constant}; aggregate 'constant' divides by it: give the tokens of the "
        'longest completion'
      )


class Rollout(NamedTuple):
  """Inputs of the policy loss; all float32[B, T] except `advantages`, which may be float32[B, 1].

  logp: of the policy in training, with gradient. old_logp: of the policy in the ratio's
  denominator; stop_gradient(logp) for the first update after sampling. ref_logp: zeros if kl_coef
  is 0. entropy:
  of the next token's distribution, with gradient; zeros if entropy_coef is 0. correction: of
  `mismatch.correct`; ones without. advantages: constants, per completion or per token.
  """

  logp: jax.Array
  old_logp: jax.Array
  ref_logp: jax.Array
  entropy: jax.Array
  correction: jax.Array
  advantages: jax.Array
  weights: jax.Array


# What the ratio pi / pi_old is computed over.


def _token_level(log_ratio: jax.Array, weights: jax.Array) -> jax.Array:
  return log_ratio


def _sequence_level(log_ratio: jax.Array, weights: jax.Array) -> jax.Array:
  return jnp.zeros_like(log_ratio) + masked.row_means(log_ratio, weights)[0][:, None]


def _trajectory_level(log_ratio: jax.Array, weights: jax.Array) -> jax.Array:
  return jnp.zeros_like(log_ratio) + (log_ratio * weights).sum(-1, keepdims=True)


# (log ratio float32[B, T], weights float32[B, T]) -> log ratio float32[B, T].
LEVELS = {
  # PPO, Schulman et al. 2017, eq. 6; GRPO, Shao et al. 2024, eq. 3. TRL's 'token'.
  'token': _token_level,
  # GSPO, Zheng et al. 2025, eq. 7: geometric mean over the completion. TRL's 'sequence'.
  'sequence': _sequence_level,
  # Product over the completion, as in TRL's RLOO trainer.
  'trajectory': _trajectory_level,
}


# Surrogates: (ratio, log-probs, advantages, objective) -> loss per token.


def _clip(
  ratio: jax.Array, logp: jax.Array, advantages: jax.Array, objective: PolicyLossConfig
) -> jax.Array:
  clipped = jnp.clip(ratio, 1 - objective.clip_low, 1 + objective.clip_high)
  gain = jnp.minimum(ratio * advantages, clipped * advantages)
  if objective.dual_clip:
    gain = jnp.where(advantages < 0, jnp.maximum(gain, objective.dual_clip * advantages), gain)
  return -gain


def _cispo(
  ratio: jax.Array, logp: jax.Array, advantages: jax.Array, objective: PolicyLossConfig
) -> jax.Array:
  bounded = jnp.minimum(ratio, 1 + objective.clip_high)
  return -jax.lax.stop_gradient(bounded) * advantages * logp


def _reinforce(
  ratio: jax.Array, logp: jax.Array, advantages: jax.Array, objective: PolicyLossConfig
) -> jax.Array:
  return -advantages * logp


SURROGATES = {
  # -min(r A, clip(r) A): PPO, Schulman et al. 2017, eq. 7, with DAPO's two bounds (Yu et al. 2025,
  # eq. 10) and, for A < 0, the bound dual_clip * A (Ye et al. 2020, eq. 5). TRL's 'grpo', 'bnpo',
  # 'dr_grpo' and 'dapo' agree; its delta (INTELLECT-2) is dual_clip.
  'clip': _clip,
  # -stop_gradient(min(r, 1 + clip_high)) A log pi: CISPO, MiniMax 2025, eq. 4 without its lower
  # bound, as the paper ran it. TRL's 'cispo' agrees; its epsilon_high is 1 + clip_high.
  'cispo': _cispo,
  # -A log pi: REINFORCE, Williams 1992; on-policy only. Its gradient is that of 'clip' at r = 1.
  'reinforce': _reinforce,
}


def k2(log_ratio: jax.Array) -> jax.Array:
  """Computes (log pi - log pi_ref)^2 / 2: a biased estimate of KL(pi || pi_ref), but on-policy the
  mean of its gradient is exactly that of KL(pi || pi_ref)."""
  return 0.5 * jnp.square(log_ratio)


def k3(log_ratio: jax.Array) -> jax.Array:
  """Computes u - 1 - log u with u = pi_ref / pi: unbiased, never negative, 0 at u = 1.

  On-policy the mean of its gradient is that of the *other* divergence, KL(pi_ref || pi). Its bias
  as a gradient of KL(pi || pi_ref) is therefore exactly grad KL(pi_ref || pi) - grad KL(pi ||
  pi_ref): of first order in log pi - log pi_ref relative to the gradient, so it vanishes near the
  reference; 28.2 % for the two distributions of test_policy.py (TRL PR 6503 reports 21 % for its
  own).
  GRPO, Shao et al. 2024, eq. 4.
  """
  x = jnp.minimum(-log_ratio, _MAX_LOG_RATIO)
  return jnp.expm1(x) - x


# (log pi - log pi_ref, log pi - log pi_old, both float32[B, T]) -> float32[B, T]. John Schulman,
# 'Approximating KL divergence', 2020.
KL_TERMS = {
  # Unbiased gradient on-policy.
  'k2': lambda to_ref, to_old: k2(to_ref),
  # Biased gradient, see k3. TRL with use_bias_correction_kl=False.
  'k3': lambda to_ref, to_old: k3(to_ref),
  # Unbiased number and gradient, on-policy and off: the mean over pi_old's samples of
  # (pi / pi_old) k3 is KL(pi || pi_ref). DeepSeek-V3.2 2025, section 3.1; TRL PR 6503.
  'k3_is': lambda to_ref, to_old: jnp.exp(to_old) * k3(to_ref),
}


def kl_rewards(old_logp: jax.Array, ref_logp: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns float32[B, T]: log pi - log pi_ref per token (the k1 estimate of the KL divergence), to
  be subtracted from the reward with a coefficient; 0 where weights are 0. It has no gradient.

  With REINFORCE on returns of -k1 the gradient is that of -KL(pi || pi_ref), without bias. Ziegler
  et al. 2019, eq. 2; TRL's PPO ('k1') per token, its RLOO per completion.
  """
  k = masked.keep(old_logp, weights) - masked.keep(ref_logp, weights)
  return jax.lax.stop_gradient(k)


def _token_mean(x: jax.Array, weights: jax.Array, constant: int) -> masked.Pair:
  return masked.mean(x, weights)


def _sequence_mean(x: jax.Array, weights: jax.Array, constant: int) -> masked.Pair:
  return masked.mean(*masked.row_means(x, weights))


def _constant_mean(x: jax.Array, weights: jax.Array, constant: int) -> masked.Pair:
  rows = masked.row_means(x, weights)[1].sum()
  return masked.mean(x, weights)[0], rows * constant


# (x float32[B, T], weights float32[B, T], constant) -> (total float32[], weight float32[]).
AGGREGATIONS = {
  # Sum over all tokens / number of tokens: DAPO, Yu et al. 2025, eq. 8. TRL's 'dapo' and 'cispo'
  # over a step; its 'bnpo' does so in each micro-batch separately.
  'token': _token_mean,
  # Mean over completions of their means: GRPO, Shao et al. 2024, eq. 3. TRL's 'grpo'. The weight
  # is the number of completions with a token.
  'sequence': _sequence_mean,
  # Sum over all tokens / (completions x constant): Dr. GRPO, Liu et al. 2025. TRL's 'dr_grpo', with
  # max_completion_length. The weight is completions x constant.
  'constant': _constant_mean,
}


def loss(
  rollout: Rollout, objective: PolicyLossConfig, kl_coef: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, dict[str, masked.Pair]]:
  """Computes the policy loss of a micro-batch: surrogate times correction, + kl_coef KL -
  entropy_coef entropy.

  All terms are aggregated in the same way, so that one weight divides them. (TRL always takes the
  entropy's mean over tokens; with 'token' that is the same.) The correction multiplies only the
  surrogate, as in TRL. With level 'sequence' the KL term's ratio is that of the sequence, as in
  TRL.

  Args:
    rollout: arrays of B completions.
    objective: what to compute.
    kl_coef: replaces the objective's where that is not 0: float32[B, 1] or float32[].

  Returns:
    (total float32[], weight float32[], {metric: (total, weight)}). Metrics, means over tokens:
    ratio, clip/low and clip/high (share of tokens where the bound clips the surrogate),
    approx_kl (k3 of the policy from the old one), and kl and entropy if they have a coefficient.
  """
  r, weights = rollout, rollout.weights
  logp, old_logp = masked.keep(r.logp, weights), masked.keep(r.old_logp, weights)
  advantages = jnp.zeros_like(old_logp) + jax.lax.stop_gradient(r.advantages)
  advantages = masked.keep(advantages, weights)
  to_old = logp - jax.lax.stop_gradient(old_logp)
  log_ratio = jnp.minimum(LEVELS[objective.level](to_old, weights), _MAX_LOG_RATIO)
  ratio = jnp.exp(log_ratio)
  losses = SURROGATES[objective.surrogate](ratio, logp, advantages, objective)
  losses = losses * jax.lax.stop_gradient(masked.keep(r.correction, weights))
  metrics = _ratio_metrics(ratio, to_old, advantages, weights, objective)
  if objective.kl_coef:
    ref_logp = jax.lax.stop_gradient(masked.keep(r.ref_logp, weights))
    kl = KL_TERMS[objective.kl](logp - ref_logp, log_ratio)
    losses = losses + (objective.kl_coef if kl_coef is None else kl_coef) * kl
    metrics['kl'] = masked.mean(jax.lax.stop_gradient(kl), weights)
  if objective.entropy_coef:
    entropy = masked.keep(r.entropy, weights)
    losses = losses - objective.entropy_coef * entropy
    metrics['entropy'] = masked.mean(jax.lax.stop_gradient(entropy), weights)
  total, weight = AGGREGATIONS[objective.aggregate](losses, weights, objective.constant)
  return total, weight, metrics


def _ratio_metrics(
  ratio: jax.Array,
  to_old: jax.Array,
  advantages: jax.Array,
  weights: jax.Array,
  objective: PolicyLossConfig,
) -> dict[str, masked.Pair]:
  ratio, to_old = jax.lax.stop_gradient((ratio, to_old))
  low = (ratio < 1 - objective.clip_low) & (advantages < 0)
  high = (ratio > 1 + objective.clip_high) & (advantages > 0)
  return {
    'ratio': masked.mean(ratio, weights),
    'clip/low': masked.mean(low.astype(jnp.float32), weights),
    'clip/high': masked.mean(high.astype(jnp.float32), weights),
    'approx_kl': masked.mean(k3(-to_old), weights),
  }


def value_loss(
  values: jax.Array, old_values: jax.Array, returns: jax.Array, weights: jax.Array, clip: float
) -> tuple[jax.Array, jax.Array, dict[str, masked.Pair]]:
  """Computes the loss of a value model: max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2)
  / 2.

  PPO's code, Schulman et al. 2017 (the paper has the plain square); TRL's PPO trainer agrees.

  Args:
    values: float32[B, T], with gradient.
    old_values: float32[B, T], of the value model at sampling.
    returns: float32[B, T], from `advantages.gae`.
    weights: float32[B, T].
    clip: how far values may move per rollout before the gradient stops; 0 means no clipping.

  Returns:
    (total float32[], weight float32[] = tokens, {metric: (total, weight)}).
  """
  values, old_values = masked.keep(values, weights), masked.keep(old_values, weights)
  returns = jax.lax.stop_gradient(masked.keep(returns, weights))
  plain = jnp.square(values - returns)
  losses, held = plain, jnp.zeros_like(plain)
  if clip:
    old_values = jax.lax.stop_gradient(old_values)
    clipped = jnp.square(old_values + jnp.clip(values - old_values, -clip, clip) - returns)
    losses = jnp.maximum(plain, clipped)
    held = jax.lax.stop_gradient(clipped > plain).astype(jnp.float32)
  metrics = {
    'value_error': masked.mean(jax.lax.stop_gradient(plain), weights),
    'value_clip': masked.mean(held, weights),
  }
  return *masked.mean(0.5 * losses, weights), metrics


def has_signal(
  weights: jax.Array, advantages: jax.Array, value_gap: jax.Array | None = None
) -> jax.Array:
  """Returns bool[]: whether a loss without KL and entropy terms can depend on the parameters.

  It is constant where every advantage is exactly 0 and, with a value model, every value equals its
  return.

  Args:
    weights, advantages: of all micro-batches of a step, of one shape.
    value_gap: returns - values at sampling, of the same shape; None without a value model.
  """
  found = advantages != 0
  if value_gap is not None:
    found = found | (value_gap != 0)
  return (found & (weights != 0)).any()


@dataclasses.dataclass(frozen=True)
class AdaptiveKL:
  """Adapts the coefficient of the KL divergence to a target. Host side, Python floats.

  e = clip(kl / target - 1, -0.2, 0.2); coef <- coef (1 + gain e), once per rollout. Ziegler et al.
  2019, section 2.2, with gain 0.1 (their code: steps per update / horizon). The coefficient is
  state: the caller saves it with the checkpoint.
  """

  target: float  # nats, the same kind of mean as the measured `kl`
  gain: float = 0.1

  def update(self, coef: float, kl: float) -> float:
    """Returns the coefficient after a rollout whose measured KL divergence was `kl` nats."""
    error = min(max(kl / self.target - 1.0, -0.2), 0.2)
    return coef * (1.0 + self.gain * error)
