"""Formats audits and comparisons of data sets as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.audit.audit import Audit
from ftjax.audit.drift import Drift
from ftjax.audit.finding import KINDS, Finding

_WIDTH = 100


def text(audit: Audit, examples: int = 2) -> str:
  """Returns the audit as text: counts by kind, facts of the set, and examples of each kind.

  examples: findings of each kind that are listed.
  """
  compared = f', {audit.evaluation:,} evaluation rows' if audit.evaluation else ''
  lines = [f'audit: {audit.rows:,} training rows{compared}; {audit.flagged():,} rows with findings']
  counts = audit.counts()
  if counts:
    lines += ['', f'{"kind":<20} {"severity":<9} {"count":>7}  remedy']
    lines += [
      f'{kind:<20} {KINDS[kind].severity:<9} {number:>7,}  {KINDS[kind].remedy}'
      for kind, number in counts.items()
    ]
  for source, facts in audit.facts.items():
    lines += ['', *([source] if source else []), *_facts(facts)]
  by_kind: dict[str, list[Finding]] = {}
  for found in audit.findings:
    by_kind.setdefault(found.kind, []).append(found)
  for kind in counts:
    lines += ['', f'{kind}: {KINDS[kind].title}']
    for found in by_kind[kind][:examples]:
      lines.append(f'  {found.file}:{found.line}' + (f': {found.detail}' if found.detail else ''))
      if found.excerpt:
        lines.append(f'    {found.excerpt}')
    if more := len(by_kind[kind]) - examples:
      lines += [f'  and {more:,} more'] if more > 0 else []
  return '\n'.join([*lines, *(['', *map('note: {}'.format, audit.notes)] if audit.notes else [])])


def _facts(facts: Mapping[str, Any]) -> list[str]:
  """Returns a line for each fact of the whole set."""
  lines = []
  for name, (low, middle, high, most) in facts.get('lengths', {}).items():
    lines.append(
      f'{name}: {low:,} to {most:,} characters, half at most {middle:,}, 99 % at most {high:,}'
    )
  for name, counts in facts.get('languages', {}).items():
    lines.append(f'languages of the {name}: {_shares(counts)}')
  if facts.get('labels'):
    lines.append(f'labels: {_shares(facts["labels"])}')
  if model := facts.get('label_model'):
    of = f'models of the study on {model["rows"]:,} rows' if 'rows' in model else 'label model'
    lines.append(
      f'{of} out of fold: accuracy {model["accuracy"]:.1%}, the most frequent label alone '
      f'{model["most_frequent"]:.1%}; {model["suspects"]:,} rows it doubts'
    )
  if own := facts.get('diversity'):
    lines.append(
      f'distinct-1 and distinct-2: questions {own["question_distinct_1"]:.2f} and '
      f'{own["question_distinct_2"]:.2f}, answers {own["answer_distinct_1"]:.2f} and '
      f'{own["answer_distinct_2"]:.2f}'
    )
    if 'coverage_effective' in own:
      lines.append(
        f'embeddings: {own["coverage_effective"]:.1f} effective rows of '
        f'{own["coverage_rows"]:,}, similarity to the nearest '
        f'{own["coverage_nearest"]:.2f}'
      )
  return lines


def _shares(counts: Mapping[str, int]) -> str:
  total = sum(counts.values())
  return ', '.join(f'{name} {n:,} ({n / total:.1%})' for name, n in counts.items())


def drift(found: Drift, names: Sequence[str]) -> str:
  """Returns a comparison of two versions as text; names: of the old and the new one."""
  lines = [
    f'{names[1]} against {names[0]}: {found.new:,} rows, before {found.old:,}',
    f'  same {found.same:,}, came {len(found.came):,}, went {len(found.went):,}, '
    f'changed {len(found.changed):,}',
  ]
  for word, rows in (('came', found.came), ('went', found.went)):
    lines += [f'  {word}: {row.place}: {_short(row.shown)}' for row in rows[:2]]
  for old, new in found.changed[:2]:
    lines.append(
      f'  changed: {old.place} -> {new.place}: {_short(old.answer)} -> {_short(new.answer)}'
    )
  if found.tests:
    lines += ['', f'{"drift of":<24} {"statistic":<9} {"value":>9} {"p":>9}  old; new']
    lines += [
      f'{t.name:<24} {t.statistic:<9} {t.value:>9.4f} {t.p:>9.2g}  {t.old}; {t.new}'
      for t in found.tests
    ]
  return '\n'.join(lines)


def _short(text: str) -> str:
  shown = ' '.join(text.split())
  return repr(shown if len(shown) <= 40 else f'{shown[:37]}...')
