"""PPO, top to bottom: completions -> rewards -> values -> advantages -> losses -> step -> run.

A value model, the policy's architecture with a score for a head, is trained beside the policy: its
parameters stand under `value/` of the same state, in the same optimizer step. Completions, rewards
and resuming between updates are episodes.py's; the policy's loss is policy_gradient.py's, the
value's is in losses/policy.py, advantages are in losses/advantages.py."""

import functools

import jax
import ml_collections
import numpy as np

from ftjax.algorithms import policy_gradient
from ftjax.experiment import fit
from ftjax.experiment import run as experiment
from ftjax.losses import advantages, masked, policy
from ftjax.models.forward import Forward
from ftjax.rl import rollout_source
from ftjax.rl.rollout_source import RolloutBatch, TrainBatch
from ftjax.training.step import SIGNAL, LossFn


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """loss(params, batch, keys) -> (total, weight, metrics) of rows of one completion each: the
  policy's loss + ppo.value_coef times the value's, both per token.
  """
  temperature, of_tokens = c.rollout.temperature, policy_gradient.make_loss(c)
  value_forward = forward.with_score()
  clip, coefficient = c.ppo.value_clip, c.ppo.value_coef

  def loss(params, batch, keys):
    del keys
    total, weight, metrics = of_tokens(
      *forward.logprobs_and_entropy(params, batch, temperature), batch
    )
    values = value_forward.token_scores(params['value'], batch)
    value_total, _, more = policy.value_loss(
      values, batch['old_values'], batch['returns'], batch['weights'], clip
    )
    if SIGNAL in metrics:  # values have to learn where every advantage is 0, too
      gap = batch['returns'] - batch['old_values']
      more[SIGNAL] = policy_gradient.signal(batch, gap)
    return total + coefficient * value_total, weight, metrics | more

  return loss


def make_measure(forward: Forward) -> rollout_source.Measure:
  """Values of the state as it is when a rollout is made."""
  forward = forward.with_score().without_remat()
  return lambda params, batch: forward.token_scores(params['value'], batch)


class ValueAdvantages(policy_gradient.AdvantageEstimator):
  """Advantages and returns of every token by generalized advantage estimation."""

  def __init__(self, c: ml_collections.ConfigDict):
    super().__init__(c)
    self._whitens = c.ppo.whiten
    self._last = jax.jit(advantages.at_last_token)
    self._gae = jax.jit(functools.partial(advantages.gae, gamma=c.ppo.gamma, lam=c.ppo.lam))
    self._whiten = jax.jit(masked.whiten)

  def build(self, sampled: RolloutBatch) -> TrainBatch:
    """See episodes.BatchBuilder."""
    a, weights = sampled.arrays, sampled.arrays['weights']
    rewards, paid, fields, metrics = self.charged(sampled)
    earned = np.asarray(self._last(rewards, weights)) - paid
    found, returns = map(np.asarray, self._gae(earned, a['old_values'], weights))
    counts = weights > 0
    spread = float(returns[counts].var())
    unexplained = float((returns - a['old_values'])[counts].var())
    metrics |= {
      'value': float(a['old_values'][counts].mean()),
      'return': float(returns[counts].mean()),
      'explained_variance': 1 - unexplained / spread if spread else 0.0,
    }
    if self._whitens:
      found = np.asarray(self._whiten(found, weights))
    return TrainBatch(a | fields | {'advantages': found, 'returns': returns}, metrics)


def run(c: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs a config to its end: train, export the policy, compare with the base."""
  r = experiment.start(c, workdir)
  measures = {'old_values': make_measure(r.forward)}
  with rollout_source.RolloutSource(r, ValueAdvantages(c), measures) as source:
    fit.fit(r, make_loss(r.forward, c), source.evaluate, source.watch, source)
