"""Reports whether the tuned model is better than the base: dicts for JSON, tables for a terminal.

Intervals and tests are those of statistics/; results come from run.py. Tables are plain ASCII, at
most 100 columns wide.
"""

import dataclasses
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftjax.evaluation.metrics import SCORES, classification, per_class
from ftjax.evaluation.run import Result
from ftjax.evaluation.statistics.bootstrap import bootstrap
from ftjax.evaluation.statistics.intervals import wilson
from ftjax.evaluation.statistics.paired import mcnemar
from ftjax.evaluation.tasks import Task
from ftjax.storage import files

SEED = 0
RESAMPLES = 2000
LEVEL = 0.95
_WIDTH = 100
_TITLES = {
  'accuracy': 'accuracy',
  'precision': 'macro precision',
  'recall': 'macro recall',
  'f1': 'macro F1',
}


@dataclasses.dataclass(frozen=True)
class Answer:
  """The completions of both models for one prompt."""

  prompt: str
  base: str
  tuned: str


def _columns(task: Task, results: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
  """Returns class indices (labels, predictions): int[n]; without classes 0: right, 1: wrong."""
  if [r.id for r in results] != [row.id for row in task.rows]:
    raise ValueError(f'{task.name}: results are not those of the task, row by row')
  if task.classes is None:
    return np.zeros(len(results), int), np.array([0 if r.right else 1 for r in results])
  number = {c: i for i, c in enumerate(task.classes)}
  labels = np.array([number[r.label] for r in results])
  return labels, np.array([number[r.prediction] for r in results])


def _interval(value, low, high) -> dict[str, float]:
  return {'value': float(value), 'low': float(low), 'high': float(high)}


def compare(task: Task, base: Sequence[Result], tuned: Sequence[Result]) -> dict[str, Any]:
  """Computes the scores of both models with intervals, and tests of their difference.

  Returns:
    a dict for JSON: task, kind, n, classes; base and tuned: {score: {value, low, high}} and
      per_class;
    difference: {score: {value, low, high, p}}, tuned - base, by paired bootstrap; mcnemar:
    {only_base_right, only_tuned_right, p}; method: level, resamples, seed. Scores are accuracy and,
    where the rows share their choices, macro precision, recall and f1. The interval of accuracy is
    Wilson's, the others are bootstrap percentiles.
  """
  labels, base_predictions = _columns(task, base)
  _, tuned_predictions = _columns(task, tuned)
  names = SCORES if task.classes else SCORES[:1]
  k, n, m = len(task.classes or (0, 1)), len(labels), len(names)

  def scores(weights):
    # Each row of weights sums to n: a result with weight 2 is there twice.
    rows = np.stack([np.repeat(np.arange(n), row) for row in weights.astype(int)])
    first = classification(labels[rows], base_predictions[rows], k)[..., :m]
    second = classification(labels[rows], tuned_predictions[rows], k)[..., :m]
    return np.concatenate([first, second, second - first], -1)

  found = bootstrap(scores, range(n), seed=SEED, resamples=RESAMPLES, level=LEVEL)
  parts = list(zip(found.value, found.low, found.high, found.p, strict=True))
  out: dict[str, Any] = {'task': task.name, 'kind': task.kind, 'n': n, 'classes': task.classes}
  for title, predictions, part in (
    ('base', base_predictions, parts[:m]),
    ('tuned', tuned_predictions, parts[m : 2 * m]),
  ):
    out[title] = {s: _interval(*p[:3]) for s, p in zip(names, part, strict=True)}
    low, high = wilson(int((predictions == labels).sum()), n, LEVEL)
    out[title]['accuracy'] |= {'low': low, 'high': high}
    if task.classes:
      out[title]['per_class'] = _per_class(task.classes, labels, predictions)
  out['difference'] = {
    s: _interval(*p[:3]) | {'p': float(p[3])} for s, p in zip(names, parts[2 * m :], strict=True)
  }
  test = mcnemar(base_predictions == labels, tuned_predictions == labels)
  out['mcnemar'] = {'only_base_right': test.b, 'only_tuned_right': test.c, 'p': test.p}
  out['method'] = {'level': LEVEL, 'resamples': RESAMPLES, 'seed': SEED}
  return out


def _per_class(classes, labels, predictions) -> dict[str, dict[str, float]]:
  found = per_class(labels, predictions, len(classes))
  columns = {
    'precision': found.precision,
    'recall': found.recall,
    'f1': found.f1,
    'support': found.support,
  }
  return {
    name: {title: column[i].item() for title, column in columns.items()}
    for i, name in enumerate(classes)
  }


def verdict(summary: Mapping[str, Any]) -> str:
  """Returns one sentence that sums the comparison up, decided by McNemar's test alone."""
  test, n = summary['mcnemar'], summary['n']
  gained, lost = test['only_tuned_right'], test['only_base_right']
  if test['p'] >= 1 - summary['method']['level']:
    return f'These {n} examples show no significant difference between the models.'
  return f'The tuned model is {"better" if gained > lost else "worse"} than the base.'


def _p(value: float, least: float = 0.0) -> str:
  """Formats a p value; `least`: the smallest p that the resampling can resolve."""
  if value <= least:
    return f'< {math.ceil(least * 1e4) / 1e4:g}' if least else '0'
  if value < 1e-4:
    return f'{value:.0e}'
  return f'{value:.4f}' if value < 0.1 else f'{value:.2f}'


def table(summary: Mapping[str, Any]) -> str:
  """Returns the comparison of one task as a table of text."""
  percent = f'{100 * summary["method"]["level"]:g} %'
  classes = f', classes {", ".join(summary["classes"])}' if summary['classes'] else ''
  head = f'{summary["task"]}: {summary["n"]} examples{classes}'
  lines = [head if len(head) <= _WIDTH else head[: _WIDTH - 3] + '...', '']
  form = '{:<16} {:<22} {:<22} {:<26} {:>8}'
  lines.append(form.format('', 'base', 'tuned', 'tuned - base', 'p'))
  lines.append('-' * 98)
  for score, diff in summary['difference'].items():
    one, two = summary['base'][score], summary['tuned'][score]
    lines.append(
      form.format(
        _TITLES[score],
        '{value:.3f} [{low:.3f}, {high:.3f}]'.format(**one),
        '{value:.3f} [{low:.3f}, {high:.3f}]'.format(**two),
        '{value:+.3f} [{low:+.3f}, {high:+.3f}]'.format(**diff),
        _p(diff['p'], 2 / (summary['method']['resamples'] + 1)),
      )
    )
  test = summary['mcnemar']
  lines += [
    '-' * 98,
    f'{test["only_tuned_right"]} examples only the tuned model has right, '
    f'{test["only_base_right"]} only the base: exact McNemar p = {_p(test["p"])}.',
    verdict(summary),
    f'In brackets: {percent} intervals, Wilson for accuracy, else bootstrap '
    f'({summary["method"]["resamples"]} resamples).',
    'p of a row: paired bootstrap, two-sided.',
  ]
  return '\n'.join(lines)


def answers(rows: Sequence[Answer], max_lines: int = 4) -> str:
  """Returns prompts with both completions, wrapped; each text is cut to `max_lines` lines."""
  blocks = []
  for row in rows:
    texts = (('prompt', row.prompt), ('base', row.base), ('tuned', row.tuned))
    blocks.append('\n'.join(_wrapped(title, text, max_lines) for title, text in texts))
  return '\n\n'.join(blocks)


def _wrapped(title: str, text: str, max_lines: int) -> str:
  """Wraps a text without its control characters, which must not reach the terminal."""
  clean = ''.join(c if c.isprintable() else ' ' for c in text)
  lines = textwrap.wrap(clean, _WIDTH - 8) or ['(nothing)']
  if len(lines) > max_lines:
    lines = [*lines[:max_lines], '...']
  return '\n'.join(f'{title if i == 0 else "":<7} {line}' for i, line in enumerate(lines))


def text(summaries: Sequence[Mapping[str, Any]], samples: Sequence[Answer] = ()) -> str:
  """Returns the report for a terminal: a table per task, then completions of both models."""
  parts = [table(s) for s in summaries]
  if samples:
    parts.append('Answers before and after\n\n' + answers(samples))
  return '\n\n'.join(parts)


def save(path: str, summaries: Sequence[Mapping[str, Any]], samples: Sequence[Answer] = ()) -> None:
  """Writes `eval/summary.json`: {"tasks": {name: summary}, "answers": [...]}."""
  out = {
    'tasks': {s['task']: s for s in summaries},
    'answers': [dataclasses.asdict(a) for a in samples],
  }
  files.write_text(path, json.dumps(out, indent=1, ensure_ascii=False, allow_nan=False) + '\n')
