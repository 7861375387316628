"""Computes bootstrap intervals of any figure, by drawing how often each cluster of results counts.

Everything is seeded: the same data give the same figures.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Iterator

import numpy as np

from ftjax.evaluation.statistics.intervals import members

# Weights float64[R, n] of n results -> float64[R], or float64[R, M] for M figures at once. A row of
# weights gives how often each result counts; NaN where the figure cannot be computed.
Figure = Callable[[np.ndarray], np.ndarray]

MAX_DROPPED = 0.1  # share of the resamples without a figure, above which there is no interval

_CHUNK = 1 << 22  # weights held at once


@dataclasses.dataclass(frozen=True)
class Bootstrap:
  """An interval of each figure; arrays of shape [] or [M].

  Attributes:
    value: float64, the figure of the results.
    low, high: float64, ends of its interval.
    se: float64, standard error: the sd over the resamples, times sqrt(G / (G - 1)) so that it is
      that of intervals for a mean.
    p: float64, two-sided, of value 0.
    dropped: int64, resamples without a finite figure, such as those that lack a class; they are
      left out.
    resamples: how many there were.

  low, high, se and p are NaN with less than two clusters, and where more than MAX_DROPPED of the
  resamples were dropped or the value is not finite.
  """

  value: np.ndarray
  low: np.ndarray
  high: np.ndarray
  se: np.ndarray
  p: np.ndarray
  dropped: np.ndarray
  resamples: int


def bootstrap(
  figure: Figure,
  clusters: Iterable[Hashable],
  *,
  seed: int,
  resamples: int = 2000,
  level: float = 0.95,
) -> Bootstrap:
  """Computes percentile intervals from resamples of whole clusters with replacement.

  The percentiles are moved out for few clusters, to Phi(-t sqrt(G / (G - 1))) with the t quantile
  of G - 1 degrees of freedom: the interval of a mean is then about as wide as its t interval. p
  inverts the interval: p < 1 - level where it excludes 0, as finely as R resolves. A figure of two
  models on the same results is paired: a result is drawn with both. Where all resamples agree (all
  right, say) the interval has no width; that of intervals.proportion has one there.

  Args:
    figure: of n results.
    clusters: [n], the cluster of each result.
    seed: of the resampling.
    resamples: R.
  Source: Efron and Tibshirani 1993, chapters 13 and 15; Hesterberg 2015, The American Statistician
    69:371, for the moved percentiles.
  """
  groups = members(clusters)
  return of_clusters(
    lambda weights: figure(weights[:, groups]),
    int(groups.max()) + 1 if len(groups) else 0,
    seed=seed,
    resamples=resamples,
    level=level,
  )


def of_clusters(
  figure: Figure, count: int, *, seed: int, resamples: int, level: float
) -> Bootstrap:
  """Computes what `bootstrap` does for a figure that takes weights of `count` clusters."""
  from scipy.stats import norm, t

  value = np.asarray(figure(np.ones((1, count))), np.float64)[0]
  nothing = np.full_like(value, np.nan)
  if count < 2:
    dropped = np.zeros(value.shape, np.int64)
    return Bootstrap(value, nothing, nothing, nothing, nothing, dropped, 0)
  stars = draws(figure, count, seed=seed, resamples=resamples)  # [R] or [R, M]
  finite = np.isfinite(stars)
  kept = finite.sum(0)
  stretch = math.sqrt(count / (count - 1))
  tail = norm.cdf(-stretch * t.ppf((1 + level) / 2, count - 1))
  low, high, sd = _spread(stars, finite, tail)
  below, above = (finite & (stars <= 0)).sum(0), (finite & (stars >= 0)).sum(0)
  share = np.minimum(0.5, (1 + np.minimum(below, above)) / (1 + kept))
  p = np.minimum(1.0, 2 * t.cdf(norm.ppf(share) / stretch, count - 1))  # moved as the ends are
  known = np.isfinite(value) & (resamples - kept <= MAX_DROPPED * resamples)
  low, high, se, p = (np.where(known, x, np.nan) for x in (low, high, stretch * sd, p))
  return Bootstrap(value, low, high, se, p, np.asarray(resamples - kept), resamples)


def draws(figure: Figure, count: int, *, seed: int, resamples: int) -> np.ndarray:
  """Returns the figure of each resample of `count` clusters: float64[R] or [R, M]."""
  rng = np.random.default_rng(seed)
  found = []
  for rows in chunks(resamples, count):
    index = rng.integers(count, size=(rows, count))
    index += np.arange(rows)[:, None] * count
    weights = np.bincount(index.reshape(-1), minlength=rows * count).reshape(rows, count)
    found.append(np.asarray(figure(weights.astype(np.float64)), np.float64))
  return np.concatenate(found)


def chunks(rows: int, width: int) -> Iterator[int]:
  """Yields numbers of rows that sum to `rows`, each small enough for weights of that width."""
  most = max(1, _CHUNK // max(1, width))
  for start in range(0, rows, most):
    yield min(most, rows - start)


def _spread(stars, finite, tail):
  """Returns quantiles `tail` and 1 - `tail` and the sd of finite draws: float64[] or [M] each."""
  if finite.all():
    return (*np.quantile(stars, [tail, 1 - tail], axis=0), stars.std(0, ddof=1))
  columns = stars.reshape(len(stars), -1).T
  out = np.full((3, len(columns)), np.nan)
  for i, column in enumerate(columns):
    kept = column[np.isfinite(column)]
    if len(kept) > 1:
      out[:, i] = *np.quantile(kept, [tail, 1 - tail]), kept.std(ddof=1)
  return tuple(out.reshape(3, *stars.shape[1:]))
