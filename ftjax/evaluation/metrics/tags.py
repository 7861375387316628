"""Scores named entities: those that a model found against those that are there.

An entity counts as right if its type and its place (of tags) or its text (of a generated list) are
both right. Scores are functions of three counts: right, found, there.
"""

import collections
import json
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from ftjax.evaluation.metric import Metric, of_sums, ratio, read_values
from ftjax.evaluation.result import Result

_MAX_TYPE = 40  # characters; a longer beginning of a line is no type
_BULLETS = ('- ', '* ', '\u2022 ')


def tag_spans(tags: Sequence[str], is_strict: bool = False) -> list[tuple[str, int, int]]:
  """Returns the entities (type, start, end) of BIO tags; the end is not part of them.

  An entity begins at B-X, and, as in conlleval, at an I-X that continues none of its type.

  Args:
    tags: 'B-PER', 'I-PER', 'O', ...
    is_strict: an I-X that continues no entity of its type is none, nor is what follows it.

  Raises:
    ValueError: a tag of another form.
  """
  spans: list[tuple[str, int, int]] = []
  kind, start = '', 0
  for i, tag in enumerate([*tags, 'O']):
    prefix, _, own = tag.partition('-')
    if tag != 'O' and (prefix not in ('B', 'I') or not own):
      raise ValueError(f'tag {i} is {tag!r}; expected O, B-TYPE or I-TYPE')
    if tag != 'O' and prefix == 'I' and own == kind:
      continue
    if kind:
      spans.append((kind, start, i))
    kind, start = ('' if prefix == 'I' and is_strict else own), i
  return spans


def parse_entities(text: str) -> tuple[tuple[str, str], ...]:
  """Returns the entities (type, text) that a completion lists, in its order.

  A line is 'TYPE: text', or 'TYPE: text; text'; several may stand on a line after ';'. JSON may be
  a list of [type, text], of {"type": ..., "text": ...}, or {type: [texts]}. Other lines are left
  out.
  """
  try:
    found = json.loads(text)
  except (ValueError, RecursionError):
    return tuple(_read_lines(text))
  return tuple(_read_json(found))


def _read_lines(text: str) -> Iterable[tuple[str, str]]:
  for line in text.splitlines():
    kind, line = '', line.strip()
    for part in (line[2:] if line.startswith(_BULLETS) else line).split(';'):
      start, colon, rest = part.partition(':')
      if colon and 0 < len(start.strip()) <= _MAX_TYPE:
        kind, part = start.strip(), rest
      if kind and part.strip():
        yield kind, part.strip()


def _read_json(found) -> Iterable[tuple[str, str]]:
  pairs = found
  if isinstance(found, dict):
    several = {k: v if isinstance(v, list) else [v] for k, v in found.items()}
    pairs = [[kind, value] for kind, values in several.items() for value in values]
  for pair in pairs if isinstance(pairs, list) else ():
    if isinstance(pair, dict):
      pair = [pair.get('type'), pair.get('text')]
    if isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair):
      yield pair[0], pair[1]


def fold_entity(kind: str, text: str) -> tuple[str, str]:
  """Returns an entity for comparison: the type in upper case, white space in the text as one."""
  return kind.strip().upper(), ' '.join(text.split())


def entity_values(
  found: Iterable[tuple[Hashable, ...]], there: Iterable[tuple[Hashable, ...]], types: Sequence[str]
) -> dict[str, tuple[float, ...]]:
  """Returns the counts of one text: {'entities': (right, found, there), of all; then of each type}.

  Args:
    found, there: entities as tuples that begin with their type. One that occurs twice must be found
      twice.
    types: of the task, for the macro mean and the table by type; an entity of another type counts
      among all alone. The same for every row.
  """
  given, gold = collections.Counter(found), collections.Counter(there)
  right = given & gold
  counts = [float(c.total()) for c in (right, given, gold)]
  for kind in types:
    counts += [float(sum(n for e, n in c.items() if e[0] == kind)) for c in (right, given, gold)]
  return {'entities': tuple(counts)}


def _scores(sums: np.ndarray) -> tuple[np.ndarray, ...]:
  """Returns precision, recall and F1 of (right, found, there): float64[..., 3] -> [...] each."""
  right, found, there = sums[..., 0], sums[..., 1], sums[..., 2]
  return ratio(right, found), ratio(right, there), ratio(2 * right, found + there)


def _micro(part: int):
  return of_sums(lambda sums: _scores(sums[:, :3])[part])


def _macro(sums: np.ndarray) -> np.ndarray:
  """Returns the mean F1 of the types that occur; NaN where none does."""
  each = _scores(sums[:, 3:].reshape(len(sums), sums.shape[1] // 3 - 1, 3))[2]
  return ratio(np.nan_to_num(each).sum(1), np.isfinite(each).sum(1))


def type_table(results: Sequence[Result], types: Sequence[str]) -> dict[str, dict[str, float]]:
  """Returns {type: {precision, recall, f1, support}} of all results; a ratio with denominator 0 is
  0, as in the table of classes.

  Args:
    types: those that `entity_values` got.
  """
  counts = np.zeros(3 + 3 * len(types))
  for r in results:
    counts += r.values['entities']
  table = {}
  for kind, own in zip(types, counts.reshape(-1, 3)[1:], strict=True):
    scores = (float(np.nan_to_num(score)) for score in _scores(own))
    names = ('precision', 'recall', 'f1')
    table[kind] = dict(zip(names, scores, strict=True)) | {'support': int(own[2])}
  return table


_READ = read_values('entities')
# NaN where nothing was found (precision), nothing is there (recall), or neither (F1).
PRECISION = Metric('entity_precision', 'entity precision', _READ, _micro(0))
RECALL = Metric('entity_recall', 'entity recall', _READ, _micro(1))
F1 = Metric('entity_f1', 'entity F1', _READ, _micro(2))
# Only of tasks with types.
MACRO_F1 = Metric('entity_macro_f1', 'entity macro F1', _READ, of_sums(_macro))
METRICS = (F1, PRECISION, RECALL)
