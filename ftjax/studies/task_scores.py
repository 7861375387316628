"""The results of the runs of a study on one task, in the form that intervals are computed of."""

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np

from ftjax.config import task_specs
from ftjax.evaluation import comparison, result, tasks
from ftjax.evaluation import metric as metric_lib
from ftjax.evaluation.metric import Metric
from ftjax.evaluation.result import Result
from ftjax.evaluation.statistics import bootstrap, intervals, seeds
from ftjax.evaluation.statistics.seeds import SeedMean
from ftjax.runtime.errors import DataError
from ftjax.storage import files
from ftjax.studies.study import Study

BOUNDS = {'fraction': (0.0, 1.0), 'points': (0.0, 100.0)}  # of a figure, by its form


@dataclasses.dataclass(frozen=True)
class TaskScores:
  """One figure of several runs on the same rows.

  Attributes:
    metric: the figure.
    columns: of each run, float64[n, M].
    clusters: [n], the prompt of each result.
  """

  metric: Metric
  columns: tuple[np.ndarray, ...]
  clusters: tuple[Hashable, ...]

  def figure(self, weights: np.ndarray) -> np.ndarray:
    """Returns the figure of each run: weights float64[R, n] -> float64[R, runs]."""
    return np.stack([self.metric.value(weights, c) for c in self.columns], axis=1)


def read(study: Study, names: Sequence[str]) -> TaskScores | None:
  """Returns the results of study.metric of runs; None where it is no figure of a task.

  Raises:
    DataError: results that differ in their rows, or are not there.
  """
  metric = study.metric
  if not metric.task:
    return None
  spec = next(s for s in task_specs.parse_all(study.config.eval.tasks) if s.name == metric.task)
  task = tasks.load_task(*spec)
  task = task.first(study.config.eval.rows, tasks.ROWS_SEED) if study.config.eval.rows else task
  found = find(task, metric.figure)
  columns, asked = [], None
  for name in names:
    own = results(study, name, metric.task)[comparison.TUNED]
    ids = tuple((r.id, r.label) for r in own)
    asked = asked or ids
    if ids != asked:
      raise DataError(f'run {name}: eval/{metric.task}.jsonl has other rows than run {names[0]}')
    columns += metric_lib.read_columns([found], own, task.classes, task.name)
  return TaskScores(found, tuple(columns), tuple(i for i, _ in asked or ()))


def find(task: tasks.Task, name: str) -> Metric:
  """Returns a figure of a task. Raises DataError where its rows do not allow it."""
  for found in (*task.metrics, *task.details):
    if found.name == name:
      return found
  raise DataError(
    f'{task.path}: the rows of the task {task.name} offer different choices, so that {name} means '
    'nothing; take another study.metric'
  )


def results(study: Study, name: str, task: str) -> dict[str, list[Result]]:
  """Returns {model: results} of a run on a task.

  Raises:
    DataError: they are not there.
  """
  path = files.join(study.folder.run(name), 'eval', f'{task}.jsonl')
  if not files.exists(path):
    raise DataError(f'{path} is not there: the run {name} has no results of {task}')
  return result.load(path)


def interval(
  metric: Metric, columns: np.ndarray, clusters: Sequence[Hashable]
) -> intervals.Interval:
  """Returns a figure of results with its interval: of a share by its score, else by a bootstrap."""
  if not len(columns):
    return intervals.Interval(math.nan, math.nan, math.nan, math.nan)
  if metric.is_proportion:
    return intervals.proportion(columns[:, 0], clusters)
  found = bootstrap.bootstrap(lambda w: metric.value(w, columns), clusters, seed=comparison.SEED)
  return intervals.Interval(*(float(x) for x in (found.value, found.low, found.high, found.se)))


def difference(
  metric: Metric, first: np.ndarray, second: np.ndarray, clusters: Sequence[Hashable]
) -> intervals.Interval:
  """Returns second - first of two models on the same results, paired, by a bootstrap."""
  found = bootstrap.bootstrap(
    lambda w: metric.value(w, second) - metric.value(w, first), clusters, seed=comparison.SEED
  )
  return intervals.Interval(*(float(x) for x in (found.value, found.low, found.high, found.se)))


def seed_mean(scores: TaskScores, columns: Sequence[np.ndarray]) -> SeedMean:
  """Returns the mean over runs that differ in their seed: both errors apart."""

  def figure(weights: np.ndarray) -> np.ndarray:
    return np.stack([scores.metric.value(weights, c) for c in columns], axis=1)

  return _in_range(scores, seeds.seed_mean(figure, scores.clusters, seed=comparison.SEED))


def seed_difference(
  scores: TaskScores, first: Sequence[np.ndarray], second: Sequence[np.ndarray]
) -> SeedMean:
  """Returns the mean of second - first over pairs of runs with the same seed."""
  value = scores.metric.value

  def figure(weights: np.ndarray) -> np.ndarray:
    pairs = zip(first, second, strict=True)
    return np.stack([value(weights, b) - value(weights, a) for a, b in pairs], axis=1)

  return seeds.seed_mean(figure, scores.clusters, seed=comparison.SEED)


def mean_interval(scores: TaskScores, columns: Sequence[np.ndarray]) -> intervals.Interval:
  """Returns the mean over seeds with its interval over seeds and examples."""
  found = seed_mean(scores, columns)
  return intervals.Interval(found.value, found.low, found.high, found.se)


def _in_range(scores: TaskScores, found: SeedMean) -> SeedMean:
  """Returns a mean with the ends of its interval inside of the range of the figure."""
  least, most = BOUNDS.get(scores.metric.form, (-math.inf, math.inf))
  if math.isnan(found.low):
    return found
  return dataclasses.replace(found, low=max(found.low, least), high=min(found.high, most))
