"""Reads eval/summary.json (version 2) for what comes first in every report: the verdict as a word,
and what a reader must not miss. text_table.py, markdown.py and page.py show it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.reporting import summary_form
from ftjax.reporting.figures import count, examples, interval, name, number, title

VERSION = 2
_GROUPS = {'safety': 'safety', 'general': 'general ability'}
# A model that gives one answer to this share of the rows, though fewer of them have it as their
# label, has not understood the question: accuracy alone does not show it.
_ONE_ANSWER = 0.9
_FEW = 10  # examples, of which so many may have one answer by chance


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
  if place := summary_form.damage(summary):
    return (
      f'eval/summary.json is damaged at {name(place)!r}: run python -m ftjax.evaluate on the '
      'workdir again.'
    )
  if not summary.get('tasks'):
    return 'No tasks were evaluated (eval.tasks is empty).'
  return ''


def tasks(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Returns the tasks of a summary in its order; none where it cannot be shown."""
  return [] if problem(summary) else list(summary['tasks'].values())


def answers(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Returns the rows of eval.prompts, which a summary without tasks has too."""
  if summary.get('version') != VERSION or summary_form.damage(summary):
    return []
  return list(summary.get('answers') or [])


def primary(task: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the primary metric of a task, the first one where none is marked; {} without any."""
  metrics = task.get('metrics') or [{}]
  return next((m for m in metrics if m.get('is_primary')), metrics[0])


def main_differences(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Returns the differences that the verdict is about: tuned minus base where both are there, else
  all.
  """
  found = task.get('differences') or []
  pairs = [d for d in found if (d.get('first'), d.get('second')) == ('base', 'tuned')]
  return pairs or list(found)


def light(summary: Mapping[str, Any]) -> Light:
  """Returns the verdict over all tasks as a word with a color."""
  if problem(summary):
    return Light('NOT EVALUATED', 'none')
  gate = summary.get('gate')
  if gate and not gate.get('passed'):
    return Light('REFUSED BY THE GATE', 'bad')
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
  if problem(summary):
    return []
  gate = summary.get('gate') or {}
  out = [
    f'The gate refused the export: {c.get("what", "")}.'
    for c in gate.get('checks') or []
    if not c.get('passed')
  ]
  order = sorted(tasks(summary), key=lambda t: t.get('group') not in _GROUPS)
  for task in order:
    for found in main_differences(task):
      if found.get('outcome') == 'worse':
        group = _GROUPS.get(task.get('group', ''), 'task')
        out.append(f'Worse on {group} "{name(task["task"])}": {found.get("verdict", "")}')
  for task in tasks(summary):
    for model, reason in (task.get('not_evaluated') or {}).items():
      out.append(f'{title(model)} has no results of "{name(task["task"])}": {reason}')
  out += [text for task in tasks(summary) if (text := one_answer(task))]
  return out + [text for task in tasks(summary) if (text := contaminated(task))]


def one_answer(task: Mapping[str, Any]) -> str:
  """Returns the sentence on models that give the same answer to nearly all rows of a task whose
  labels are more varied; '' where none does.
  """
  found = task.get('most_frequent') or {}
  label, n = found.get('label') or {}, task.get('n') or 0
  models = [
    f'{title(model)} answers "{name(own.get("class"))}" {count(own.get("n"))} times of {count(n)}'
    for model, own in (found.get('answers') or {}).items()
    if n >= _FEW and (own.get('share') or 0) >= _ONE_ANSWER > (own.get('label_share') or 0)
  ]
  if not models:
    return ''
  return (
    f'Hardly more than one answer to "{name(task["task"])}": {", ".join(models)}; always answering '
    f'"{name(label.get("class"))}" would have accuracy {number(label.get("share"), "fraction")}.'
  )


def always(task: Mapping[str, Any], metric: Mapping[str, Any]) -> tuple[str, str]:
  """Returns ('always "no"', '0.595'), what accuracy must be compared with: that of always giving
  the most frequent label; two empty texts for other metrics, and where rows have no classes.
  """
  label = (task.get('most_frequent') or {}).get('label')
  if metric.get('name') != 'accuracy' or not label:
    return '', ''
  return f'always "{name(label.get("class"))}"', number(label.get('share'), 'fraction')


def contaminated(task: Mapping[str, Any]) -> str:
  """Returns the sentence of a test set that shares text with the training data; '' for others."""
  found = task.get('contamination') or {}
  if not found.get('contaminated') and not found.get('near_duplicates'):
    return ''
  near = found.get('near_duplicates') or 0
  text = f'Contaminated test "{name(task["task"])}": {overlap(found)}'
  text += f', {count(near)} are near-duplicates' if near else ''
  metric = primary(task)
  clean = [
    f'{title(model)} {interval(score, metric.get("form", "number"))}'
    for model, score in (found.get('scores_clean') or {}).items()
  ]
  return f'{text}. {_headed(metric)} without them: {", ".join(clean)}.' if clean else f'{text}.'


def overlap(found: Mapping[str, Any]) -> str:
  """Returns in words how many rows of a test are in the training data, and by which rule.

  found: "contamination" of a task.
  """
  against = ', '.join(map(str, found.get('against') or ['the training data']))
  whole = found.get('whole') or 0
  rule = f'{found.get("ngram")} words in a row'
  if whole:
    rule += f'; {examples(whole)} without that many words compared as a whole'
  n = found.get('n') or 0
  return f'{count(found.get("contaminated") or 0)} of {examples(n)} found in {against} ({rule})'


def _headed(metric: Mapping[str, Any]) -> str:
  shown = name(metric.get('title', 'score'))
  return shown[:1].upper() + shown[1:]


def power(task: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
  """Returns the sentence on the smallest difference that a test set of this size could show; ''
  where it is not known, or where the verdict has it: of an undecided difference.
  """
  if difference.get('outcome') == 'undecided' and difference.get('verdict'):
    return ''
  metric = primary(task)
  smallest = number(difference.get('smallest_difference'), metric.get('form', 'number'))
  if smallest == '-':
    return ''
  prompts = task.get('prompts', task.get('n'))
  return f'{examples(prompts)} would show a difference of {smallest} in four of five cases.'


def one_sided(test: Mapping[str, Any], names: Sequence[str]) -> str:
  """Returns how many examples one of two models alone has right; '' where that was not counted.

  names: of the second and the first model.
  """
  if test.get('only_second_right') is None:
    return ''
  return (
    f'{examples(test["only_second_right"])} only {names[0]} has right, '
    f'{count(test.get("only_first_right"))} only {names[1]}'
  )


def in_groups(task: Mapping[str, Any]) -> str:
  """Returns ', in 213 groups' where rows are not independent; else ''."""
  return f', in {count(task["groups"])} groups' if task.get('groups') else ''


def is_too_small(difference: Mapping[str, Any]) -> bool:
  """Returns whether the test set was too small for an undecided difference."""
  return difference.get('outcome') == 'undecided' and bool(difference.get('is_too_small'))


def main_metrics(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Returns the metrics of a task without its details, such as lengths."""
  return [m for m in task.get('metrics') or [] if not m.get('is_detail')]


def test(difference: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the paired test of a difference; {} without one."""
  return difference.get('test') or {}


def missing(task: Mapping[str, Any], models: Sequence[str]) -> list[str]:
  """Returns a sentence for each reason why metrics could not be computed, with their models."""
  found: dict[str, list[str]] = {}
  why_not = task.get('not_evaluated') or {}
  for model, reason in why_not.items():
    found.setdefault(f'not evaluated: {reason}', []).append(title(model))
  for model in models:
    scores = (task.get('scores') or {}).get(model)
    if scores is None and model not in why_not:
      found.setdefault('not evaluated on this task', []).append(title(model))
    if scores is None:
      continue
    for metric in main_metrics(task):
      score = scores.get(metric['name']) or {}
      if score.get('value') is not None:
        continue
      shown = name(metric.get('title', metric['name']))
      why = str(score.get('why') or 'not computed')
      why = why if why.startswith(shown) else f'{shown}: {why}'
      found.setdefault(why, []).append(title(model))
  return [f'{", ".join(who)}: {why}' for why, who in found.items()]
