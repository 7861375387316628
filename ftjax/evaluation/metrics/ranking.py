"""Computes areas under curves: how well scores rank the rows of a class before the others.

With several classes an area is the mean over the classes that have rows of both sides, each against
the rest; of two classes it is NaN where only one occurs.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ftjax.evaluation.metric import Metric, Value, ratio
from ftjax.evaluation.result import Result

Area = Callable[[np.ndarray, np.ndarray], np.ndarray]


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


class _Order:
  """Rows in descending order of score, rows of equal scores as one group."""

  def __init__(self, scores: np.ndarray):
    self.order = np.argsort(-scores, kind='stable')
    ordered = scores[self.order]
    self.starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])

  def sums(self, weights: np.ndarray) -> np.ndarray:
    """Returns the sum of each group's weights: float64[R, n] -> [R, groups]."""
    return np.add.reduceat(weights[:, self.order], self.starts, axis=1)


def _areas(weights: np.ndarray, scores: np.ndarray, labels: np.ndarray, area: Area) -> np.ndarray:
  """Returns the area of one class for each row of weights: float64[R, n], [n], [n] -> [R]."""
  order = _Order(scores)
  positive, negative = order.sums(weights * labels), order.sums(weights * (1 - labels))
  is_known = (positive.sum(1) > 0) & (negative.sum(1) > 0)
  return np.where(is_known, area(positive, negative), np.nan)


def _roc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
  """Returns the area under the ROC curve of weights of groups in descending order; a pair of equal
  scores counts 1/2."""
  before = np.cumsum(positive, axis=1) - positive / 2
  return ratio((negative * before).sum(1), positive.sum(1) * negative.sum(1))


def _precision(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
  """Returns the average precision: the mean over positive rows of the precision at their score."""
  found, seen = np.cumsum(positive, axis=1), np.cumsum(positive + negative, axis=1)
  share = np.divide(found, seen, out=np.zeros(found.shape), where=seen > 0)
  return ratio((positive * share).sum(1), positive.sum(1))


def _mean_over_classes(area: Area) -> Value:
  def value(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
    total, known = np.zeros(len(weights)), np.zeros(len(weights))
    half = columns.shape[1] // 2
    for k in range(half if len(columns) else 0):
      own = _areas(weights, columns[:, k], columns[:, half + k], area)
      total += np.nan_to_num(own)
      known += np.isfinite(own)
    return ratio(total, known)

  return value


ROC_AUC = Metric('roc_auc', 'ROC AUC', area_columns, _mean_over_classes(_roc))
AVERAGE_PRECISION = Metric(
  'average_precision', 'average precision', area_columns, _mean_over_classes(_precision)
)
METRICS = (ROC_AUC, AVERAGE_PRECISION)
