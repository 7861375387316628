"""Suggests a point by a Gaussian process over the scores of earlier ones: expected improvement with
a Matern 5/2 kernel, its length scales by maximum a posteriori.

optuna's own sampler of this kind needs torch. Source: Snoek, Larochelle and Adams 2012, NeurIPS 25;
Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, chapters 2 and 5.
"""

import math
from collections.abc import Sequence

import numpy as np

from ftjax.config.search_space import Dimension, Point

_CANDIDATES = 1024  # points of which the best one is suggested
_NEAR = 256  # of them, near the best point so far
_JITTER = 1e-8


def suggest(
  space: Sequence[Dimension], scored: Sequence[tuple[Point, float]], draw: Sequence[int]
) -> Point:
  """Returns the point with the largest expected improvement among random ones.

  Args:
    space: its dimensions.
    scored: points with scores, smaller is better; at least one.
    draw: seed.
  """
  from scipy.stats import norm, rankdata

  rng = np.random.default_rng(draw)
  x = np.stack([_encoded(space, point) for point, _ in scored])
  # By ranks, as normal quantiles: a score that is very bad must not flatten all others.
  ranks = rankdata([score for _, score in scored])
  y = norm.ppf((ranks - 0.5) / len(ranks))
  scale, noise = _hyperparameters(x, y)
  best = np.array([d.place(v) if d.form != 'choices' else np.nan for d, v in _pairs(space, scored)])
  places = rng.uniform(size=(_CANDIDATES, len(space)))
  near = best + 0.1 * rng.standard_normal((_NEAR, len(space)))
  places[:_NEAR] = np.where(np.isnan(near), places[:_NEAR], np.clip(near, 0, 1 - 1e-9))
  points = [{d.key: d.at(float(p)) for d, p in zip(space, row, strict=True)} for row in places]
  found = np.stack([_encoded(space, point) for point in points])
  mean, sd = _predicted(x, y, found, scale, noise)
  # Against the smallest mean at a point that was tried: scores have noise.
  lowest = _predicted(x, y, x, scale, noise)[0].min()
  z = (lowest - mean) / sd
  gain = sd * (z * norm.cdf(z) + norm.pdf(z))
  return points[int(gain.argmax())]


def _pairs(space, scored):
  point = min(scored, key=lambda found: found[1])[0]
  return [(d, point[d.key]) for d in space]


def _encoded(space: Sequence[Dimension], point: Point) -> np.ndarray:
  """Returns the coordinates of a point: places in [0, 1], a choice as ones and zeros."""
  out: list[float] = []
  for d in space:
    if d.form == 'choices':
      own = d.index(point[d.key])
      out += [0.7 * (i == own) for i in range(len(d.values))]  # two choices are about 1 apart
    else:
      out.append(d.place(point[d.key]))
  return np.array(out)


def _kernel(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Returns the Matern 5/2 covariance: float64[A, D], [B, D] -> [A, B]."""
  distance = np.sqrt(5 * (((a[:, None] - b[None]) / scale) ** 2).sum(-1))
  return (1 + distance + distance**2 / 3) * np.exp(-distance)


def _covariance(x: np.ndarray, scale: np.ndarray, noise: float) -> np.ndarray:
  return _kernel(x, x, scale) + (noise + _JITTER) * np.eye(len(x))


def _hyperparameters(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
  """Returns (length scales float64[D], noise variance), of scores with unit variance."""
  from scipy.linalg import cho_factor, cho_solve
  from scipy.optimize import minimize

  dims = x.shape[1]

  def cost(log: np.ndarray) -> float:
    scale, noise = np.exp(log[:dims]), math.exp(log[dims])
    try:
      factor = cho_factor(_covariance(x, scale, noise), lower=True)
    except np.linalg.LinAlgError:
      return 1e10
    fitted = 0.5 * y @ cho_solve(factor, y) + np.log(np.diag(factor[0])).sum()
    prior = (((log[:dims] - math.log(0.5)) / 0.8) ** 2).sum() + ((log[dims] + 3) / 1.5) ** 2
    return float(fitted + 0.5 * prior)

  start = np.append(np.full(dims, math.log(0.5)), -3.0)
  limits = [(math.log(0.02), math.log(20.0))] * dims + [(-9.0, 1.0)]
  found = minimize(cost, start, method='L-BFGS-B', bounds=limits).x
  return np.exp(found[:dims]), math.exp(found[dims])


def _predicted(x, y, points, scale, noise):
  """Returns mean and standard deviation at points, float64[P] each."""
  from scipy.linalg import cho_factor, cho_solve

  factor = cho_factor(_covariance(x, scale, noise), lower=True)
  cross = _kernel(points, x, scale)
  mean = cross @ cho_solve(factor, y)
  variance = 1 - (cross * cho_solve(factor, cross.T).T).sum(1)
  return mean, np.sqrt(np.maximum(variance, 1e-10))
