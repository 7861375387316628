"""Computes scores of classes: accuracy, precision, recall, F1, Matthews' correlation, confusions.

A prediction outside the classes is wrong for each of them: "none of these".
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ftjax.evaluation.metric import Metric, of_sums, proportion, ratio
from ftjax.evaluation.result import Result

NONE = 'none of these'


def _indices(results: Sequence[Result], classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the index of each label and of each prediction: int[n] twice; K: none of the K classes.

  Raises:
    ValueError: a label that is none of the classes.
  """
  number = {c: i for i, c in enumerate(classes)}
  for r in results:
    if r.label not in number:
      raise ValueError(f'result {r.id!r}: the label {r.label!r} is none of {list(classes)}')
  labels = np.array([number[r.label] for r in results], int)
  return labels, np.array([number.get(r.prediction, len(classes)) for r in results], int)


def class_columns(results: Sequence[Result], classes: Sequence[str]) -> np.ndarray:
  """Returns float64[n, 3 K]: one-hot the label where it was predicted, the label, the prediction.

  Their sums are true positives, labels and predictions of each class, of which all scores here are
  functions. Without classes (K = 0) every score is NaN.

  Raises:
    ValueError: a label that is none of the classes.
  """
  if not classes:
    return np.zeros((len(results), 0))
  labels, predictions = _indices(results, classes)
  each = np.arange(len(classes))
  label, prediction = labels[:, None] == each, predictions[:, None] == each
  return np.concatenate([label & prediction, label, prediction], axis=1).astype(np.float64)


def _of_classes(score: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]):
  """Returns the `value` of a function of (true positives, labels, predictions), float64[R, K]
  each; NaN without results."""

  def function(sums: np.ndarray) -> np.ndarray:
    right, labels, predictions = np.split(sums, 3, axis=1)
    return np.where(labels.sum(1) > 0, score(right, labels, predictions), np.nan)

  return of_sums(function)


def _zero_ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
  return np.divide(top, bottom, out=np.zeros(np.shape(top)), where=bottom > 0)


# Of (true positives, labels, predictions): what is divided by what.
_RATIOS = {
  'precision': lambda right, labels, predictions: (right, predictions),
  'recall': lambda right, labels, predictions: (right, labels),
  'f1': lambda right, labels, predictions: (2 * right, labels + predictions),
}


def _macro(name: str):
  def score(right, labels, predictions):
    each = _zero_ratio(*_RATIOS[name](right, labels, predictions))
    occurs = labels + predictions > 0
    return ratio((each * occurs).sum(1), occurs.sum(1))

  return score


def _micro(name: str):
  def score(right, labels, predictions):
    top, bottom = _RATIOS[name](right, labels, predictions)
    return ratio(top.sum(1), bottom.sum(1))

  return score


def _weighted(name: str):
  def score(right, labels, predictions):
    each = _zero_ratio(*_RATIOS[name](right, labels, predictions))
    return ratio((each * labels).sum(1), labels.sum(1))

  return score


def _balanced_accuracy(right, labels, predictions):
  return ratio(_zero_ratio(right, labels).sum(1), (labels > 0).sum(1))


def _mcc(right, labels, predictions):
  n = labels.sum(1)
  none = n - predictions.sum(1)
  both = right.sum(1) * n - (labels * predictions).sum(1)
  of_labels = n**2 - (labels**2).sum(1)
  of_predictions = n**2 - (predictions**2).sum(1) - none**2
  spread = np.maximum(of_labels * of_predictions, 0)
  return _zero_ratio(both, np.sqrt(spread))


def _metric(name: str, title: str, score: Callable) -> Metric:
  return Metric(name, title, class_columns, _of_classes(score))


_MEANS = {'macro': _macro, 'micro': _micro, 'weighted': _weighted}
_TITLES = {'precision': 'precision', 'recall': 'recall', 'f1': 'F1'}

# The share of results whose value `right` is 1; it needs no classes.
ACCURACY = dataclasses.replace(proportion('right', 'accuracy'), name='accuracy')
# As in scikit-learn: the mean recall of the classes that occur as a label.
BALANCED_ACCURACY = _metric('balanced_accuracy', 'balanced accuracy', _balanced_accuracy)
# 0 where all labels or all predictions are of one class, as in scikit-learn (Gorodkin 2004).
MCC = _metric('mcc', "Matthews' correlation", _mcc)
# {'macro_f1': ...}. Macro: over the classes that occur as a label or a prediction. Weighted: by
# labels. Of one class, a ratio with denominator 0 is 0; over all classes it is NaN.
MEANS = {
  f'{kind}_{name}': _metric(f'{kind}_{name}', f'{kind} {title}', of_kind(name))
  for kind, of_kind in _MEANS.items()
  for name, title in _TITLES.items()
}
METRICS = (ACCURACY, BALANCED_ACCURACY, *MEANS.values(), MCC)
# Of tasks with classes, beside accuracy: what a table shows, and what it shows beneath.
OF_CLASSES = (MEANS['macro_f1'], BALANCED_ACCURACY, MCC)
FURTHER = tuple(m for name, m in MEANS.items() if name != 'macro_f1')


def per_class_table(
  results: Sequence[Result], classes: Sequence[str]
) -> dict[str, dict[str, float]]:
  """Returns {class: {precision, recall, f1, support}}; a ratio with denominator 0 is 0.

  precision = tp / predicted, recall = tp / support, F1 = 2 tp / (predicted + support).

  Raises:
    ValueError: a label that is none of the classes.
  """
  columns = class_columns(results, classes)
  sums = columns.sum(0) if len(columns) else np.zeros(3 * len(classes))
  counts = np.split(sums, 3)
  scores = {name: _zero_ratio(*ratio_of(*counts)) for name, ratio_of in _RATIOS.items()}
  return {
    c: {name: float(each[k]) for name, each in scores.items()} | {'support': int(counts[1][k])}
    for k, c in enumerate(classes)
  }


def confusion(results: Sequence[Result], classes: Sequence[str]) -> dict[str, list]:
  """Returns how often each label got each prediction.

  Returns:
    {"labels": [...], "predictions": [...], "counts": [[...]]}, a row of counts per label;
    predictions end with NONE where one is none of the classes.

  Raises:
    ValueError: a label that is none of the classes.
  """
  labels, predictions = _indices(results, classes)
  k = len(classes)
  counts = np.bincount(labels * (k + 1) + predictions, minlength=k * (k + 1)).reshape(k, k + 1)
  wide = k + bool(counts[:, k].any())
  columns = [*classes, NONE][:wide]
  return {'labels': list(classes), 'predictions': columns, 'counts': counts[:, :wide].tolist()}


def most_frequent(
  results: Mapping[str, Sequence[Result]], classes: Sequence[str]
) -> dict[str, Any] | None:
  """Returns which label is the most frequent one, and which answer of each model.

  A model that gives one answer whatever is asked is right as often as that label occurs.

  Args:
    results: by model; at least one model, all of the same rows.
    classes: of the task. Of equally frequent ones the first counts.

  Returns:
    {"label": {class, n, share}, "answers": {model: {class, n, share, label_share}}}: n results,
    their share of all, which for the label is the accuracy of always answering it, and the share
    of results whose label that answer is. The class of answers outside the classes is NONE. None
    without results.

  Raises:
    ValueError: a label that is none of the classes.
  """
  if not all(results.values()):
    return None
  names, answers, label = [*classes, NONE], {}, None
  for model, own in results.items():
    labels, predictions = (np.bincount(x, minlength=len(names)) for x in _indices(own, classes))
    label = label or _largest(labels, names)
    found = _largest(predictions, names)
    answers[model] = found | {'label_share': float(labels[names.index(found['class'])] / len(own))}
  return {'label': label, 'answers': answers}


def _largest(counts: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
  """Returns the first name with the largest count, with that count and its share of all."""
  best = int(counts.argmax())
  return {
    'class': names[best],
    'n': int(counts[best]),
    'share': float(counts[best] / counts.sum()),
  }
