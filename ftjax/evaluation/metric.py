"""What a metric is: a figure of a set of results, in a form that can be resampled.

A resample is a vector of weights, how often each result counts: a bootstrap draws them, a
permutation test chooses between two models by them, and n ones give the figure itself. So a metric
maps weights float64[R, n] and its columns float64[n, M] to float64[R], all R at once. Most metrics
are functions of sums over results (`of_sums`); those of ranks are not.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ftjax.evaluation.result import Result
from ftjax.runtime.errors import DataError

Columns = Callable[[Sequence[Result], Sequence[str]], np.ndarray]
Value = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Metric:
  """A figure of the results of one model on one task.

  Attributes:
    name: key in files, such as 'macro_f1'.
    title: in tables, such as 'macro F1'.
    columns: (results, classes of the task) -> float64[n, M], what the figure needs of each result.
    value: (weights float64[R, n], columns) -> float64[R]; NaN where it cannot be computed, such as
      a mean without results.
    better: 'higher', 'lower', or '' where neither is better.
    is_proportion: the figure is the mean of zeros and ones: Wilson's interval, McNemar's test.
    is_resampled: it has an interval; not where a resample that repeats rows means something else.
    form: how it is shown: 'fraction' (0.873), 'points' (of 100: 27.4) or 'number' (any scale).
  """

  name: str
  title: str
  columns: Columns
  value: Value
  better: str = 'higher'
  is_proportion: bool = False
  is_resampled: bool = True
  form: str = 'fraction'


def of_sums(function: Callable[[np.ndarray], np.ndarray]) -> Value:
  """Returns the `value` of a metric that is a function of the weighted sums of its columns; NaN
  without results, of which the number of columns may not be known.

  Args:
    function: float64[R, M] -> float64[R].
  """

  def value(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return function(weights @ columns) if len(columns) else np.full(len(weights), np.nan)

  return value


def read_columns(
  metrics: Sequence[Metric], results: Sequence[Result], classes: Sequence[str], task: str
) -> tuple[np.ndarray, ...]:
  """Returns the columns of each metric: float64[n, M].

  Args:
    task: whose results these are, for messages.

  Raises:
    DataError: the values of the results are not those that a metric reads; a share of others than
      0 and 1.
  """
  out = []
  for metric in metrics:
    try:
      out.append(metric.columns(results, classes))
    except KeyError as error:
      raise DataError(
        f'eval.tasks, {task}: the metric {metric.name!r} reads the value {error}, which the score '
        'of its kind does not give'
      ) from error
    except ValueError as error:  # of NumPy
      raise DataError(
        f'eval.tasks, {task}: the metric {metric.name!r} cannot read its values: {error}; expected '
        'as many numbers of every row'
      ) from error
    if metric.is_proportion and len(results) and not np.isin(out[-1][:, 0], (0, 1)).all():
      raise DataError(
        f'eval.tasks, {task}: the metric {metric.name!r} is a share of results whose value is 1, '
        f'not 0; got {out[-1][~np.isin(out[-1][:, 0], (0, 1)), 0][0]:g}. Other numbers have '
        'metric.mean'
      )
  return tuple(out)


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
  """Returns top / bottom, NaN where bottom is 0: float64[...] twice."""
  top, bottom = np.asarray(top, np.float64), np.asarray(bottom, np.float64)
  return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom != 0)


def read_values(*names: str) -> Columns:
  """Returns the columns of the results' values under these names, one after the other.

  The columns raise KeyError where a result lacks one of them.
  """

  def columns(results: Sequence[Result], classes: Sequence[str]) -> np.ndarray:
    rows = [[x for name in names for x in result.values[name]] for result in results]
    return np.array(rows, np.float64) if rows else np.zeros((0, 0))

  return columns


def mean(name: str, title: str, *, better: str = 'higher', form: str = 'fraction') -> Metric:
  """Returns the metric that is the mean of the results' value `name`."""

  def columns(results: Sequence[Result], classes: Sequence[str]) -> np.ndarray:
    values = read_values(name)(results, classes).reshape(len(results), 1)
    return np.concatenate([values, np.ones_like(values)], axis=1)

  value = of_sums(lambda sums: ratio(sums[:, 0], sums[:, 1]))
  return Metric(name, title, columns, value, better, form=form)


def optional_ratio(name: str, title: str, *, better: str, form: str = 'fraction') -> Metric:
  """Returns the metric that is a ratio of sums of the two numbers of the value `name`; NaN where no
  result has it: it is measured apart from the task, and not in every run.
  """

  def columns(results: Sequence[Result], classes: Sequence[str]) -> np.ndarray:
    found = [r.values.get(name, (0.0, 0.0)) for r in results]
    return np.array(found, np.float64).reshape(len(results), 2)

  value = of_sums(lambda sums: ratio(sums[:, 0], sums[:, 1]))
  return Metric(name, title, columns, value, better, form=form)


def proportion(name: str, title: str, *, better: str = 'higher') -> Metric:
  """Returns the metric that is the share of results whose value `name` is 1, not 0."""
  return dataclasses.replace(mean(name, title, better=better), is_proportion=True)
