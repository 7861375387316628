"""evaluation/statistics/power_law.py: laws with known parameters, and the coverage of forecasts."""

import math

import numpy as np
import pytest

from ftjax.evaluation.statistics import power_law

SIZES = np.array([500.0, 1000.0, 3000.0, 10_000.0])


@pytest.mark.parametrize(
  ('limit', 'amplitude', 'exponent', 'rises'),
  [
    (0.92, -3.0, 0.5, True),
    (0.8, -1.2, 0.3, True),
    (1.7, 25.0, 0.4, False),
    (0.1, 9.0, 1.0, False),
  ],
)
def test_a_law_without_noise_is_found_again(limit, amplitude, exponent, rises):
  scores = power_law.PowerLaw(limit, amplitude, exponent).at(SIZES)
  found = power_law.fit(SIZES, scores, noise=1e-6, rises=rises)
  assert found.limit == pytest.approx(limit, rel=0.01)
  assert found.exponent == pytest.approx(exponent, rel=0.02)
  assert found.amplitude == pytest.approx(amplitude, rel=0.1)
  np.testing.assert_allclose(found.at(SIZES), scores, rtol=1e-3)
  np.testing.assert_allclose(
    found.at([50_000.0]), power_law.PowerLaw(limit, amplitude, exponent).at([50_000.0]), rtol=3e-3
  )


def test_laws_are_fitted_as_one_by_one():
  rng = np.random.default_rng(0)
  scores = 0.9 - 2 * SIZES**-0.5 + 0.01 * rng.standard_normal((5, 4))
  laws = power_law.fit(SIZES, scores, noise=0.01, rises=True)
  for r in range(5):
    one = power_law.fit(SIZES, scores[r], noise=0.01, rises=True)
    assert (one.limit, one.amplitude, one.exponent) == pytest.approx(
      (laws.limit[r], laws.amplitude[r], laws.exponent[r])
    )


def test_a_score_that_does_not_move_gives_a_flat_law():
  law = power_law.fit(SIZES, np.full(4, 0.7), noise=0.01, rises=True)
  assert law.amplitude == 0 and law.limit == pytest.approx(0.7)
  # One that falls where it should rise is flat too.
  law = power_law.fit(SIZES, np.array([0.8, 0.78, 0.75, 0.7]), noise=0.01, rises=True)
  assert law.amplitude == 0 and law.limit == pytest.approx(np.mean([0.8, 0.78, 0.75, 0.7]))


def test_the_limit_stays_in_its_bounds():
  scores = np.array([0.5, 0.7, 0.9, 0.99])
  law = power_law.fit(SIZES, scores, noise=0.01, rises=True, bounds=(0.0, 1.0))
  assert law.limit <= 1 and law.at([1e9])[0] <= 1


@pytest.mark.parametrize('sizes', [[1.0, 2.0], [1.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
def test_sizes_that_carry_no_law_are_refused(sizes):
  with pytest.raises(ValueError, match='three or more'):
    power_law.fit(np.array(sizes), np.zeros(len(sizes)), noise=0.1, rises=True)


def test_without_noise_known_there_is_no_interval():
  values = (0.9 - SIZES**-0.5)[:, None]
  found = power_law.forecast(SIZES, values, [20_000.0], rises=True, seed=0)
  assert math.isnan(found.low[0]) and found.value[0] == pytest.approx(0.9 - 20_000**-0.5, abs=2e-3)


class Simulation:
  """Runs whose accuracy lies on a law: each seed has noise of its own, examples are shared."""

  def __init__(self, rng, sizes, *, seeds=3, examples=400, sd=0.01):
    law = power_law.PowerLaw(rng.uniform(0.75, 0.97), -1.0, math.exp(rng.normal(-0.7, 0.4)))
    start = rng.uniform(0.05, 0.3)  # below the limit at the smallest size
    self.law = power_law.PowerLaw(law.limit, -start / sizes[0] ** -law.exponent, law.exponent)
    accuracy = self.law.at(sizes)[:, None] + sd * rng.standard_normal((len(sizes), seeds))
    hard = rng.uniform(size=examples)  # an example is right where it is easier than the model good
    noise = 0.1 * rng.standard_normal((len(sizes), seeds, examples))
    order = (hard + noise).argsort(-1).argsort(-1)
    self.right = (order < accuracy[..., None] * examples).astype(float)  # [K, S, n]
    drawn = rng.integers(examples, size=examples)  # the examples are a sample too
    self.right = self.right[..., drawn]

  def forecast(self, count, rows, sizes, resamples=400):
    right = self.right[:count].reshape(-1, self.right.shape[-1])
    return power_law.forecast(
      sizes[:count],
      self.right[:count].mean(-1),
      rows,
      rises=True,
      bounds=(0.0, 1.0),
      figure=lambda w: (w @ right.T) / w.sum(1, keepdims=True),
      clusters=range(right.shape[1]),
      seed=1,
      resamples=resamples,
    )


def coverage(times, seed, **settings):
  """Shares of simulations whose forecast from 30 % covers (the score that runs on 100 % have on the
  same examples, the true one), and the mean width.
  """
  rng, measured, true, widths = np.random.default_rng(seed), 0, 0, []
  for _ in range(times):
    simulation = Simulation(rng, SIZES, **settings)
    found = simulation.forecast(3, SIZES[3:], SIZES)
    low, high = found.low[0], found.high[0]
    measured += low <= simulation.right[3].mean() <= high
    true += low <= simulation.law.at(SIZES[3:])[0] <= high
    widths.append(high - low)
  return measured / times, true / times, float(np.mean(widths))


def test_the_forecast_from_30_percent_covers_the_score_at_100_percent():
  measured, true, width = coverage(60, seed=0)
  assert measured >= 0.92 and true >= 0.92 and width < 0.15


@pytest.mark.full
@pytest.mark.parametrize(
  ('settings', 'widest'),
  [
    ({}, 0.13),
    ({'sd': 0.003, 'examples': 2000}, 0.07),
    ({'sd': 0.02, 'examples': 200}, 0.18),
  ],
)
def test_coverage_over_many_curves(settings, widest):
  measured, true, width = coverage(600, seed=1, **settings)
  assert measured >= 0.95 and 0.95 <= true <= 0.997 and width < widest


def test_the_forecast_is_seeded():
  simulation = Simulation(np.random.default_rng(3), SIZES)
  a, b = (simulation.forecast(4, [20_000.0, 50_000.0], SIZES) for _ in range(2))
  assert (a.low == b.low).all() and (a.gain_high == b.gain_high).all()
  assert (a.low <= a.value).all() and (a.value <= a.high).all()
