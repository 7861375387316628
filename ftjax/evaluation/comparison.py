"""Compares the results of several models on the rows of one task, and sums tasks up.

`compare` gives the entry of one task in eval/summary.json, `summarize` the whole of it. Results of
one prompt are a cluster, and so are those of all rows with the same group.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ftjax.evaluation import verdict
from ftjax.evaluation.metric import Metric, read_columns
from ftjax.evaluation.metrics import calibration, classification, samples
from ftjax.evaluation.result import Result
from ftjax.evaluation.rows import Row, clusters
from ftjax.evaluation.statistics import bootstrap, intervals, paired, power

VERSION = 2
SEED = 0
RESAMPLES = 2000
LEVEL = 0.95
EXAMPLES = 200  # rows of a task whose responses are shown
LONGEST = 4000  # characters of a text that is shown
TUNED = 'tuned'
MCNEMAR = 'exact McNemar'

_BINS = 10  # of a reliability diagram


class Compared(Protocol):
  """What is read of a task: tasks.Task has it, and lm_eval_results.LmEvalEntry."""

  name: str
  kind_name: str
  group: str
  rows: tuple[Row, ...]
  classes: tuple[str, ...]

  @property
  def metrics(self) -> tuple[Metric, ...]: ...
  @property
  def details(self) -> tuple[Metric, ...]: ...


@dataclasses.dataclass(frozen=True)
class _Models:
  """The results of all models on one task: what each metric needs of them.

  main: how many of the metrics are no details. columns: [model][metric] float64[n, M]. clusters: of
  each model, int[n], below `groups`. prompts: rows.
  """

  names: tuple[str, ...]
  metrics: tuple[Metric, ...]
  main: int
  classes: tuple[str, ...]
  results: tuple[Sequence[Result], ...]
  columns: tuple[tuple[np.ndarray, ...], ...]
  clusters: tuple[np.ndarray, ...]
  groups: int
  prompts: int

  def figures(self, weights: np.ndarray) -> np.ndarray:
    """Returns the metrics of each model: float64[R, groups] -> float64[R, models, metrics]."""
    out = []
    for columns, own in zip(self.columns, self.clusters, strict=True):
      spread = weights[:, own]
      values = [_figure(m, spread, c) for m, c in zip(self.metrics, columns, strict=True)]
      out.append(np.stack(values, axis=-1))
    return np.stack(out, axis=1)

  def primary(self, model: int, results: int) -> np.ndarray:
    """Returns the first metric of each of the first `results` results alone: float64[results]; NaN
    where that means nothing.
    """
    columns = self.columns[model][0][:results]
    return self.metrics[0].value(np.eye(len(columns)), columns)


def _figure(metric: Metric, weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
  if not metric.is_resampled and len(weights) > 1:
    return np.full(len(weights), np.nan)
  return metric.value(weights, columns)


def _models(task: Compared, results: Mapping[str, Sequence[Result]]) -> _Models:
  ids = [row.id for row in task.rows]
  for name, own in results.items():
    if list(dict.fromkeys(r.id for r in own)) != ids:
      raise ValueError(f'{task.name}: results of {name!r} are not those of the task, row by row')
  number = clusters(task.rows)
  metrics = (*task.metrics, *_of_samples(results), *task.details)
  columns = tuple(read_columns(metrics, own, task.classes, task.name) for own in results.values())
  return _Models(
    names=tuple(results),
    metrics=metrics,
    main=len(metrics) - len(task.details),
    classes=task.classes,
    results=tuple(results.values()),
    columns=columns,
    clusters=tuple(np.array([number[r.id] for r in own], int) for own in results.values()),
    groups=len(set(number.values())),
    prompts=len(ids),
  )


def _of_samples(results: Mapping[str, Sequence[Result]]) -> tuple[Metric, ...]:
  """Returns pass@k and maj@k, where each model gave k completions of each prompt."""
  counts = {max((r.sample for r in own), default=0) + 1 for own in results.values()}
  k = min(counts, default=1)
  has_right = all('right' in r.values for own in results.values() for r in own)
  return samples.metrics(k) if has_right else ()


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
  """Returns which models are compared, as (first, second): the tuned one with all others, and the
  first with each of the rest.
  """
  with_tuned = [(name, TUNED) for name in names if name != TUNED] if TUNED in names else []
  return with_tuned + [(names[0], n) for n in names[1:] if n != TUNED]


def compare(
  task: Compared, results: Mapping[str, Sequence[Result]], cost: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Returns the entry of a task in eval/summary.json: figures of each model with intervals, tests
  of differences, and examples. docs/evaluation.md describes its keys.

  Args:
    task: what was asked.
    results: of each model, on all rows of the task; at least one model.
    cost: {model: {seconds, tokens, rows}}.

  Raises:
    ValueError: results of other rows.
    DataError: a metric that reads what the kind's score does not give.
  """
  models = _models(task, results)
  names, count = models.names, len(models.metrics)
  pairs = [(names.index(a), names.index(b)) for a, b in pairs_of(names)]

  def figures(weights: np.ndarray) -> np.ndarray:
    found = models.figures(weights)
    differences = [found[:, b] - found[:, a] for a, b in pairs]
    return np.concatenate([found.reshape(len(found), -1), *differences], axis=1)

  entries = _bootstrap(models, figures)
  scores = {
    name: _scores(models, m, entries[m * count : (m + 1) * count]) for m, name in enumerate(names)
  }
  differences = []
  for number, (a, b) in enumerate(pairs):
    at = (len(names) + number) * count
    differences.append(_difference(models, a, b, entries[at : at + count]))
  return {
    'task': task.name,
    'kind': task.kind_name,
    'group': task.group,
    'n': len(models.results[0]),
    'prompts': models.prompts,
    'groups': models.groups if models.groups < models.prompts else None,
    'samples': max((r.sample for r in models.results[0]), default=0) + 1,
    'classes': list(task.classes) or None,
    'metrics': [
      {
        'name': m.name,
        'title': m.title,
        'better': m.better,
        'form': m.form,
        'is_primary': not i,
        'is_detail': i >= models.main,
      }
      for i, m in enumerate(models.metrics)
    ],
    'scores': scores,
    'differences': differences,
    'per_class': _by_model(models, classification.per_class_table) if task.classes else None,
    'confusion': _by_model(models, classification.confusion) if task.classes else None,
    'most_frequent': classification.most_frequent(results, task.classes) if task.classes else None,
    'calibration': _calibration(models),
    'by_source': _by_source(task, models),
    'cut': {
      n: _mean([r.is_cut for r in own]) for n, own in zip(names, models.results, strict=True)
    },
    'contamination': None,
    'cost': dict(cost or {}),
    'method': {'level': LEVEL, 'resamples': RESAMPLES, 'seed': SEED},
    'examples': _examples(task, models),
  }


def on_rows(
  task: Compared, results: Mapping[str, Sequence[Result]], ids: frozenset[str]
) -> dict[str, dict[str, float | None]]:
  """Returns {model: {value, low, high}} of the primary figure on some of the rows.

  ids: of these rows; nothing is known of none.
  """
  rows = tuple(row for row in task.rows if row.id in ids)
  if not rows:
    return {name: dict.fromkeys(('value', 'low', 'high')) for name in results}
  part = dataclasses.replace(task, rows=rows)
  models = _models(part, {n: [r for r in own if r.id in ids] for n, own in results.items()})
  models = dataclasses.replace(
    models, metrics=models.metrics[:1], columns=tuple(c[:1] for c in models.columns)
  )
  entries = _bootstrap(models, models.figures)
  return {
    name: {k: found[k] for k in ('value', 'low', 'high')}
    for m, name in enumerate(models.names)
    for found in _scores(models, m, entries[m : m + 1]).values()
  }


def _bootstrap(models: _Models, figures: Callable[[np.ndarray], np.ndarray]) -> list[dict]:
  """Returns {value, low, high, se, p} of each figure: weights float64[R, groups] -> [R, ...]."""
  spread = bootstrap.of_clusters(
    lambda weights: figures(weights).reshape(len(weights), -1),
    models.groups,
    seed=SEED,
    resamples=RESAMPLES,
    level=LEVEL,
  )
  return [
    {k: _number(getattr(spread, k)[i]) for k in ('value', 'low', 'high', 'se', 'p')}
    for i in range(spread.value.size)
  ]


def _number(value: Any) -> float | None:
  number = float(value)
  return number if math.isfinite(number) else None


def _mean(values: Sequence[float]) -> float:
  return float(np.mean(values)) if len(values) else 0.0


def _by_model(models: _Models, table) -> dict[str, Any]:
  return {
    n: table(own, models.classes) for n, own in zip(models.names, models.results, strict=True)
  }


def _scores(models: _Models, model: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns {metric: {value, low, high, se}}; where there is no value, with the reason."""
  out = {}
  for metric, columns, entry in zip(models.metrics, models.columns[model], entries, strict=True):
    found = {k: entry[k] for k in ('value', 'low', 'high', 'se')}
    if metric.is_proportion and found['value'] is not None:
      interval = intervals.proportion(columns[:, 0], models.clusters[model], LEVEL)
      found |= {'low': interval.low, 'high': interval.high, 'se': _number(interval.se)}
    if found['value'] is None:
      found['why'] = f'{metric.title} cannot be computed from these results'
    elif found['low'] is None:
      found['why'] = 'too few prompts for an interval'
    out[metric.name] = found
  return out


def _difference(models: _Models, a: int, b: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns the comparison of models a and b; its primary figure decides the outcome."""
  metrics = {}
  for i, (metric, entry) in enumerate(zip(models.metrics, entries, strict=True)):
    own = dict(entry)
    se = own.pop('se')
    spread = se * math.sqrt(models.groups) if se else 0.0
    # A spread that is rounding alone gives no effect size.
    is_spread = own['value'] is not None and spread > 1e-9 * max(1.0, abs(own['value']))
    own['effect'] = own['value'] / spread if is_spread else None
    if metric.is_proportion and own['value'] is not None:
      own |= _of_shares(models, (a, b), i, own['value'], se)
    metrics[metric.name] = own
  test, sensitivity = _test(models, a, b, entries[0])
  out = {
    'first': models.names[a],
    'second': models.names[b],
    'metrics': metrics,
    'test': test,
    'smallest_difference': _number(sensitivity.smallest),
    'rows_needed': sensitivity.rows,
    'is_too_small': sensitivity.is_too_small,
  }
  return out | _outcome(models, out)


def _of_shares(
  models: _Models, pair: tuple[int, int], metric: int, value: float, se: float | None
) -> dict[str, Any]:
  """Returns {effect, low, high, p} of a difference of shares: of two models that gave one result of
  each prompt, as McNemar's test counts them. A bootstrap of results without spread would have an
  interval of no width, however few they are.
  """
  one, two = (models.columns[m][metric][:, 0] for m in pair)
  out: dict[str, Any] = {'effect': paired.cohen_h(float(one.mean()), float(two.mean()))}
  if _is_single(models, *pair):
    found = paired.mcnemar(one == 1, two == 1)
    counts, out['p'] = (found.b, found.c), found.p
  elif not se and abs(value) in (0, 1):  # every cluster has the same difference
    counts = models.groups * (value == -1), models.groups * (value == 1)
  else:
    return out
  interval = paired.difference_of_proportions(*counts, models.groups, LEVEL)
  return out | {'low': interval.low, 'high': interval.high}


def _is_single(models: _Models, a: int, b: int) -> bool:
  """Returns whether each result of both models is a cluster by itself."""
  return all(len(models.results[m]) == models.groups for m in (a, b))


def _test(
  models: _Models, a: int, b: int, entry: Mapping[str, Any]
) -> tuple[dict[str, Any], power.Sensitivity]:
  """Returns the test of the primary figure, and what this test could have found."""
  metric = models.metrics[0]
  if metric.is_proportion and _is_single(models, a, b):
    one, two = (models.columns[m][0][:, 0] == 1 for m in (a, b))
    found = paired.mcnemar(one, two)
    test = {
      'metric': metric.name,
      'name': MCNEMAR,
      'p': found.p,
      'only_first_right': found.b,
      'only_second_right': found.c,
    }
    return test, power.sensitivity_of_proportions(found.b, found.c, models.prompts)
  se = math.nan if entry['se'] is None else entry['se']
  value = math.nan if entry['value'] is None else entry['value']
  sensitivity = power.sensitivity_of_mean(value, se, models.groups)
  if sensitivity.rows is not None:  # so many groups
    rows = math.ceil(sensitivity.rows * models.prompts / models.groups)
    sensitivity = dataclasses.replace(sensitivity, rows=rows)
  if len(models.results[a]) != len(models.results[b]):
    return {'metric': metric.name, 'name': 'paired bootstrap', 'p': entry['p']}, sensitivity
  pooled = np.concatenate([models.columns[a][0], models.columns[b][0]])
  found = paired.permutation(
    lambda weights: metric.value(weights, pooled),
    models.clusters[a],
    models.clusters[b],
    seed=SEED,
    resamples=RESAMPLES,
  )
  return {'metric': metric.name, 'name': 'permutation', 'p': _number(found.p)}, sensitivity


def _outcome(models: _Models, difference: Mapping[str, Any]) -> dict[str, str]:
  """Returns the outcome of a comparison, and a sentence: decided by the test, adjusted for several
  tasks where it is.
  """
  metric = models.metrics[0]
  return verdict.decide(
    difference,
    {'title': metric.title, 'better': metric.better, 'name': metric.name, 'form': metric.form},
    models.prompts,
  )


def _calibration(models: _Models) -> dict[str, Any] | None:
  """Returns the reliability diagram of each model, where its choices have probabilities."""
  if not all('confidence' in r.values for own in models.results for r in own):
    return None
  out = {}
  for name, own in zip(models.names, models.results, strict=True):
    ece = calibration.ECE
    value = ece.value(np.ones((1, len(own))), ece.columns(own, ()))[0]
    out[name] = {'bins': calibration.bin_table(own, _BINS), 'ece': _number(value)}
  return out


def _by_source(task: Compared, models: _Models) -> dict[str, Any] | None:
  """Returns {source: {n, model: the primary figure}} where rows name their source."""
  sources = [row.columns.get('source') for row in task.rows]
  if all(s is None for s in sources):
    return None
  metric, out = models.metrics[0], {}
  for source in sorted({str(s) for s in sources}):
    ids = {row.id for row, s in zip(task.rows, sources, strict=True) if str(s) == source}
    out[source] = {'n': len(ids)}
    for m, name in enumerate(models.names):
      weights = np.array([[float(r.id in ids) for r in models.results[m]]])
      out[source][name] = _number(metric.value(weights, models.columns[m][0])[0])
  return out


def _examples(task: Compared, models: _Models) -> list[dict[str, Any]]:
  """Returns the first EXAMPLES rows with each model's first response; long texts are cut."""
  shown = {row.id for row in task.rows[:EXAMPLES]}
  first, each = [], []
  for m, own in enumerate(models.results):
    last = max((i for i, r in enumerate(own) if r.id in shown), default=-1) + 1
    pairs = list(zip(own[:last], models.primary(m, last).tolist(), strict=True))
    first.append({r.id: r for r, _ in reversed(pairs)})
    each.append({r.id: value for r, value in reversed(pairs)})
  out = []
  for row in task.rows[:EXAMPLES]:
    own = {n: f[row.id] for n, f in zip(models.names, first, strict=True)}
    values = {n: _number(e[row.id]) for n, e in zip(models.names, each, strict=True)}
    out.append(
      {
        'id': row.id,
        'prompt': _cut(row.question),
        'label': _cut(row.answer),
        'responses': {n: _cut(r.response or r.prediction) for n, r in own.items()},
        'predictions': {n: _cut(r.prediction) for n, r in own.items()},
        'values': values,
      }
    )
  return out


def _cut(text: str) -> str:
  return text if len(text) <= LONGEST else text[:LONGEST] + '…'


def summarize(
  entries: Sequence[dict[str, Any]], answers: Sequence[Mapping[str, str]] = ()
) -> dict[str, Any]:
  """Returns eval/summary.json of tasks: p values adjusted for their number, and the verdict.

  Args:
    entries: of `compare`; their tests and verdicts are completed here.
    answers: [{prompt, base, tuned}].
  """
  models = list(dict.fromkeys(name for e in entries for name in e['scores']))
  for pair in pairs_of(models) if models else ():
    own = [d for e in entries for d in e['differences'] if (d['first'], d['second']) == pair]
    ps = [math.nan if d['test']['p'] is None else d['test']['p'] for d in own]
    for d, p in zip(own, paired.holm(ps), strict=True):
      d['test']['p_holm'] = _number(p)
  sentences = []
  for e in entries:
    metric = next(m for m in e['metrics'] if m['is_primary'])
    for d in e['differences']:
      d |= verdict.decide(d, metric, e['prompts'])
      if d is e['differences'][0]:
        sentences.append(f'{e["task"]}: {d["verdict"]}')
  return {
    'version': VERSION,
    'verdict': sentences,
    'models': models,
    'tasks': {e['task']: e for e in entries},
    'gate': None,
    'answers': list(answers),
  }
