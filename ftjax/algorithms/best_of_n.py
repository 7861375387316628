"""Best-of-n and rejection sampling: cross-entropy of the completions with the highest rewards,
sampled again and again from the model as it then is.

RAFT (Dong et al. 2023) with best_of_n.keep=1; STaR's filter (Zelikman et al. 2022) with a
min_reward that only correct answers get and keep=rollout.group. Equal completions count once. The
kept ones are written to rollouts/kept-<number>.jsonl, as rows for supervised fine-tuning."""

import ml_collections
import numpy as np

from ftjax.data.tokenizer import Tokenizer
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.experiment.transcript import Transcripts
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models.forward import Forward
from ftjax.rl.batch_builder import BatchBuilder, TrainBatch
from ftjax.rl.rollout_batch import RolloutBatch
from ftjax.rl.rollout_source import RolloutSource
from ftjax.training.step import LossFn

# Columns that the prompt of a row was rendered with, and is again.
_AGAIN = ('tools', 'functions', 'chat_template_kwargs')


def make_loss(forward: Forward, c: ml_collections.ConfigDict) -> LossFn:
  """Returns loss(params, batch, keys) -> (sum of the loss, completion tokens, {'nll': sums})."""
  del c

  def loss(params, batch, keys):
    del keys
    total, nll = forward.cross_entropy(params, batch, LossConfig())
    weight = batch['weights'].sum()
    return total, weight, {'nll': (nll, weight)}

  return loss


def choose(s: RolloutBatch, keep: int, min_reward: float) -> list[list[int]]:
  """Returns the rows of the completions that are kept, for each prompt, highest reward first; among
  equal completions, and among equal rewards, the earlier."""
  out = []
  for first in range(0, len(s.rewards), s.group):
    rows, seen = [], set()
    for row in sorted(range(first, first + s.group), key=lambda i: (-s.rewards[i], i)):
      tokens = tuple(s.completions[row].tokens)
      if s.rewards[row] >= min_reward and tokens not in seen and len(rows) < keep:
        rows.append(row)
        seen.add(tokens)
    out.append(rows)
  return out


class BestCompletions(BatchBuilder):
  """Keeps the best completions of each prompt; rows that are left over are padding."""

  def __init__(self, c: ml_collections.ConfigDict, tokenizer: Tokenizer):
    self._keep, self._min_reward = c.best_of_n.keep, c.best_of_n.min_reward
    self._transcripts = Transcripts(tokenizer, tokenizer.stop_ids)

  def build(self, sampled: RolloutBatch) -> TrainBatch:
    """See BatchBuilder."""
    s, chosen = sampled, choose(sampled, self._keep, self._min_reward)
    places, rows = [], []
    for prompt, best in enumerate(chosen):
      places += range(prompt * self._keep, prompt * self._keep + len(best))
      rows += best
    arrays = {}
    for name, values in s.arrays.items():
      arrays[name] = np.zeros((len(chosen) * self._keep, *values.shape[1:]), values.dtype)
      arrays[name][places] = values[rows]
    metrics = {'kept': len(rows) / len(s.rewards)}
    if rows:
      metrics['kept_reward'] = float(s.rewards[rows].mean())
    whole = (self._row(s, i) for i in rows if not s.completions[i].truncated)
    return TrainBatch(arrays, metrics, [row for row in whole if row])

  def _row(self, s: RolloutBatch, i: int) -> dict:
    """Returns a row for supervised fine-tuning; empty for a blank completion."""
    prompt, text = s.prompts[i].text, self._transcripts.completion(s.completions[i].tokens)
    if not text.strip():
      return {}
    if isinstance(prompt, str):
      row = {'prompt': prompt, 'completion': text}
    else:
      row = {'messages': [*prompt, {'role': 'assistant', 'content': text}]}
      row |= {k: v for k, v in s.prompts[i].columns.items() if k in _AGAIN}
    return row | {'reward': float(s.rewards[i]), 'place': s.prompts[i].place.rpartition('/')[2]}


def build(run: Run) -> fit.Parts:
  """Returns loss, evaluation and source of a run."""
  c = run.config
  source = RolloutSource(run, BestCompletions(c, run.model.tokenizer))
  return fit.Parts(make_loss(run.forward, c), source.evaluate, source)
