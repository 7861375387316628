"""Fits a power law to scores by the number of training rows, and forecasts the score of more rows.

score(n) = limit + amplitude * n ** -exponent. The amplitude is at most 0 for a score that is better
when it is larger, at least 0 for the others.
"""

import dataclasses
import math

import numpy as np

from ftjax.evaluation.statistics.bootstrap import Figure, draws
from ftjax.evaluation.statistics.intervals import members

# Of log exponent: the prior that decides where the scores do not. Its 95 % are 0.13 to 2: learning
# curves of networks have 0.07 to 0.5 (Hestness et al. 2017, arXiv:1712.00409), those of error rates
# near their limit up to 1.
_PRIOR_MEAN, _PRIOR_SD = math.log(0.5), 0.7
_EXPONENTS = np.exp(np.linspace(math.log(0.05), math.log(4.0), 80))
_LEAST_NOISE = 1e-7  # relative to the scores: weights stay finite where nothing varies


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """limit + amplitude * n ** -exponent; floats, or arrays of several laws, float64[R]."""

  limit: np.ndarray | float
  amplitude: np.ndarray | float
  exponent: np.ndarray | float

  def at(self, rows: np.ndarray) -> np.ndarray:
    """Returns the score at numbers of rows: float64[T] -> float64[T], or [R, T] of several laws."""
    limit, amplitude, exponent = (
      np.asarray(x)[..., None] for x in (self.limit, self.amplitude, self.exponent)
    )
    return limit + amplitude * np.asarray(rows, np.float64) ** -exponent


@dataclasses.dataclass(frozen=True)
class Forecast:
  """Scores that a law gives at numbers of rows.

  Attributes:
    law: of the mean scores.
    rows: float64[T].
    value: float64[T], of the law.
    low, high: float64[T], ends of the interval of what runs with so many rows would score, on
      examples drawn anew; NaN where nothing is known of the noise.
    gain, gain_low, gain_high: float64[T], of the value at the last of `sizes` to that at `rows`.
  """

  law: PowerLaw
  rows: np.ndarray
  value: np.ndarray
  low: np.ndarray
  high: np.ndarray
  gain: np.ndarray
  gain_low: np.ndarray
  gain_high: np.ndarray


def fit(
  sizes: np.ndarray,
  scores: np.ndarray,
  *,
  noise: np.ndarray | float,
  rises: bool,
  bounds: tuple[float, float] = (-math.inf, math.inf),
  prior: np.ndarray | float = _PRIOR_MEAN,
) -> PowerLaw:
  """Fits laws by weighted least squares, with a prior on the logarithm of the exponent.

  For each exponent of a grid, limit and amplitude are the solution of a linear problem, clipped to
  their ranges; the exponent with the least cost is taken, and refined by a parabola.

  Args:
    sizes: float64[K] numbers of rows, K >= 3.
    scores: float64[K], or float64[R, K] for R laws.
    noise: standard deviations of the scores, float64[K] or one.
    rises: whether the score grows with the rows.
    bounds: of the limit, and of all scores: (0, 1) for a share.
    prior: mean of log exponent, float64[R] or one.

  Raises:
    ValueError: fewer than three sizes, or sizes that are not positive and different.
  """
  sizes = np.asarray(sizes, np.float64)
  if len(sizes) < 3 or len(set(sizes.tolist())) < len(sizes) or not (sizes > 0).all():
    raise ValueError(f'power_law.fit: got sizes {sizes}, expected three or more, all different')
  y = np.atleast_2d(np.asarray(scores, np.float64))  # [R, K]
  scale = max(float(np.abs(y).max()), 1e-12)
  sigma = np.maximum(np.broadcast_to(noise, sizes.shape), _LEAST_NOISE * scale)
  unit = sizes / sizes[0]  # of rows; the amplitude is scaled back at the end
  cost, limit, amplitude = _solve(unit, y, 1 / sigma**2, _EXPONENTS, rises, bounds)
  cost = cost + ((np.log(_EXPONENTS) - np.reshape(prior, (-1, 1))) / _PRIOR_SD) ** 2
  best = cost.argmin(1)
  exponent = _refined(cost, best)
  _, limit, amplitude = _solve_each(unit, y, 1 / sigma**2, exponent, rises, bounds)
  amplitude = amplitude * sizes[0] ** exponent
  if np.ndim(scores) == 1:
    return PowerLaw(float(limit[0]), float(amplitude[0]), float(exponent[0]))
  return PowerLaw(limit, amplitude, exponent)


def _solve(unit, y, weights, exponents, rises, bounds):
  """Returns (cost, limit, amplitude), float64[R, C] each, of each law with each exponent."""
  x = unit ** -exponents[:, None]  # [C, K]
  return _linear(x[None], y[:, None], weights, rises, bounds)


def _solve_each(unit, y, weights, exponent, rises, bounds):
  """Returns the same of law r with exponent r, float64[R] each."""
  return _linear(unit ** -exponent[:, None], y, weights, rises, bounds)


def _linear(x, y, weights, rises, bounds):
  """Solves y = limit + amplitude * x by weighted least squares over the last axis, in range."""
  total = weights.sum()
  mean_x, mean_y = (x * weights).sum(-1) / total, (y * weights).sum(-1) / total
  dx, dy = x - mean_x[..., None], y - mean_y[..., None]
  amplitude = (weights * dx * dy).sum(-1) / np.maximum((weights * dx * dx).sum(-1), 1e-300)
  sign = -1.0 if rises else 1.0
  amplitude = sign * np.maximum(sign * amplitude, 0.0)
  limit = mean_y - amplitude * mean_x
  inside = np.clip(limit, *bounds)
  # With the limit at its bound, the amplitude that fits best.
  at_bound = (weights * x * (y - inside[..., None])).sum(-1) / (weights * x * x).sum(-1)
  at_bound = sign * np.maximum(sign * at_bound, 0.0)
  amplitude = np.where(inside == limit, amplitude, at_bound)
  residual = y - inside[..., None] - amplitude[..., None] * x
  return (weights * residual**2).sum(-1), inside, amplitude


def _refined(cost: np.ndarray, best: np.ndarray) -> np.ndarray:
  """Returns the exponent at the lowest point of a parabola through three costs: float64[R]."""
  rows, step = np.arange(len(cost)), math.log(_EXPONENTS[1] / _EXPONENTS[0])
  middle = np.clip(best, 1, len(_EXPONENTS) - 2)
  before, here, after = (cost[rows, middle + i] for i in (-1, 0, 1))
  bend = before - 2 * here + after
  shift = np.where(bend > 0, (before - after) / (2 * np.where(bend > 0, bend, 1.0)), 0.0)
  shift = np.where(middle == best, np.clip(shift, -0.5, 0.5), best - middle)
  return np.exp(np.log(_EXPONENTS[middle]) + shift * step)


def between_sd(values: np.ndarray) -> float:
  """Returns the sd over seeds, pooled over sizes: float64[K, S] -> float; NaN with one seed."""
  if values.shape[1] < 2:
    return math.nan
  return math.sqrt(float(values.var(1, ddof=1).mean()))


def forecast(
  sizes: np.ndarray,
  values: np.ndarray,
  rows: np.ndarray,
  *,
  rises: bool,
  bounds: tuple[float, float] = (-math.inf, math.inf),
  figure: Figure | None = None,
  clusters=(),
  seed: int,
  resamples: int = 2000,
  level: float = 0.95,
) -> Forecast:
  """Forecasts the mean score of as many seeds at numbers of rows, with an interval.

  The interval has three parts: the examples are drawn anew, the same for all runs; the seeds' noise
  is drawn anew for each size, and for the runs that are forecast; and the prior mean of the
  exponent is drawn anew with each fit, so that the laws are draws of the posterior where the noise
  is normal. Where more sizes than parameters do not lie on a law, the noise is scaled to their
  distance.

  In simulations an interval of 95 % from three sizes covers the true score in 98 %, the score on
  the same examples in 99 % (tests/test_power_law.py).

  Args:
    sizes: float64[K], K >= 3.
    values: float64[K, S], the score of each seed.
    rows: float64[T] where it is forecast.
    rises, bounds: as for `fit`.
    figure: weights float64[R, n] -> float64[R, K * S], the same scores of n results; None where
      they are not known by example.
    clusters: [n], the cluster of each result.
    seed: of the drawing.
    resamples: R.
  Source: perturbing data and prior together gives draws of a posterior, exactly so for a linear
    model: Bardsley et al. 2014, SIAM J. Sci. Comput. 36:A1895.
  """
  sizes, values = np.asarray(sizes, np.float64), np.asarray(values, np.float64)
  rows, (count, seeds) = np.asarray(rows, np.float64), values.shape
  rng, spread = np.random.default_rng(seed), between_sd(values)
  stars = np.repeat(values.mean(1)[None], resamples, 0)  # [R, K]
  if figure is not None:
    groups = members(clusters)
    count_of = int(groups.max()) + 1
    found = draws(lambda w: figure(w[:, groups]), count_of, seed=seed, resamples=resamples)
    stars = found.reshape(resamples, count, seeds).mean(2)
    stars = stars[np.isfinite(stars).all(1)]
  own, fresh = _seed_noise(rng, spread, seeds, len(stars), count, len(rows))
  sigma = np.sqrt(_own_variance(stars) + (spread**2 / seeds if seeds > 1 else 0.0))
  law = fit(sizes, values.mean(1), noise=sigma, rises=rises, bounds=bounds)
  misfit = _misfit(law, sizes, values.mean(1), sigma)
  if misfit > 1:
    own = own + rng.standard_normal(own.shape) * sigma * math.sqrt(misfit**2 - 1)
  sigma = sigma * misfit
  if not len(stars) or sigma.max() <= _LEAST_NOISE * np.abs(values).max():
    nothing = np.full(len(rows), math.nan)
    gain = law.at(rows) - law.at(sizes[-1:])
    return Forecast(law, rows, law.at(rows), nothing, nothing, gain, nothing, nothing)
  prior = _PRIOR_MEAN + _PRIOR_SD * rng.standard_normal(len(stars))
  laws = fit(sizes, stars + own, noise=sigma, rises=rises, bounds=bounds, prior=prior)
  tails = [(1 - level) / 2, (1 + level) / 2]
  low, high = np.clip(np.quantile(laws.at(rows) + fresh, tails, axis=0), *bounds)
  gains = laws.at(rows) - laws.at(sizes[-1:])
  gain_low, gain_high = np.quantile(gains, tails, axis=0)
  value = law.at(rows)
  gain = value - law.at(sizes[-1:])
  return Forecast(law, rows, value, low, high, gain, gain_low, gain_high)


def _seed_noise(rng, spread: float, seeds: int, resamples: int, count: int, targets: int):
  """Returns the noise of means over seeds: of the sizes, float64[R, K], and of what is forecast,
  float64[R, T]; 0 with one seed, which does not show it.
  """
  if seeds < 2:
    return np.zeros((resamples, count)), np.zeros((resamples, targets))
  degrees = count * (seeds - 1)
  # The spread is known from few runs: one draw of it for all sizes of a resample.
  factor = np.sqrt(degrees / rng.chisquare(degrees, (resamples, 1)))
  noise = rng.standard_normal((resamples, count + targets))
  noise *= np.minimum(factor, 4.0) * spread / math.sqrt(seeds)
  return noise[:, :count], noise[:, count:]


def _own_variance(stars: np.ndarray) -> np.ndarray:
  """Returns the variance of each size's draws that the sizes do not share: float64[R, K] -> [K].

  What they share, hard and easy examples, moves the whole curve, and bends it little.
  """
  covariance = np.cov(stars.T)
  own = np.diag(covariance)
  count = len(own)
  shared = (covariance.sum() - own.sum()) / (count * (count - 1))
  return np.maximum(own - max(shared, 0.0), 0.05 * own)


def _misfit(law: PowerLaw, sizes: np.ndarray, means: np.ndarray, sigma: np.ndarray) -> float:
  """Returns by what the noise is scaled: 1 where the scores are as near to the law as it says."""
  free = len(sizes) - 3
  safe = np.maximum(sigma, _LEAST_NOISE * max(float(np.abs(means).max()), 1e-12))
  if free < 1:
    return 1.0
  return math.sqrt(max(1.0, float((((means - law.at(sizes)) / safe) ** 2).sum()) / free))
