"""Scores several samples of each prompt: pass@k, and the answer that most of them give.

The score of a prompt stands in the columns of each of its results, divided by their number. So
these metrics are ratios of sums as others are, as long as all results of a prompt get the same
weight: resamples draw prompts, not results.
"""

import collections
import math
from collections.abc import Callable, Sequence

import numpy as np

from ftjax.evaluation.metric import Columns, Metric, of_sums, ratio
from ftjax.evaluation.result import Result


def pass_at(right: int, n: int, k: int) -> float:
  """Returns the probability that k of n samples, drawn without replacement, hold a right one.

  1 - C(n - right, k) / C(n, k), unbiased for k samples of the model; NaN where n < k.

  Args:
    right: how many of the n samples are right.

  Raises:
    ValueError: not 0 <= right <= n, or k < 1.
  Source: Chen et al. 2021, arXiv:2107.03374.
  """
  if not 0 <= right <= n or k < 1:
    raise ValueError(f'pass@{k} of {right} right of {n}; expected 0 <= right <= n and k >= 1')
  if n < k:
    return math.nan
  return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_share(predictions: Sequence[str], right: Sequence[bool]) -> float:
  """Returns whether the most frequent prediction is right: 1 or 0; of a tie, the share of tied
  predictions that are right: the expectation of a random choice among them.

  Empty predictions, from which no answer was parsed, have no vote while others have one. An answer
  is right if one of the samples with it is: the others may state it in a form that does not count.
  """
  votes = collections.Counter(p for p in predictions if p) or collections.Counter(predictions)
  most = max(votes.values())
  accepted = {p for p, is_right in zip(predictions, right, strict=True) if is_right}
  tied = [p in accepted for p, count in votes.items() if count == most]
  return sum(tied) / len(tied)


def _by_prompt(score: Callable[[list[Result]], float]) -> Columns:
  """Returns the columns (score of the prompt / its samples, 1 / its samples): float64[n, 2]."""

  def columns(results: Sequence[Result], classes: Sequence[str]) -> np.ndarray:
    groups = collections.defaultdict(list)
    for r in results:
      groups[r.id].append(r)
    each = {k: (score(g) / len(g), 1 / len(g)) for k, g in groups.items()}
    return np.array([each[r.id] for r in results], np.float64).reshape(len(results), 2)

  return columns


def _mean(name: str, title: str, score: Callable[[list[Result]], float]) -> Metric:
  value = of_sums(lambda sums: ratio(sums[:, 0], sums[:, 1]))
  return Metric(name, title, _by_prompt(score), value)


def pass_metric(k: int) -> Metric:
  """Returns pass@k: the mean over prompts; NaN where a prompt has fewer than k samples.

  Results have the value `right`, 0 or 1.
  """

  def score(group: list[Result]) -> float:
    return pass_at(sum(r.right for r in group), len(group), k)

  return _mean(f'pass_at_{k}', f'pass@{k}', score)


def majority_metric(k: int) -> Metric:
  """Returns maj@k: how often the most frequent prediction of the first k samples is right.

  NaN where a prompt has fewer than k samples. Results have the value `right`, 0 or 1.
  """

  def score(group: list[Result]) -> float:
    if len(group) < k:
      return math.nan
    first = sorted(group, key=lambda r: r.sample)[:k]
    return majority_share([r.prediction for r in first], [r.right for r in first])

  return _mean(f'maj_at_{k}', f'maj@{k}', score)


def metrics(k: int) -> tuple[Metric, ...]:
  """Returns the figures of k samples of each prompt; none of a single one."""
  if k < 2:
    return ()
  sizes = sorted({k, *(size for size in (4, 16, 64) if size < k)})
  return (*map(pass_metric, sizes), majority_metric(k))
