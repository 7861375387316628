"""Online DPO, top to bottom: completions -> rewards -> the best and the worst of each prompt -> a
preference loss -> step -> run (Guo et al. 2024, with a reward in place of a judge).

The losses are those of dpo.py, by `dpo` of the config; completions, rewards and resuming are
episodes.py's."""

import ml_collections
import numpy as np

from ftjax.algorithms import preference
from ftjax.data import batches
from ftjax.experiment import fit
from ftjax.experiment import run as experiment
from ftjax.rl import rollout_source
from ftjax.rl.rollout_batch import side
from ftjax.rl.rollout_source import RolloutBatch, TrainBatch

make_loss = preference.make_loss


class PairBuilder(rollout_source.BatchBuilder):
  """A row of two segments for each prompt; prompts whose completions all earned the same are rows
  of padding, and of equal rewards the earlier completion counts."""

  def __init__(self, c: ml_collections.ConfigDict):
    self._seq_len = c.seq_len

  def build(self, sampled: RolloutBatch) -> TrainBatch:
    """See episodes.BatchBuilder."""
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


def run(c: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs a config to its end: train, export, compare with the base."""
  r = experiment.start(c, workdir)
  with rollout_source.RolloutSource(r, PairBuilder(c)) as source:
    loss, alarm = make_loss(r.forward, c), preference.Alarm(c)
    fit.fit(r, loss, source.evaluate, alarm, source)
