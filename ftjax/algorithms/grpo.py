"""GRPO and its variants: the loss of a batch, and advantages by groups of completions.

One loss with settings: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++ are rows of the table
in docs/rollout_tuning.md. Completions, rewards and resuming between updates are in
rl/rollout_source.py, the loss of tokens in policy_gradient.py, advantages in
losses/advantages.py."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ftjax.algorithms import policy_gradient
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.losses import advantages
from ftjax.models.forward import Forward
from ftjax.rl.batch_builder import TrainBatch
from ftjax.rl.rollout_batch import RolloutBatch
from ftjax.rl.rollout_source import RolloutSource
from ftjax.training.step import LossFn

RELATIVE = {
  'grpo': advantages.grpo,
  'dr_grpo': advantages.dr_grpo,
  'rloo': advantages.rloo,
  'reinforce_pp_baseline': advantages.reinforce_pp_baseline,
}


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns loss(params, batch, keys) -> (total, weight, metrics); a row has one completion."""
  temperature, of_tokens = c.rollout.temperature, policy_gradient.make_loss(c)

  def loss(params, batch, keys):
    del keys
    return of_tokens(*forward.logprobs_and_entropy(params, batch, temperature), batch)

  return loss


class GroupAdvantages(policy_gradient.AdvantageEstimator):
  """Computes every token's advantage by `grpo.advantage`; zero-variance groups get weight 0."""

  def __init__(self, c: ml_collections.ConfigDict):
    super().__init__(c)
    self._name = c.grpo.advantage
    self._last = jax.jit(advantages.at_last_token)
    self._whitened = jax.jit(advantages.reinforce_pp)
    self._relative = jax.jit(RELATIVE.get(self._name, advantages.dr_grpo))

  def build(self, sampled: RolloutBatch) -> TrainBatch:
    """See BatchBuilder."""
    s, weights = sampled, sampled.arrays['weights']
    on_device = jnp.asarray(weights)
    rewards, penalty, fields, metrics = self.penalized(s, on_device)
    if self._name == 'reinforce_pp':
      out = self._whitened(self._last(rewards, on_device) - penalty, on_device)
      return TrainBatch(s.arrays | fields | {'advantages': np.asarray(out)}, metrics)
    # A difference in divergence alone, which every group has, is no signal.
    groups = rewards.reshape(-1, s.group)
    has_signal = np.repeat(groups.min(1) != groups.max(1), s.group)[:, None]
    groups = groups - penalty.sum(-1).reshape(groups.shape)
    found = self._relative(groups, np.ones(groups.shape, bool))
    out = np.asarray(found.advantages).reshape(-1, 1) * weights * has_signal
    fields |= {'advantages': out, 'weights': weights * has_signal}
    return TrainBatch(s.arrays | fields, metrics)


def build(run: Run) -> fit.Parts:
  """Returns loss, evaluation, source and alarm of a run."""
  c = run.config
  source = RolloutSource(run, GroupAdvantages(c))
  return fit.Parts(make_loss(run.forward, c), source.evaluate, source, source.watch)
