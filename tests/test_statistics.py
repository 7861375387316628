"""evaluation/statistics/{intervals,bootstrap}.py: formulas, scipy's bootstrap, edge cases."""

import dataclasses
import math
from statistics import NormalDist

import numpy as np
import pytest
import scipy.stats

from ftjax.evaluation.statistics import bootstrap as module
from ftjax.evaluation.statistics.bootstrap import MAX_DROPPED, bootstrap
from ftjax.evaluation.statistics.intervals import (
  design_effect,
  intraclass_correlation,
  mean,
  members,
  proportion,
  standard_error,
  wilson,
)


def _mean(x):
  """The figure that is the mean of the columns of x: float64[n] or [n, M]."""
  return lambda weights: weights @ x / weights.sum(1).reshape(-1, *(1,) * (x.ndim - 1))


def _numbers(found):
  return [float(x) for x in (found.value, found.low, found.high, found.se, found.p)]


def _clustered(count=40, size=4, seed=0):
  """Values float64[n] whose clusters differ, and their clusters, shuffled."""
  rng = np.random.default_rng(seed)
  clusters = np.repeat(np.arange(count), size)
  values = rng.normal(size=count)[clusters] + rng.normal(size=count * size)
  order = rng.permutation(len(values))
  return values[order], clusters[order]


@pytest.mark.parametrize('level', [0.9, 0.95, 0.99])
def test_wilson_equals_its_formula(level):
  z = NormalDist().inv_cdf((1 + level) / 2)
  for n in (1, 2, 7, 50, 400, 100_000):
    for k in sorted({0, 1, n // 3, n // 2, n - 1, n}):
      center = (k + z * z / 2) / (n + z * z)
      half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
      assert wilson(k, n, level) == pytest.approx((center - half, center + half), abs=1e-12), (k, n)


def test_wilson_by_hand_and_at_the_ends():
  # k = 8, n = 10, z = 1.95996: center (8 + 1.92073) / 13.84146, half 1.95996/13.84146 sqrt(1.6 +
  # .96036)
  assert wilson(8, 10) == pytest.approx((0.49016, 0.94333), abs=1e-4)
  assert wilson(0, 0) == (0.0, 1.0)
  assert wilson(10, 10)[1] == 1.0 and 0.69 < wilson(10, 10)[0] < 0.73
  for n in range(1, 300):  # rounding does not put an end past the estimate
    assert wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1
    assert proportion(np.arange(n) < 1, range(n)).low <= 1 / n
  for k, n in ((-1, 5), (6, 5)):
    with pytest.raises(ValueError, match='0 <= k <= n'):
      wilson(k, n)


def test_members_are_numbers_of_any_labels():
  assert members(['b', 'a', 'b', 'é', 'a']).tolist() == [0, 1, 0, 2, 1]
  assert members(np.array([7, 7, 3])).tolist() == [0, 0, 1]
  assert members([]).shape == (0,) and members([]).dtype == np.int64


def test_clusters_of_one_are_no_clusters():
  x = np.random.default_rng(0).normal(size=50)
  assert standard_error(x, range(50)) == pytest.approx(scipy.stats.sem(x), rel=1e-12)
  low, high = scipy.stats.ttest_1samp(x, 0).confidence_interval(0.9)
  got = mean(x, range(50), 0.9)
  assert (got.value, got.low, got.high) == pytest.approx((x.mean(), low, high))
  right = (x > 0.3).astype(float)
  got = proportion(right, range(50))
  assert (got.low, got.high) == pytest.approx(wilson(int(right.sum()), 50), abs=1e-12)
  assert design_effect(x, range(50)) == pytest.approx(1)


def test_equal_clusters_are_results_that_are_their_means():
  x, clusters = _clustered()
  means = np.array([x[clusters == c].mean() for c in range(40)])
  assert standard_error(x, clusters) == pytest.approx(scipy.stats.sem(means), rel=1e-12)
  got, expected = mean(x, clusters), mean(means, range(40))
  assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(expected))


def test_the_clustered_error_equals_statsmodels_and_hand():
  y, g = np.array([1.0, 2.0, 4.0, 4.0, 6.0]), [0, 0, 1, 1, 2]
  # Sums of deviations from 3.4: -3.8, 1.2, 2.6; squares 14.44 + 1.44 + 6.76 = 22.64; 3/2 22.64/25
  assert standard_error(y, g) == pytest.approx(math.sqrt(1.5 * 22.64 / 25), rel=1e-12)
  # statsmodels 0.15: OLS(y, ones(5)).fit(cov_type='cluster', cov_kwds={'groups': g}).bse
  assert standard_error(y, g) == pytest.approx(1.16550418, abs=1e-8)


def test_copies_of_a_result_add_nothing():
  right = (np.random.default_rng(1).random(60) < 0.4).astype(float)
  copied, clusters = np.repeat(right, 5), np.repeat(np.arange(60), 5)
  assert standard_error(copied, clusters) == pytest.approx(standard_error(right, range(60)))
  one, many = proportion(right, range(60)), proportion(copied, clusters)
  assert design_effect(copied, clusters) == pytest.approx(5 * 299 / 295, rel=1e-3)
  assert intraclass_correlation(copied, clusters) == pytest.approx(1)
  # Wider than Wilson's by t against z and G / (G - 1) alone.
  assert many.low < one.low and one.high < many.high
  assert many.high - many.low < 1.04 * (one.high - one.low)


def test_intraclass_correlation_is_that_of_the_analysis_of_variance():
  x, clusters = _clustered(30, 5)
  f = scipy.stats.f_oneway(*(x[clusters == c] for c in range(30))).statistic
  assert intraclass_correlation(x, clusters) == pytest.approx((f - 1) / (f + 4))
  rng = np.random.default_rng(3)
  sizes = rng.integers(1, 9, 2000)
  clusters = np.repeat(np.arange(2000), sizes)
  x = math.sqrt(0.3) * rng.normal(size=2000)[clusters] + math.sqrt(0.7) * rng.normal(
    size=len(clusters)
  )
  assert intraclass_correlation(x, clusters) == pytest.approx(0.3, abs=0.03)
  assert abs(intraclass_correlation(rng.normal(size=len(x)), clusters)) < 0.03
  # Clusters 0, 2 | 5 | 4, 6, 8 with mean 25 / 6: between (2 (19/6)^2 + (5/6)^2 + 3 (11/6)^2) / 2,
  # within (2 + 8) / 3, size (6 - 14 / 6) / 2
  between, within, size = (2 * 361 + 25 + 3 * 121) / 72, 10 / 3, 11 / 6
  got = intraclass_correlation(np.array([0, 2, 5, 4, 6, 8]), [0, 0, 1, 2, 2, 2])
  assert got == pytest.approx((between - within) / (between + (size - 1) * within))


def test_clusters_that_cancel_do_not_narrow_a_proportion():
  right, clusters = np.tile([0.0, 1.0], 30), np.repeat(np.arange(30), 2)
  assert standard_error(right, clusters) == 0 and intraclass_correlation(right, clusters) < -0.9
  right[0] = 1  # all but one cancel
  got, (low, high) = proportion(right, clusters), wilson(31, 60)
  assert got.low < low < high < got.high


def test_a_proportion_stays_within_0_and_1_and_has_a_width():
  rng = np.random.default_rng(4)
  for n, size in ((1, 1), (2, 1), (8, 4), (40, 4), (40, 40)):
    clusters = np.repeat(np.arange(n // size), size)
    for p in (0, 0.1, 0.5, 1):
      values = (rng.random(n) < p).astype(float)
      got = proportion(values, clusters)
      assert 0 <= got.low <= got.value <= got.high <= 1 and got.high - got.low > 0.05, (n, size, p)
  assert dataclasses.astuple(proportion(np.ones(8), np.repeat([0, 1], 4)))[1:3] == pytest.approx(
    (2 / (2 + scipy.stats.t.ppf(0.975, 1) ** 2), 1)
  )
  with pytest.raises(ValueError, match='expected 0 to 1'):
    proportion(np.array([0.5, 1.5]), range(2))


def test_intervals_of_nothing_one_and_equal_results():
  nan = math.nan
  same = [
    (mean(np.zeros(0), []), (nan, nan, nan, nan)),
    (mean(np.ones(1), [0]), (1, nan, nan, nan)),
    (mean(np.ones(4), [0] * 4), (1, nan, nan, nan)),
    (mean(np.ones(4), range(4)), (1, 1, 1, 0)),
    (proportion(np.zeros(0), []), (nan, 0, 1, nan)),
    (proportion(np.ones(4), [0] * 4), (1, 0, 1, nan)),
  ]
  for got, expected in same:
    np.testing.assert_equal(dataclasses.astuple(got), expected)
  assert proportion(np.ones(1), [0]).high == 1 and proportion(np.ones(1), [0]).low > 0.2
  for function in (design_effect, intraclass_correlation):
    assert math.isnan(function(np.zeros(0), [])) and math.isnan(function(np.ones(4), [0, 0, 1, 1]))
  for bad in (np.array([1, nan]), np.ones((2, 2)), np.ones(3)):
    with pytest.raises(ValueError, match=r'expected \[n\] finite'):
      mean(bad, range(2))


def test_bootstrap_equals_scipy_within_its_noise():
  x = np.random.default_rng(1).exponential(size=120)
  got = bootstrap(_mean(x), range(120), seed=0, resamples=20_000)
  # The level at which scipy's percentiles are those that are moved out for n = 120.
  moved = scipy.stats.t.ppf(0.975, 119) * math.sqrt(120 / 119)
  expected = scipy.stats.bootstrap(
    (x,),
    np.mean,
    n_resamples=20_000,
    method='percentile',
    confidence_level=1 - 2 * scipy.stats.norm.sf(moved),
    rng=np.random.default_rng(5),
  )
  # Two independent estimates of a 2.5 % quantile from 20,000 draws; the standard error is 0.017 sd
  # each.
  tolerance = 5 * 0.017 * math.sqrt(2) * expected.standard_error
  low, high = expected.confidence_interval
  assert got.low == pytest.approx(low, abs=tolerance)
  assert got.high == pytest.approx(high, abs=tolerance)
  assert got.value == pytest.approx(x.mean(), rel=1e-12) and got.dropped == 0
  assert got.se == pytest.approx(scipy.stats.sem(x), rel=0.03)


def test_the_bootstrap_of_clusters_has_the_clustered_error():
  x, clusters = _clustered(60, 3)
  got = bootstrap(_mean(x), clusters, seed=0, resamples=20_000)
  assert got.se == pytest.approx(standard_error(x, clusters), rel=0.03)
  expected = mean(x, clusters)
  width = expected.high - expected.low
  assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=0.05 * width)
  x, clusters = x[clusters < 6], clusters[clusters < 6]
  few, expected = bootstrap(_mean(x), clusters, seed=0, resamples=20_000), mean(x, clusters)
  assert few.se == pytest.approx(expected.se, rel=0.03)
  assert few.high - few.low == pytest.approx(expected.high - expected.low, rel=0.25)


def test_bootstrap_is_deterministic_and_seeded():
  figure = _mean(np.random.default_rng(1).normal(size=50))
  one, two = (bootstrap(figure, range(50), seed=3) for _ in range(2))
  assert _numbers(one) == _numbers(two)
  assert one.low != bootstrap(figure, range(50), seed=4).low
  labels = [f'row {i}' for i in range(50)]
  assert _numbers(bootstrap(figure, labels, seed=3)) == _numbers(one)


def test_chunks_do_not_change_the_draws(monkeypatch):
  figure = _mean(np.random.default_rng(1).integers(100, size=37).astype(float))
  whole = bootstrap(figure, range(37), seed=3, resamples=101)
  monkeypatch.setattr(module, '_CHUNK', 37 * 10)
  assert _numbers(bootstrap(figure, range(37), seed=3, resamples=101)) == _numbers(whole)


def test_pairs_stay_together_and_figures_may_be_several():
  x = np.random.default_rng(2).normal(size=80)
  both = np.stack([x + 0.5 - x, x + 0.5], -1)  # the difference is constant although both vary
  got = bootstrap(_mean(both), range(80), seed=0)
  assert all(a.shape == (2,) for a in (got.value, got.low, got.high, got.se, got.p, got.dropped))
  assert got.low[0] == pytest.approx(0.5) and got.high[0] == pytest.approx(0.5)
  assert got.high[1] - got.low[1] > 0.2
  alone = bootstrap(_mean(both[:, 1]), range(80), seed=0)
  assert _numbers(alone) == pytest.approx(
    [a[1] for a in (got.value, got.low, got.high, got.se, got.p)]
  )


@pytest.mark.parametrize('count', [6, 60])
def test_p_inverts_the_interval(count):
  for shift in np.linspace(-1.2, 1.2, 25):
    x = np.random.default_rng(7).normal(size=count) + shift
    got = bootstrap(_mean(x), range(count), seed=0, resamples=9999)
    if 0.03 < got.p < 0.5:  # the interval of level 1 - p ends at 0
      touching = bootstrap(_mean(x), range(count), seed=0, resamples=9999, level=1 - float(got.p))
      assert min(abs(touching.low), abs(touching.high)) < (0.1 if count < 10 else 0.06) * got.se
    excluded = got.low > 0 or got.high < 0
    assert excluded == (got.p < 0.05) or abs(got.p - 0.05) < 0.005


def test_bootstrap_of_constants_nothing_and_one():
  assert _numbers(bootstrap(_mean(np.zeros(10)), range(10), seed=0)) == [0, 0, 0, 0, 1]
  ones = bootstrap(_mean(np.ones(10)), range(10), seed=0, resamples=1999)
  assert _numbers(ones)[:4] == [1, 1, 1, 0]
  least = scipy.stats.norm.ppf(1 / 2000) * math.sqrt(9 / 10)  # 1 / (R + 1), never 0
  assert ones.p == pytest.approx(2 * scipy.stats.t.cdf(least, 9))
  nan = math.nan
  for x, clusters in ((np.ones(1), [0]), (np.array([1.0, 3.0]), ['a', 'a'])):
    got = bootstrap(_mean(x), clusters, seed=0)
    np.testing.assert_equal(_numbers(got), [x.mean(), nan, nan, nan, nan])
  with np.errstate(invalid='ignore'):
    assert math.isnan(bootstrap(_mean(np.zeros(0)), [], seed=0).value)


def test_resamples_without_a_figure_are_dropped_and_counted():
  def share(n, of):
    """The share of ones among results of a class with `of` members: NaN without one."""
    is_of = (np.arange(n) < of).astype(float)
    right = is_of * (np.arange(n) % 2)

    def figure(weights):
      below = weights @ is_of
      return np.divide(weights @ right, below, out=np.full(len(below), np.nan), where=below > 0)

    return figure

  # A class of 3 of 30 is absent with (0.9)^30 = 4.2 %, one of 1 with (29 / 30)^30 = 36 %.
  some = bootstrap(share(30, 3), range(30), seed=0)
  assert 50 < some.dropped < 120 and some.dropped < MAX_DROPPED * 2000
  assert some.low <= some.value <= some.high and some.se > 0
  many = bootstrap(share(30, 1), range(30), seed=0)
  assert 600 < many.dropped < 850 and many.value == 0
  assert all(math.isnan(x) for x in _numbers(many)[1:])
  both = bootstrap(
    lambda w: np.stack([share(30, 3)(w), w[:, 0], share(30, 0)(w)], -1), range(30), seed=0
  )
  assert both.low[0] == some.low and both.dropped.tolist() == [some.dropped, 0, 2000]
  assert both.high[1] > 1 and np.isnan(both.value[2]) and np.isnan(both.p[2])
