"""Compares two models on the same rows: tests, intervals of a difference, effect sizes.

A difference is second - first. A pair is a row with a result of each model, or a prompt with
several results of each: a cluster, whose results are drawn and swapped together.
"""

import dataclasses
import math
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from ftjax.evaluation.statistics.bootstrap import Bootstrap, Figure, chunks, of_clusters
from ftjax.evaluation.statistics.intervals import Interval, members, proportion


@dataclasses.dataclass(frozen=True)
class McNemar:
  """b: examples right only for the first model; c: only for the second; p: exact, two-sided."""

  b: int
  c: int
  p: float


@dataclasses.dataclass(frozen=True)
class Permutation:
  """A test of the difference of each figure; arrays of shape [] or [M].

  Attributes:
    value: float64, the figure of the second model minus that of the first.
    p: float64, two-sided; NaN where the value is.
    is_exact: every assignment of results to models was counted, not a sample of them.
    assignments: how many were.
    incomputable: int64, those without a finite figure; they count as extreme, against a small p.
  """

  value: np.ndarray
  p: np.ndarray
  is_exact: bool
  assignments: int
  incomputable: np.ndarray


@dataclasses.dataclass(frozen=True)
class WinRate:
  """How often the second model is better.

  Attributes:
    wins, ties, losses: results of the second model against the first.
    rate: Interval of (wins + ties / 2) / n.
    p: two-sided, of rate 1/2.
  """

  wins: int
  ties: int
  losses: int
  rate: Interval
  p: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
  """Tests whether two models are right equally often on the same examples.

  Only examples where one is right and the other is wrong count. If both models were equally good,
  each such example would go to either with probability 1/2, so p is that of a binomial test. The
  examples must be independent: for several results of a prompt use `permutation`.

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


def difference_of_proportions(b: int, c: int, n: int, level: float = 0.95) -> Interval:
  """Computes the interval of (c - b) / n: b and c of n independent pairs are right for one alone.

  It adds half a pair to b and to c twice, so it has a width even where b = c = 0. NaN where n = 0.

  Raises:
    ValueError: b or c is negative, or b + c > n.
  Source: Bonett and Price 2012, J. Educational and Behavioral Statistics 37:479.
  """
  from scipy.stats import norm

  if min(b, c) < 0 or b + c > n:
    raise ValueError(f'got b={b} and c={c} of n={n}, expected b, c >= 0 and b + c <= n')
  if n == 0:
    return Interval(math.nan, math.nan, math.nan, math.nan)
  value, b_share, c_share = (c - b) / n, (b + 1) / (n + 2), (c + 1) / (n + 2)
  center = c_share - b_share
  half = norm.ppf((1 + level) / 2) * math.sqrt((b_share + c_share - center**2) / (n + 2))
  se = math.sqrt(((b + c) / n - value**2) / n)
  return Interval(value, float(max(-1.0, center - half)), float(min(1.0, center + half)), se)


def bootstrap_difference(
  first: Figure,
  second: Figure,
  first_clusters: Iterable[Hashable],
  second_clusters: Iterable[Hashable],
  *,
  seed: int,
  resamples: int = 2000,
  level: float = 0.95,
) -> Bootstrap:
  """Computes the interval of second - first, as bootstrap.bootstrap does, and its p.

  A cluster is drawn with the results of both models, whose numbers of results may differ.

  Args:
    first, second: the figure of each model, of its own n1 or n2 results.
    first_clusters, second_clusters: [n1], [n2], the cluster of each result.

  Raises:
    ValueError: a model lacks a cluster of the other.
  """
  one, two = _paired(first_clusters, second_clusters)
  return of_clusters(
    lambda weights: np.asarray(second(weights[:, two])) - np.asarray(first(weights[:, one])),
    int(one.max()) + 1 if len(one) else 0,
    seed=seed,
    resamples=resamples,
    level=level,
  )


def permutation(
  figure: Figure,
  first_clusters: Iterable[Hashable],
  second_clusters: Iterable[Hashable],
  *,
  seed: int,
  resamples: int = 9999,
) -> Permutation:
  """Tests a difference of any figure by swapping the models' results, cluster by cluster.

  Were both models alike, each assignment of a cluster's two sets of results to the models would be
  as probable. p is the share of assignments with a difference at least as large in absolute value.
  All of them count where 2^(G - 1) <= R: the other half mirrors them. Else p is
  (1 + extreme) / (1 + R) of R random ones.

  Args:
    figure: of the pooled results, n1 of the first model and then n2 of the second. Weights are 1
      for the results that are assigned to a model, else 0.
    first_clusters, second_clusters: [n1], [n2], the cluster of each result.
    seed: of the random assignments.
    resamples: R.

  Raises:
    ValueError: the models have different numbers of results in a cluster.
  Source: Phipson and Smyth 2010, Statistical Applications in Genetics 9:39, for the ones added.
  """
  one, two = _paired(first_clusters, second_clusters)
  if not np.array_equal(np.bincount(one), np.bincount(two)):
    raise ValueError(
      'permutation: the models have different numbers of results for a prompt, so their results '
      'cannot be swapped; compare as many samples of each, or use bootstrap_difference'
    )
  count = int(one.max()) + 1 if len(one) else 0

  def difference(swapped: np.ndarray) -> np.ndarray:
    weights = np.concatenate([swapped[:, one], 1 - swapped[:, two]], axis=1)
    return np.asarray(figure(weights), np.float64) - np.asarray(figure(1 - weights), np.float64)

  value = difference(np.zeros((1, count)))[0]
  is_exact = 2 ** max(0, count - 1) <= resamples
  rows = 2 ** max(0, count - 1) if is_exact else resamples
  least = np.abs(value) * (1 - 1e-9) - 1e-12  # rounding must not part assignments that are equal
  extreme, incomputable = (np.zeros(value.shape, np.int64) for _ in range(2))
  rng, start = np.random.default_rng(seed), 0
  for size in chunks(rows, 2 * len(one)):
    if is_exact:
      number = np.arange(start, start + size)[:, None]
      swapped = (number >> np.arange(count)) & 1  # the last cluster is never swapped
    else:
      swapped = rng.integers(2, size=(size, count))
    found = difference(swapped.astype(np.float64))
    extreme += (~(np.abs(found) < least)).sum(0)
    incomputable += (~np.isfinite(found)).sum(0)
    start += size
  p = extreme / rows if is_exact else (1 + extreme) / (1 + rows)
  return Permutation(value, np.where(np.isfinite(value), p, np.nan), is_exact, rows, incomputable)


def holm(p: Sequence[float]) -> list[float]:
  """Returns p values adjusted for being several: each below alpha bounds the family's error by it.

  The i-th smallest of m is multiplied by m - i + 1, at most 1, and never below a smaller one's. NaN
  is not one of the m and stays.

  Source: Holm 1979, Scandinavian Journal of Statistics 6:65.
  """
  given = np.asarray(p, np.float64)
  known = np.flatnonzero(~np.isnan(given))
  order = known[np.argsort(given[known], kind='stable')]
  out = given.copy()
  out[order] = np.maximum.accumulate(np.minimum(1.0, given[order] * np.arange(len(order), 0, -1)))
  return out.tolist()


def cohen_h(first: float, second: float) -> float:
  """Returns the effect size of two proportions: 2 asin sqrt second - 2 asin sqrt first.

  About 0.2 is small, 0.5 medium, 0.8 large; equal differences near 0 or 1 weigh more.

  Source: Cohen 1988, Statistical Power Analysis, chapter 6.
  """
  return 2 * math.asin(math.sqrt(second)) - 2 * math.asin(math.sqrt(first))


def standardized_difference(differences: np.ndarray, clusters: Iterable[Hashable]) -> float:
  """Returns the effect size of paired values: the mean over the sd of the clusters' differences.

  It is Cohen's d_z; a cluster counts by the mean of its differences. 0 where all differences are 0;
  NaN with less than two clusters, and where all are equal and not 0.

  Args:
    differences: float64[n], second - first.
  Source: Cohen 1988, Statistical Power Analysis, section 2.3.5.
  """
  differences, groups = np.asarray(differences, np.float64), members(clusters)
  means = np.bincount(groups, differences) / np.bincount(groups)
  if len(means) < 2:
    return math.nan
  center, spread = float(means.mean()), float(means.std(ddof=1))
  if spread <= 1e-12 * abs(center):
    return math.nan if center else 0.0
  return center / spread


def win_rate(
  outcomes: np.ndarray,
  clusters: Iterable[Hashable],
  *,
  seed: int,
  resamples: int = 9999,
  level: float = 0.95,
) -> WinRate:
  """Computes how often the second model is better; a tie counts half.

  p is that of the sign test, which leaves ties out. With clusters p is that of `permutation`.

  Args:
    outcomes: float64[n], 1 where the second model is better, 0 where the first is, 0.5 for a tie.
    clusters: [n], the cluster of each outcome.
    seed, resamples: of the permutation.

  Raises:
    ValueError: another outcome.
  Source: Dixon and Mood 1946, JASA 41:557, for the sign test.
  """
  from scipy.stats import binomtest

  outcomes, groups = np.asarray(outcomes, np.float64), members(clusters)
  if not np.isin(outcomes, (0.0, 0.5, 1.0)).all():
    raise ValueError('win_rate: got an outcome other than 0, 0.5 and 1')
  wins, ties, losses = (int((outcomes == x).sum()) for x in (1.0, 0.5, 0.0))
  rate = proportion(outcomes, groups, level)
  if not len(groups) or len(groups) == groups.max() + 1:
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
  else:
    pooled = np.concatenate([1 - outcomes, outcomes])
    test = permutation(lambda w: w @ pooled, groups, groups, seed=seed, resamples=resamples)
    p = float(test.p)
  return WinRate(wins, ties, losses, rate, p)


def _paired(first_clusters, second_clusters) -> tuple[np.ndarray, np.ndarray]:
  """Returns the numbers of both models' clusters, the same for the same: int64[n1], int64[n2]."""
  first, second = list(first_clusters), list(second_clusters)
  joint = members([*first, *second])
  one, two = joint[: len(first)], joint[len(first) :]
  if lonely := set(one.tolist()) ^ set(two.tolist()):
    row = [*first, *second][int(np.argmax(joint == min(lonely)))]
    raise ValueError(f'the models were not run on the same rows: only one has results of {row!r}')
  return one, two
