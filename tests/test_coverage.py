"""evaluation/statistics/: how often intervals cover the truth, and tests refuse a true hypothesis.

The bar is 93 to 97 % over 4,000 simulations for 200 results and more. Simulations are columns of
one figure, so all of them share the resamples, as runs do, whose seed is fixed.
"""

import math

import numpy as np
import pytest
import scipy.stats

from ftjax.evaluation.statistics.bootstrap import bootstrap
from ftjax.evaluation.statistics.intervals import mean, proportion, wilson
from ftjax.evaluation.statistics.paired import (
  bootstrap_difference,
  difference_of_proportions,
  holm,
  mcnemar,
  permutation,
  win_rate,
)
from ftjax.evaluation.statistics.power import power_of_mcnemar, sensitivity_of_mean
from ftjax.evaluation.statistics.seeds import seed_mean

full = pytest.mark.full
SHARES = (0.1, 0.3, 0.5, 0.9)


def _mean(x):
  return lambda weights: weights @ x / weights.sum(1).reshape(-1, *(1,) * (x.ndim - 1))


def _check(title, low, high, truth, record):
  """Checks the share of intervals that cover, with 3 standard errors where few are simulated."""
  low, high = np.asarray(low), np.asarray(high)
  covered, n = float(((low <= truth) & (truth <= high)).mean()), low.size
  slack = 0 if n >= 4000 else 3 * math.sqrt(0.05 * 0.95 / n)
  record(title, float(covered))
  print(f'{title}: {100 * covered:.1f} % of {n}')
  assert 0.93 - slack <= covered <= 0.97 + slack, f'{title}: {covered}'


def _clustered(rng, count, size, share, correlation, simulations):
  """Zeros and ones float64[count * size, simulations] with a correlation within clusters."""
  scale = (1 - correlation) / correlation
  shares = rng.beta(share * scale, (1 - share) * scale, (count, simulations))
  return (rng.random((count, size, simulations)) < shares[:, None]).reshape(-1, simulations) * 1.0


def _f1(labels, predictions, classes):
  """Macro F1 over the classes that occur, for int[n, S] twice: a figure [R, S]."""
  parts = [
    ((labels == k) * (predictions == k) * 2.0, (labels == k) * 1.0 + (predictions == k))
    for k in range(classes)
  ]

  def figure(weights):
    total = occurs = 0.0
    for top, bottom in parts:
      below = weights @ bottom
      total = total + np.where(below > 0, weights @ top / np.maximum(below, 1), 0)
      occurs = occurs + (below > 0)
    return total / occurs

  return figure


def _classified(rng, n, prior, accuracy, simulations):
  """Labels and predictions int[n, S], wrong ones equally often each class, and the true F1."""
  prior, classes = np.asarray(prior), len(prior)
  labels = rng.choice(classes, p=prior, size=(n, simulations))
  other = (labels + rng.integers(1, classes, size=labels.shape)) % classes
  predictions = np.where(rng.random(labels.shape) < accuracy, labels, other)
  right, wrong = prior * accuracy, (1 - prior) * (1 - accuracy) / (classes - 1)
  return labels, predictions, float((2 * right / (prior + right + wrong)).mean())


@pytest.mark.parametrize('n', [200, 201, 350, 1000])
def test_wilson_covers_exactly(n, record_property):
  """Sums the probability of each count, without simulation."""
  counts = np.arange(n + 1)
  low, high = np.array([wilson(k, n) for k in counts]).T
  shares = np.linspace(0.1, 0.9, 81)
  covered = [scipy.stats.binom.pmf(counts, n, p)[(low <= p) & (p <= high)].sum() for p in shares]
  record_property('least', float(min(covered)))
  assert 0.93 <= min(covered) <= max(covered) <= 0.97
  assert 0.945 <= np.mean(covered) <= 0.955


def _wilson(share, n, simulations, record):
  counts = np.random.default_rng(1).binomial(n, share, simulations)
  low, high = np.array([wilson(k, n) for k in range(n + 1)]).T
  _check(f'Wilson, n {n}, p {share}', low[counts], high[counts], share, record)


def _clustered_wilson(share, count, simulations, record):
  x = _clustered(np.random.default_rng(2), count, 4, share, 0.3, simulations)
  clusters = np.repeat(np.arange(count), 4)
  found = [proportion(column, clusters) for column in x.T]
  title = f'clustered Wilson, {count} x 4, p {share}'
  _check(title, [f.low for f in found], [f.high for f in found], share, record)


def _clustered_bootstrap(share, count, simulations, record):
  x = _clustered(np.random.default_rng(3), count, 4, share, 0.3, simulations)
  got = bootstrap(_mean(x), np.repeat(np.arange(count), 4), seed=0)
  _check(f'clustered bootstrap, {count} x 4, p {share}', got.low, got.high, share, record)


def _bootstrap_mean(share, n, simulations, record):
  x = (np.random.default_rng(4).random((n, simulations)) < share) * 1.0
  got = bootstrap(_mean(x), range(n), seed=0)
  _check(f'bootstrap of a proportion, n {n}, p {share}', got.low, got.high, share, record)


def _bootstrap_f1(prior, accuracy, n, simulations, record):
  labels, predictions, truth = _classified(
    np.random.default_rng(5), n, prior, accuracy, simulations
  )
  got = bootstrap(_f1(labels, predictions, len(prior)), range(n), seed=0)
  title = f'bootstrap of macro F1, n {n}, classes {prior}, accuracy {accuracy}'
  _check(title, got.low, got.high, truth, record)


def _differences(b, c, n, simulations):
  """Right or not, float64[n, S] of each model; b and c: shares that one alone has right."""
  draw = np.random.default_rng(6).random((n, simulations))
  first = (draw < b) | (draw > 0.6 + 0.4 * (b + c))  # both are right for some of the rest
  second = ((draw >= b) & (draw < b + c)) | (draw > 0.6 + 0.4 * (b + c))
  return first * 1.0, second * 1.0


def _bootstrap_pairs(b, c, n, simulations, record):
  first, second = _differences(b, c, n, simulations)
  got = bootstrap_difference(_mean(first), _mean(second), range(n), range(n), seed=0)
  _check(f'bootstrap of a difference, n {n}, b {b}, c {c}', got.low, got.high, c - b, record)


def _clustered_pairs(count, simulations, record):
  rng = np.random.default_rng(7)
  x = _clustered(rng, count, 4, 0.5, 0.3, simulations)
  # The second model mends a third of the wrong results, at random: 0.5 + 0.5 / 3
  y = np.maximum(x, rng.random(x.shape) < 1 / 3)
  clusters = np.repeat(np.arange(count), 4)
  got = bootstrap_difference(_mean(x), _mean(y), clusters, clusters, seed=0)
  _check(f'clustered difference, {count} x 4', got.low, got.high, 1 / 6, record)


def _counted_pairs(b, c, n, simulations, record):
  first, second = _differences(b, c, n, simulations)
  only = zip((first > second).sum(0), (second > first).sum(0), strict=True)
  found = [difference_of_proportions(int(i), int(j), n) for i, j in only]
  title = f'difference of proportions, n {n}, b {b}, c {c}'
  _check(title, [f.low for f in found], [f.high for f in found], c - b, record)


def _clustered_mean(count, simulations, record):
  rng = np.random.default_rng(8)
  sizes = rng.integers(1, 8, count)
  clusters = np.repeat(np.arange(count), sizes)
  # Skewed, with a correlation of 0.3 within clusters of 1 to 7.
  x = 0.3 * rng.exponential(size=(count, simulations))[clusters] + math.sqrt(0.21) * rng.normal(
    size=(len(clusters), simulations)
  )
  found = [mean(column, clusters) for column in x.T]
  title = f'clustered mean, {count} clusters of 1 to 7'
  _check(title, [f.low for f in found], [f.high for f in found], 0.3, record)


def _wins(n, simulations, record):
  rng = np.random.default_rng(9)
  outcomes = rng.choice([0.0, 0.5, 1.0], p=(0.2, 0.5, 0.3), size=(simulations, n))
  found = [win_rate(row, range(n), seed=0).rate for row in outcomes]
  title = f'win rate with half ties, n {n}'
  _check(title, [f.low for f in found], [f.high for f in found], 0.55, record)


def _seeds(between, seeds, simulations, record):
  rng = np.random.default_rng(10)
  found = []
  for _ in range(simulations):
    x = between * rng.normal(size=seeds) + 0.3 * rng.normal(size=(200, 1))
    x = x + 0.4 * rng.normal(size=(200, seeds))
    found.append(seed_mean(lambda w, x=x: w @ x / 200, range(200), seed=0, resamples=400))
  title = f'mean of {seeds} seeds, between {between}'
  # It covers at least; more where seeds differ less than test sets.
  covered = float(np.mean([f.low <= 0 <= f.high for f in found]))
  record(title, float(covered))
  print(f'{title}: {100 * covered:.1f} % of {simulations}')
  assert covered >= 0.94 - (0.02 if simulations < 4000 else 0)
  assert covered <= 0.97 or between < 0.1


def test_intervals_cover(record_property):
  _wilson(0.1, 200, 4000, record_property)
  _clustered_wilson(0.3, 50, 600, record_property)
  _clustered_bootstrap(0.9, 50, 1000, record_property)
  _bootstrap_mean(0.1, 200, 1000, record_property)
  _bootstrap_f1((0.5, 0.3, 0.2), 0.6, 200, 1000, record_property)
  _bootstrap_pairs(0.05, 0.1, 200, 1000, record_property)
  _clustered_pairs(50, 1000, record_property)
  _seeds(0.03, 3, 400, record_property)


@full
def test_intervals_of_proportions_cover_over_4000_simulations(record_property):
  for share in SHARES:
    for n in (200, 500):
      _wilson(share, n, 4000, record_property)
      _bootstrap_mean(share, n, 4000, record_property)
    for count in (50, 200):
      _clustered_wilson(share, count, 4000, record_property)
      _clustered_bootstrap(share, count, 4000, record_property)


@full
def test_intervals_of_f1_and_of_differences_cover_over_4000_simulations(record_property):
  for n in (200, 500):
    for prior, accuracy in (
      ((0.5, 0.5), 0.7),
      ((0.9, 0.1), 0.8),
      ((0.5, 0.3, 0.2), 0.6),
      ((0.8, 0.1, 0.1), 0.7),
      ((0.5, 0.5), 0.9),
      ((0.5, 0.5), 0.1),
      ((0.7, 0.2, 0.1), 0.9),
    ):
      _bootstrap_f1(prior, accuracy, n, 4000, record_property)
    for b, c in ((0.1, 0.1), (0.05, 0.1), (0.02, 0.04), (0.2, 0.3)):
      _bootstrap_pairs(b, c, n, 4000, record_property)
      _counted_pairs(b, c, n, 4000, record_property)
  for count in (50, 200):
    _clustered_pairs(count, 4000, record_property)


@full
def test_intervals_of_means_wins_and_seeds_cover_over_4000_simulations(record_property):
  for count in (50, 200):
    _clustered_mean(count, 4000, record_property)
  _wins(200, 4000, record_property)
  for between, seeds in ((0.0, 3), (0.03, 3), (0.1, 2), (0.1, 3), (0.3, 3), (0.03, 5)):
    _seeds(between, seeds, 4000, record_property)


def _refusals(title, p, record):
  """Checks that at most 5.5 % are refused, with 3 standard errors where few are simulated."""
  p = np.asarray(p)
  refused = float((p < 0.05).mean())
  slack = 0 if p.size >= 4000 else 3 * math.sqrt(0.05 * 0.95 / p.size)
  record(title, float(refused))
  print(f'{title}: refuses {100 * refused:.1f} % of {p.size}')
  assert 0.01 < refused <= 0.055 + slack, f'{title}: {refused}'


def test_mcnemar_keeps_its_level(record_property):
  for n, share in ((200, 0.3), (1000, 0.1), (60, 0.5)):
    exact = power_of_mcnemar(0, share, n)
    assert 0.02 < exact <= 0.05
  rng = np.random.default_rng(0)
  p = []
  for _ in range(1000):
    draw = rng.random(200)
    p.append(mcnemar((draw < 0.15) | (draw > 0.6), (draw > 0.15) & (draw < 0.3) | (draw > 0.6)).p)
  _refusals('McNemar, n 200, 30 % discordant', p, record_property)


def _null_permutations(simulations, record):
  rng = np.random.default_rng(1)
  x = np.concatenate(_differences(0.15, 0.15, 200, simulations))
  test = permutation(_mean(x), range(200), range(200), seed=0, resamples=999)
  _refusals('permutation of a proportion, n 200', test.p, record)
  labels, _, _ = _classified(rng, 200, (0.6, 0.3, 0.1), 0.6, simulations)
  both = [np.where(rng.random(labels.shape) < 0.6, labels, 1) for _ in range(2)]
  figure = _f1(np.concatenate([labels, labels]), np.concatenate(both), 3)
  test = permutation(figure, range(200), range(200), seed=0, resamples=499)
  _refusals('permutation of macro F1, n 200', test.p, record)
  shares = rng.beta(0.5, 0.5, (50, 1, simulations))
  x = [(rng.random((50, 4, simulations)) < shares).reshape(200, -1) for _ in range(2)]
  # What a prompt does to one model alone is common to its samples: swapping results would not do.
  flips = [rng.random((50, 1, simulations)) < 0.2 for _ in range(2)]
  x = [np.where(np.repeat(f, 4, 1).reshape(200, -1), 0.0, v) for f, v in zip(flips, x, strict=True)]
  clusters = np.repeat(np.arange(50), 4)
  test = permutation(_mean(np.concatenate(x)), clusters, clusters, seed=0, resamples=999)
  _refusals('clustered permutation, 50 x 4', test.p, record)


def test_permutations_keep_their_level(record_property):
  _null_permutations(500, record_property)


@full
def test_tests_keep_their_level_over_4000_simulations(record_property):
  _null_permutations(4000, record_property)
  rng = np.random.default_rng(2)
  p = [mcnemar(*(rng.random((2, 200)) < [[0.7], [0.7]])).p for _ in range(4000)]
  _refusals('McNemar, n 200, p 0.7', p, record_property)
  first, second = _differences(0.1, 0.1, 200, 4000)
  got = bootstrap_difference(_mean(first), _mean(second), range(200), range(200), seed=0)
  record_property('bootstrap p', float((got.p < 0.05).mean()))
  assert (got.p < 0.05).mean() < 0.07


def test_holm_keeps_the_family_wise_rate(record_property):
  rng = np.random.default_rng(3)
  for shared in (0.0, 0.7):  # tasks with errors in common too
    z = math.sqrt(shared) * rng.normal(size=(4000, 1))
    z = z + math.sqrt(1 - shared) * rng.normal(size=(4000, 6))
    z[:, :2] += 4  # two of six tasks have a true difference
    p = 2 * scipy.stats.norm.sf(np.abs(z))
    found = np.array([holm(row) for row in p]) < 0.05
    rate, plain = found[:, 2:].any(1).mean(), (p[:, 2:] < 0.05).any(1).mean()
    record_property(f'family-wise, shared {shared}', float(rate))
    assert rate <= 0.055 < plain and found[:, :2].mean() > 0.8


@full
def test_rows_for_macro_f1_have_the_wanted_power():
  """The standard error of a bootstrap gives the rows that a test of macro F1 needs."""
  prior, simulations = (0.6, 0.4), 1000

  def figures(rng, n):
    labels, first, truth = _classified(rng, n, prior, 0.70, simulations)
    mended = rng.random(labels.shape) < 1 / 6  # of the wrong ones: 0.75 right
    second = np.where(mended, labels, first)
    return labels, first, second, truth

  labels, first, second, truth = figures(np.random.default_rng(4), 100)
  better = _classified(np.random.default_rng(0), 1, prior, 0.75, 1)[2]
  got = bootstrap_difference(
    _f1(labels, first, 2), _f1(labels, second, 2), range(100), range(100), seed=0, resamples=500
  )
  rows = sensitivity_of_mean(better - truth, float(got.se.mean()), 100).rows
  labels, first, second, _ = figures(np.random.default_rng(5), rows)
  figure = _f1(np.concatenate([labels, labels]), np.concatenate([first, second]), 2)
  test = permutation(figure, range(rows), range(rows), seed=0, resamples=999)
  assert (test.p < 0.05).mean() == pytest.approx(0.8, abs=0.06)
