"""Computes scores of classes and of texts by pure functions; statistics/ has intervals."""

import dataclasses
import unicodedata

import numpy as np

# What `classification` returns along its last axis.
SCORES = ('accuracy', 'precision', 'recall', 'f1')


@dataclasses.dataclass(frozen=True)
class ClassScores:
  """Scores per class, [..., K]: float64 precision, recall, f1; int64 support (number of labels)
  and predicted (number of predictions)."""

  precision: np.ndarray
  recall: np.ndarray
  f1: np.ndarray
  support: np.ndarray
  predicted: np.ndarray


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
  """Returns the fraction of equal pairs along the last axis: int[..., n] twice -> float64[...]."""
  return (np.asarray(labels) == np.asarray(predictions)).mean(-1)


def per_class(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> ClassScores:
  """Computes precision, recall and F1 of each class; a ratio with denominator 0 is 0.

  precision = tp / predicted, recall = tp / support, F1 = 2 tp / (predicted + support).

  Args:
    labels: int[..., n] of 0 .. num_classes - 1.
    predictions: int[..., n]; a number outside the classes is wrong for each of them.
  """
  labels, predictions = np.asarray(labels), np.asarray(predictions)
  right = labels == predictions
  support, predicted, tp = (
    np.stack([np.sum(mask & (column == k), -1) for k in range(num_classes)], -1)
    for mask, column in ((True, labels), (True, predictions), (right, labels))
  )

  def ratio(top, bottom):
    return np.divide(top, bottom, out=np.zeros(top.shape), where=bottom > 0)

  return ClassScores(
    precision=ratio(tp, predicted),
    recall=ratio(tp, support),
    f1=ratio(2 * tp, predicted + support),
    support=support,
    predicted=predicted,
  )


def classification(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
  """Returns accuracy and the macro means of precision, recall and F1: float64[..., 4], as SCORES.

  The macro mean is over the classes that occur as a label or a prediction, with equal weights. So a
  class that a bootstrap resample lacks is left out and does not count as 0.
  """
  scores = per_class(labels, predictions, num_classes)
  occurs = (scores.support + scores.predicted) > 0
  count = np.maximum(occurs.sum(-1), 1)
  macro = [
    np.where(occurs, s, 0).sum(-1) / count for s in (scores.precision, scores.recall, scores.f1)
  ]
  return np.stack([accuracy(labels, predictions), *macro], -1)


def exact_match(answer: str, output: str) -> bool:
  """Returns whether two texts are equal after stripping white space."""
  return answer.strip() == output.strip()


# Punctuation around a word, without signs that change a value (- + % $ / #).
_AROUND = frozenset('.,;:!?\'"`*_()[]{}<>…“”«»„、。「」『』\u2018\u2019\u201a')


def normalize(text: str) -> str:
  """Returns the text in NFKC, case folded, without punctuation around words and extra spaces.

  Punctuation inside a word stays (3.5, don't), and so does a point before a digit (.5). Articles
  stay: 'a' may be the answer.
  """
  words = []
  for word in unicodedata.normalize('NFKC', text).casefold().split():
    start, end = 0, len(word)
    while end > start and word[end - 1] in _AROUND:
      end -= 1
    while start < end and word[start] in _AROUND:
      if word[start] == '.' and word[start + 1 : start + 2].isdigit():
        break
      start += 1
    if start < end:
      words.append(word[start:end])
  return ' '.join(words)


def normalized_match(answer: str, output: str) -> bool:
  """Returns whether two texts are equal after `normalize`.

  An answer of punctuation alone is compared exactly, so that no empty output matches it.
  """
  wanted = normalize(answer)
  return wanted == normalize(output) if wanted else exact_match(answer, output)
