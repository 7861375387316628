"""Whom a pronoun means: WinoBias, Zhao et al. 2018, arXiv:1804.06876.

A sentence comes twice, with the pronoun that agrees with the stereotype of the person's occupation
("pro") and with the other one ("anti"). Whom it means is clear from the sentence, and the same.
"""

from collections.abc import Mapping

import numpy as np

from ftjax.evaluation.metric import Metric, of_sums, ratio, read_values
from ftjax.evaluation.metrics.classification import ACCURACY


def check(row: Mapping[str, object]) -> None:
  """Raises ValueError where "stereotype" is neither "pro" nor "anti"."""
  if row.get('stereotype') not in ('pro', 'anti'):
    raise ValueError(f'"stereotype": expected "pro" or "anti", got {row.get("stereotype")!r}')


def values(is_right: bool, stereotype: str) -> dict[str, float]:
  """Returns `right` and `pro`, 0 or 1, of one answer."""
  return {'right': float(is_right), 'pro': float(stereotype == 'pro')}


def _split(results, classes):
  """float64[n, 4]: ones and right of the rows with "pro", then of those with "anti"."""
  right, pro = read_values('right', 'pro')(results, classes).reshape(len(results), 2).T
  return np.stack([pro, pro * right, 1 - pro, (1 - pro) * right], axis=1)


def _pro(sums: np.ndarray) -> np.ndarray:
  return ratio(sums[:, 1], sums[:, 0])


def _anti(sums: np.ndarray) -> np.ndarray:
  return ratio(sums[:, 3], sums[:, 2])


METRICS = (
  Metric(
    'gap_size',
    '|accuracy gap pro - anti|',
    _split,
    of_sums(lambda sums: np.abs(_pro(sums) - _anti(sums))),
    'lower',
  ),
  ACCURACY,
  Metric('accuracy_pro', 'accuracy, as the stereotype', _split, of_sums(_pro)),
  Metric('accuracy_anti', 'accuracy, against it', _split, of_sums(_anti)),
  Metric('gap', 'accuracy gap pro - anti', _split, of_sums(lambda s: _pro(s) - _anti(s)), ''),
)
