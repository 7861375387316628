"""evaluation/statistics/seeds.py: against the analysis of variance and simulated runs."""

import math

import numpy as np
import pytest
import scipy.stats

from ftjax.evaluation.statistics.intervals import mean
from ftjax.evaluation.statistics.seeds import seed_mean


def _runs(rng, seeds, rows, *, between, row, rest):
  """Results float64[n, S]: sd over seeds, over rows that all seeds share, and of the rest."""
  return (
    0.6
    + between * rng.normal(size=seeds)
    + row * rng.normal(size=(rows, 1))
    + rest * rng.normal(size=(rows, seeds))
  )


def _mean(x):
  return lambda weights: weights @ x / weights.sum(1)[:, None]


def test_components_are_those_of_the_analysis_of_variance():
  x = _runs(np.random.default_rng(0), 4, 150, between=0.1, row=0.4, rest=0.3)
  got = seed_mean(_mean(x), range(150), seed=0, resamples=20_000)
  # Two-way layout without replication: mean squares of seeds, of rows and of the rest.
  grand, by_seed, by_row = x.mean(), x.mean(0), x.mean(1)
  seeds = 150 * ((by_seed - grand) ** 2).sum() / 3
  rows = 4 * ((by_row - grand) ** 2).sum() / 149
  rest = ((x - by_seed - by_row[:, None] + grand) ** 2).sum() / (3 * 149)
  assert got.value == pytest.approx(grand) and got.values == pytest.approx(by_seed)
  assert got.between_sd**2 == pytest.approx((seeds - rest) / 150, rel=0.02)
  assert got.within_se == pytest.approx(math.sqrt(x.var(0, ddof=1).mean() / 150), rel=0.02)
  assert got.se**2 == pytest.approx((seeds + rows - rest) / (4 * 150), rel=0.03)
  total = got.between_sd**2 + got.within_se**2
  assert got.intraclass == pytest.approx(got.between_sd**2 / total)
  # Nearly all of the error is between seeds: near the t interval of the four means.
  assert got.low < got.value < got.high
  plain = scipy.stats.ttest_1samp(by_seed, 0).confidence_interval()
  assert got.high - got.low == pytest.approx(plain.high - plain.low, rel=0.4)


def test_equal_seeds_are_one_and_one_has_no_error_between():
  x = np.random.default_rng(1).normal(size=120)
  plain = mean(x, range(120))
  for copies in (1, 2, 5):
    got = seed_mean(_mean(np.stack([x] * copies, -1)), range(120), seed=0, resamples=20_000)
    assert (got.value, got.se) == pytest.approx((plain.value, plain.se), rel=0.03)
    assert got.within_se == pytest.approx(plain.se, rel=0.03)
    assert got.high - got.low == pytest.approx(plain.high - plain.low, rel=0.03)
    if copies == 1:
      assert math.isnan(got.between_sd) and math.isnan(got.intraclass)
    else:
      assert got.between_sd == pytest.approx(0, abs=1e-8)
      assert got.intraclass == pytest.approx(0, abs=1e-8)


def test_seeds_that_differ_much_have_the_t_interval_of_their_figures():
  x = _runs(np.random.default_rng(3), 3, 100, between=0.5, row=0.01, rest=0.01)
  got = seed_mean(_mean(x), range(100), seed=0)
  plain = mean(x.mean(0), range(3))
  assert (got.low, got.high, got.se) == pytest.approx((plain.low, plain.high, plain.se), rel=1e-3)
  assert got.intraclass > 0.99


def test_seeds_that_agree_by_chance_keep_the_error_of_the_test_set():
  rng = np.random.default_rng(5)
  x = rng.normal(size=150)
  got = seed_mean(
    _mean(np.stack([x, rng.permutation(x)], -1)), range(150), seed=0, resamples=20_000
  )
  assert got.between_sd == 0 and got.se == pytest.approx(got.within_se / math.sqrt(2), rel=0.15)
  assert got.high - got.value >= 1.96 * got.se > 0


def test_few_clusters_have_the_error_of_their_t_interval():
  x = np.random.default_rng(4).normal(size=5)
  got = seed_mean(_mean(x[:, None]), range(5), seed=0, resamples=20_000)
  plain = mean(x, range(5))
  assert (got.low, got.high, got.se) == pytest.approx((plain.low, plain.high, plain.se), rel=0.03)


def test_clusters_widen_the_error_of_the_test_set():
  rng = np.random.default_rng(2)
  x = np.repeat(_runs(rng, 3, 60, between=0.02, row=0.4, rest=0.2), 4, axis=0)
  apart = seed_mean(_mean(x), range(240), seed=0)
  whole = seed_mean(_mean(x), np.repeat(np.arange(60), 4), seed=0)
  assert whole.within_se == pytest.approx(2 * apart.within_se, rel=0.1)


def test_figures_that_cannot_be_computed_and_no_spread():
  nan = math.nan

  def rest(found):
    return [found.low, found.high, found.se, found.between_sd, found.within_se, found.intraclass]

  one = seed_mean(_mean(np.ones((4, 3))), [0] * 4, seed=0)
  np.testing.assert_equal(rest(one), [nan] * 6)
  broken = seed_mean(lambda w: np.full((len(w), 2), nan), range(9), seed=0)
  np.testing.assert_equal([broken.value, *rest(broken)], [nan] * 7)
  with np.errstate(invalid='ignore'):
    nothing = seed_mean(_mean(np.ones((0, 3))), [], seed=0)
  np.testing.assert_equal(rest(nothing), [nan] * 6)

  def rare(weights):  # of one result in nine: 35 % of the resamples lack it
    found = np.where(weights[:, :1] > 0, 1.0, nan)
    return np.concatenate([found, found], axis=1)

  got = seed_mean(rare, range(9), seed=0)
  np.testing.assert_equal([got.value, *rest(got)], [1.0] + [nan] * 6)
  flat = seed_mean(_mean(np.ones((9, 3))), range(9), seed=0)
  assert (flat.low, flat.high, flat.se, flat.between_sd) == (1, 1, 0, 0)
  with pytest.raises(ValueError, match=r'expected \[S > 0\]'):
    seed_mean(lambda w: w.sum(1), range(9), seed=0)
