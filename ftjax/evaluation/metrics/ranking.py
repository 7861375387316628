"""Computes areas under curves: how well scores rank the rows of a class before the others.

With several classes an area is the mean over the classes that have rows of both sides, each against
the rest; of two classes it is NaN where only one occurs.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ftjax.evaluation.metric import Metric, Value, ratio
from ftjax.evaluation.result import Result

_CHUNK = 1 << 20  # weights at once: they stay in the cache


def ranking_values(choices: Sequence[str], scores: Sequence[float]) -> dict[str, tuple[float, ...]]:
  """Returns {'class_log_odds': log p / (1 - p) of each choice, in the order of sorted choices}.

  p is the softmax of the scores. Its log odds rank rows alike, also where p is rounded to 1. Only
  tasks with classes, whose rows share their choices, have this value: elsewhere results would
  differ in its length.

  Args:
    choices: of the row, two or more; scores: log-probability of each, in nats.

  Raises:
    ValueError: a score that is no finite number, not one a choice, or fewer than two.
  """
  found = np.asarray(scores, np.float64)
  if len(choices) != len(found) or len(found) < 2 or not np.isfinite(found).all():
    raise ValueError(f'scores {list(scores)} of the choices {list(choices)}; expected finite pairs')
  each = {c: float(found[i] - _log_sum(np.delete(found, i))) for i, c in enumerate(choices)}
  return {'class_log_odds': tuple(each[c] for c in sorted(each))}


def _log_sum(logs: np.ndarray) -> float:
  """Returns log sum exp: the same in any order of the choices, so that ties stay ties."""
  return logs.max() + np.log(np.exp(np.sort(logs) - logs.max()).sum())


def area_columns(results: Sequence[Result], classes: Sequence[str]) -> np.ndarray:
  """Returns float64[n, 2 K]: the log odds of each class, and one-hot the label.

  Args:
    classes: sorted. Without any, K = 0.

  Raises:
    ValueError: classes that are not sorted, or results with another number of log odds.
  """
  if not classes or not results:
    return np.zeros((len(results), 0))
  if list(classes) != sorted(classes):
    raise ValueError(f'classes {list(classes)} are not sorted')
  found = [r.values['class_log_odds'] for r in results]
  if any(len(p) != len(classes) for p in found):
    raise ValueError(f'class_log_odds: expected {len(classes)} numbers, one a class')
  labels = [[float(r.label == c) for c in classes] for r in results]
  return np.concatenate([np.array(found, np.float64), labels], axis=1)


@dataclasses.dataclass(frozen=True)
class _Ranked:
  """Rows in descending order of score, under R resamples; rows of equal scores are a group.

  Attributes:
    before: float64[m, R], weight of all rows above the group of each of m positive rows.
    upto: float64[m, R], the same with its group.
    positive: float64[m, R], weights of the positive rows.
    last: int[m], the last positive row of each one's group.
    total: float64[R].
  """

  before: np.ndarray
  upto: np.ndarray
  positive: np.ndarray
  last: np.ndarray
  total: np.ndarray


def _rank(weights: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> _Ranked:
  """Sorts once for all resamples: weights float64[n, R], scores [n], labels bool[n]."""
  from scipy.sparse import csr_array

  order = np.argsort(-scores, kind='stable')
  ordered, own = scores[order], np.flatnonzero(labels[order])
  start = np.searchsorted(-ordered, -ordered[own], side='left')
  end = np.searchsorted(-ordered, -ordered[own], side='right')
  # Sums are needed at these places alone, so rows are summed between them without being moved.
  places = np.unique(np.r_[0, start, end, len(order)])
  between = csr_array((np.ones(len(order)), order, places)) @ weights
  sums = np.concatenate([np.zeros((1, weights.shape[1])), np.cumsum(between, axis=0)])
  before, upto = (sums[np.searchsorted(places, at)] for at in (start, end))
  last = np.searchsorted(own, end, side='left') - 1
  return _Ranked(before, upto, weights[order[own]], last, sums[-1])


def _roc(ranked: _Ranked) -> np.ndarray:
  """Returns the area under the ROC curve: the share of pairs of a positive and a negative row that
  are in the right order, a pair of equal scores counting 1/2."""
  positive = ranked.positive.sum(0)
  # Pairs with any row above a positive one; those of two positive rows are half of all such.
  above = (ranked.positive * (ranked.before + ranked.upto)).sum(0) / 2 - positive**2 / 2
  return 1 - ratio(above, positive * (ranked.total - positive))


def _precision(ranked: _Ranked) -> np.ndarray:
  """Returns the average precision: the mean over positive rows of the precision at their score."""
  found = np.cumsum(ranked.positive, axis=0)[ranked.last]
  share = np.divide(found, ranked.upto, out=np.zeros(found.shape), where=ranked.upto > 0)
  return ratio((ranked.positive * share).sum(0), ranked.positive.sum(0))


def _mean_over_classes(area: Callable[[_Ranked], np.ndarray]) -> Value:
  def of_chunk(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
    total, known = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    half = columns.shape[1] // 2
    for k in range(half):
      ranked = _rank(weights, columns[:, k], columns[:, half + k] > 0)
      positive = ranked.positive.sum(0)
      is_known = (positive > 0) & (ranked.total > positive)
      total += np.where(is_known, area(ranked), 0)
      known += is_known
    return ratio(total, known)

  def value(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
    if not columns.size:
      return np.full(len(weights), np.nan)
    # Resamples stand side by side, so that sorting and summing move whole rows of memory.
    step = max(1, _CHUNK // len(columns))
    parts = [
      of_chunk(np.ascontiguousarray(weights[i : i + step].T, np.float64), columns)
      for i in range(0, len(weights), step)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)

  return value


ROC_AUC = Metric('roc_auc', 'ROC AUC', area_columns, _mean_over_classes(_roc))
AVERAGE_PRECISION = Metric(
  'average_precision', 'average precision', area_columns, _mean_over_classes(_precision)
)
METRICS = (ROC_AUC, AVERAGE_PRECISION)
