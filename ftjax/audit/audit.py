"""Runs all checks of training data: findings, and facts on the set as a whole."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftjax.audit import answers, characters, diversity, duplicates, labels, languages, personal
from ftjax.audit.finding import KINDS, SEVERITIES, Finding
from ftjax.audit.rows import Row
from ftjax.evaluation import near_duplicates
from ftjax.runtime.errors import caught

_NAMED = 8  # labels and languages that a summary lists
_EXTRA = "pip install '.[eval]' in the checkout of ftjax"


@dataclasses.dataclass(frozen=True)
class Audit:
  """The result of an audit.

  Attributes:
    findings: in the order of the rows; of one row in the order of KINDS.
    rows: number of training rows, those that cannot be read included.
    evaluation: number of evaluation rows compared.
    facts: {source: facts}, JSON values: balance of labels, languages, diversity, lengths.
    notes: sentences on checks that were not made.
  """

  findings: tuple[Finding, ...]
  rows: int
  evaluation: int
  facts: Mapping[str, Any]
  notes: tuple[str, ...]

  def counts(self) -> dict[str, int]:
    """Returns {kind: number of findings}, the severe ones first."""
    found = Counter(f.kind for f in self.findings)
    order = sorted(found, key=lambda k: (SEVERITIES.index(KINDS[k].severity), -found[k]))
    return {kind: found[kind] for kind in order}

  def flagged(self) -> int:
    """Returns the number of rows with a finding."""
    return len({(f.file, f.line) for f in self.findings})

  def to_json(self) -> dict[str, Any]:
    """Returns the summary, for audit.json of a workdir."""
    first = {f.kind: f for f in reversed(self.findings)}
    kinds = [
      {'kind': kind, 'severity': KINDS[kind].severity, 'title': KINDS[kind].title, 'count': number}
      | {'remedy': KINDS[kind].remedy, 'first': f'{first[kind].file}:{first[kind].line}'}
      for kind, number in self.counts().items()
    ]
    return {
      'version': 1, 'rows': self.rows, 'flagged': self.flagged(), 'evaluation': self.evaluation,
      'kinds': kinds, 'facts': dict(self.facts), 'notes': list(self.notes),
    }  # fmt: skip


def run(
  rows: Sequence[Row],
  evaluation: Sequence[Row] = (),
  unusable: Sequence[Finding] = (),
  *,
  special: frozenset[str] = frozenset(),
  scorer: labels.Scorer | None = labels.out_of_fold,
  embed: diversity.Embed | None = None,
  given: labels.Given | None = None,
  seed: int = 0,
  is_short: bool = False,
) -> Audit:
  """Audits training rows.

  Args:
    rows: of the training data, in order.
    evaluation: rows that no training row may share text with.
    unusable: findings of rows that could not be read.
    special: texts of the tokenizer's special tokens.
    scorer: gives out-of-fold probabilities of labels; None: label errors are not looked for.
    embed: gives embeddings of texts, of at most 2,000 evenly spread rows; None: no coverage.
    given: probabilities of labels from a cross-validation, in place of those of `scorer`.
    seed: of the folds.
    is_short: only what takes some seconds for thousands of rows: near duplicates, languages and
      likely label errors are not looked for.
  """
  found: list[Finding] = list(unusable)
  notes: list[str] = []
  exact = duplicates.exact(rows)
  found += exact
  if is_short:
    scorer = None
    notes.append(
      'a short audit of the first rows: near duplicates, languages, likely label errors and rows '
      'of the evaluation data are looked for by python -m ftjax.preview --audit'
    )
  elif error := caught(lambda: near_duplicates.need_datasketch('near duplicates')):
    notes.append(f'near duplicates were not looked for: {error}')
  else:
    found += duplicates.near(rows, frozenset(f.row for f in exact))
  found += duplicates.overlap(rows, evaluation)
  for check in _OF_ROWS:
    found += check(rows)
  found += answers.template_leaks(rows, special)
  if not characters.has_ftfy():
    notes.append(f'mojibake was looked for by its usual pairs alone: ftfy is missing; {_EXTRA}')
  if not is_short and not languages.has_langid():
    notes.append(
      f'languages were found by script and frequent words: py3langid is missing; {_EXTRA}'
    )
  if scorer is labels.out_of_fold and given is None and not labels.has_scorer():
    notes.append(f'label errors were not looked for: scikit-learn is missing; {_EXTRA}')
    scorer = None
  facts = {}
  for source, group in _by_source(rows).items():
    own, facts[source] = _of_source([rows[i] for i in group], scorer, embed, given, seed, is_short)
    found += [dataclasses.replace(f, row=group[f.row]) for f in own]
  order = {kind: k for k, kind in enumerate(KINDS)}
  found.sort(key=lambda f: (f.row if f.row >= 0 else len(rows), f.file, f.line, order[f.kind]))
  total = len(rows) + len(unusable)
  return Audit(tuple(found), total, len(evaluation), facts, tuple(notes))


# Checks that look at each row alone.
_OF_ROWS = (
  answers.empty, answers.equal_sides, answers.over_length, answers.assistant_phrases,
  answers.prompt_repeated, characters.mojibake, characters.garbage, characters.repetition,
  personal.find,
)  # fmt: skip


def _by_source(rows: Sequence[Row]) -> dict[str, list[int]]:
  """Returns {source: indices of its rows}."""
  out: dict[str, list[int]] = {}
  for i, row in enumerate(rows):
    out.setdefault(row.source, []).append(i)
  return out


def _of_source(
  rows: Sequence[Row],
  scorer: labels.Scorer | None,
  embed: diversity.Embed | None,
  given: labels.Given | None,
  seed: int,
  is_short: bool,
) -> tuple[list[Finding], dict[str, Any]]:
  """Compares the rows of a source with each other; returns (findings, facts)."""
  found = answers.truncated(rows) + answers.length_outliers(rows)
  facts: dict[str, Any] = {'lengths': _lengths(rows)}
  if not is_short:
    own, mix = languages.find(rows)
    found += own
    facts['languages'] = {k: _top(v) for k, v in mix.items()}
  names = labels.of_rows(rows)
  if names is not None:
    facts['labels'] = _top(labels.balance(names))
    found += labels.rare(rows, names) + labels.conflicts(rows, names)
    if scorer is not None or given is not None:
      own, facts['label_model'] = labels.errors(rows, names, scorer, seed, given)
      found += own
  own, facts['diversity'] = diversity.of_rows(rows, names is not None, embed)
  return found + own, facts


def _top(counts: Mapping[str, int]) -> dict[str, int]:
  named = dict(list(counts.items())[:_NAMED])
  rest = sum(counts.values()) - sum(named.values())
  return named | ({'others': rest} if rest else {})


def _lengths(rows: Sequence[Row]) -> dict[str, list[int]]:
  """Returns shortest, median, 99 % and longest length of questions and answers, characters."""
  out = {}
  for name in ('question', 'answer'):
    lengths = [n for row in rows if (n := len(row.question if name == 'question' else row.answer))]
    if lengths:
      out[name] = np.percentile(lengths, [0, 50, 99, 100]).astype(int).tolist()
  return out
