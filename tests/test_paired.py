"""evaluation/statistics/paired.py: against scipy, exact sums and arithmetic by hand."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import f1_score

from ftjax.evaluation.statistics import bootstrap as bootstrap_file
from ftjax.evaluation.statistics.bootstrap import bootstrap
from ftjax.evaluation.statistics.intervals import mean
from ftjax.evaluation.statistics.paired import (
  bootstrap_difference,
  cohen_h,
  difference_of_proportions,
  holm,
  mcnemar,
  permutation,
  standardized_difference,
  win_rate,
)


def _mean(x):
  return lambda weights: weights @ x / weights.sum(1).reshape(-1, *(1,) * (x.ndim - 1))


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


def test_the_difference_of_proportions_by_hand_and_at_the_ends():
  # b = 5, c = 15, n = 100: shares 6 / 102 and 16 / 102, center 10 / 102,
  # half 1.959964 sqrt((22 / 102 - (10 / 102)^2) / 102) = 0.088095
  got = difference_of_proportions(5, 15, 100)
  assert got.value == 0.1
  assert (got.low, got.high) == pytest.approx((0.098039 - 0.088095, 0.098039 + 0.088095), abs=1e-5)
  back = difference_of_proportions(15, 5, 100)
  assert (back.low, back.high) == pytest.approx((-got.high, -got.low))
  rng = np.random.default_rng(0)
  draw = rng.choice([-1.0, 0.0, 1.0], 3000, p=(0.1, 0.75, 0.15))
  large = difference_of_proportions(int((draw < 0).sum()), int((draw > 0).sum()), 3000)
  plain = mean(draw, range(3000))
  assert (large.low, large.high) == pytest.approx((plain.low, plain.high), abs=5e-4)
  assert large.se == pytest.approx(plain.se, rel=1e-3)
  same = difference_of_proportions(0, 0, 50)
  assert same.value == 0 and same.low == -same.high and 0.03 < same.high < 0.08
  assert difference_of_proportions(0, 3, 3).high <= 1
  assert math.isnan(difference_of_proportions(0, 0, 0).value)
  for b, c, n in ((-1, 0, 3), (2, 2, 3)):
    with pytest.raises(ValueError, match=r'b \+ c <= n'):
      difference_of_proportions(b, c, n)


def test_a_paired_bootstrap_is_that_of_the_differences():
  rng = np.random.default_rng(2)
  x = rng.normal(size=80)
  y = x + 0.3 + 0.5 * rng.normal(size=80)
  got = bootstrap_difference(_mean(x), _mean(y), range(80), range(80), seed=3)
  alone = bootstrap(_mean(y - x), range(80), seed=3)
  for name in ('value', 'low', 'high', 'se', 'p'):
    assert vars(got)[name] == pytest.approx(float(vars(alone)[name])), name
  # Another order of the second model's results changes nothing.
  order = rng.permutation(80)
  other = bootstrap_difference(_mean(x), _mean(y[order]), range(80), order, seed=3)
  assert other.low == pytest.approx(float(got.low)) and other.p == got.p
  same = bootstrap_difference(_mean(x), _mean(x), range(80), range(80), seed=0)
  assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_models_may_have_other_numbers_of_samples_in_a_bootstrap():
  rng = np.random.default_rng(3)
  effect = rng.normal(size=60)
  x, y = effect, np.repeat(effect, 4) + 0.2 * rng.normal(size=240)
  got = bootstrap_difference(_mean(x), _mean(y), range(60), np.repeat(np.arange(60), 4), seed=0)
  assert got.value == pytest.approx(y.mean() - x.mean())
  assert got.se < 0.03  # what rows have in common cancels: without pairs it is 0.18
  with pytest.raises(ValueError, match='only one has results of 0'):
    bootstrap_difference(_mean(x), _mean(x), range(60), range(1, 61), seed=0)
  with pytest.raises(ValueError, match='only one has results of 60'):
    bootstrap_difference(_mean(x[:59]), _mean(x), range(1, 60), range(1, 61), seed=0)
  with pytest.raises(ValueError, match='cannot be swapped'):
    permutation(_mean(np.concatenate([x, y])), range(60), np.repeat(np.arange(60), 4), seed=0)


def _macro_f1(labels, predictions):
  return f1_score(labels, predictions, average='macro', zero_division=0)


def _f1(labels, predictions):
  """Macro F1 as a figure of weights, by repeating rows."""

  def figure(weights):
    rows = [np.repeat(np.arange(len(labels)), w) for w in weights.astype(int)]
    return np.array([_macro_f1(labels[i], predictions[i]) for i in rows])

  return figure


def test_exact_permutations_equal_scipys_for_means_and_for_f1():
  rng = np.random.default_rng(4)
  x, y = rng.normal(size=9), rng.normal(size=9) + 0.8
  got = permutation(_mean(np.concatenate([x, y])), range(9), range(9), seed=0)
  expected = scipy.stats.permutation_test(
    (x, y), lambda a, b: b.mean() - a.mean(), permutation_type='samples', vectorized=False
  )
  assert got.is_exact and got.assignments == 256 and got.incomputable == 0
  assert got.value == pytest.approx(expected.statistic)
  assert got.p == pytest.approx(expected.pvalue)
  labels, first, second = rng.integers(3, size=(3, 9))
  second[:5] = labels[:5]
  pooled = np.concatenate([first, second])
  got = permutation(_f1(np.tile(labels, 2), pooled), range(9), range(9), seed=0)

  def difference(a, b):
    one, two = (_macro_f1(labels, v.astype(int)) for v in (a, b))
    return two - one

  expected = scipy.stats.permutation_test(
    (first, second), difference, permutation_type='samples', vectorized=False
  )
  assert got.value == pytest.approx(expected.statistic)
  assert got.p == pytest.approx(expected.pvalue) and got.p < 1


def test_clusters_are_swapped_whole():
  rng = np.random.default_rng(5)
  clusters = np.repeat(np.arange(6), 3)
  x, y = rng.normal(size=18), rng.normal(size=18) + 1
  got = permutation(_mean(np.concatenate([x, y])), clusters, clusters, seed=0)
  sums = np.bincount(clusters, y - x)
  every = [abs(np.dot(signs, sums)) for signs in itertools.product((1, -1), repeat=6)]
  assert got.is_exact and got.assignments == 32
  assert got.p == np.mean(np.array(every) >= abs(sums.sum()) - 1e-9)
  order = rng.permutation(18)  # of the second model's results
  other = permutation(_mean(np.concatenate([x, y[order]])), clusters, clusters[order], seed=0)
  assert (other.value, other.p) == pytest.approx((float(got.value), float(got.p)))


def test_assignments_that_are_equal_but_for_rounding_are_equal():
  for seed in range(20):
    x = np.random.default_rng(seed).integers(-3, 4, 10)
    got = permutation(_mean(np.concatenate([np.zeros(10), x / 10])), range(10), range(10), seed=0)
    signs = np.array(list(itertools.product((1, -1), repeat=10)))
    assert got.p == np.mean(abs(signs @ x) >= abs(x.sum())), seed


def test_random_permutations_are_close_to_exact_ones_and_seeded(monkeypatch):
  rng = np.random.default_rng(6)
  x, y = rng.normal(size=13), rng.normal(size=13) + 0.7
  figure = _mean(np.concatenate([x, y]))
  exact = permutation(figure, range(13), range(13), seed=0)
  some = permutation(figure, range(13), range(13), seed=0, resamples=4000)
  assert exact.is_exact and not some.is_exact and some.assignments == 4000
  assert some.p == pytest.approx(exact.p, abs=4 * math.sqrt(exact.p / 4000))
  assert some.p != permutation(figure, range(13), range(13), seed=1, resamples=4000).p
  monkeypatch.setattr(bootstrap_file, '_CHUNK', 26 * 100)
  assert permutation(figure, range(13), range(13), seed=0, resamples=4000).p == some.p
  assert permutation(figure, range(13), range(13), seed=0).p == exact.p
  # The least p of random assignments is 1 / (R + 1), never 0.
  far = permutation(_mean(np.repeat([0.0, 1.0], 40)), range(40), range(40), seed=0, resamples=99)
  assert far.p == 0.01 and far.value == 1


def test_permutation_of_right_and_wrong_is_mcnemars_test():
  rng = np.random.default_rng(7)
  first, second = rng.random((2, 12)) < [[0.4], [0.8]]
  pooled = np.concatenate([first, second]).astype(float)
  got = permutation(_mean(pooled), range(12), range(12), seed=0)
  assert got.is_exact and got.p == pytest.approx(mcnemar(first, second).p)


def test_permutation_of_several_figures_nan_nothing_and_equal_results():
  rng = np.random.default_rng(8)
  pooled = rng.normal(size=(20, 2))
  got = permutation(_mean(pooled), range(10), range(10), seed=0)
  for i in range(2):
    alone = permutation(_mean(pooled[:, i]), range(10), range(10), seed=0)
    assert (got.value[i], got.p[i]) == pytest.approx((float(alone.value), float(alone.p)))

  def of_class(weights):  # the class has a result of each model, of the rows 0 and 1
    is_of = np.zeros(20)
    is_of[[0, 11]] = 1
    below = weights @ is_of
    with np.errstate(invalid='ignore'):
      return weights @ (is_of * pooled[:, 0]) / below

  got = permutation(of_class, range(10), range(10), seed=0)
  # Half of the assignments give one model both: they count as extreme, as do the others, +- d.
  assert got.incomputable == 256 and got.p == 1
  never = permutation(lambda w: np.full(len(w), np.nan), range(10), range(10), seed=0)
  assert np.isnan(never.p) and np.isnan(never.value) and never.incomputable == 512
  same = permutation(_mean(np.ones(20)), range(10), range(10), seed=0)
  assert (same.value, same.p) == (0, 1)
  one = permutation(_mean(np.array([0.0, 1.0])), [0], [0], seed=0)
  assert (one.value, one.p, one.assignments) == (1, 1, 1)
  with np.errstate(invalid='ignore'):
    assert np.isnan(permutation(_mean(np.zeros(0)), [], [], seed=0).p)


def test_holm_by_hand_and_by_its_definition():
  # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04 -> 0.06
  assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert holm([]) == [] and holm([0.3]) == [0.3] and holm([0.6, 0.7, 1]) == [1, 1, 1]
  np.testing.assert_equal(holm([math.nan, 0.02, math.nan, 0.5]), [math.nan, 0.04, math.nan, 0.5])
  rng = np.random.default_rng(9)
  for _ in range(200):
    p = rng.random(rng.integers(1, 9)) ** 3
    refused = np.array(holm(p)) <= 0.05
    # Holm's steps: the smallest against alpha / m, the next against alpha / (m - 1), and so on.
    order, expected = np.argsort(p), np.zeros(len(p), bool)
    for i, j in enumerate(order):
      if p[j] > 0.05 / (len(p) - i):
        break
      expected[j] = True
    assert (refused == expected).all()


def test_effect_sizes_by_hand():
  # 2 (asin sqrt 0.75 - asin sqrt 0.25) = 2 (pi / 3 - pi / 6)
  assert cohen_h(0.25, 0.75) == pytest.approx(math.pi / 3)
  assert cohen_h(0.75, 0.25) == -cohen_h(0.25, 0.75) and cohen_h(0, 1) == pytest.approx(math.pi)
  x = np.array([0.0, 1.0, 2.0, 3.0])
  assert standardized_difference(x, range(4)) == pytest.approx(1.5 / math.sqrt(5 / 3))
  assert standardized_difference(-x, range(4)) == pytest.approx(-1.5 / math.sqrt(5 / 3))
  # Clusters count by their means 0.5 and 2.5.
  assert standardized_difference(x, [0, 0, 1, 1]) == pytest.approx(1.5 / math.sqrt(2))
  t = scipy.stats.ttest_1samp(x, 0).statistic
  assert standardized_difference(x, range(4)) == pytest.approx(t / 2)
  assert standardized_difference(np.zeros(5), range(5)) == 0
  for values in (np.full(5, 0.1), np.ones(1), np.ones(0)):
    assert math.isnan(standardized_difference(values, range(len(values))))


def test_a_win_rate_counts_ties_half():
  outcomes = np.array([1.0] * 12 + [0.5] * 5 + [0.0] * 3)
  got = win_rate(outcomes, range(20), seed=0)
  assert (got.wins, got.ties, got.losses) == (12, 5, 3) and got.rate.value == 14.5 / 20
  assert got.p == pytest.approx(scipy.stats.binomtest(3, 15).pvalue)
  assert got.rate.low > 0.5
  back = win_rate(1 - outcomes, range(20), seed=0)
  assert (back.rate.low, back.p) == pytest.approx((1 - got.rate.high, got.p))
  # Copies of an outcome add nothing to either.
  many = win_rate(np.repeat(outcomes, 4), np.repeat(np.arange(20), 4), seed=0)
  assert many.p == pytest.approx(got.p, abs=0.005)
  assert many.rate.low == pytest.approx(got.rate.low, abs=0.02)
  assert many.rate.low < got.rate.low
  ties = win_rate(np.full(10, 0.5), range(10), seed=0)
  assert (ties.rate.value, ties.p) == (0.5, 1) and ties.rate.low < 0.5 < ties.rate.high
  nothing = win_rate(np.zeros(0), [], seed=0)
  assert math.isnan(nothing.rate.value) and nothing.p == 1
  with pytest.raises(ValueError, match='other than 0'):
    win_rate(np.array([0.3]), [0], seed=0)
