"""Parses rows of texts that are to have near or distant vectors: an anchor with a positive and
perhaps negatives, or two texts with a score.

The columns are those of sentence-transformers' data sets. `embedding_examples.py` tokenizes them.
"""

import dataclasses
import re
from collections.abc import Mapping

from ftjax.data import annotated_rows, row_numbers
from ftjax.data.annotated_rows import Annotation
from ftjax.data.formats import has
from ftjax.data.messages import read_text

# Columns of an anchor and its positive.
PAIRS = (
  ('anchor', 'positive'),
  ('query', 'positive'),
  ('query', 'passage'),
  ('query', 'document'),
  ('question', 'answer'),
  ('question1', 'question2'),
  ('sentence1', 'sentence2'),
  ('text', 'text_pair'),
)
_NUMBERED = re.compile(r'negative_\d+')
_LISTS = ('negative', 'negatives')
_SCORES = ('score', 'label', 'similarity_score')


@dataclasses.dataclass(frozen=True)
class TextGroup:
  """Anchor, positive and negatives; or two texts and the score of both, their wanted cosine."""

  texts: tuple[str, ...]
  score: float = 0.0


def _pair_columns(row: Mapping) -> tuple[str, str]:
  """Returns the columns of a row's anchor and positive.

  Raises:
    ValueError: none, or several.
  """
  found = [p for p in PAIRS if all(has(row, k) for k in p)]
  if len(found) == 1:
    return found[0]
  if found:
    raise ValueError(f'the columns {sorted({k for p in found for k in p})} hold several pairs')
  known = ', '.join(f'{a} and {b}' for a, b in PAIRS)
  raise ValueError(f'no two texts: expected columns {known}; got keys {sorted(map(str, row))}')


def _negative_columns(row: Mapping) -> list[str]:
  numbered = [k for k in row if isinstance(k, str) and _NUMBERED.fullmatch(k)]
  return [k for k in (*_LISTS, *sorted(numbered, key=lambda k: int(k[9:]))) if has(row, k)]


def _negatives(row: Mapping) -> list[str]:
  out: list[str] = []
  for key in _negative_columns(row):
    value = annotated_rows.from_json(row[key]) if key in _LISTS else row[key]
    if isinstance(value, list):
      out += [read_text({f'{key}[{i}]': v}, f'{key}[{i}]') for i, v in enumerate(value)]
    else:
      out.append(read_text(row, key))
  return out


def _score(row: Mapping) -> tuple[str, float]:
  """Returns (column of the score, its number)."""
  given = [k for k in _SCORES if has(row, k)]
  if len(given) != 1:
    raise ValueError(
      f'{"several scores" if given else "no score"}: expected one column of {list(_SCORES)}; got '
      f'keys {sorted(map(str, row))}'
    )
  (key,) = given
  number = row_numbers.finite(row[key])
  if number is None or not -1 <= number <= 1:
    raise ValueError(
      f'{key!r} is {row[key]!r}, expected a cosine, a number from -1 to 1: divide scores of a '
      'larger range'
    )
  return key, number


def parse(row: Mapping, annotation: Annotation) -> TextGroup:
  """Parses a raw row.

  Args:
    row: the raw row.
    annotation: its kind is a value of embedding.objective; with the limits of negatives.

  Raises:
    ValueError: the row is unusable; the message is the reason.
  """
  first, second = (read_text(row, key) for key in _pair_columns(row))
  if annotation.kind == 'cosine':
    return TextGroup((first, second), _score(row)[1])
  if scored := [k for k in _SCORES if has(row, k)]:
    raise ValueError(
      f"{scored[0]!r} is {row[scored[0]]!r}: every pair of embedding.objective='"
      f"{annotation.kind}' is one of near texts. Keep those rows alone, without the column; or set "
      "embedding.objective='cosine'"
    )
  negatives = _negatives(row)
  if len(negatives) > annotation.negatives:
    raise ValueError(
      f'{len(negatives)} negatives, more than embedding.negatives={annotation.negatives}; raise it'
    )
  if annotation.needs_negative and not negatives:
    raise ValueError(
      "no negative: expected a column 'negative', since embedding.in_batch=False takes those of "
      'the row alone'
    )
  if second in negatives:
    raise ValueError('a negative is the same text as the positive')
  return TextGroup((first, second, *negatives))


def unread(row: Mapping, annotation: Annotation) -> set[str]:
  """Returns the columns of a row for `parse` that are not null and that it does not read."""
  own = [_score(row)[0]] if annotation.kind == 'cosine' else _negative_columns(row)
  known = {*_pair_columns(row), *own, *row_numbers.NUMBERS, 'id', 'group'}
  return {str(k) for k, v in row.items() if v is not None and k not in known}
