"""Measures whether the probabilities of choices are right as often as they claim.

The probability of a choice is the softmax of the log-probabilities of the row's choices.
"""

from collections.abc import Sequence

import numpy as np

from ftjax.evaluation.metric import Columns, Metric, mean, of_sums, ratio, read_values
from ftjax.evaluation.result import Result


def log_probabilities(scores: Sequence[float]) -> np.ndarray:
  """Returns the log softmax of the log-probabilities of choices: float64[C].

  Raises:
    ValueError: no scores, or one that is no finite number.
  """
  found = np.asarray(scores, np.float64)
  if found.ndim != 1 or not found.size or not np.isfinite(found).all():
    raise ValueError(f'scores of choices are {list(scores)}; expected one or more finite numbers')
  shifted = found - found.max()
  return shifted - np.log(np.exp(shifted).sum())


def calibration_values(
  choices: Sequence[str], scores: Sequence[float], label: str
) -> dict[str, tuple[float, ...]]:
  """Returns what the metrics of this file need of one row.

  Args:
    choices: of the row, different texts.
    scores: log-probability of each, in nats.
    label: the right choice.

  Returns:
    confidence: (the largest probability, 1 if it is the label's); brier: half the squared distance
    of the probabilities from the label's one-hot vector, 0 to 1 (of two choices, the squared error
    of one of them); log_loss: minus the log-probability of the label, in nats.

  Raises:
    ValueError: not a score per choice, see `log_probabilities`; the label is none of the choices.
  """
  if label not in choices or len(choices) != len(scores):
    raise ValueError(f'{len(scores)} scores of the choices {list(choices)}, label {label!r}')
  logs, right = log_probabilities(scores), list(choices).index(label)
  each = np.exp(logs)
  top = int(each.argmax())
  square = float(((each - (np.arange(len(each)) == right)) ** 2).sum() / 2)
  return {
    'confidence': (float(each[top]), float(top == right)),
    'brier': (square,),
    'log_loss': (-float(logs[right]),),
  }


def bin_index(confidence: np.ndarray, bins: int) -> np.ndarray:
  """Returns the bin of each confidence: float64[n] -> int[n] of 0 .. bins - 1.

  Bins have equal widths and hold their upper end, as in Guo et al. 2017 (arXiv:1706.04599).
  """
  edges = np.linspace(0, 1, bins + 1)
  return np.clip(np.searchsorted(edges, confidence, side='left') - 1, 0, bins - 1)


def _bin_columns(bins: int) -> Columns:
  """Returns the columns float64[n, 2 bins]: of its bin, confidence minus right, and 1."""

  def columns(results: Sequence[Result], classes: Sequence[str]) -> np.ndarray:
    found = read_values('confidence')(results, classes).reshape(len(results), 2)
    own = bin_index(found[:, 0], bins)[:, None] == np.arange(bins)
    return np.concatenate([own * (found[:, 0] - found[:, 1])[:, None], own], axis=1)

  return columns


def expected_calibration_error(bins: int, name: str) -> Metric:
  """Returns ECE: the mean over bins of |mean confidence - accuracy|, by their results.

  Args:
    bins: of equal widths.
    name: of the metric.
  """

  def score(sums: np.ndarray) -> np.ndarray:
    gaps, counts = sums[:, :bins], sums[:, bins:]
    return ratio(np.abs(gaps).sum(1), counts.sum(1))

  title = f'calibration error, {bins} bins'
  return Metric(name, title, _bin_columns(bins), of_sums(score), 'lower')


ECE = expected_calibration_error(10, 'ece')
ECE_15 = expected_calibration_error(15, 'ece_15')
BRIER = mean('brier', 'Brier score', better='lower')
LOG_LOSS = mean('log_loss', 'log loss', better='lower', form='number')
METRICS = (ECE, ECE_15, BRIER, LOG_LOSS)


def bin_table(results: Sequence[Result], bins: int) -> list[dict[str, float | int | None]]:
  """Returns the bins of a reliability diagram: low, high, n, and of bins that have results the
  means `confidence` and `accuracy`, else None.

  Raises:
    KeyError: results without the value `confidence`.
  """
  found = read_values('confidence')(results, ()).reshape(len(results), 2)
  own, table = bin_index(found[:, 0], bins), []
  for k in range(bins):
    inside = found[own == k]
    confidence, accuracy = inside.mean(0).tolist() if len(inside) else (None, None)
    row = {'low': k / bins, 'high': (k + 1) / bins, 'n': len(inside)}
    table.append(row | {'confidence': confidence, 'accuracy': accuracy})
  return table
