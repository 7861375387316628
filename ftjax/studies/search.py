"""Search: runs at points of a space, with or without successive halving.

Without rungs a run's score is that of the whole run. With rungs all runs train to the first one,
where the choice of further points reads their scores too; then the best go on, each from its own
checkpoint.
"""

import itertools
import logging
from collections.abc import Sequence

from ftjax.config.search_space import Point
from ftjax.reporting.figures import count as counted
from ftjax.reporting.figures import number as figure
from ftjax.reporting.study import Chart, Content, Table
from ftjax.reporting.xy_chart import Line
from ftjax.studies import findings, halving, optuna_storage, points
from ftjax.studies.findings import Findings
from ftjax.studies.folder import Record
from ftjax.studies.halving import Rung
from ftjax.studies.runner import Job
from ftjax.studies.study import Study

log = logging.getLogger(__name__)

_NAME_DIGITS = 3


def run(study: Study) -> Findings:
  """Runs a search to its end, and returns what it found."""
  c, s = study.config, study.config.study
  total = points.count(s.kind, study.space, s.trials)
  rungs = halving.plan(total, c.steps, s.rungs, s.reduction)
  if s.kind == 'tpe':
    points.import_optuna()  # now, and not after the first runs
  _check_known_points(study, total)
  log.info(_stated(study, rungs))
  with optuna_storage.opened(study.folder, study.metric, study.space) as storage:
    first = left = _first_rung(study, total, rungs[0], storage)
    for before, rung in itertools.pairwise(rungs):
      left = _promoted(study, left, before, rung.runs)
      study.runner().run([Job(r.name, r.values, rung.stop_at) for r in left], storage.note)
      left = [study.folder.record(r.name, r.values) for r in left]
    records = [study.folder.record(r.name, r.values) for r in first]
    storage.close_trials(records)
  return _findings(study, records, rungs)


def _stated(study: Study, rungs: Sequence[Rung]) -> str:
  s = study.config.study
  text = f'{s.kind}: {rungs[0].runs} runs, compared by {study.metric.name} ({study.metric.better})'
  if len(rungs) == 1:
    return text
  parts = ', '.join(f'{r.runs} to step {r.step}' for r in rungs)
  return f'{text}; {parts}: {halving.total_steps(rungs):,} steps in all'


def _name(number: int) -> str:
  return f'{number:0{_NAME_DIGITS}d}'


def _check_known_points(study: Study, total: int) -> None:
  """Checks the configs of all points that are known before the first run."""
  s, taken = study.config.study, []
  for number in range(min(total, points.first_guided(s.kind, total))):
    point = _point(study, number, total, [], taken)
    if point is None:
      break
    study.run_config(point)
    taken.append(point)


def _point(study: Study, number: int, total: int, history, taken) -> Point | None:
  return points.choose(
    study.config.study.kind,
    study.space,
    seed=study.config.study.seed,
    number=number,
    trials=total,
    history=history,
    taken=taken,
  )


def _first_rung(study: Study, total: int, rung: Rung, storage) -> list[Record]:
  """Chooses all points and runs them to the first rung; returns their records.

  Points are chosen in groups of study.parallel, each after the last run of the group before it has
  ended, so that they do not depend on which run is faster.
  """
  known: list[Record] = []
  while len(known) < total:
    history = [
      (r.values, None if (v := r.value_at(rung.stop_at)) is None else study.metric.order(v))
      for r in known
    ]
    group: list[Job] = []
    for number in range(len(known), min(total, len(known) + study.config.study.parallel)):
      taken = [*(r.values for r in known), *(job.values for job in group)]
      values = _trial(study, number, total, history, taken)
      if values is None:
        break
      group.append(Job(_name(number), values, rung.stop_at))
    if not group:
      log.warning('study.trials=%d, but the space has only %d points', total, len(known))
      break
    for job in group:
      study.write_config(job.name, job.values)
      storage.begin(job)
    study.runner().run(group, storage.note)
    known += [study.folder.record(job.name, job.values) for job in group]
  return known


def _trial(study: Study, number: int, total: int, history, taken) -> Point | None:
  """Returns the point of a trial: as it was chosen before, or chosen now and written down."""
  name = _name(number)
  if found := study.folder.known(name):
    return found.values
  point = _point(study, number, total, history, taken)
  if point is not None:
    study.folder.save(Record(name, point))
  return point


def _promoted(study: Study, records: Sequence[Record], before: Rung, count: int) -> list[Record]:
  values = {r.name: r.value_at(before.stop_at) for r in records}
  orders = {n: study.metric.order(v) for n, v in values.items() if v is not None}
  chosen = halving.promoted(orders, count)
  if chosen:
    log.info('promoted after step %d: %s', before.step, ', '.join(chosen))
  return [r for r in records if r.name in chosen]


def _findings(study: Study, records: Sequence[Record], rungs: Sequence[Rung]) -> Findings:
  metric = study.metric
  winner = findings.best(records, metric)
  failed = sum(r.has_failed for r in records)
  spent = _spent(records, rungs)
  sentences = []
  if winner:
    best = next(r for r in records if r.name == winner)
    keys = ', '.join(f'{k} = {_shown(v)}' for k, v in best.values.items())
    value = figure(best.value_at(0), metric.form)
    runs = f'{len(records)} run{"s" * (len(records) > 1)}'
    sentences.append(f'Best of {runs}: {winner}, with {keys}: {metric.name} {value}.')
    if len(records) > 1:
      sentences.append(
        'The best of many is flattered by luck: its score on other data will be lower. Run it with '
        'other seeds (study.kind=seeds), or score it on rows that chose nothing.'
      )
  else:
    sentences.append('No run has ended with a score.')
  if failed:
    sentences.append(f'{failed} of {len(records)} runs failed; the table has the reasons.')
  if len(rungs) > 1:
    sentences.append(
      f'{counted(spent)} optimizer steps were taken of {counted(halving.total_steps(rungs))} '
      f'planned; all runs to their end would have taken {counted(len(records) * rungs[-1].step)}.'
    )
  rows = tuple(findings.row(r, metric, _rung_values(r, rungs)) for r in records)
  summary = {
    'rungs': [{'step': r.step, 'runs': r.runs} for r in rungs],
    'planned_steps': halving.total_steps(rungs) if study.config.steps else None,
    'steps': spent if study.config.steps else None,
  }
  tables = (_table(study, records, rungs),)
  content = Content(tuple(sentences), tables, charts=_charts(study, records))
  return Findings(content, rows, summary, winner)


def _spent(records: Sequence[Record], rungs: Sequence[Rung]) -> int:
  """Returns the steps of the runs that reached their rung."""
  out, before = 0, 0
  for rung in rungs:
    out += (rung.step - before) * sum(r.value_at(rung.stop_at) is not None for r in records)
    before = rung.step
  return out


def _rung_values(record: Record, rungs: Sequence[Rung]) -> dict:
  return {f'at step {r.step}': record.value_at(r.stop_at) for r in rungs if r.stop_at}


def _shown(value) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def _table(study: Study, records: Sequence[Record], rungs: Sequence[Rung]) -> Table:
  metric = study.metric
  stops = [r for r in rungs if r.stop_at]
  head = (
    *('run', *(d.key for d in study.space)),
    *(f'at step {r.step}' for r in stops),
    *(metric.name, 'status', 'time'),
  )
  ranked = sorted(
    records,
    key=lambda r: (
      -len(r.outcomes) + r.has_failed,
      metric.order(r.last.value or 0.0) if r.last else 0,
    ),
  )
  rows = []
  for record in ranked:
    cells = findings.row(record, metric)
    rows.append(
      (
        record.name,
        *(_shown(record.values[d.key]) for d in study.space),
        *(figure(record.value_at(r.stop_at), metric.form) for r in stops),
        figure(record.value_at(0), metric.form),
        f'{cells["status"]}: {cells["reason"]}' if cells['reason'] else cells['status'],
        f'{cells["seconds"]:.0f} s',
      )
    )
  return Table('Runs', f'The best first, by {metric.name}.', head, tuple(rows))


def _charts(study: Study, records: Sequence[Record]) -> tuple[Chart, ...]:
  """Returns a chart for each range of numbers: the scores over its values."""
  out = []
  for d in study.space:
    pairs = sorted(
      (r.values[d.key], r.value_at(0)) for r in records
      if r.value_at(0) is not None and isinstance(r.values[d.key], int | float)
      and not isinstance(r.values[d.key], bool)
    )  # fmt: skip
    if len({x for x, _ in pairs}) < 2:
      continue
    xs, ys = [p[0] for p in pairs], [p[1] for p in pairs]
    is_log = min(xs) > 0 and max(xs) / min(xs) >= 20
    lines = {study.metric.name: Line(xs, ys, is_joined=False)}
    out.append(Chart(d.key, f'{study.metric.name} of whole runs over {d.key}', lines, is_log))
  return tuple(out)
