"""Computes intervals and tests for scores of two models on the same examples.

Everything is exact or seeded: the same data give the same figures. scipy is imported by the
functions that need it, since its import takes a second.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Metric = Callable[..., np.ndarray]

_CHUNK = 1 << 22  # indices held at once


@dataclasses.dataclass(frozen=True)
class McNemar:
  """b: examples right only for the first model; c: only for the second; p: exact, two-sided."""

  b: int
  c: int
  p: float


@dataclasses.dataclass(frozen=True)
class Bootstrap:
  """value: the metric of the data; low, high: ends of its interval; p: two-sided, of value 0.

  Each float64[...] of the metric's own shape.
  """

  value: np.ndarray
  low: np.ndarray
  high: np.ndarray
  p: np.ndarray


def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
  """Returns the score interval of a proportion: k of n independent trials.

  It stays within [0, 1] and has a width even where k = n; (0, 1) where n = 0.

  Raises:
    ValueError: not 0 <= k <= n.
  Source: Wilson 1927, JASA 22:209.
  """
  from scipy.stats import binomtest

  if not 0 <= k <= n:
    raise ValueError(f'wilson: got k={k} of n={n}, expected 0 <= k <= n')
  if n == 0:
    return 0.0, 1.0
  interval = binomtest(k, n).proportion_ci(level, method='wilson')
  return float(interval.low), float(interval.high)


def bootstrap(
  metric: Metric,
  columns: Sequence[np.ndarray],
  *,
  seed: int,
  resamples: int = 2000,
  level: float = 0.95,
) -> Bootstrap:
  """Computes the percentile interval of a metric of n examples from resamples with replacement.

  A difference between two models is a metric of both their columns: an example is drawn with both
  results, so the interval is paired. p = 2 (1 + min(#{m* <= 0}, #{m* >= 0})) / (R + 1), at most 1,
  inverts the interval: p < 1 - level where the interval excludes 0, up to 1/R. Where all resamples
  agree (all right, say) the interval has no width; `wilson` has one there.

  Args:
    metric: `metric(*columns)` on arrays [..., n] gives [...] or [..., M]; it may see any resample.
    columns: arrays [n], one row an example.
    seed: of the resampling.
    resamples: R.

  Raises:
    ValueError: no examples, or columns of different lengths.
  Source: Efron and Tibshirani 1993, chapters 13 and 15.
  """
  columns = [np.asarray(c) for c in columns]
  n = len(columns[0])
  if n == 0 or any(c.shape != (n,) for c in columns):
    raise ValueError(
      f'bootstrap: columns have shapes {[c.shape for c in columns]}, expected [n > 0]'
    )
  rng = np.random.default_rng(seed)
  chunk = max(1, _CHUNK // n)
  draws = []
  for start in range(0, resamples, chunk):
    index = rng.integers(n, size=(min(chunk, resamples - start), n))
    draws.append(metric(*(c[index] for c in columns)))
  stars = np.concatenate(draws).astype(np.float64)  # [R] or [R, M]
  low, high = np.quantile(stars, [(1 - level) / 2, (1 + level) / 2], axis=0)
  tail = np.minimum((stars <= 0).sum(0), (stars >= 0).sum(0))
  p = np.minimum(1.0, 2 * (1 + tail) / (resamples + 1))
  return Bootstrap(np.asarray(metric(*columns), np.float64), low, high, p)


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
  """Tests whether two models are right equally often on the same examples.

  Only examples where one is right and the other is wrong count. If both models were equally good,
  each such example would go to either with probability 1/2, so p is that of a binomial test.

  Args:
    first, second: bool[n], the example is right.
  Source: McNemar 1947, Psychometrika 12:153, with the binomial law in place of its limit.
  """
  from scipy.stats import binomtest

  first, second = np.asarray(first, bool), np.asarray(second, bool)
  if first.shape != second.shape or first.ndim != 1:
    raise ValueError(f'mcnemar: got shapes {first.shape} and {second.shape}, expected [n] twice')
  b, c = int((first & ~second).sum()), int((second & ~first).sum())
  p = float(binomtest(b, b + c).pvalue) if b + c else 1.0
  return McNemar(b, c, p)
