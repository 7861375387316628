"""Cross-validation: data.train is dealt to folds, and each fold is held out from one run.

A run trains on the other folds, and eval.tasks are asked on the rows of its own in place of the
rows that they name. So each row is answered once in each repeat by a model that has not seen it.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftjax.config import task_specs
from ftjax.config.task_specs import TaskSpec
from ftjax.evaluation import comparison, tasks
from ftjax.evaluation import metric as metric_lib
from ftjax.evaluation.kinds import find as find_kind
from ftjax.evaluation.result import Result
from ftjax.reporting.figures import interval as shown_interval
from ftjax.reporting.figures import number
from ftjax.reporting.study import Content, Estimate, Forest, Table
from ftjax.runtime.errors import ConfigError
from ftjax.storage import files
from ftjax.studies import findings, folds, rows, task_scores
from ftjax.studies.findings import Findings
from ftjax.studies.folder import Record
from ftjax.studies.rows import TrainRows
from ftjax.studies.study import Plan, Study

log = logging.getLogger(__name__)

WINNER = 'all_rows'
_MODELS = ('base', comparison.TUNED)


@dataclasses.dataclass(frozen=True)
class _Dealt:
  """Rows in folds: fold int64[repeats, n]; clusters: the group of each row, or the row itself."""

  train: TrainRows
  fold: np.ndarray
  clusters: tuple[str, ...]
  answers: tuple[str | None, ...]


def run(study: Study) -> Findings:
  """Runs a cross-validation to its end, and returns what it found."""
  c = study.config
  train = rows.read(c, study.folder.join('data_cache'))
  dealt = _deal(study, train)
  specs = [s for s in task_specs.parse_all(c.eval.tasks) if s.kind not in task_specs.LM_EVAL_KINDS]
  by_task = {s.name: rows.task_rows(train, s.kind, dealt.answers) for s in specs}
  loaded = {s.name: _load(study, s, by_task[s.name]) for s in specs}
  plans = [
    _plan(study, dealt, specs, by_task, repeat, fold)
    for repeat in range(c.study.repeats)
    for fold in range(c.study.folds)
  ]
  study.write_config(WINNER, {})
  log.info(
    'kfold: %d rows, folds=%d, repeats=%d: %d runs',
    *(len(train.rows), c.study.folds, c.study.repeats, len(plans)),
  )
  records = study.run_all(plans, shares_base=False)
  return _findings(study, dealt, loaded, records)


def _deal(study: Study, train: TrainRows) -> _Dealt:
  s = study.config.study
  answers = train.answers()
  groups = train.groups(s.group)
  clusters = groups or [f'row {i}' for i in range(len(train.rows))]
  if copies := train.copies(clusters):
    log.warning(
      'kfold: %d rows are copies of others; a fold may hold a copy of a training row. Give copies '
      'the same value of the column %r (study.group)',
      *(copies, s.group or 'group'),
    )
  found = folds.deal(
    len(train.rows),
    folds=s.folds,
    repeats=s.repeats,
    seed=s.seed,
    labels=_labels(study, train, answers),
    groups=groups,
  )
  return _Dealt(train, found, tuple(clusters), tuple(answers))


def _labels(study: Study, train: TrainRows, answers: Sequence[str | None]) -> list[str] | None:
  """Returns what the folds have equal shares of; None: they are not stratified."""
  name = study.config.study.stratify
  if name == 'none':
    return None
  found = train.field(name or 'label')
  if name:
    missing = [row.place for row, value in zip(train.rows, found, strict=True) if value is None]
    if missing:
      raise ConfigError(f'study.stratify={name}: {missing[0]} has no such column')
  if None not in found:
    return found  # type: ignore[return-value]
  specs = task_specs.parse_all(study.config.eval.tasks)
  own = [s for s in specs if s.kind not in task_specs.LM_EVAL_KINDS]
  chooses = any(rows.reads_choices(find_kind(s.kind)) for s in own)
  return answers if chooses and None not in answers else None  # type: ignore[return-value]


def _load(study: Study, spec: TaskSpec, found: Sequence[Mapping[str, Any]]) -> tasks.Task:
  """Writes all rows as rows of a task and reads them: what a fold would refuse, is refused now."""
  folder = study.folder.join('folds')
  files.makedirs(folder)
  path = files.join(folder, f'{spec.name}.jsonl')
  rows.write_lines(path, found)
  return tasks.load_task(spec.name, spec.kind, path)


def _plan(study: Study, dealt: _Dealt, specs, by_task, repeat: int, fold: int) -> Plan:
  """Returns the run that holds a fold out, and writes its files."""
  name = f'repeat{repeat}-fold{fold}'
  is_held_out = dealt.fold[repeat] == fold
  folder = study.folder.join('folds', name)
  held_out = np.flatnonzero(is_held_out).tolist()
  changed = {
    'data.train': dealt.train.write(
      files.join(folder, 'train'), np.flatnonzero(~is_held_out).tolist(), has_weights=True
    ),
    'data.eval': dealt.train.write(files.join(folder, 'held_out'), held_out, has_weights=False),
    'data.eval_fraction': 0.0,
    'eval.rows': 0,  # each row is held out once
  }
  paths = {}
  for spec in specs:
    paths[spec.name] = files.join(folder, f'{spec.name}.jsonl')
    rows.write_lines(paths[spec.name], [by_task[spec.name][n] for n in held_out])
  changed['eval.tasks'] = tuple(
    text if (own := task_specs.parse(text)).name not in paths
    else f'{own.name}={own.kind}:{paths[own.name]}'
    for text in study.config.eval.tasks
  )  # fmt: skip
  return Plan(name, {'repeat': repeat, 'fold': fold}, changed)


@dataclasses.dataclass(frozen=True)
class _OutOfFold:
  """Results of a model on held-out rows, those of a row one after the other.

  results: of the rows that have any. clusters: of each of them. runs: name of the run of each.
  """

  results: list[Result]
  clusters: list[str]
  runs: list[str]


def _gather(
  study: Study, dealt: _Dealt, task: str, records: Sequence[Record]
) -> dict[str, _OutOfFold]:
  """Joins the results of all folds, writes them to out_of_fold/, and returns them by model."""
  found: dict[str, dict[tuple[int, int, int], tuple[Result, str]]] = {m: {} for m in _MODELS}
  for record in records:
    if record.value_at(0) is None:
      continue
    repeat = record.values['repeat']
    for model, own in task_scores.results(study, record.name, task).items():
      if model in found:
        for r in own:
          found[model][int(r.id), repeat, r.sample] = (r, record.name)
  lines, out = [], {}
  for model, own in found.items():
    keys = sorted(own)
    out[model] = _OutOfFold(
      [own[k][0] for k in keys],
      [dealt.clusters[k[0]] for k in keys],
      [own[k][1] for k in keys],
    )
    for row, repeat, sample in keys:
      r = own[row, repeat, sample][0]
      lines.append(
        {'model': model, 'repeat': repeat, 'fold': int(dealt.fold[repeat, row])}
        | {'place': dealt.train.rows[row].place}
        | dataclasses.asdict(r)
      )
  files.makedirs(study.folder.join('out_of_fold'))
  text = ''.join(json.dumps(x, ensure_ascii=False, allow_nan=False) + '\n' for x in lines)
  files.write_text(study.folder.join('out_of_fold', f'{task}.jsonl'), text)
  return {m: x for m, x in out.items() if x.results}


def _findings(
  study: Study, dealt: _Dealt, loaded: Mapping[str, tasks.Task], records: Sequence[Record]
) -> Findings:
  metric = study.metric
  sentences, tables, forests, summary = [], [], [], {}
  for name, task in loaded.items():
    gathered = _gather(study, dealt, name, records)
    if comparison.TUNED not in gathered:
      continue
    entry = _task_entry(task, gathered)
    summary[name] = entry
    first = entry['metrics'][0]
    sentences.append(_sentence(study, name, first, len(gathered[comparison.TUNED].results)))
    tables.append(_table(name, entry))
    forests.append(_forest(name, task, gathered[comparison.TUNED], records))
  values = [v for r in records if (v := r.value_at(0)) is not None]
  if values:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    mean = float(np.mean(values))
    summary['runs'] = {'metric': metric.name, 'mean': mean, 'sd': sd, 'n': len(values)}
    sentences.append(
      f'{metric.name} of {len(values)} runs: mean {number(mean, metric.form)}, standard deviation '
      f'{number(sd, metric.form)} between runs.'
    )
  if failed := [r.name for r in records if r.has_failed]:
    sentences.append(f'Failed, and not in these figures: {", ".join(failed)}.')
  sentences.append(
    'Training sets of different folds share rows, so that the true uncertainty is somewhat larger '
    'than the intervals. winner.json trains these settings on all rows.'
  )
  sizes = {r.name: int((dealt.fold[r.values['repeat']] == r.values['fold']).sum()) for r in records}
  table = tuple(findings.row(r, metric, {'held out': sizes[r.name]}) for r in records)
  tables.append(_runs_table(table, metric))
  content = Content(tuple(sentences), tuple(tables), tuple(forests))
  return Findings(content, table, summary, WINNER)


def _task_entry(task: tasks.Task, gathered: Mapping[str, _OutOfFold]) -> dict[str, Any]:
  """Returns the figures of all held-out rows, of each model and of their difference."""
  metrics = task.metrics
  columns = {
    m: metric_lib.read_columns(metrics, own.results, task.classes, task.name)
    for m, own in gathered.items()
  }
  entries = []
  for i, metric in enumerate(metrics):
    entry: dict[str, Any] = {'name': metric.name, 'title': metric.title, 'form': metric.form}
    for model, own in gathered.items():
      entry[model] = dataclasses.asdict(
        task_scores.interval(metric, columns[model][i], own.clusters)
      )
    if len(gathered) == len(_MODELS):
      base, tuned = (columns[m][i] for m in _MODELS)
      if base.shape == tuned.shape:
        clusters = gathered[comparison.TUNED].clusters
        entry['difference'] = dataclasses.asdict(
          task_scores.difference(metric, base, tuned, clusters)
        )
    entries.append(entry)
  n = len(gathered[comparison.TUNED].results)
  return {'kind': task.kind_name, 'results': n, 'metrics': entries}


def _sentence(study: Study, task: str, entry: Mapping[str, Any], count: int) -> str:
  s = study.config.study
  text = f'{task}: {entry["title"]} of the tuned models on rows that they have not seen: '
  text += shown_interval(entry[comparison.TUNED], entry['form'])
  if 'base' in entry:
    text += f'; of the base {shown_interval(entry["base"], entry["form"])}'
  if 'difference' in entry:
    text += f'; difference {shown_interval(entry["difference"], entry["form"], "+")}'
  return f'{text}. {count} results: {s.repeats} x {s.folds} folds.'


def _table(name: str, entry: Mapping[str, Any]) -> Table:
  columns = [k for k in (*_MODELS, 'difference') if k in entry['metrics'][0]]
  cells = tuple(
    (m['title'], *(shown_interval(m.get(k), m['form'], '+' * (k == 'difference')) for k in columns))
    for m in entry['metrics']
  )
  about = 'All held-out rows; in brackets 95 % intervals that count a row, or a group, once.'
  return Table(f'{name}, out of fold', about, ('figure', *columns), cells)


def _forest(name: str, task: tasks.Task, own: _OutOfFold, records: Sequence[Record]) -> Forest:
  """Returns how far the figure of each run lies from that of all rows."""
  metric = task.metrics[0]
  (columns,) = metric_lib.read_columns([metric], own.results, task.classes, task.name)
  overall = float(metric.value(np.ones((1, len(columns))), columns)[0])
  out = []
  for record in records:
    mine = np.array([run == record.name for run in own.runs])
    if not mine.any():
      continue
    clusters = [c for c, is_mine in zip(own.clusters, mine, strict=True) if is_mine]
    found = task_scores.interval(metric, columns[mine], clusters)
    ends = (x - overall for x in (found.value, found.low, found.high))
    out.append(Estimate(record.name, *ends, metric.form))
  about = f'{metric.title} of each run minus that of all, {number(overall, metric.form)}.'
  return Forest(f'{name}, by fold', about, tuple(out))


def _runs_table(table, metric) -> Table:
  cells = tuple(
    (
      row['run'],
      str(row['held out']),
      number(row[metric.name], metric.form),
      f'{row["status"]}: {row["reason"]}' if row['reason'] else row['status'],
      f'{row["seconds"]:.0f} s',
    )
    for row in table
  )
  return Table('Runs', '', ('run', 'held out', metric.name, 'status', 'time'), cells)
