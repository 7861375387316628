"""evaluation/statistics/power.py: against simulations, exact sums and statsmodels."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from ftjax.evaluation.statistics.paired import permutation
from ftjax.evaluation.statistics.power import (
  power_of_mcnemar,
  power_of_mean,
  sensitivity_of_mean,
  sensitivity_of_proportions,
)

SIMULATIONS = 20_000


def _refused(difference, discordant, n, seed=0):
  """The share of simulated data whose McNemar test is significant."""
  share = max(discordant, difference)
  cells = ((share - difference) / 2, (share + difference) / 2, 1 - share)
  b, c, _ = np.random.default_rng(seed).multinomial(n, cells, SIMULATIONS).T
  return (2 * scipy.stats.binom.cdf(np.minimum(b, c), b + c, 0.5) < 0.05).mean()


@pytest.mark.parametrize(('difference', 'discordant', 'n'), [
  (0.1, 0.3, 200), (0.05, 0.05, 100), (0.04, 0.1, 500), (0.0, 0.2, 150), (0.5, 0.6, 12),
])  # fmt: skip
def test_power_of_mcnemar_is_that_of_simulated_tests(difference, discordant, n):
  got = power_of_mcnemar(difference, discordant, n)
  assert got == pytest.approx(_refused(difference, discordant, n), abs=0.012)
  assert power_of_mcnemar(-difference, discordant, n) == pytest.approx(got)


def test_power_of_mcnemar_by_hand():
  # All 6 pairs are discordant and for one model: p = 2 / 2^6 < 0.05, which 5 pairs do not reach.
  assert power_of_mcnemar(1, 1, 6) == pytest.approx(1) and power_of_mcnemar(1, 1, 5) == 0
  # With 8 discordant pairs b <= 0 alone is significant: 0.75^8 + 0.25^8 for odds 3 : 1
  assert power_of_mcnemar(0.5, 1, 8) == pytest.approx(0.75**8 + 0.25**8)
  assert power_of_mcnemar(0, 0, 10) == 0 and power_of_mcnemar(0.3, 0.5, 0) == 0


def test_power_of_a_mean_equals_statsmodels():
  # statsmodels 0.15: TTestPower().power(difference / sd, n, 0.05)
  for difference, sd, n, expected in (
    (0.5, 1, 10, 0.29317560651407687),
    (0.3, 0.8, 30, 0.5103210070356222),
    (0.05, 0.4, 200, 0.42055508740492725),
    (0.1, 1, 999, 0.8844811315556353),
    (2, 1, 5, 0.9088848681009404),
  ):
    assert power_of_mean(difference, sd, n) == pytest.approx(expected, abs=2e-5)
    assert power_of_mean(-difference, sd, n) == power_of_mean(difference, sd, n)
  # TTestPower().solve_power(nobs=200, alpha=0.05, power=0.8) * sd and its nobs
  got = sensitivity_of_mean(0.03, 0.02, 200)
  assert got.smallest == pytest.approx(0.05630398824225743, rel=1e-4)
  assert got.rows == math.ceil(699.5996483459445) and got.is_too_small
  assert power_of_mean(0, 1, 50) == pytest.approx(0.05, abs=1e-5)
  assert power_of_mean(1, 0, 2) == 1 and power_of_mean(0, 0, 2) == 0 and power_of_mean(1, 1, 1) == 0


@pytest.mark.parametrize(('b', 'c', 'n'), [(20, 35, 200), (3, 10, 100), (60, 75, 1000), (0, 0, 50)])
def test_the_smallest_difference_has_the_wanted_power(b, c, n):
  got = sensitivity_of_proportions(b, c, n)
  assert _refused(got.smallest, (b + c) / n, n) == pytest.approx(0.8, abs=0.015)
  if b == c:
    assert got.rows is None and not got.is_too_small
    return
  assert got.is_too_small and got.rows > n
  seen = (c - b) / n
  assert _refused(seen, (b + c) / n, got.rows) == pytest.approx(0.8, abs=0.015)
  assert power_of_mcnemar(seen, (b + c) / n, got.rows) >= 0.8
  assert power_of_mcnemar(seen, (b + c) / n, got.rows - 1) < 0.8


@pytest.mark.parametrize('n', [10, 60, 400])
def test_the_smallest_mean_has_the_wanted_power_by_t_and_by_permutation(n):
  got = sensitivity_of_mean(0.1, 1 / math.sqrt(n), n)
  rng = np.random.default_rng(n)
  x = rng.normal(size=(n, 2000)) + got.smallest
  assert (scipy.stats.ttest_1samp(x, 0).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.03)
  pooled = np.concatenate([np.zeros_like(x), x])
  test = permutation(lambda w: w @ pooled / n, range(n), range(n), seed=0, resamples=999)
  assert (test.p < 0.05).mean() == pytest.approx(0.8, abs=0.04)
  sized = rng.normal(size=(min(got.rows, 1000), 2000)) + 0.1
  if got.rows <= 1000:
    assert (scipy.stats.ttest_1samp(sized, 0).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.03)
  assert power_of_mean(0.1, 1, got.rows - 1) < 0.8 <= power_of_mean(0.1, 1, got.rows)


def test_more_rows_show_smaller_differences():
  shown = [sensitivity_of_proportions(n // 10, n // 5, n) for n in (20, 100, 500, 2500)]
  assert all(a.smallest > b.smallest for a, b in itertools.pairwise(shown))
  assert [s.is_too_small for s in shown] == [True, True, False, False]
  assert len({s.rows for s in shown}) == 1  # what is seen is the same


def test_sets_that_can_show_nothing():
  for got in (
    sensitivity_of_proportions(0, 0, 0),
    sensitivity_of_proportions(0, 0, 1),
    sensitivity_of_proportions(1, 2, 5),  # McNemar needs six pairs for p < 0.05
    sensitivity_of_mean(0.2, math.nan, 10),
    sensitivity_of_mean(0.2, 0.1, 1),
  ):
    assert math.isnan(got.smallest) and got.is_too_small
  same = sensitivity_of_mean(0.0, 0.0, 50)  # of equal results nothing is known
  assert math.isnan(same.smallest) and not same.is_too_small
  assert sensitivity_of_mean(math.nan, 0.1, 50).rows is None
  assert sensitivity_of_mean(1e-12, 0.1, 50).rows is None
  assert sensitivity_of_proportions(10_000, 10_001, 10**6).rows is None
  with pytest.raises(ValueError, match=r'b \+ c <= n'):
    sensitivity_of_proportions(3, 3, 5)
