"""A rollout on the host: rows of completions with rewards, and statistics of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ftjax.data import batches
from ftjax.data.prompts import Prompt
from ftjax.generation.completion import Completion, Rollout


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
  """A rollout on the host: R rows, one completion each, those of a prompt next to each other.

  arrays: tokens, labels, segments, positions int32[R, T]; weights float32[R, T], 1 where the label
  is a completion's token; sampler_logp float32[R, T]; old_logp, ref_logp and other measurements
  float32[R, T] where the algorithm needs them. rewards: float32[R]. lengths: int32[R], completion
  tokens. group: completions a prompt. prompts, completions: what the rows hold, R each.
  """

  arrays: dict[str, np.ndarray]
  rewards: np.ndarray
  lengths: np.ndarray
  group: int
  prompts: Sequence[Prompt] = ()
  completions: Sequence[Completion] = ()


def side(prompt: Prompt, completion: Completion) -> tuple[np.ndarray, np.ndarray]:
  """Returns a prompt with one completion, as (tokens, supervised) of batches.fill_row."""
  tokens = np.array([*prompt.ids, *completion.tokens], np.int32)
  return tokens, np.arange(len(tokens)) >= len(prompt.ids)


def rows(
  prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], seq_len: int
) -> dict[str, np.ndarray]:
  """Returns arrays [R, T] of completions[prompt][index], in this order; see `RolloutBatch`."""
  pairs = [(p, c) for p, cs in zip(prompts, completions, strict=True) for c in cs]
  out = batches.empty(len(pairs), seq_len)
  out['sampler_logp'] = np.zeros((len(pairs), seq_len), np.float32)
  for i, (prompt, completion) in enumerate(pairs):
    batches.fill_row(out, i, [side(prompt, completion)])
    start = len(prompt.ids) - 1
    out['sampler_logp'][i, start : start + len(completion.tokens)] = completion.logprobs
  return out


def sampler_choices(
  prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], shape: tuple[int, int]
) -> np.ndarray:
  """Returns the experts that the sampler's routers chose, int16[R, T, L, k]; -1 for tokens that it
  did not read one by one. shape: (R, T), of the first R completions.
  """
  pairs = [(p, c) for p, cs in zip(prompts, completions, strict=True) for c in cs][: shape[0]]
  out = np.full((*shape, *pairs[0][1].choices.shape[1:]), -1, np.int16)
  for row, (prompt, completion) in zip(out, pairs, strict=True):
    start = len(prompt.ids) - 1
    row[start : start + len(completion.tokens)] = completion.choices
  return out


def fill_unscored(totals: np.ndarray, groups: int) -> np.ndarray:
  """Returns rewards float32[R] of `groups` groups with the mean of its group in place of each NaN,
  0 where a group has nothing else: such a completion has no advantage over its group.
  """
  rows = totals.reshape(groups, -1)
  is_scored = ~np.isnan(rows)
  sums, counts = np.where(is_scored, rows, 0).sum(1), is_scored.sum(1)
  means = (sums / np.maximum(counts, 1)).astype(np.float32)
  return np.where(is_scored, rows, means[:, None]).reshape(-1)


def zero_variance_groups(s: RolloutBatch) -> np.ndarray:
  """Returns int[n], the prompts whose completions all have the same reward."""
  groups = s.rewards.reshape(-1, s.group)
  return np.flatnonzero(groups.min(1) == groups.max(1))


def with_groups(s: RolloutBatch, other: RolloutBatch, places: np.ndarray) -> RolloutBatch:
  """Returns `s` with the groups of `other` at `places`."""
  at = (places[:, None] * s.group + np.arange(s.group)).reshape(-1)

  def put(old, new):
    out = np.array(old)
    out[at] = new
    return out

  def put_all(old, new):
    out = list(old)
    for i, x in zip(at, new, strict=True):
      out[i] = x
    return out

  return RolloutBatch(
    {k: put(v, other.arrays[k]) for k, v in s.arrays.items()},
    put(s.rewards, other.rewards),
    put(s.lengths, other.lengths),
    s.group,
    put_all(s.prompts, other.prompts),
    put_all(s.completions, other.completions),
  )


def rollout_statistics(totals: np.ndarray, found: Rollout) -> dict[str, float]:
  """Returns metrics of rewards float32[R] and lengths. With rewards of 0 and 1, the completions
  'better' than the mean are the correct ones.
  """
  lengths = np.array([len(c.tokens) for cs in found.completions for c in cs])
  truncated = [c.truncated for cs in found.completions for c in cs]
  groups = totals.reshape(len(found.completions), -1)
  out = {
    'reward_std': float(totals.std()),
    'length': float(lengths.mean()),
    'truncated': float(np.mean(truncated)),
  }
  if groups.shape[1] > 1:
    out['zero_variance_groups'] = float((groups.min(1) == groups.max(1)).mean())
  mean = totals.mean()
  for name, which in (('better', totals > mean), ('worse', totals < mean)):
    if which.any():
      out[f'length/{name}'] = float(lengths[which].mean())
  return out
