"""Formats a comparison of models as Markdown, for the model card: the tables of text_table.py."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.reporting import findings
from ftjax.reporting.figures import (
  LEVEL,
  count,
  interval,
  is_finite,
  one_line,
  outcome,
  p_value,
  title,
)

_LONGEST = 300  # characters of a user's text
_SPECIAL = re.compile(r'([\\`*_{}\[\]()#!|~$])')


def evaluation(summary: Mapping[str, Any]) -> str:
  """Returns the section below the heading "Evaluation"; '' where nothing was evaluated.

  summary: eval/summary.json, version 2.
  """
  if findings.problem(summary):
    return ''
  models = summary['models']
  lines = [f'**{findings.light(summary).word}**']
  lines += [plain(str(s)) for s in summary.get('verdict') or []]
  lines += [f'- **Attention:** {plain(notice)}' for notice in findings.notices(summary)]
  parts = ['\n\n'.join(lines), _scores(summary, models), _differences(summary)]
  parts.append(f'In brackets: {LEVEL} intervals. Bold: the metric that the verdict is about.')
  return '\n\n'.join(part for part in parts if part)


def plain(text: str) -> str:
  """Returns a text of others as Markdown that shows it letter by letter, on one line."""
  return html.escape(_SPECIAL.sub(r'\\\1', one_line(text, _LONGEST)), quote=False)


def code(text: str) -> str:
  """Returns a text of others as a code span, which can stand in a table."""
  text = one_line(text, _LONGEST)
  if not text:
    return ''
  fence = '`' * (1 + max(map(len, re.findall('`+', text)), default=0))
  room = ' ' if text.startswith('`') or text.endswith('`') else ''
  return f'{fence}{room}{text}{room}{fence}'.replace('|', '\\|')


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table of cells that are Markdown."""
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _scores(summary: Mapping[str, Any], models: Sequence[str]) -> str:
  rows = []
  for task in findings.tasks(summary):
    first = findings.primary(task)
    for metric in findings.main_metrics(task):
      name = plain(str(metric.get('title', metric['name'])))
      scores = task.get('scores') or {}
      cells = [
        interval((scores.get(m) or {}).get(metric['name']), metric.get('form', 'number'))
        for m in models
      ]
      bold = f'**{name}**' if metric is first else name
      rows.append([code(task['task']), count(task.get('n')), bold, *cells])
      always, value = findings.always(task, metric)
      rows += [[*rows[-1][:2], plain(always), *[value] * len(models)]] if always else []
  return table(['task', 'examples', 'metric', *(plain(title(m)) for m in models)], rows)


def _differences(summary: Mapping[str, Any]) -> str:
  rows = []
  for task in findings.tasks(summary):
    metric = findings.primary(task)
    for found in task.get('differences') or []:
      one = (found.get('metrics') or {}).get(metric.get('name')) or {}
      test = findings.test(found)
      pair = f'{title(str(found.get("second")))} - {title(str(found.get("first")))}'
      smallest = found.get('smallest_difference')
      form = metric.get('form', 'number')
      shown = interval({'value': smallest}, form) if is_finite(smallest) else '-'
      tested = [p_value(test.get('p')), p_value(test.get('p_holm'))]
      word = outcome(found.get('outcome', '')).lower()
      measured = interval(one, form, '+')
      rows.append([code(task['task']), plain(pair), measured, *tested, shown, word])
  if not rows:
    return ''
  head = ['task', 'models', 'difference', 'p', 'p (Holm)', 'smallest that n could show', 'outcome']
  return table(head, rows)
