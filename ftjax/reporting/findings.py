"""Reads eval/summary.json (version 2) for what comes first in every report: the verdict as a word,
and what a reader must not miss. text_table.py, markdown.py and page.py show it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.reporting.figures import count, interval, name, number, title

VERSION = 2
_GROUPS = {'safety': 'safety', 'general': 'general ability'}


@dataclasses.dataclass(frozen=True)
class Light:
  """The verdict as a word, and its color: 'good', 'bad', 'mixed', 'open' or 'none'."""

  word: str
  color: str


def problem(summary: Mapping[str, Any]) -> str:
  """Returns why a summary cannot be shown; '' where it can."""
  if not summary:
    return 'There is no eval/summary.json: no task has been evaluated yet.'
  if summary.get('version') != VERSION:
    return (
      f'eval/summary.json has version {summary.get("version", 1)}, this ftjax reads version '
      f'{VERSION}: run python -m ftjax.evaluate on the workdir again.'
    )
  if not summary.get('tasks'):
    return 'No tasks were evaluated (eval.tasks is empty).'
  return ''


def tasks(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Returns the tasks of a summary in its order; none where it cannot be shown."""
  return [] if problem(summary) else list(summary['tasks'].values())


def primary(task: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the primary metric of a task, the first one where none is marked; {} without any."""
  metrics = task.get('metrics') or [{}]
  return next((m for m in metrics if m.get('is_primary')), metrics[0])


def main_metrics(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Returns the metrics of a task that tables show, without its details."""
  return [m for m in task.get('metrics') or [] if not m.get('is_detail')]


def main_differences(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Returns the differences that the verdict is about: tuned minus base where both are there, else
  all.
  """
  found = task.get('differences') or []
  pairs = [d for d in found if (d.get('first'), d.get('second')) == ('base', 'tuned')]
  return pairs or list(found)


def light(summary: Mapping[str, Any]) -> Light:
  """Returns the verdict over all tasks as a word with a color."""
  gate = summary.get('gate')
  if gate and not gate.get('passed'):
    return Light('REFUSED BY THE GATE', 'bad')
  if problem(summary):
    return Light('NOT EVALUATED', 'none')
  if 'tuned' not in summary.get('models', ()) and len(summary.get('models', ())) > 2:
    return Light('SEVERAL MODELS', 'none')
  found = {d.get('outcome') for t in tasks(summary) for d in main_differences(t)}
  if not found:
    return Light('NOT COMPARED', 'none')
  if {'better', 'worse'} <= found:
    return Light('BETTER AND WORSE', 'mixed')
  if 'worse' in found:
    return Light('WORSE', 'bad')
  return Light('BETTER', 'good') if 'better' in found else Light('NO DIFFERENCE SHOWN', 'open')


def notices(summary: Mapping[str, Any]) -> list[str]:
  """Returns the sentences that are shown in red: a refused gate, tasks that got worse (safety and
  general ability first), contaminated tests.
  """
  gate = summary.get('gate') or {}
  out = [
    f'The gate refused the export: {c.get("what", "")} (got {number(c.get("value"))}, limit '
    f'{number(c.get("limit"))}).'
    for c in gate.get('checks') or []
    if not c.get('passed')
  ]
  order = sorted(tasks(summary), key=lambda t: t.get('group') not in _GROUPS)
  for task in order:
    for found in main_differences(task):
      if found.get('outcome') == 'worse':
        group = _GROUPS.get(task.get('group', ''), 'task')
        out.append(f'Worse on {group} "{name(task["task"])}": {found.get("verdict", "")}')
  return out + [text for task in tasks(summary) if (text := contaminated(task))]


def contaminated(task: Mapping[str, Any]) -> str:
  """Returns the sentence of a test set that shares text with the training data; '' for others."""
  found = task.get('contamination') or {}
  if not found.get('contaminated') and not found.get('near_duplicates'):
    return ''
  against = ', '.join(map(str, found.get('against') or ['the training data']))
  near = found.get('near_duplicates') or 0
  text = (
    f'Contaminated test "{name(task["task"])}": {count(found.get("contaminated") or 0)} of '
    f'{count(found.get("n"))} examples share {found.get("ngram")} words in a row with {against}'
  )
  text += f', {count(near)} are near-duplicates' if near else ''
  metric = primary(task)
  clean = [
    f'{title(model)} {interval(score, metric.get("form", "number"))}'
    for model, score in (found.get('scores_clean') or {}).items()
  ]
  return f'{text}. {_headed(metric)} without them: {", ".join(clean)}.' if clean else f'{text}.'


def _headed(metric: Mapping[str, Any]) -> str:
  shown = name(metric.get('title', 'score'))
  return shown[:1].upper() + shown[1:]


def power(task: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
  """Returns the sentence on the smallest difference that a test set of this size could show; ''
  where it is not known.
  """
  metric = primary(task)
  smallest = number(difference.get('smallest_difference'), metric.get('form', 'number'))
  if smallest == '-':
    return ''
  text = f'{count(task.get("n"))} examples could show a difference of {smallest} or more'
  needed = difference.get('rows_needed')
  if difference.get('outcome') == 'undecided' and needed:
    return f'{text}; about {count(needed)} would show the one that was measured.'
  return f'{text}.'


def test(difference: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the paired test of a difference; {} without one."""
  return difference.get('test') or {}


def missing(task: Mapping[str, Any], models: Sequence[str]) -> list[str]:
  """Returns a sentence for each metric of a model that could not be computed."""
  out = []
  for model in models:
    scores = (task.get('scores') or {}).get(model)
    if scores is None:
      out.append(f'{title(model)}: not evaluated on this task.')
      continue
    for metric in main_metrics(task):
      score = scores.get(metric['name']) or {}
      if score.get('value') is None:
        why = score.get('why') or 'not computed'
        out.append(f'{title(model)}, {name(metric.get("title", metric["name"]))}: {why}')
  return out
