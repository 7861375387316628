"""evaluation/statistics.py: against formulas, scipy's bootstrap and edge cases."""

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
import scipy.stats

from ftjax.evaluation.statistics import bootstrap, mcnemar, wilson


def _mean(x):
  return x.mean(-1)


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
  assert wilson(0, 10)[0] == 0.0
  for k, n in ((-1, 5), (6, 5)):
    with pytest.raises(ValueError, match='0 <= k <= n'):
      wilson(k, n)


def test_mcnemar_equals_the_binomial_sum_and_hand():
  rng = np.random.default_rng(0)
  for n, share in ((1, 0.5), (10, 0.2), (50, 0.6), (400, 0.7), (5000, 0.55)):
    first, second = rng.random(n) < 0.5, rng.random(n) < share
    got = mcnemar(first, second)
    assert got.b == sum(a and not b for a, b in zip(first, second, strict=True))
    pairs, few = got.b + got.c, min(got.b, got.c)
    expected = min(1, Fraction(2 * sum(math.comb(pairs, i) for i in range(few + 1)), 2**pairs))
    assert got.p == pytest.approx(float(expected), rel=1e-12)
  # b = 1, c = 5: 2 (C(6,0) + C(6,1)) / 2^6 = 14 / 64
  first = np.array([1, 0, 0, 0, 0, 0, 1, 0], bool)
  second = np.array([0, 1, 1, 1, 1, 1, 1, 0], bool)
  got = mcnemar(first, second)
  assert (got.b, got.c, got.p) == (1, 5, 14 / 64)
  back = mcnemar(second, first)
  assert (back.b, back.c, back.p) == (5, 1, 14 / 64)


def test_mcnemar_where_nothing_differs():
  same = np.array([1, 0, 1], bool)
  assert mcnemar(same, same).p == 1.0
  assert mcnemar(np.zeros(0, bool), np.zeros(0, bool)).p == 1.0
  assert mcnemar(np.array([1, 0], bool), np.array([0, 1], bool)).p == 1.0
  assert mcnemar(np.ones(3000, bool), np.zeros(3000, bool)).p == 0.0  # 2^-2999
  with pytest.raises(ValueError, match=r'\(2,\) and \(3,\)'):
    mcnemar(np.zeros(2), np.zeros(3))


def test_bootstrap_equals_scipy_within_its_noise():
  x = np.random.default_rng(1).exponential(size=120)
  got = bootstrap(_mean, [x], seed=0, resamples=20_000)
  expected = scipy.stats.bootstrap(
    (x,), np.mean, n_resamples=20_000, method='percentile', rng=np.random.default_rng(5)
  )
  # Two independent estimates of a 2.5 % quantile from 20,000 draws; the standard error is 0.017 sd
  # each.
  tolerance = 5 * 0.017 * math.sqrt(2) * expected.standard_error
  low, high = expected.confidence_interval
  assert got.low == pytest.approx(low, abs=tolerance)
  assert got.high == pytest.approx(high, abs=tolerance)
  assert got.value == x.mean()


def test_bootstrap_is_deterministic_and_seeded():
  x = np.random.default_rng(1).normal(size=50)
  one, two = (bootstrap(_mean, [x], seed=3) for _ in range(2))
  assert one == two
  assert one.low != bootstrap(_mean, [x], seed=4).low


def test_chunks_do_not_change_the_draws(monkeypatch):
  from ftjax.evaluation import statistics as module

  x = np.random.default_rng(1).normal(size=37)
  whole = bootstrap(_mean, [x], seed=3, resamples=101)
  monkeypatch.setattr(module, '_CHUNK', 37 * 10)
  assert bootstrap(_mean, [x], seed=3, resamples=101) == whole


def test_pairs_stay_together_and_vectors_are_metrics():
  rng = np.random.default_rng(2)
  x = rng.normal(size=80)
  y = x + 0.5  # the difference is constant although both vary

  def both(a, b):
    return np.stack([(b - a).mean(-1), b.mean(-1)], -1)

  got = bootstrap(both, [x, y], seed=0)
  assert got.value.shape == got.low.shape == got.p.shape == (2,)
  assert got.low[0] == pytest.approx(0.5) and got.high[0] == pytest.approx(0.5)
  assert got.high[1] - got.low[1] > 0.2


def test_p_inverts_the_interval():
  for shift in np.linspace(-0.5, 0.5, 41):
    x = np.random.default_rng(7).normal(size=60) + shift
    got = bootstrap(_mean, [x], seed=0, resamples=999)
    excluded = got.low > 0 or got.high < 0
    assert excluded == (got.p < 0.05) or abs(got.p - 0.05) < 0.005


def test_p_is_about_uniform_when_nothing_differs():
  rng = np.random.default_rng(11)
  hits = 0
  for i in range(300):
    base, tuned = rng.random((2, 80)) < 0.7
    got = bootstrap(lambda a, b: b.mean(-1) - a.mean(-1), [base, tuned], seed=i, resamples=400)
    hits += got.p < 0.05
  # 5 % of 300 is 15, sd 3.8; the bootstrap of 80 pairs is a little eager.
  assert 3 <= hits <= 32


def test_bootstrap_of_constants_and_of_nothing():
  zero = bootstrap(_mean, [np.zeros(10)], seed=0)
  assert (zero.low, zero.high, zero.p) == (0, 0, 1)
  ones = bootstrap(_mean, [np.ones(10)], seed=0, resamples=1999)
  assert (ones.low, ones.high) == (1, 1) and ones.p == 2 / 2000
  with pytest.raises(ValueError, match='n > 0'):
    bootstrap(_mean, [np.zeros(0)], seed=0)
  with pytest.raises(ValueError, match=r'\(3,\), \(4,\)'):
    bootstrap(lambda a, b: a, [np.zeros(3), np.zeros(4)], seed=0)
