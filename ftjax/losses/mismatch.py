"""Importance weights that correct the mismatch between the log-probs of sampler and trainer.

A fast decoder and the trainer compute different log-probs, because of rounding, kernels or stale
weights. The ratio pi_trainer / pi_sampler, kept within bounds, corrects the expectation. Axes: B
completions, T tokens. All jnp, elementwise and reductions. Once per rollout, before its updates.
"""

import jax
import jax.numpy as jnp

from ftjax.losses import masked
from ftjax.losses.policy import LEVELS, k3

# Sequence ratios are products over all tokens: beyond e^20 they exceed every bound.
_MAX_LOG_RATIO = 20.0


def _truncate(ratio: jax.Array, low: float, high: float) -> jax.Array:
  return jnp.clip(ratio, low, high)


def _mask(ratio: jax.Array, low: float, high: float) -> jax.Array:
  return jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0)


# name -> (a level of policy.LEVELS, what happens beyond the bounds).
CORRECTIONS = {
  # TIS, Yao et al. 2025, 'Your efficient RL framework secretly brings you off-policy RL training'.
  'token_truncate': ('token', _truncate),
  # IcePop, Ling team 2025: tokens beyond the bounds get weight 0.
  'token_mask': ('token', _mask),
  # Sequence-level truncation and masking: Liu et al. 2025, 'When speed kills stability'.
  'sequence_truncate': ('trajectory', _truncate),
  'sequence_mask': ('trajectory', _mask),
}


def correct(
  old_logp: jax.Array,
  sampler_logp: jax.Array,
  weights: jax.Array,
  *,
  how: str,
  low: float,
  high: float,
) -> tuple[jax.Array, dict[str, masked.Pair]]:
  """Computes weights for the surrogate loss of every token, without gradient.

  ratio = exp(old_logp - sampler_logp), of a token or multiplied over the completion, then clipped
  to [low, high] or set to 0 outside. A masked token still counts in the loss's weight: it lowers
  the gradient instead of raising that of the others. TRL agrees in all four
  (vllm_importance_sampling_mode); verl calls them TIS and MIS.

  Args:
    old_logp: float32[B, T], of the trainer before its first update, at the sampler's temperature.
    sampler_logp: float32[B, T], of the sampler.
    weights: float32[B, T].
    how: a name of CORRECTIONS.
    low, high: bounds of the ratio, such as 0 and 2; 0 is no lower bound.

  Returns:
    (float32[B, T], 0 where weights are 0; {metric: (total, weight)}). Metrics, means over tokens:
    mismatch/abs_diff (|old_logp - sampler_logp|, nats), mismatch/kl (k3 estimate of
    KL(sampler || trainer)), mismatch/weight, mismatch/outside (share beyond the bounds).

  Raises:
    ValueError: for bounds that leave out 1.
  """
  if not 0 <= low <= 1 <= high:
    raise ValueError(f'bounds of the importance ratio are [{low}, {high}]; they must hold 1')
  level, bound = CORRECTIONS[how]
  diff = masked.keep(old_logp, weights) - masked.keep(sampler_logp, weights)
  diff = jax.lax.stop_gradient(diff)
  ratio = jnp.exp(jnp.minimum(LEVELS[level](diff, weights), _MAX_LOG_RATIO))
  outside = (ratio < low) | (ratio > high)
  out = masked.keep(bound(ratio, low, high), weights)
  metrics = {
    'mismatch/abs_diff': masked.mean(jnp.abs(diff), weights),
    # Samples are the sampler's, and k3 takes log p - log q of samples of p.
    'mismatch/kl': masked.mean(k3(-diff), weights),
    'mismatch/weight': masked.mean(out, weights),
    'mismatch/outside': masked.mean(outside.astype(jnp.float32), weights),
  }
  return out, metrics
