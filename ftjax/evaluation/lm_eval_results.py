"""Results and metrics of the documents that lm-eval scored.

lm-eval computes the values of each document, and one figure of them by an aggregation. The values
become those of a `Result`, under the name 'METRIC|AGGREGATION|BETTER', so that the results alone
give the metrics again: with weights, for intervals and tests. METRIC is lm-eval's own key, 'acc' or
'exact_match,strict-match'.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from ftjax.evaluation import metric
from ftjax.evaluation.metric import Metric, of_sums, ratio
from ftjax.evaluation.result import Result
from ftjax.evaluation.rows import Row
from ftjax.runtime.errors import DataError


@dataclasses.dataclass(frozen=True)
class Documents:
  """What lm-eval found for one task or group.

  Attributes:
    results: one a document.
    metrics: figures of the results; the first is the one that decides.
    figures: lm-eval's own, by its key ('acc,none').
    left_out: why a figure of lm-eval is no metric here, by its key.
  """

  results: list[Result]
  metrics: tuple[Metric, ...]
  figures: Mapping[str, float]
  left_out: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Aggregation:
  """numbers: of each document. value: sums float64[R, M] -> float64[R]. columns: numbers
  float64[n, numbers] -> float64[n, M], what is summed. is_mean: of numbers, so that zeros and ones
  give a proportion.
  """

  numbers: int
  value: Callable[[np.ndarray], np.ndarray]
  columns: Callable[[np.ndarray], np.ndarray] = lambda numbers: np.pad(
    numbers, ((0, 0), (0, 1)), constant_values=1
  )
  is_mean: bool = False
  form: str = 'number'


def _mean(sums: np.ndarray) -> np.ndarray:
  return ratio(sums[:, 0], sums[:, -1])


def _weighted(sums: np.ndarray) -> np.ndarray:
  return ratio(sums[:, 0], sums[:, 1])


def _binary(numbers: np.ndarray) -> np.ndarray:
  """Returns of (label, prediction) in {0, 1}: both 1, label 1, prediction 1."""
  label, predicted = (numbers == 1).T.astype(np.float64)
  return np.stack([label * predicted, label, predicted], axis=1)


def _f1(sums: np.ndarray) -> np.ndarray:
  """Returns F1 of the class 1; 0 where neither labels nor predictions have it, as scikit-learn."""
  found = ratio(2 * sums[:, 0], sums[:, 1] + sums[:, 2])
  return np.where(sums[:, 1] + sums[:, 2] == 0, 0.0, found)


def _classes(numbers: np.ndarray) -> np.ndarray:
  """Returns of (label, prediction): the label one-hot, the prediction one-hot, whether equal."""
  known = np.unique(numbers)
  label, predicted = (numbers.T[:, :, None] == known).astype(np.float64)
  return np.concatenate([label, predicted, (numbers[:, :1] == numbers[:, 1:])], axis=1)


def _mcc(sums: np.ndarray) -> np.ndarray:
  """Returns Matthews' correlation of several classes (Gorodkin 2004); 0 where a side has one class
  only, as scikit-learn.
  """
  count = (sums.shape[1] - 1) // 2
  label, predicted, equal = sums[:, :count], sums[:, count : 2 * count], sums[:, -1]
  total = label.sum(1)
  top = equal * total - (label * predicted).sum(1)
  bottom = (total**2 - (label**2).sum(1)) * (total**2 - (predicted**2).sum(1))
  return np.where(bottom <= 0, 0.0, ratio(top, np.sqrt(np.maximum(bottom, 0.0))))


# By lm-eval's names (lm_eval/api/metrics.py).
_AGGREGATIONS = {
  'mean': _Aggregation(1, _mean, is_mean=True, form='fraction'),
  'present_mean': _Aggregation(2, _weighted, form='fraction'),  # of documents that have the value
  'perplexity': _Aggregation(1, lambda sums: np.exp(-_mean(sums))),
  'weighted_perplexity': _Aggregation(2, lambda sums: np.exp(-_weighted(sums))),
  'f1': _Aggregation(2, _f1, _binary, form='fraction'),
  'matthews_corrcoef': _Aggregation(2, _mcc, _classes),
  'bits_per_byte': _Aggregation(2, lambda sums: -_weighted(sums) / math.log(2)),
}


def read(
  samples: Mapping[str, Sequence[Mapping[str, Any]]],
  aggregations: Mapping[str, tuple[str, bool]],
  choices: Callable[[str, Mapping[str, Any]], Sequence[str] | None],
  lengths: Mapping[tuple[str, int], tuple[int, bool]],
  figures: Mapping[str, float],
) -> Documents:
  """Returns the documents of a task, or of all tasks of a group.

  Args:
    samples: by task, what lm-eval logged: a row for each document and filter.
    aggregations: by metric, (lm-eval's name of its aggregation, whether higher is better).
    choices: (task, document) -> what it offers; None where the model wrote a text.
    lengths: by (task, document's number), tokens of the completion and whether it was cut.
    figures: lm-eval's own, by 'METRIC,FILTER'.
  """
  rows: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
  for task, logged in samples.items():
    for row in logged:
      rows.setdefault((task, row['doc_id']), []).append(row)
  values, left_out = _values(rows, aggregations)
  results = [
    _result(
      place if len(samples) > 1 else ('', place[1]),
      found,
      choices(place[0], found[0]['doc']),
      values[place],
      lengths.get(place, (0, False)),
    )
    for place, found in rows.items()
  ]
  kept = []
  for found_metric in metrics(results):
    key = found_metric.name if ',' in found_metric.name else f'{found_metric.name},none'
    own = found_metric.value(np.ones((1, len(results))), found_metric.columns(results, ()))[0]
    theirs = figures.get(key, math.nan)
    if math.isclose(own, theirs, rel_tol=1e-9, abs_tol=1e-12):
      kept.append(found_metric)
    else:
      left_out[key] = f'over all documents it is {own:.6g}, and {theirs:.6g} by lm-eval'
  return Documents(results, tuple(kept), dict(figures), left_out)


@dataclasses.dataclass(frozen=True)
class LmEvalEntry:
  """A task of lm-eval as comparison.py reads it, made of the results of all models."""

  name: str
  kind_name: str
  rows: tuple[Row, ...]
  metrics: tuple[Metric, ...]
  group: str = 'task'
  classes: tuple[str, ...] = ()
  details: tuple[Metric, ...] = ()


def entry(name: str, kind_name: str, results: Mapping[str, Sequence[Result]]) -> LmEvalEntry:
  """Returns the entry of a task.

  Args:
    name: of the task. kind_name: of its entry in eval.tasks.
    results: of each model.

  Raises:
    DataError: the models have no metric in common.
  """
  together = [r for own in results.values() for r in own]
  found = metrics(together)
  if not found:
    raise DataError(f'eval.tasks, {name}: lm-eval gives no figure that can be compared')
  rows = tuple(
    Row(r.id, f'{name}:{r.id}', None, answers=(r.label,)) for r in next(iter(results.values()))
  )
  return LmEvalEntry(name, kind_name, rows, found)


def metrics(results: Sequence[Result]) -> tuple[Metric, ...]:
  """Returns the metrics of results of `read`, in lm-eval's order; also of several models' results
  together, so that all have the same.
  """
  if not results:
    return ()
  keys = [key for key in results[0].values if key.count('|') == 2]
  names = [key for key in keys if all(key in r.values for r in results)]
  return tuple(_metric(name, results) for name in names)


def _metric(key: str, results: Sequence[Result]) -> Metric:
  name, kind, better = key.split('|')
  how, read_values = _AGGREGATIONS[kind], metric.read_values(key)
  title, _, rest = name.partition(',')

  def columns(some: Sequence[Result], classes: Sequence[str]) -> np.ndarray:
    return how.columns(read_values(some, classes).reshape(len(some), how.numbers))

  is_proportion = how.is_mean and all(r.values[key] in ((0.0,), (1.0,)) for r in results)
  in_unit = all(0 <= r.values[key][0] <= 1 for r in results)
  return Metric(
    *(name, f'{title} ({rest})' if rest else title, columns, of_sums(how.value), better),
    is_proportion=is_proportion,
    form=how.form if in_unit else 'number',
  )


def _values(
  rows: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]],
  aggregations: Mapping[str, tuple[str, bool]],
) -> tuple[dict[tuple[str, int], dict[str, tuple[float, ...]]], dict[str, str]]:
  """Returns the values by document, and why a metric has none, by lm-eval's key."""
  found: dict[str, dict[tuple[str, int], tuple[float, ...] | None]] = {}
  for place, some in rows.items():
    for row in some:
      for name in row['metrics']:
        kind, _ = aggregations.get(name, ('mean', True))
        value = _brier(*row[name]) if kind == 'brier_score' else row[name]
        found.setdefault(f'{name},{row["filter"]}', {})[place] = _numbers(value)
  values: dict[tuple[str, int], dict[str, tuple[float, ...]]] = {place: {} for place in rows}
  left_out = {}
  for key, own in found.items():
    name = key.partition(',')[0]
    kind, is_higher = aggregations.get(name, ('mean', True))
    kind = 'mean' if kind == 'brier_score' else kind
    if kind == 'nanmean' or (kind == 'mean' and len(own) < len(rows)):
      kind = 'present_mean'
      own = {
        p: (x[0], 1.0) if x and len(x) == 1 and not math.isnan(x[0]) else (0.0, 0.0)
        for p in rows
        for x in [own.get(p)]
      }
    how = _AGGREGATIONS.get(kind)
    if how is None:
      left_out[key] = f'its aggregation {kind} has no form with weights'
      continue
    wrong = [p for p in rows if not _fits(own.get(p), how.numbers)]
    if wrong:
      left_out[key] = f'document {wrong[0][1]} of {wrong[0][0]} has no finite value of it'
      continue
    better = 'higher' if is_higher else 'lower'
    full = f'{key.removesuffix(",none")}|{kind}|{better}'
    for place in rows:
      values[place][full] = own[place] or ()
  return values, left_out


def _brier(label: int, probabilities: Sequence[float]) -> float:
  """Returns the sum of squared errors of a document's probabilities, whose mean is lm-eval's."""
  found = np.array(probabilities, np.float64)
  found[label] -= 1
  return float(np.square(found).sum())


def _numbers(value: Any) -> tuple[float, ...] | None:
  """Returns the numbers of a document's value, None where it holds something else."""
  items = value if isinstance(value, tuple | list) else (value,)
  if not all(isinstance(x, Real | np.number | np.bool_) for x in items):
    return None
  return tuple(float(x) for x in items)


def _fits(numbers: tuple[float, ...] | None, count: int) -> bool:
  return numbers is not None and len(numbers) == count and all(map(math.isfinite, numbers))


def _result(
  place: tuple[str, int],
  rows: Sequence[Mapping[str, Any]],
  choices: Sequence[str] | None,
  values: dict[str, tuple[float, ...]],
  length: tuple[int, bool],
) -> Result:
  """Returns the result of one document from its rows, one a filter."""
  row, scores, response = rows[0], (), ''
  first = next(iter(values), '')
  if first.split('|')[1:2] == ['mean'] and values[first] in ((0.0,), (1.0,)):
    values = {'right': values[first]} | values
  answers = [resps[0] for resps in row['resps']]
  prediction = ''
  if answers and isinstance(answers[0], str):
    response, found = answers[0], row['filtered_resps'][0]
    prediction = found if isinstance(found, str) else str(found[0] if found else '')
  elif answers and isinstance(answers[0], tuple):
    scores = tuple(float(logp) for logp, _ in answers)
    if choices:
      scores = scores[: len(choices)]  # behind them lm-eval may have those without a context
      prediction = str(choices[int(np.argmax(scores))])
  name = f'{place[0]}/{place[1]}' if place[0] else str(place[1])
  return Result(
    *(name, _label(row['target'], choices), prediction, values, scores, response),
    tokens=length[0],
    is_cut=length[1],
  )


def _label(target: Any, choices: Sequence[str] | None) -> str:
  """Returns the right text, of several the first."""
  if isinstance(target, list | tuple):
    target = target[0] if target else ''
  if choices and isinstance(target, int | np.integer) and 0 <= target < len(choices):
    return str(choices[target])
  return str(target)
