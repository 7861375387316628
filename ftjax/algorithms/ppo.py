"""PPO: the losses of policy and value model, and advantages by generalized advantage estimation.

The value model has the policy's architecture with a score for a head. Its parameters are under
`value/` of the same state, and the same optimizer step trains them. Completions, rewards and
resuming between updates are in rl/rollout_source.py, the policy's loss in policy_gradient.py, the
formulas in losses/policy.py and losses/advantages.py."""

import functools

import jax
import jax.numpy as jnp
import ml_collections

from ftjax.algorithms import policy_gradient
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.losses import advantages, masked, policy
from ftjax.models.forward import Forward
from ftjax.rl.batch_builder import TrainBatch
from ftjax.rl.measurements import Measure
from ftjax.rl.rollout_batch import RolloutBatch
from ftjax.rl.rollout_source import RolloutSource
from ftjax.training.step import SIGNAL, LossFn


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns loss(params, batch, keys) -> (total, weight, metrics); a row has one completion. The
  total is the policy's loss + ppo.value_coef times that of the value model, both per token.
  """
  temperature, of_tokens = c.rollout.temperature, policy_gradient.make_loss(c)
  value_forward = forward.with_score()
  clip, coefficient = c.ppo.value_clip, c.ppo.value_coef

  def loss(params, batch, keys):
    del keys
    total, weight, metrics = of_tokens(
      *forward.logprobs_and_entropy(params, batch, temperature), batch
    )
    values = value_forward.token_scores(value_forward.find_params(params, 'value'), batch)
    value_total, _, more = policy.value_loss(
      values, batch['old_values'], batch['returns'], batch['weights'], clip
    )
    if SIGNAL in metrics:  # values have to learn where every advantage is 0, too
      gap = batch['returns'] - batch['old_values']
      more[SIGNAL] = policy_gradient.signal(batch, gap)
    return total + coefficient * value_total, weight, metrics | more

  return loss


def make_measure(forward: Forward) -> Measure:
  """Returns (params, batch) -> the value of every token, float32[B, T]."""
  forward = forward.with_score().without_remat()
  return lambda params, batch: forward.token_scores(forward.find_params(params, 'value'), batch)


class ValueAdvantages(policy_gradient.AdvantageEstimator):
  """Computes advantage and return of every token by generalized advantage estimation."""

  def __init__(self, c: ml_collections.ConfigDict):
    super().__init__(c)
    self._whitens = c.ppo.whiten
    self._last = jax.jit(advantages.at_last_token)
    self._gae = jax.jit(functools.partial(advantages.gae, gamma=c.ppo.gamma, lam=c.ppo.lam))
    self._whiten = jax.jit(masked.whiten)

  def build(self, sampled: RolloutBatch) -> TrainBatch:
    """See BatchBuilder."""
    a, weights = sampled.arrays, sampled.arrays['weights']
    on_device = jnp.asarray(weights)
    rewards, penalty, fields, metrics = self.penalized(sampled, on_device)
    by_token = self._last(rewards, on_device) - penalty
    found, returns = self._gae(by_token, a['old_values'], on_device)
    if self._whitens:
      found = self._whiten(found, on_device)
    found, returns = jax.device_get((found, returns))
    counts = weights > 0
    variance = float(returns[counts].var())
    unexplained = float((returns - a['old_values'])[counts].var())
    metrics |= {
      'value': float(a['old_values'][counts].mean()),
      'return': float(returns[counts].mean()),
      'explained_variance': 1 - unexplained / variance if variance else 0.0,
    }
    return TrainBatch(a | fields | {'advantages': found, 'returns': returns}, metrics)


def build(run: Run) -> fit.Parts:
  """Returns loss, evaluation, source and alarm of a run."""
  c = run.config
  source = RolloutSource(run, ValueAdvantages(c), {'old_values': make_measure(run.forward)})
  return fit.Parts(make_loss(run.forward, c), source.evaluate, source, source.watch)
