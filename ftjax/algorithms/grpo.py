"""GRPO and its kin, top to bottom: completions -> rewards -> advantages -> loss -> step -> run.

One loss with settings: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++ are rows of the table
in docs/rollout_tuning.md. Completions, rewards and resuming between updates are episodes.py's; the
loss is policy_gradient.py's, advantages are in losses/advantages.py."""

import jax
import ml_collections
import numpy as np

from ftjax.algorithms import policy_gradient
from ftjax.experiment import fit
from ftjax.experiment import run as experiment
from ftjax.losses import advantages
from ftjax.models.forward import Forward
from ftjax.rl import rollout_source
from ftjax.rl.rollout_source import RolloutBatch, TrainBatch
from ftjax.training.step import LossFn

_RELATIVE = {
  'grpo': advantages.grpo,
  'dr_grpo': advantages.dr_grpo,
  'rloo': advantages.rloo,
  'reinforce_pp_baseline': advantages.reinforce_pp_baseline,
}


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """loss(params, batch, keys) -> (total, weight, metrics) of rows of one completion each."""
  temperature, of_tokens = c.rollout.temperature, policy_gradient.make_loss(c)

  def loss(params, batch, keys):
    del keys
    return of_tokens(*forward.logprobs_and_entropy(params, batch, temperature), batch)

  return loss


class GroupAdvantages(policy_gradient.AdvantageEstimator):
  """Advantages of every token by `grpo.advantage`; zero-variance groups get weight 0."""

  def __init__(self, c: ml_collections.ConfigDict):
    super().__init__(c)
    self._name = c.grpo.advantage
    self._last = jax.jit(advantages.at_last_token)
    self._whitened = jax.jit(advantages.reinforce_pp)
    self._relative = jax.jit(_RELATIVE.get(self._name, advantages.dr_grpo))

  def build(self, sampled: RolloutBatch) -> TrainBatch:
    """See episodes.BatchBuilder."""
    s, weights = sampled, sampled.arrays['weights']
    rewards, paid, fields, metrics = self.charged(s)
    if self._name == 'reinforce_pp':
      out = self._whitened(np.asarray(self._last(rewards, weights)) - paid, weights)
      return TrainBatch(s.arrays | fields | {'advantages': np.asarray(out)}, metrics)
    # A divergence alone, which is never the same twice, is no signal.
    earned = rewards.reshape(-1, s.group)
    has_signal = np.repeat(earned.min(1) != earned.max(1), s.group)[:, None]
    earned = earned - paid.sum(-1).reshape(earned.shape)
    found = self._relative(earned, np.ones(earned.shape, bool))
    out = np.asarray(found.advantages).reshape(-1, 1) * weights * has_signal
    fields |= {'advantages': out, 'weights': weights * has_signal}
    return TrainBatch(s.arrays | fields, metrics)


def run(c: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs a config to its end: train, export, compare with the base."""
  r = experiment.start(c, workdir)
  with rollout_source.RolloutSource(r, GroupAdvantages(c)) as source:
    fit.fit(r, make_loss(r.forward, c), source.evaluate, source.watch, source)
