"""What the policy-gradient algorithms share: the loss of sampled tokens by `policy` of the config,
and the penalties of a completion for its length and its divergence from the reference.

The formulas are in losses/policy.py and losses/mismatch.py."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ftjax.config import algorithms
from ftjax.losses import advantages, masked, mismatch, policy
from ftjax.rl.batch_builder import BatchBuilder
from ftjax.rl.rollout_batch import RolloutBatch
from ftjax.training.step import SIGNAL

log = logging.getLogger(__name__)


def objective(c: ml_collections.ConfigDict) -> policy.PolicyLossConfig:
  """Returns the settings of a config's loss."""
  p, in_loss = c.policy, c.policy.kl != 'reward'
  return policy.PolicyLossConfig(
    surrogate=p.surrogate,
    level=p.level,
    clip_low=p.clip_low,
    clip_high=p.clip_high,
    dual_clip=p.dual_clip,
    kl=p.kl if in_loss else 'k3',
    kl_coef=p.kl_coef if in_loss else 0.0,
    entropy_coef=p.entropy_coef,
    aggregate=p.aggregate,
    constant=c.rollout.max_tokens,
  )


Loss = Callable[
  [jax.Array, jax.Array, dict[str, jax.Array]],
  tuple[jax.Array, jax.Array, dict[str, masked.Pair]],
]


def make_loss(c: ml_collections.ConfigDict) -> Loss:
  """Returns loss(log-probs float32[B, T], entropies float32[B, T], batch) -> (total, weight,
  metrics).

  For the first update on a rollout the old log-probs are this pass's own: the ratio is 1, whatever
  the sampler's rounding. With more updates they are in the batch.

  A loss of advantages alone, without divergence and entropy, gives the metric SIGNAL of
  training/step.py.
  """
  goal, how = objective(c), c.policy.correction
  is_of_advantages = not (goal.entropy_coef or goal.kl_coef)
  bounds = dict(low=c.policy.correction_low, high=c.policy.correction_high)

  def loss(logp, entropy, batch):
    weights = batch['weights']
    old_logp = batch.get('old_logp', jax.lax.stop_gradient(logp))
    correction, more = mismatch.correct(
      old_logp,
      batch['sampler_logp'],
      weights,
      how='token_truncate' if how == 'none' else how,
      **bounds,
    )
    if how == 'none':  # measured all the same
      correction = jnp.ones_like(correction)
      more = {k: more[k] for k in ('mismatch/abs_diff', 'mismatch/kl')}
    rollout = policy.Rollout(
      logp=logp,
      old_logp=old_logp,
      ref_logp=batch.get('ref_logp', jnp.zeros_like(logp)),
      entropy=entropy,
      correction=correction,
      advantages=batch['advantages'],
      weights=weights,
    )
    coefficient = batch['kl_coef'][:, None] if 'kl_coef' in batch else None
    total, weight, metrics = policy.loss(rollout, goal, coefficient)
    counted = jax.lax.stop_gradient(entropy).sum(), (weights != 0).sum().astype(jnp.float32)
    if is_of_advantages:
      more[SIGNAL] = signal(batch)
    return total, weight, metrics | more | {'entropy': counted}

  return loss


def signal(batch: dict[str, jax.Array], value_gap: jax.Array | None = None) -> masked.Pair:
  """Returns the metric SIGNAL of a micro-batch; value_gap: see policy.has_signal."""
  found = policy.has_signal(batch['weights'], batch['advantages'], value_gap)
  return found.astype(jnp.float32), jnp.float32(1)


class AdvantageEstimator(BatchBuilder):
  """Computes penalties, and adapts the coefficient of the divergence where there is a target."""

  def __init__(self, c: ml_collections.ConfigDict):
    self._config, p = c, c.policy
    self._coef, self._has_reference = p.kl_coef, bool(algorithms.auxiliary(c, 'reference'))
    self._steer = policy.AdaptiveKL(p.kl_target, p.kl_gain) if p.kl_target else None
    self._cost = jax.jit(policy.kl_rewards)

  def saved(self) -> dict[str, Any]:
    """See BatchBuilder."""
    begun = self._config.policy.kl_coef
    return {'kl_coef': self._coef, 'kl_begun': begun} if self._steer else {}

  def restore(self, saved: Mapping[str, Any]) -> None:
    """See BatchBuilder."""
    begun = self._config.policy.kl_coef
    if self._steer and saved.get('kl_begun', begun) == begun:
      self._coef = saved.get('kl_coef', begun)
    elif self._steer:
      log.warning(
        'the coefficient of the divergence starts again at policy.kl_coef=%g; it had started at '
        '%g, and was %g',
        *(begun, saved['kl_begun'], saved['kl_coef']),
      )

  def penalized(
    self, s: RolloutBatch, device_weights: jax.Array
  ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, float]]:
    """Returns (rewards with the penalty for length float32[R], penalty of each token for its
    divergence from the reference float32[R, T], arrays of the batch, metrics).

    device_weights: the weights of the rollout, float32[R, T], on the devices.
    """
    c, p, rewards, metrics = self._config, self._config.policy, s.rewards, {}
    weights, fields = s.arrays['weights'], {}
    if p.overlong:
      overlong = advantages.overlong_penalty(s.lengths, c.rollout.max_tokens, p.overlong)
      overlong = np.asarray(overlong)
      rewards = rewards + overlong
      metrics['overlong'] = float(np.mean(overlong))
    penalty = np.zeros_like(weights)
    if not self._has_reference:
      return rewards, penalty, fields, metrics
    a = s.arrays
    ours = a['old_logp'] if 'old_logp' in a else a['sampler_logp']
    gap = np.asarray(self._cost(ours, a['ref_logp'], device_weights))
    kl = float(gap.sum() / weights.sum())
    metrics |= {'kl': kl, 'kl_coef': self._coef}
    if p.kl == 'reward':
      penalty = np.float32(self._coef) * gap
    elif self._steer:
      fields['kl_coef'] = np.full(len(weights), self._coef, np.float32)
    if self._steer:
      self._coef = self._steer.update(self._coef, kl)
    return rewards, penalty, fields, metrics
