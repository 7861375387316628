"""Arranges eval/summary.json for the page: scores, differences with their forest plots, and what
there is of each task: classes, confusion, calibration, contamination, cost.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.reporting import charts, findings
from ftjax.reporting.figures import (
  count,
  duration,
  examples,
  interval,
  is_finite,
  name,
  number,
  outcome,
  p_value,
  share,
  title,
)

_GROUPS = (('task', 'Tasks'), ('general', 'General ability'), ('safety', 'Safety'))
_UNITS = {'fraction': 'fractions of 1', 'points': 'points of 100'}


def build(summary: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what the page shows of a summary: "problem" in place of the rest where there is none.

  summary: eval/summary.json.
  """
  problem = findings.problem(summary)
  if problem:
    return {'problem': problem, 'models': [], 'groups': [], 'forests': [], 'tasks': [], 'cost': []}
  models, found = summary['models'], findings.tasks(summary)
  known = {group for group, _ in _GROUPS}
  groups = []
  for group, heading in _GROUPS:
    tasks = [t for t in found if _group(t, known) == group]
    if tasks:
      groups.append({'heading': heading, 'rows': [r for t in tasks for r in _scores(t, models)]})
  return {
    'problem': '',
    'models': [title(m) for m in models],
    'groups': groups,
    'forests': _forests(found),
    'tasks': [_task(t, models) for t in found],
    'cost': _cost(found),
  }


def _group(task: Mapping[str, Any], known: set[str]) -> str:
  group = task.get('group', 'task')
  return group if group in known else 'task'


def _name(metric: Mapping[str, Any]) -> str:
  shown = name(metric.get('title', metric.get('name', 'score')))
  return f'{shown} (lower is better)' if metric.get('better') == 'lower' else shown


def _scores(task: Mapping[str, Any], models: Sequence[str]) -> list[dict[str, Any]]:
  """Returns a row per metric of a task."""
  rows, first = [], findings.primary(task)
  for metric in findings.main_metrics(task):
    cells = []
    for model in models:
      score = ((task.get('scores') or {}).get(model) or {}).get(metric['name']) or {}
      why = '' if is_finite(score.get('value')) else score.get('why') or 'not evaluated'
      cells.append({'text': interval(score, metric.get('form', 'number')), 'why': why})
    is_primary = metric is first
    rows.append({'task': name(task['task']), 'n': count(task.get('n')), 'metric': _name(metric)})
    always = ': '.join(findings.always(task, metric)).removeprefix(': ')
    rows[-1] |= {'is_primary': is_primary, 'always': always, 'cells': cells}
  if not rows:
    nothing = [{'text': '-', 'why': 'nothing was scored'} for _ in models]
    rows = [
      {'task': name(task['task']), 'n': count(task.get('n')), 'metric': '-', 'cells': nothing}
    ]
    rows[0] |= {'is_primary': True, 'always': ''}
  return rows


def _difference(task: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a row on the primary metric of a pair of models."""
  metric, test = findings.primary(task), findings.test(found)
  one = (found.get('metrics') or {}).get(metric.get('name')) or {}
  form = metric.get('form', 'number')
  names = title(str(found.get('second'))), title(str(found.get('first')))
  state = found.get('outcome')
  state = state if state in ('better', 'worse') else 'undecided'
  return {
    'task': name(task['task']),
    'pair': f'{names[0]} - {names[1]}',
    'metric': _name(metric),
    'text': interval(one, form, '+'),
    'p': p_value(test.get('p')),
    'p_holm': p_value(test.get('p_holm')),
    'test': name(test.get('name', '')),
    'counts': findings.one_sided(test, names),
    'is_too_small': findings.is_too_small(found),
    'word': outcome(state),
    'outcome': state,
    'verdict': str(found.get('verdict') or ''),
    'power': findings.power(task, found),
    'smallest': number(found.get('smallest_difference'), form),
    'found': one,
    'form': form,
  }


def _forests(tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns the differences in tables whose rows share a scale: fractions, points, and each metric
  of another scale by itself.
  """
  tables: dict[str, list[dict[str, Any]]] = {}
  for task in tasks:
    for found in task.get('differences') or []:
      row = _difference(task, found)
      tables.setdefault(_UNITS.get(row['form'], row['metric']), []).append(row)
  out = []
  for unit, rows in tables.items():
    estimates = [
      charts.Estimate(f'{r["task"]}: {r["pair"]}', r['found'], r['form'], r['outcome'])
      for r in rows
    ]
    drawn = charts.forest(estimates)
    for i, row in enumerate(rows):
      row['drawing'] = drawn[0][i] if drawn else ''
    out.append({'unit': unit, 'rows': rows, 'axis': drawn[1] if drawn else ''})
  return out


def _task(task: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
  """Returns what is shown when a task is opened."""
  pairs = []
  for found in task.get('differences') or []:
    row = _difference(task, found)
    row['metrics'] = [
      {
        'metric': _name(metric),
        'text': interval(one, metric.get('form', 'number'), '+'),
        'p': p_value(one.get('p')),
        'effect': f'{one["effect"]:+.3g}' if is_finite(one.get('effect')) else '-',
      }
      for metric in task.get('metrics') or []
      if (one := (found.get('metrics') or {}).get(metric['name']))
    ]
    pairs.append(row)
  samples = task.get('samples') or 1
  several = f'{samples} samples for each of {count(task.get("prompts"))} prompts'
  calibration = {title(m): c for m, c in (task.get('calibration') or {}).items() if c}
  return {
    'task': name(task['task']),
    'kind': name(task.get('kind', '')),
    'n': examples(task.get('n')) + findings.in_groups(task),
    'is_empty': not task.get('n'),
    'samples': several if samples > 1 else '',
    'classes': [name(c) for c in task.get('classes') or []],
    'pairs': pairs,
    'details': _details(task, models),
    'sources': _sources(task, models),
    'cut': _cut(task),
    'seeds': _seeds(task),
    'missing': findings.missing(task, models) if task.get('n') else [],
    'per_class': _per_class(task.get('per_class') or {}),
    'confusion': [
      (title(m), charts.confusion(c)) for m, c in (task.get('confusion') or {}).items() if c
    ],
    'calibration': charts.calibration(calibration) if calibration else '',
    'calibration_rows': [(m, number(c.get('ece'), 'fraction')) for m, c in calibration.items()],
    'calibration_bins': [
      (m, [_bin(b) for b in c.get('bins') or [] if b.get('n')]) for m, c in calibration.items()
    ],
    'contamination': _contamination(task),
    'cost': [r for r in _cost([task])],
  }


def _details(task: Mapping[str, Any], models: Sequence[str]) -> list[dict[str, Any]]:
  """Returns a row for each detail, such as lengths."""
  rows = []
  for metric in task.get('metrics') or []:
    if metric.get('is_detail'):
      scores = [((task.get('scores') or {}).get(m) or {}).get(metric['name']) for m in models]
      cells = [interval(s, metric.get('form', 'number')) for s in scores]
      rows.append({'metric': _name(metric), 'cells': cells})
  return rows


def _sources(task: Mapping[str, Any], models: Sequence[str]) -> list[list[str]]:
  """Returns (source, examples, the primary figure of each model), where rows name their source."""
  form = findings.primary(task).get('form', 'number')
  return [
    [name(source), count(found.get('n')), *(number(found.get(m), form) for m in models)]
    for source, found in (task.get('by_source') or {}).items()
  ]


def _cut(task: Mapping[str, Any]) -> str:
  """Returns which share of the answers of each model was cut at the most tokens; '' where none."""
  found = task.get('cut') or {}
  if not any(found.values()):
    return ''
  return ', '.join(f'{title(model)} {share(part)}' for model, part in found.items())


def _seeds(task: Mapping[str, Any]) -> list[list[str]]:
  """Returns (runs, metric, mean over seeds, sd between seeds, error of the rows)."""
  rows = []
  for runs, metrics in (task.get('seeds') or {}).items():
    for metric in findings.main_metrics(task):
      if found := metrics.get(metric['name']):
        form = metric.get('form', 'number')
        errors = [number(found.get(k), form) for k in ('between_sd', 'within_se')]
        rows.append([name(runs), _name(metric), interval(found, form), *errors])
  return rows


def _bin(found: Mapping[str, Any]) -> tuple[str, str, str, str]:
  between = f'{number(found.get("low"))} to {number(found.get("high"))}'
  figures = [number(found.get(k), 'fraction') for k in ('confidence', 'accuracy')]
  return between, count(found.get('n')), figures[0], figures[1]


def _per_class(found: Mapping[str, Any]) -> list[dict[str, Any]]:
  return [
    {
      'model': title(model),
      'class': name(label),
      'support': count(scores.get('support')),
      'figures': [number(scores.get(k), 'fraction') for k in ('precision', 'recall', 'f1')],
    }
    for model, classes in found.items()
    for label, scores in (classes or {}).items()
  ]


def _contamination(task: Mapping[str, Any]) -> dict[str, Any] | None:
  found = task.get('contamination')
  if not found:
    return None
  metric = findings.primary(task)
  n, shared = found.get('n') or 0, found.get('contaminated') or 0
  return {
    'figures': f'{findings.overlap(found)}, which is {share(shared / n) if n else "-"}; '
    f'{count(found.get("near_duplicates") or 0)} near-duplicates.',
    'metric': _name(metric),
    'clean': [
      (title(m), interval(score, metric.get('form', 'number')))
      for m, score in (found.get('scores_clean') or {}).items()
    ],
  }


def _cost(tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
  """Returns what the evaluation of each task and model took."""
  out = []
  for task in tasks:
    for model, found in (task.get('cost') or {}).items():
      rows, tokens, seconds = (found.get(k) for k in ('rows', 'tokens', 'seconds'))
      mean = number(tokens / rows) if rows and is_finite(tokens) else '-'
      out.append(
        {
          'task': name(task['task']),
          'model': title(model),
          'rows': count(rows),
          'tokens': count(tokens),
        }
        | {'mean': mean, 'time': duration(seconds)}
      )
  return out
