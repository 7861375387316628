"""Online DPO: the best and the worst completion of each prompt as a pair (Guo et al. 2024, with
rewards in place of preference labels by a model).

The losses are those of dpo.py, by `dpo` of the config; completions, rewards and resuming are in
rl/rollout_source.py."""

import ml_collections
import numpy as np

from ftjax.algorithms import preference
from ftjax.data import batches
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.rl.batch_builder import BatchBuilder, TrainBatch
from ftjax.rl.rollout_batch import RolloutBatch, side
from ftjax.rl.rollout_source import RolloutSource

make_loss = preference.make_loss


class PairBuilder(BatchBuilder):
  """Makes a row of two segments for each prompt. Zero-variance groups are rows of padding; among
  equal rewards the earlier completion counts."""

  def __init__(self, c: ml_collections.ConfigDict):
    self._seq_len = c.seq_len

  def build(self, sampled: RolloutBatch) -> TrainBatch:
    """See BatchBuilder."""
    s, rewards = sampled, sampled.rewards.reshape(-1, sampled.group)
    arrays = batches.empty(len(rewards), self._seq_len, 'pair')
    best, worst = rewards.argmax(1), rewards.argmin(1)
    gap = rewards.max(1) - rewards.min(1)
    for prompt in np.flatnonzero(gap > 0):
      rows = [prompt * s.group + i[prompt] for i in (best, worst)]
      sides = [side(s.prompts[row], s.completions[row]) for row in rows]
      batches.fill_row(arrays, prompt, sides)
    metrics = {'pairs': float((gap > 0).sum()), 'reward_gap': float(gap.mean())}
    return TrainBatch(arrays, metrics)


def build(run: Run) -> fit.Parts:
  """Returns loss, evaluation, source and alarm of a run."""
  c = run.config
  source = RolloutSource(run, PairBuilder(c))
  return fit.Parts(make_loss(run.forward, c), source.evaluate, source, preference.Alarm(c))
