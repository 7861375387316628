"""Chooses the points of a search space: by a grid, by random or Sobol numbers, or by the scores of
earlier points.

The point of a trial depends on the study's seed, the trial's number and the earlier trials alone,
so that a search that was stopped resumes as if it had not been.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from ftjax.config.search_space import Dimension, Point
from ftjax.runtime.errors import ConfigError
from ftjax.studies import gaussian_process

_TRIES = 64  # of other points, where one was tried before

History = Sequence[tuple[Point, float | None]]  # points with a number, smaller is better


def count(kind: str, space: Sequence[Dimension], trials: int) -> int:
  """Returns how many points a study has."""
  if kind != 'grid':
    return trials
  return math.prod(len(d.all_values()) for d in space)


def first_guided(kind: str, trials: int) -> int:
  """Returns the number of the first trial that reads the scores of earlier ones."""
  return min(10, max(4, trials // 3)) if kind in ('tpe', 'gp') else trials


def choose(
  kind: str,
  space: Sequence[Dimension],
  *,
  seed: int,
  number: int,
  trials: int,
  history: History,
  taken: Sequence[Point],
) -> Point | None:
  """Returns the point of a trial; None where the space has no other point than those tried.

  Args:
    kind: of the study.
    space: what may be chosen.
    seed: of the study.
    number: of the trial, from 0.
    trials: in all.
    history: earlier points with their scores; None: the run failed.
    taken: all earlier points, those without a score yet included.
  """
  if kind == 'grid':
    values = list(itertools.product(*(d.all_values() for d in space)))[number]
    return dict(zip([d.key for d in space], values, strict=True))
  known = [repr(sorted(p.items())) for p in taken]
  is_guided = number >= first_guided(kind, trials)
  scored = _scored(history) if is_guided else []
  for attempt in range(_TRIES):
    draw = [seed, number, attempt]
    if attempt or not (scored or kind == 'sobol' or kind in ('tpe', 'gp')):
      point = _random(space, draw)
    elif scored:
      point = (_tpe if kind == 'tpe' else gaussian_process.suggest)(space, scored, draw)
    else:
      point = _sobol(space, seed, number)
    if repr(sorted(point.items())) not in known:
      return point
  return None


def _scored(history: History) -> list[tuple[Point, float]]:
  """Returns points with scores; a failed run counts as the worst one."""
  found = [score for _, score in history if score is not None]
  if not found:
    return []
  worst = max(found)
  return [(point, worst if score is None else score) for point, score in history]


def _at(space: Sequence[Dimension], places: np.ndarray) -> Point:
  return {d.key: d.at(float(p)) for d, p in zip(space, places, strict=True)}


def _random(space: Sequence[Dimension], draw: Sequence[int]) -> Point:
  return _at(space, np.random.default_rng(draw).uniform(size=len(space)))


def _sobol(space: Sequence[Dimension], seed: int, number: int) -> Point:
  from scipy.stats import qmc

  sequence = qmc.Sobol(len(space), scramble=True, seed=np.random.default_rng(seed))
  if number:
    sequence.fast_forward(number)
  return _at(space, sequence.random(1)[0])


def _tpe(
  space: Sequence[Dimension], scored: Sequence[tuple[Point, float]], draw: Sequence[int]
) -> Point:
  """Returns the point of a tree-structured Parzen estimator (Bergstra et al. 2011, NeurIPS 24)."""
  optuna = import_optuna()
  distributions = distributions_of(space)
  seed = int(np.random.default_rng(draw).integers(1 << 31))
  # multivariate: keys are drawn together, so that what goes well together is found.
  sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, multivariate=True)
  study = optuna.create_study(sampler=sampler, direction='minimize')
  study.add_trials(
    optuna.trial.create_trial(params=params(space, point), distributions=distributions, value=score)
    for point, score in scored
  )
  found = study.ask(distributions).params
  return {
    d.key: d.values[found[d.key]] if d.form == 'choices' else d.rounded(found[d.key]) for d in space
  }


def params(space: Sequence[Dimension], point: Point) -> Point:
  """Returns a point as optuna has it: choices by their number, which any value may have."""
  return {d.key: d.index(point[d.key]) if d.form == 'choices' else point[d.key] for d in space}


def distributions_of(space: Sequence[Dimension]) -> dict:
  """Returns {key: optuna's distribution}."""
  from optuna import distributions as kinds

  out = {}
  for d in space:
    if d.form == 'choices':
      out[d.key] = kinds.CategoricalDistribution(range(len(d.values)))
    elif d.is_integer:
      out[d.key] = kinds.IntDistribution(int(d.low), int(d.high), log=d.is_log)
    else:
      out[d.key] = kinds.FloatDistribution(d.low, d.high, log=d.is_log)
  return out


def import_optuna():
  """Returns the module optuna, quiet.

  Raises:
    ConfigError: it is not installed.
  """
  try:
    import optuna
  except ImportError as error:
    raise ConfigError(
      "study.kind=tpe needs optuna: pip install '.[study]' in the checkout of ftjax, or "
      'take sobol, grid, random or gp'
    ) from error
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  return optuna
