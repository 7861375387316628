"""Computes what a test set of n rows could have shown, and how many rows would do.

Power is the probability that the test of two models on the same rows comes out significant. It uses
what was seen of the rows (how often the models disagree, how much differences vary) and asks for
the true difference; the difference that was seen enters `rows_needed` alone.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

_MOST_ROWS = 10**7


@dataclasses.dataclass(frozen=True)
class Sensitivity:
  """What n rows can show.

  Attributes:
    smallest: the smallest true difference that the test would find with the wanted power; NaN where
      no difference would be, or where nothing is known of the spread.
    rows: how many would find a true difference as large as the one seen; None where none was seen,
      or where a ten million would not do.
    is_too_small: no difference could be found, or one was seen that is smaller than `smallest`:
      more rows are needed to find it reliably.
  """

  smallest: float
  rows: int | None
  is_too_small: bool


def power_of_mcnemar(difference: float, discordant: float, n: int, alpha: float = 0.05) -> float:
  """Returns the power of the exact McNemar test, by summing over the number of discordant pairs.

  Args:
    difference: true share of pairs right only for one model minus that only for the other.
    discordant: true share of pairs right for one model alone; at least |difference| is taken.
    n: pairs.
  Source: Duffy 1984, Biometrics 40:1005, the unconditional power.
  """
  from scipy.stats import binom

  share = max(discordant, abs(difference))
  if n < 1 or share <= 0:
    return 0.0
  # 1e-12 of the probability is left out on either side.
  low, high = binom.ppf([1e-12, 1 - 1e-12], n, share)
  pairs = np.arange(max(1, int(low)), int(high) + 1)
  most = binom.ppf(alpha / 2, pairs, 0.5)
  most = np.where(binom.cdf(most, pairs, 0.5) <= alpha / 2, most, most - 1)  # may be -1: never
  odds = (1 + abs(difference) / share) / 2
  found = binom.cdf(most, pairs, odds) + binom.cdf(most, pairs, 1 - odds)
  return float((binom.pmf(pairs, n, share) * found).sum())


def power_of_mean(difference: float, sd: float, n: int, alpha: float = 0.05) -> float:
  """Returns the power of the paired t test; that of a permutation test of means is close to it.

  Args:
    difference: true mean of the differences.
    sd: standard deviation of the differences of n independent pairs or clusters.
  Source: Cohen 1988, Statistical Power Analysis, chapter 2. The noncentral t law is integrated over
    the quantiles of the sample's sd here, since scipy's nct fails far from 0.
  """
  from scipy.stats import chi2, norm, t

  if n < 2:
    return 0.0
  if sd <= 0:
    return float(difference != 0)
  shift = abs(difference) / sd * math.sqrt(n)
  limit = float(t.ppf(1 - alpha / 2, n - 1))
  points = (np.arange(1000) + 0.5) / 1000
  limits = limit * np.sqrt(chi2.ppf(points, n - 1) / (n - 1))
  return float((norm.cdf(shift - limits) + norm.cdf(-shift - limits)).mean())


def sensitivity_of_proportions(
  b: int, c: int, n: int, *, power: float = 0.8, alpha: float = 0.05
) -> Sensitivity:
  """Computes what McNemar's test on n rows can show: b and c are right for one model alone.

  The share of discordant rows is the one seen; a difference above it means a share as large. So
  models that never disagreed have the smallest difference of one that only gains.

  Raises:
    ValueError: b or c is negative, or b + c > n.
  """
  if min(b, c) < 0 or b + c > n:
    raise ValueError(f'got b={b} and c={c} of n={n}, expected b, c >= 0 and b + c <= n')
  if n == 0:
    return Sensitivity(math.nan, None, True)
  return _sensitivity(
    lambda difference, rows: power_of_mcnemar(difference, (b + c) / n, rows, alpha),
    abs(c - b) / n,
    n,
    power,
    most=1.0,
  )


def sensitivity_of_mean(
  difference: float, se: float, n: int, *, power: float = 0.8, alpha: float = 0.05
) -> Sensitivity:
  """Computes what a test of a mean difference on n rows or clusters can show.

  It does for any figure whose difference is about normal, such as macro F1, with the standard error
  of its bootstrap: that falls with sqrt(n) too.

  Args:
    difference: the one seen; its sign does not matter.
    se: standard error of the difference, so its spread per row or cluster is se sqrt(n).
  """
  if n < 2 or not math.isfinite(se):
    return Sensitivity(math.nan, None, True)
  if se == 0 and not difference:  # equal results: nothing is known of the spread
    return Sensitivity(math.nan, None, False)
  sd = se * math.sqrt(n)
  return _sensitivity(
    lambda value, rows: power_of_mean(value, sd, rows, alpha),
    abs(difference) if math.isfinite(difference) else 0.0,
    n,
    power,
    most=20 * sd,
  )


def _sensitivity(
  find: Callable[[float, int], float], seen: float, n: int, power: float, most: float
) -> Sensitivity:
  """Inverts find(difference, rows), the power, which grows with both; `most`: the difference."""
  smallest = math.nan
  if find(most, n) >= power:
    low, high = 0.0, most
    while high - low > 1e-6 * high:
      middle = (low + high) / 2
      low, high = (low, middle) if find(middle, n) >= power else (middle, high)
    smallest = high
  rows = _rows(lambda count: find(seen, count) >= power) if seen > 0 else None
  return Sensitivity(smallest, rows, math.isnan(smallest) or 0 < seen < smallest)


def _rows(does: Callable[[int], bool]) -> int | None:
  """Returns the smallest number of rows for which `does` holds, by doubling and halving."""
  high = 1
  while not does(high):
    high *= 2
    if high > _MOST_ROWS:
      return None
  low = high // 2  # does not do, or is 0
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if does(middle) else (middle, high)
  return high
