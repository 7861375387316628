"""Averages a figure over runs that differ in their seed, with the errors of both kinds apart.

A run has two random parts. Another seed gives another model (between seeds); another test set
gives another figure of the same model (within a seed). Runs of one comparison share their test set,
so its error is common to them and does not shrink with more seeds.
"""

import dataclasses
import math
from collections.abc import Hashable, Iterable

import numpy as np

from ftjax.evaluation.statistics.bootstrap import MAX_DROPPED, Figure, draws
from ftjax.evaluation.statistics.intervals import members


@dataclasses.dataclass(frozen=True)
class SeedMean:
  """The mean of a figure over S seeds; NaN where it cannot be computed.

  Attributes:
    values: float64[S], the figure of each seed.
    value: their mean.
    low, high: ends of the interval of the mean over all seeds and rows; with one seed, over rows.
    se: standard error of the mean, of both kinds.
    between_sd: sd over seeds that the test set does not explain; NaN with one seed.
    within_se: standard error of one seed's figure that comes from the test set.
    intraclass: share of between_sd^2 in between_sd^2 + within_se^2: the intraclass correlation of
      figures of one seed on several test sets. Near 1 more seeds help, near 0 more rows.
  """

  values: np.ndarray
  value: float
  low: float
  high: float
  se: float
  between_sd: float
  within_se: float
  intraclass: float


def seed_mean(
  figure: Figure,
  clusters: Iterable[Hashable],
  *,
  seed: int,
  resamples: int = 2000,
  level: float = 0.95,
) -> SeedMean:
  """Computes the mean of a figure over seeds with an interval that has both errors.

  The covariance of the seeds' figures is that of a bootstrap of the rows: its diagonal is the error
  within a seed, beside it is what seeds share. With var the variance of the S figures, the square
  of the standard error is var / S plus the shared part, and at least that of the test set alone.
  The interval adds the squares of the t intervals of both parts, with S - 1 and G - 1 degrees of
  freedom. It covers 95 % where the seeds differ much and up to 99 % where they do not; one with
  Satterthwaite's degrees of freedom covers 92 % with three seeds, 88 % with two.

  Args:
    figure: weights float64[R, n] -> float64[R, S], of all seeds on the same n results each; of
      differences too, tuned with each seed minus the base.
    clusters: [n], the cluster of each result, the same for all seeds.
    seed: of the resampling.
    resamples: R; those without a finite figure of each seed are left out.
  Source: Miller 2024, arXiv 2411.00640, for the error of a test set; Searle, Casella and McCulloch
    1992, Variance Components, chapter 4, for the parts. Coverage: tests/test_coverage.py.
  """
  from scipy.stats import t

  groups = members(clusters)
  count = int(groups.max()) + 1 if len(groups) else 0
  values = np.asarray(figure(np.ones((1, len(groups)))), np.float64)[0]
  if values.ndim != 1 or not len(values):
    raise ValueError(f'seed_mean: got figures of shape {values.shape}, expected [S > 0]')
  seeds, value = len(values), float(values.mean())
  nan = math.nan
  if count < 2 or not np.isfinite(values).all():
    return SeedMean(values, value, nan, nan, nan, nan, nan, nan)
  stars = draws(lambda w: figure(w[:, groups]), count, seed=seed, resamples=resamples)
  stars = stars[np.isfinite(stars).all(1)]
  if len(stars) < (1 - MAX_DROPPED) * resamples:
    return SeedMean(values, value, nan, nan, nan, nan, nan, nan)
  # A resample of G clusters varies by (G - 1) / G too little.
  covariance = np.atleast_2d(np.cov(stars.T)) * count / (count - 1)
  within, whole = float(np.diag(covariance).mean()), float(covariance.mean())
  by_rows = float(t.ppf((1 + level) / 2, count - 1))
  if seeds == 1:
    se = math.sqrt(within)
    return SeedMean(values, value, value - by_rows * se, value + by_rows * se, se, nan, se, nan)
  shared = max(0.0, (seeds * whole - within) / (seeds - 1))
  spread = float(values.var(ddof=1))
  between = max(0.0, spread - (within - shared))
  by_seeds = float(t.ppf((1 + level) / 2, seeds - 1))
  half = math.sqrt(max(by_seeds**2 * spread / seeds + by_rows**2 * shared, by_rows**2 * whole))
  total = between + within
  return SeedMean(
    values=values,
    value=value,
    low=value - half,
    high=value + half,
    se=math.sqrt(max(spread / seeds + shared, whole)),
    between_sd=math.sqrt(between),
    within_se=math.sqrt(within),
    intraclass=between / total if total > 0 else nan,
  )
