"""Formats a comparison of models for a terminal: the verdict first, then a table per task, at most
100 columns wide.

The input is eval/summary.json, version 2, as evaluation/comparison.py makes it. Texts of users are
cut and cleaned; the rest is ASCII.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.reporting import findings
from ftjax.reporting.figures import (
  LEVEL,
  clean,
  count,
  duration,
  examples,
  interval,
  is_finite,
  number,
  one_line,
  outcome,
  p_value,
  pad,
  title,
  width,
)

WIDTH = 100
_NAMES = 20, 34  # least and most columns of the names of metrics
_CELL = 25  # columns of a value with its interval
_SIDE_BY_SIDE = 3  # models that fit beside each other


def text(summary: Mapping[str, Any], max_lines: int = 4) -> str:
  """Returns the whole report: verdict, notices, a table per task, the gate, answers.

  Args:
    summary: eval/summary.json; {} where there is none.
    max_lines: of each prompt and answer; longer ones are cut.
  """
  shown = answers(findings.answers(summary), max_lines)
  if findings.problem(summary):
    return f'{verdict(summary)}\n\n{shown}'.rstrip()
  parts = [verdict(summary), *(table(t, summary['models']) for t in findings.tasks(summary))]
  if findings.tasks(summary):
    parts.append(
      wrap(
        f'In brackets: {LEVEL} intervals. *: the metric that the verdict is about. (low): a lower '
        'value is better.'
      )
    )
  parts += [gate(summary), shown]
  return '\n\n'.join(part for part in parts if part)


def verdict(summary: Mapping[str, Any]) -> str:
  """Returns the verdict as a word and sentences, then the notices, each marked by '!'."""
  head = findings.light(summary).word
  problem = findings.problem(summary)
  sentences = [problem] if problem else list(summary.get('verdict') or [])
  lines = [f'Verdict: {head}', *(wrap(str(s), '  ') for s in sentences if s)]
  lines += [wrap(notice, '  ', '! ') for notice in findings.notices(summary)]
  return '\n'.join(lines)


def wrap(line: str, indent: str = '', mark: str = '') -> str:
  """Returns a sentence in lines of at most WIDTH columns, without control characters."""
  lines = textwrap.wrap(
    one_line(line, 1000), WIDTH, initial_indent=mark or indent, subsequent_indent=indent
  )
  return '\n'.join(lines)


def table(task: Mapping[str, Any], models: Sequence[str]) -> str:
  """Returns the scores of the models on one task, and their differences.

  Args:
    task: of the summary.
    models: names in order.
  """
  lines = [one_line(_head(task), WIDTH), '']
  columns = _columns(task, models, len(models) <= _SIDE_BY_SIDE)
  if not task.get('n'):
    lines.append('No examples: nothing could be scored.')
  elif len(models) <= _SIDE_BY_SIDE:
    lines += _by_metric(task, models, columns)
  else:
    lines += _by_model(task, models, columns)
  for difference in task.get('differences') or []:
    lines += ['', *_difference(task, difference, columns)]
  lines += _seeds(task)
  shown = findings.missing(task, models) if task.get('n') else []
  lines += ['', *(wrap(f'- {text}', '  ') for text in shown)] if shown else []
  return '\n'.join(lines)


def _head(task: Mapping[str, Any]) -> str:
  group = {'safety': ', safety', 'general': ', general ability'}.get(task.get('group', ''), '')
  samples = task.get('samples') or 1
  several = f', {samples} samples for each of {count(task.get("prompts"))} prompts'
  classes = task.get('classes')
  return (
    f'{task["task"]} ({task.get("kind", "")}{group}): {examples(task.get("n"))}'
    + (several if samples > 1 else '')
    + findings.in_groups(task)
    + (f', classes {", ".join(map(str, classes))}' if classes else '')
  )


def _score(task: Mapping[str, Any], model: str, metric: Mapping[str, Any]) -> str:
  found = ((task.get('scores') or {}).get(model) or {}).get(metric['name'])
  return interval(found, metric.get('form', 'number'))


def _columns(task: Mapping[str, Any], models: Sequence[str], is_beside: bool) -> int:
  """Returns the columns for names: as many as the longest metric takes, if there is room."""
  least, most = _NAMES
  if not is_beside:
    return least
  room = min(most, WIDTH - (_cell(task, models) + 1) * max(len(models), 2))
  titles = [one_line(str(m.get('title', m['name']))) for m in findings.main_metrics(task)]
  return max(least, min(room, max(map(width, titles), default=0) + 8))


def _cell(task: Mapping[str, Any], models: Sequence[str]) -> int:
  """Returns the columns of a value beside others: at most _CELL, fewer where none needs them."""
  texts = [one_line(title(m)) for m in models]
  texts += [_score(task, m, x) for m in models for x in findings.main_metrics(task)]
  return min(_CELL, max(map(width, texts), default=_CELL))


def _metric_title(metric: Mapping[str, Any], is_primary: bool, columns: int) -> str:
  lower = ' (low)' if metric.get('better') == 'lower' else ''
  mark = ' *' if is_primary else ''
  room = columns - len(lower) - len(mark)
  name = one_line(str(metric.get('title', metric['name'])))
  return pad(name, room).rstrip() + lower + mark


def _by_metric(task: Mapping[str, Any], models: Sequence[str], columns: int) -> list[str]:
  """Returns a line per metric, a column per model."""
  first = findings.primary(task)
  rows = [['', *(one_line(title(m)) for m in models)]]
  for metric in findings.main_metrics(task):
    name = _metric_title(metric, metric is first, columns)
    rows.append([name, *(_score(task, m, metric) for m in models)])
    always, value = findings.always(task, metric)
    rows += [[f'  {one_line(always)}', *[value] * len(models)]] if always else []
  return _grid(rows, [columns] + [_cell(task, models)] * len(models))


def _by_model(task: Mapping[str, Any], models: Sequence[str], columns: int) -> list[str]:
  """Returns a line per model, a column per metric; the metrics in blocks that fit the width."""
  first, out = findings.primary(task), []
  metrics = findings.main_metrics(task)
  for start in range(0, len(metrics), _SIDE_BY_SIDE):
    block = metrics[start : start + _SIDE_BY_SIDE]
    rows = [['', *(_metric_title(m, m is first, _CELL) for m in block)]]
    rows += [[one_line(title(m)), *(_score(task, m, x) for x in block)] for m in models]
    for i, metric in enumerate(block):
      always, value = findings.always(task, metric)
      cells = [value if i == k else '' for k in range(len(block))]
      rows += [[one_line(always), *cells]] if always else []
    out += ([''] if out else []) + _grid(rows, [columns] + [_CELL] * len(block))
  return out


def _grid(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
  lines = [
    ' '.join(pad(cell, w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
  ]
  return [lines[0], '-' * (sum(widths) + len(widths) - 1), *lines[1:]]


def _difference(task: Mapping[str, Any], difference: Mapping[str, Any], columns: int) -> list[str]:
  """Returns the lines on one pair of models: what was measured, the test, the verdict."""
  names = [title(str(difference.get(k, '?'))) for k in ('second', 'first')]
  small = ' (the test set is too small)' if findings.is_too_small(difference) else ''
  lines = [wrap(f'{names[0]} - {names[1]}: {outcome(difference.get("outcome", ""))}{small}')]
  found = difference.get('metrics') or {}
  for metric in findings.main_metrics(task):
    one = found.get(metric['name']) or {}
    if not is_finite(one.get('value')):
      continue
    cells = [
      _metric_title(metric, metric is findings.primary(task), columns),
      interval(one, metric.get('form', 'number'), '+'),
      f'p {p_value(one.get("p"))}' if one.get('p') is not None else '',
      f'effect {one["effect"]:+.3g}' if is_finite(one.get('effect')) else '',
    ]
    widths = [columns, _CELL + 3, 10, 18]
    line = ' '.join(pad(cell, w) for cell, w in zip(cells, widths, strict=True))
    lines.append(f'  {line}'.rstrip())
  sentences = [_test(names, difference), str(difference.get('verdict') or '')]
  if difference.get('outcome') != 'undecided':  # else the verdict has it
    sentences.append(findings.power(task, difference))
  return lines + [wrap(s, '  ', '  ') for s in sentences if s]


def _test(names: Sequence[str], difference: Mapping[str, Any]) -> str:
  test = findings.test(difference)
  if test.get('p') is None:
    return ''
  holm = test.get('p_holm')
  text = f'{test.get("name", "test")}: p = {p_value(test["p"])}'
  text += f', {p_value(holm)} after Holm over all tasks' if holm is not None else ''
  counts = findings.one_sided(test, names)
  return f'{text}; {counts}.' if counts else f'{text}.'


def _seeds(task: Mapping[str, Any]) -> list[str]:
  """Returns the means over runs that differ in their seed alone."""
  out = []
  for runs, metrics in (task.get('seeds') or {}).items():
    out += ['', wrap(f'mean of {runs}, which differ in the seed alone:')]
    for metric in findings.main_metrics(task):
      found = metrics.get(metric['name'])
      if not found:
        continue
      form = metric.get('form', 'number')
      between, within = (number(found.get(k), form) for k in ('between_sd', 'within_se'))
      text = f'{interval(found, form)}; error of the rows {within}, '
      text += f'sd between seeds beyond it {between}'
      out.append(wrap(f'{one_line(str(metric.get("title", "")), 40)} {text}', '    ', '  '))
  return out


def gate(summary: Mapping[str, Any]) -> str:
  """Returns the checks of the gate; '' without one."""
  found = summary.get('gate')
  if not found:
    return ''
  lines = [f'Gate: {"passed" if found.get("passed") else "REFUSED"}']
  for check in found.get('checks') or []:
    mark = 'passed' if check.get('passed') else 'FAILED'
    lines.append(wrap(f'{mark}: {check.get("what", "")}', '    ', '  '))
  return '\n'.join(lines)


def cost(summary: Mapping[str, Any]) -> str:
  """Returns what the evaluation took, a line per task and model; '' where it is not known."""
  rows = []
  for task in findings.tasks(summary):
    for model, found in (task.get('cost') or {}).items():
      cells = (count(found.get('rows')), count(found.get('tokens')), duration(found.get('seconds')))
      rows.append([one_line(task['task']), one_line(title(model)), *cells])
  head = ['task', 'model', 'rows', 'tokens', 'time']
  return '\n'.join(_grid([head, *rows], [30, 20, 10, 14, 14])) if rows else ''


def answers(rows: Sequence[Mapping[str, Any]], max_lines: int = 4) -> str:
  """Returns prompts with the completions of both models, wrapped; each text is cut to `max_lines`
  lines.

  rows: {"prompt", "base", "tuned"}.
  """
  blocks = ['\n'.join(_wrapped(k, str(v), max_lines) for k, v in row.items()) for row in rows]
  return '\n\n'.join(['Answers before and after', *blocks]) if blocks else ''


def _wrapped(label: str, text: str, max_lines: int) -> str:
  lines = textwrap.wrap(clean(text), WIDTH - 8) or ['(nothing)']
  if len(lines) > max_lines:
    lines = [*lines[:max_lines], '...']
  return '\n'.join(f'{label if i == 0 else "":<7} {line}' for i, line in enumerate(lines))
