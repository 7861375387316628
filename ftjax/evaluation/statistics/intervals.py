"""Computes intervals of proportions and means, of results that are independent or in clusters.

Results of one prompt (k samples of it) are a cluster: they agree with each other, so that they say
less than as many results of other prompts. `clusters` has a label per result, equal within a
cluster; the ids of the rows will do. Without clusters each result has a label of its own.

What cannot be computed is NaN: everything of no results, the error of one cluster. scipy is
imported by the functions that need it, since its import takes a second.
"""

import dataclasses
import math
from collections.abc import Hashable, Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Interval:
  """value: the estimate; low, high: ends of its interval; se: its standard error."""

  value: float
  low: float
  high: float
  se: float


def members(clusters: Iterable[Hashable]) -> np.ndarray:
  """Returns the number of each result's cluster: int64[n], from 0 in the order of appearance."""
  numbers: dict[Hashable, int] = {}
  return np.array([numbers.setdefault(c, len(numbers)) for c in clusters], np.int64)


def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
  """Returns the score interval of a proportion: k of n independent trials.

  It stays within [0, 1] and has a width even where k = n; (0, 1) where n = 0.

  Raises:
    ValueError: not 0 <= k <= n.
  Source: Wilson 1927, JASA 22:209.
  """
  from scipy.stats import norm

  if not 0 <= k <= n:
    raise ValueError(f'wilson: got k={k} of n={n}, expected 0 <= k <= n')
  return _score(k / n, n, float(norm.ppf((1 + level) / 2))) if n else (0.0, 1.0)


def _score(share: float, n: float, quantile: float) -> tuple[float, float]:
  """Returns the shares whose score test with n trials does not refuse `share`."""
  z2 = quantile**2
  center, half = share + z2 / (2 * n), math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
  low, high = ((center + sign * quantile * half) / (1 + z2 / n) for sign in (-1, 1))
  # Rounding must not put the ends past the estimate where it is 0 or 1.
  return max(0.0, min(low, share)), min(1.0, max(high, share))


def standard_error(values: np.ndarray, clusters: Iterable[Hashable]) -> float:
  """Returns the standard error of a mean whose results are in clusters.

  The square is G / (G - 1) times the sum of squares of the clusters' sums of deviations, over n^2.
  Clusters of one give sd / sqrt(n). NaN with less than two clusters.

  Args:
    values: float64[n].
  Source: Liang and Zeger 1986, Biometrika 73:13; Miller 2024, arXiv 2411.00640.
  """
  values, groups = _checked(values, clusters)
  count = int(groups.max()) + 1 if len(groups) else 0
  if count < 2:
    return math.nan
  sums = np.bincount(groups, values - values.mean(), count)
  return float(np.sqrt(count / (count - 1) * (sums**2).sum()) / len(values))


def mean(values: np.ndarray, clusters: Iterable[Hashable], level: float = 0.95) -> Interval:
  """Computes the t interval of a mean whose results are in clusters, with G - 1 degrees of freedom.

  A mean of differences of two models on the same rows is a paired interval. Where the values do not
  vary the interval has no width; `proportion` has one there.

  Args:
    values: float64[n].
  """
  from scipy.stats import t

  values, groups = _checked(values, clusters)
  if not len(values):
    return Interval(math.nan, math.nan, math.nan, math.nan)
  value, se = float(values.mean()), standard_error(values, groups)
  half = float(t.ppf((1 + level) / 2, groups.max())) * se if se == se else math.nan
  return Interval(value, value - half, value + half, se)


def proportion(values: np.ndarray, clusters: Iterable[Hashable], level: float = 0.95) -> Interval:
  """Computes the score interval of a mean of numbers in [0, 1] whose results are in clusters.

  Of independent zeros and ones it is Wilson's. Else it is Wilson's of the effective number of
  results p (1 - p) / se^2, with the t quantile of G - 1 degrees of freedom for clusters; se is the
  larger of the clustered and the independent one, since an estimate below that is mostly noise.
  Where all values agree, a cluster counts as one result. (0, 1) where nothing is known: no results,
  or one cluster of several.

  Args:
    values: float64[n]; 0.5 may be a tie.

  Raises:
    ValueError: a value outside of [0, 1].
  Source: Korn and Graubard 1998, Survey Methodology 24:193, with the score interval in place of
    the exact one; both are compared in Dean and Pagano 2015, J. Survey Stat. Methodol. 3:484.
  """
  from scipy.stats import norm, t

  values, groups = _checked(values, clusters)
  if not ((values >= 0) & (values <= 1)).all():
    raise ValueError(f'proportion: got values {values.min()} to {values.max()}, expected 0 to 1')
  n = len(values)
  if n == 0:
    return Interval(math.nan, 0.0, 1.0, math.nan)
  count, share = int(groups.max()) + 1, float(values.mean())
  se = standard_error(values, groups)
  if count < 2 and n > 1:
    return Interval(share, 0.0, 1.0, se)
  quantile = float((norm.ppf if count == n else t(count - 1).ppf)((1 + level) / 2))
  independent = float(values.std()) / math.sqrt(n)
  worst = independent if count == n else max(se, independent)
  low, high = _score(share, share * (1 - share) / worst**2 if worst > 0 else count, quantile)
  return Interval(share, low, high, se)


def design_effect(values: np.ndarray, clusters: Iterable[Hashable]) -> float:
  """Returns how many times the variance of a mean is that of independent results: float64[n].

  n / design effect is the effective number of results. NaN where the values do not vary.

  Source: Kish 1965, Survey Sampling, section 8.2.
  """
  values, groups = _checked(values, clusters)
  independent = standard_error(values, range(len(values)))
  return standard_error(values, groups) ** 2 / independent**2 if independent > 0 else math.nan


def intraclass_correlation(values: np.ndarray, clusters: Iterable[Hashable]) -> float:
  """Returns the correlation of two results of one cluster, from a one-way analysis of variance.

  1 where clusters agree within; about 0 where they say nothing; it can fall below 0. NaN where the
  values do not vary, or without two clusters and a cluster of two.

  Args:
    values: float64[n].
  Source: Donner 1986, International Statistical Review 54:67, formula of the ANOVA estimator.
  """
  values, groups = _checked(values, clusters)
  sizes = np.bincount(groups) if len(groups) else np.zeros(0)
  n, count = len(values), len(sizes)
  if count < 2 or n == count or not np.ptp(values) > 0:
    return math.nan
  means = np.bincount(groups, values) / sizes
  between = (sizes * (means - values.mean()) ** 2).sum() / (count - 1)
  within = ((values - means[groups]) ** 2).sum() / (n - count)
  size = (n - (sizes**2).sum() / n) / (count - 1)
  return float((between - within) / (between + (size - 1) * within))


def _checked(values, clusters) -> tuple[np.ndarray, np.ndarray]:
  """Returns values as float64[n] and the numbers of their clusters: int64[n]."""
  values, groups = np.asarray(values, np.float64), members(clusters)
  if values.ndim != 1 or values.shape != groups.shape or not np.isfinite(values).all():
    raise ValueError(
      f'got values of shape {values.shape} and {len(groups)} clusters, expected [n] finite numbers '
      'and n clusters'
    )
  return values, groups
