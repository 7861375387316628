"""A batch of completions with their columns, the input of rewards, and their scores."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Parameters of reward functions in addition to columns of the data; completion_ids (TRL's name) and
# token_ids are the same.
GIVEN = (
  'prompts',
  'completions',
  'completion_ids',
  'token_ids',
  'token_counts',
  'is_truncated',
)
# Columns of every sample row.
SAMPLE_KEYS = ('prompt', 'completion', 'reward', 'parts', 'truncated')


@dataclasses.dataclass(frozen=True)
class Batch:
  """n completions. All sequences have n entries.

  Attributes:
    prompts, completions: texts from transcript.py; prompts with all special tokens.
    prompt_ids, token_ids: their tokens; the stop token belongs to the completion.
    is_truncated: whether there is no stop token within the limit.
    columns: of the data rows, each row's value once per completion.
    given: prompts in the form of their rows, a text or messages; () for `prompts`.
    state: fields of TRL's trainer_state: global_step, max_steps, epoch.
  """

  prompts: Sequence[str]
  completions: Sequence[str]
  prompt_ids: Sequence[Sequence[int]]
  token_ids: Sequence[Sequence[int]]
  is_truncated: Sequence[bool]
  columns: Mapping[str, Sequence[Any]]
  given: Sequence[str | list[dict[str, Any]]] = ()
  state: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def values(self, name: str) -> Sequence[Any]:
    """Returns the values of one of GIVEN or of a column, prompts and completions as texts; None for
    each completion if no row of the batch has the column.
    """
    if name == 'token_counts':
      return [len(ids) for ids in self.token_ids]
    found = {
      'prompts': self.prompts,
      'completions': self.completions,
      'token_ids': self.token_ids,
      'completion_ids': self.token_ids,
      'is_truncated': self.is_truncated,
    }
    if name in found:
      return found[name]
    return self.columns.get(name, [None] * len(self.completions))

  def as_given(self, name: str) -> Sequence[Any]:
    """Returns `values`, but prompts and completions in the form of their rows, as TRL passes them:
    a completion of a conversation is [{'role': 'assistant', 'content': text}].
    """
    given = self.given or self.prompts
    if name == 'prompts':
      return given
    if name != 'completions':
      return self.values(name)
    return [
      text if isinstance(prompt, str) else [{'role': 'assistant', 'content': text}]
      for prompt, text in zip(given, self.completions, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Scores:
  """Rewards of a batch of n by P parts.

  Attributes:
    total: float32[n], the weighted sum; NaN where no part with a weight gave a reward.
    parts: float32[n, P], before weights; 0 where a part failed, NaN where it returned None.
    names: P names.
    failures: {name: completions whose part raised or ran out of time}.
    reasons: {name: the message of the first failure}, of parts that had one.
    logged: {name: mean} of values passed to log_metric.
    extra: {name: n values} of columns passed to log_extra.
  """

  total: np.ndarray
  parts: np.ndarray
  names: tuple[str, ...]
  failures: Mapping[str, int]
  reasons: Mapping[str, str]
  logged: Mapping[str, float] = dataclasses.field(default_factory=dict)
  extra: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

  def metrics(self) -> dict[str, float]:
    """Returns {'reward': mean, 'reward/NAME': mean before its weight, 'reward/NAME/failures':
    count} over the completions that have one, 'reward/NAME/skipped' (share) of parts that returned
    None, and `logged`.
    """
    out = {'reward': _mean(self.total)}
    out |= {f'reward/{n}': _mean(x) for n, x in zip(self.names, self.parts.T, strict=True)}
    out |= {f'reward/{n}/failures': float(c) for n, c in self.failures.items()}
    skipped = np.isnan(self.parts).mean(0)
    out |= {f'reward/{n}/skipped': float(s) for n, s in zip(self.names, skipped, strict=True) if s}
    return out | dict(self.logged)


def _mean(values: np.ndarray) -> float:
  """Returns the mean of the values that are not NaN, 0 if all are."""
  known = values[~np.isnan(values)]
  return float(known.mean()) if len(known) else 0.0


def sample_rows(batch: Batch, scores: Scores, count: int) -> list[dict[str, Any]]:
  """Returns JSON rows of the first `count` completions with the reward of each part (None if it
  returned None) and the columns of log_extra.
  """
  rows = []
  for i in range(min(count, len(scores.total))):
    known = (None if np.isnan(x) else float(x) for x in (*scores.parts[i], scores.total[i]))
    *parts, total = known
    row = {'prompt': batch.prompts[i], 'completion': batch.completions[i], 'reward': total}
    row |= {'parts': dict(zip(scores.names, parts, strict=True))}
    row |= {name: values[i] for name, values in scores.extra.items()}
    rows.append(row | {'truncated': batch.is_truncated[i]})
  return rows
