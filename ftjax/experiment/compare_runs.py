"""Compares the tuned models of several runs on the tasks that they share, from their result files.

Runs share a task where its name, kind and rows are the same. Runs whose configs differ in nothing
but the seed are a group, whose mean is reported with the error between seeds and that of the rows
apart.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftjax.config import task_specs
from ftjax.evaluation import comparison, general, lm_eval_results, result, tasks
from ftjax.evaluation.comparison import TUNED
from ftjax.evaluation.result import Result
from ftjax.evaluation.statistics import seeds
from ftjax.reporting import comparison as pages
from ftjax.reporting import run_files
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files

BASE = 'base'
_MACHINE = ('compile_cache', 'data.cache', 'data.workers', 'log.', 'watchdog.', 'profile.')
_MACHINE += ('stop_at', 'study.')


@dataclasses.dataclass(frozen=True)
class _Evaluated:
  """A run with results.

  name: in tables. workdir: of the run. digests: of the rows of tasks, where they are known.
  results: {task: {model: results}}.
  """

  name: str
  workdir: str
  config: Mapping[str, Any]
  specs: Mapping[str, task_specs.TaskSpec]
  digests: Mapping[str, str]
  results: Mapping[str, Mapping[str, Sequence[Result]]]


def _read(workdir: str, name: str) -> _Evaluated:
  path = files.join(workdir, 'config.json')
  if not files.exists(path):
    raise ConfigError(f'--compare: {workdir} is no workdir of a run: it has no config.json')
  config = json.loads(files.read_text(path))
  specs = {spec.name: spec for spec in task_specs.parse_all(config.get('eval.tasks', ()))}
  evaluated = _evaluated_tasks(workdir)
  # `python -m ftjax.evaluate` may have run others than those of the training's config.
  specs |= {
    name: task_specs.TaskSpec(name, entry['kind'], entry['path'])
    for name, entry in evaluated.items()
    if entry.get('group') != general.GROUP
  }
  found = {}
  for task in specs:
    own = files.join(workdir, 'eval', f'{task}.jsonl')
    if files.exists(own):
      found[task] = result.load(own)
  if not found:
    raise ConfigError(
      f'--compare: {workdir} has no results of eval.tasks; run python -m ftjax.evaluate on it first'
    )
  digests = {name: entry['digest'] for name, entry in evaluated.items()}
  return _Evaluated(name, workdir, config, specs, digests, found)


def _evaluated_tasks(workdir: str) -> dict[str, dict[str, Any]]:
  """Returns the entries of eval/summary.json that name their rows; those of older runs do not."""
  path = files.join(workdir, 'eval', 'summary.json')
  if not files.exists(path):
    return {}
  try:
    found = json.loads(files.read_text(path))['tasks']
    named = ('kind', 'path', 'digest')
    return {n: e for n, e in found.items() if all(isinstance(e.get(k), str) for k in named)}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise DataError(
      f'{path}: cannot be read ({error}); run python -m ftjax.evaluate on it again'
    ) from error


def compare(workdirs: Sequence[str]) -> tuple[dict[str, Any], pages.Comparison]:
  """Returns (the summary, version 2, whose models are the runs; its page and table).

  The base is a model too, where the runs have the same results of it.

  Raises:
    ConfigError: fewer than two workdirs, one without results, or no task that all share.
    DataError: a result file that cannot be read, or rows that are not there any more.
  """
  if len(set(workdirs)) < 2:
    raise ConfigError(f'--compare: got {list(workdirs)}, expected two or more workdirs')
  names = pages.distinct([run_files.name_of(w) for w in workdirs], workdirs)
  runs = [_read(w, name) for w, name in zip(workdirs, names, strict=True)]
  entries, left_out = [], []
  for name, spec in runs[0].specs.items():
    if not all(name in run.results and run.specs[name][:2] == spec[:2] for run in runs):
      left_out.append(name)
      continue
    entries.append(_entry(name, spec, runs))
  if not entries:
    raise ConfigError(
      f'--compare: {", ".join(names)} have no task in common: '
      + '; '.join(f'{run.name} has {sorted(run.results)}' for run in runs)
    )
  summary = comparison.summarize(entries)
  summary['left_out'] = left_out
  return summary, pages.compare(workdirs, summary)


def _entry(name: str, spec: task_specs.TaskSpec, runs: Sequence[_Evaluated]) -> dict[str, Any]:
  own = {run.name: run.results[name][TUNED] for run in runs if TUNED in run.results[name]}
  if len(own) < len(runs):
    raise DataError(f'--compare: {name}: a run has no results of its tuned model')
  asked = [(r.id, r.label) for r in own[runs[0].name]]
  for run in runs:
    theirs = [(r.id, r.label) for r in own[run.name]]
    digests = {r.digests[name] for r in (runs[0], run) if name in r.digests}
    if len(digests) < 2 and theirs != asked and set(theirs) == set(asked):
      raise DataError(
        f'--compare: {name}: {run.name} has {len(theirs)} completions of {len(set(theirs))} rows, '
        f'{runs[0].name} has {len(asked)}; run python -m ftjax.evaluate on both with the same '
        'eval.samples'
      )
    if theirs != asked or len(digests) > 1:
      raise DataError(
        f'--compare: {name}: {run.name} was evaluated on other rows than {runs[0].name}; run '
        'python -m ftjax.evaluate on both with the same data and code'
      )
  bases = [run.results[name].get(BASE) for run in runs]
  results = ({BASE: bases[0]} if bases[0] and all(b == bases[0] for b in bases) else {}) | own
  if spec.kind in task_specs.LM_EVAL_KINDS:
    task: comparison.Compared = lm_eval_results.entry(name, spec.kind, results)
  else:
    task = _task(spec, runs[0].workdir, dict(asked))
  entry = comparison.compare(task, results)
  entry['seeds'] = _seeds(task, own, runs)
  return entry


def _task(spec: task_specs.TaskSpec, workdir: str, labels: Mapping[str, str]) -> tasks.Task:
  """Returns the task with the rows that were asked.

  Args:
    spec: of the task.
    workdir: of a run, for messages.
    labels: {id: label} of its results, in their order.

  Raises:
    DataError: a file that is not there, or not as it was.
  """
  try:
    found = tasks.load_task(*spec)
  except DataError as error:
    raise DataError(
      f'--compare: {error}; the rows of {workdir} are read again: start in the folder in which it '
      'was evaluated, where paths are relative'
    ) from error
  rows = tuple(row for row in found.rows if row.id in labels)
  if {row.id: row.answer for row in rows} != labels or [row.id for row in rows] != list(labels):
    raise DataError(
      f'--compare: {spec.path} has changed since {workdir} was evaluated on it; run python -m '
      'ftjax.evaluate on the runs again'
    )
  return dataclasses.replace(found, rows=rows)


def _seeds(
  task: comparison.Compared, own: Mapping[str, Sequence[Result]], runs: Sequence[_Evaluated]
) -> dict[str, dict[str, Any]]:
  """Returns {names of the runs, joined: {metric: mean over seeds}} of each group of seeds."""
  groups = collections.defaultdict(list)
  for run in runs:
    same = {k: v for k, v in run.config.items() if k != 'seed' and not k.startswith(_MACHINE)}
    groups[json.dumps(same, sort_keys=True)].append(run.name)
  out = {}
  for names in groups.values():
    if len(names) < 2:
      continue
    found = {}
    for metric in task.metrics:
      columns = [metric.columns(own[n], task.classes) for n in names]

      def figure(weights: np.ndarray, metric=metric, columns=columns) -> np.ndarray:
        return np.stack([metric.value(weights, c) for c in columns], axis=1)

      clusters = [r.id for r in own[names[0]]]
      mean = seeds.seed_mean(figure, clusters, seed=comparison.SEED)
      if metric.is_proportion:
        mean = dataclasses.replace(mean, low=max(mean.low, 0.0), high=min(mean.high, 1.0))
      found[metric.name] = {
        k: float(x) if math.isfinite(x) else None
        for k, x in dataclasses.asdict(mean).items()
        if k != 'values'
      } | {'values': [float(x) if math.isfinite(x) else None for x in mean.values]}
    out[' + '.join(names)] = found
  return out
