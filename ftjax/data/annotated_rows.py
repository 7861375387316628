"""Parses rows whose texts have labels: of the whole text ('class'), of each word ('tags'), or of
each step of a solution ('steps', step_rows.py); and texts whose own tokens are the labels
('masked').

`annotated_examples.py` tokenizes them. The columns are those of the published sets.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ftjax.data import row_numbers, step_rows
from ftjax.data.formats import has
from ftjax.data.messages import parse_json, read_text
from ftjax.data.step_rows import Steps

# 'texts' are those of embedding_rows.py.
SHAPES = ('class', 'tags', 'masked', step_rows.SHAPE, 'texts')

# Columns of one text, and of two texts that are read together.
SINGLE = ('text', 'sentence', 'content', 'review', 'document', 'tweet', 'abstract')
PAIRS = (
  ('text', 'text_pair'),
  ('sentence1', 'sentence2'),
  ('premise', 'hypothesis'),
  ('question1', 'question2'),
  ('question', 'sentence'),
  ('query', 'passage'),
  ('query', 'document'),
)
_LABELS = ('label', 'labels', 'score')
_WORDS = ('tokens', 'words')
_TAGS = ('tags', 'ner_tags', 'labels', 'pos_tags')


@dataclasses.dataclass(frozen=True)
class Annotation:
  """What the labels of a source are.

  kind: 'single', 'multi', 'regression' or 'binary' for whole texts, 'tags' for words, 'steps' for
    the steps of a solution, 'masked' for a text without labels, a value of embedding.objective for
    groups of texts.
  names: of the labels in the order of their numbers; () of a number.
  all_subwords: of tags: whether all sub-words of a word have its label, and not the first alone.
  separator: of steps: the text after each.
  negatives: of groups of texts: the most negatives of a row. needs_negative: whether there must be
  one.
  """

  kind: str = ''
  names: tuple[str, ...] = ()
  all_subwords: bool = False
  separator: str = ''
  negatives: int = 0
  needs_negative: bool = False


@dataclasses.dataclass(frozen=True)
class LabeledText:
  """One text, or two that are read together, with what it is to be given: the number of its label,
  those of its labels, or a number.
  """

  texts: tuple[str, ...]
  values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class TaggedWords:
  """Words and the number of each one's label."""

  words: tuple[str, ...]
  tags: tuple[int, ...]


# Labels.


def from_json(value: Any) -> Any:
  """Returns a value as JSON has it: a list also from its text as in CSV."""
  if isinstance(value, str) and value.strip().startswith('['):
    with contextlib.suppress(ValueError):
      return parse_json(value, 'value', 'a list')
  return value


def _is_whole(value: Any) -> bool:
  return not isinstance(value, bool) and isinstance(value, int)


def _number_of(value: Any, key: str, names: Sequence[str]) -> int:
  """Returns the number of a label, given by its name or its number."""
  if isinstance(value, bool):
    value = str(value).lower() if str(value).lower() in names else int(value)
  if isinstance(value, float) and value.is_integer():
    value = int(value)  # a column of a table in which values are missing
  if isinstance(value, str) and value in names:
    return names.index(value)
  text = value.strip() if isinstance(value, str) else value
  if isinstance(text, str) and text in names:
    return names.index(text)
  if isinstance(text, str) and text.isdigit():
    value = int(text)
  if _is_whole(value) and str(value) in names:
    return names.index(str(value))
  if _is_whole(value) and 0 <= value < len(names):
    return value
  raise ValueError(f'{key!r} is {value!r}; expected one of {list(names)}, or its number from 0')


def _finite(value: Any, key: str) -> float:
  number = row_numbers.finite(value)
  if number is None:
    raise ValueError(f'{key!r} is {value!r}, expected a finite number')
  return number


def _values(row: Mapping, key: str, annotation: Annotation) -> tuple[float, ...]:
  value, names = from_json(row[key]), annotation.names
  if annotation.kind == 'single':
    if isinstance(value, list):
      raise ValueError(
        f"{key!r} is a list; classification.objective='multi' is for texts with several labels"
      )
    return (float(_number_of(value, key, names)),)
  if annotation.kind == 'multi':
    if not isinstance(value, list):
      raise ValueError(f'{key!r} is {value!r}, expected a list of labels, which may be empty')
    if len(value) == len(names) and all(_is_whole(v) and v in (0, 1) for v in value):
      if {str(v) for v in value} & {*names}:
        raise ValueError(f'{key!r} is {value!r}: numbers of labels, or 0 and 1 for each label?')
      return tuple(float(i) for i, v in enumerate(value) if v)
    return tuple(float(n) for n in sorted({_number_of(v, key, names) for v in value}))
  number = float(value) if isinstance(value, bool) else _finite(value, key)
  if annotation.kind == 'binary' and not 0 <= number <= 1:
    raise ValueError(f'{key!r} is {number:g}, expected a number from 0 to 1')
  return (number,)


# Columns.


def _one_of(row: Mapping, keys: Sequence[str], what: str) -> str:
  """Returns the one column of `keys` that a row has.

  Raises:
    ValueError: none, or several.
  """
  given = [k for k in keys if has(row, k)]
  if not given:
    raise ValueError(
      f'no {what}: expected a column {", ".join(keys[:-1])} or {keys[-1]}; got keys '
      f'{sorted(map(str, row))}'
    )
  if len(given) > 1:
    raise ValueError(f'the columns {given} may all hold {what}; keep one of them')
  return given[0]


def texts(row: Mapping) -> tuple[str, ...]:
  """Returns the one or two texts of a row. Raises ValueError where it has none."""
  return tuple(read_text(row, key) for key in _text_columns(row))


def single_text(row: Mapping) -> str:
  """Returns the one text of a row. Raises ValueError where it has none, or several."""
  return read_text(row, _one_of(row, SINGLE, 'text'))


def words(row: Mapping) -> tuple[str, ...]:
  """Returns the words of a row; those of a text are what stands between white space.

  Raises:
    ValueError: no words, or what is none.
  """
  if not any(has(row, k) for k in _WORDS) and any(has(row, k) for k in SINGLE):
    return tuple(read_text(row, _one_of(row, SINGLE, 'text')).split())
  key = _one_of(row, _WORDS, 'words')
  found = _list(row, key)
  if not found:
    raise ValueError(f'{key!r} is empty')
  for i, word in enumerate(found):
    if not isinstance(word, str) or not word.strip():
      raise ValueError(f'{key}[{i}] is {word!r}, expected a word')
    read_text({key: word}, key)
  return tuple(found)


def _text_columns(row: Mapping) -> tuple[str, ...]:
  """Returns the columns of a row's one or two texts."""
  pairs = [p for p in PAIRS if all(has(row, k) for k in p)]
  if len(pairs) == 1:
    return pairs[0]
  if pairs:
    raise ValueError(f'the columns {sorted({k for p in pairs for k in p})} hold several pairs')
  return (_one_of(row, SINGLE, 'text'),)


def _label_column(row: Mapping) -> str:
  return _one_of(row, _LABELS, 'a label')


def _list(row: Mapping, key: str) -> list:
  value = from_json(row[key])
  if not isinstance(value, list):
    raise ValueError(f'{key!r} is {type(value).__name__}, expected a list')
  return value


def _from_class(row: Mapping, annotation: Annotation) -> LabeledText:
  return LabeledText(texts(row), _values(row, _label_column(row), annotation))


def _from_tags(row: Mapping, annotation: Annotation) -> TaggedWords:
  found, tags_key = words(row), _one_of(row, _TAGS, 'tags')
  tags = _list(row, tags_key)
  if len(found) != len(tags):
    raise ValueError(f'{len(found)} words and {len(tags)} {tags_key}; expected one for each word')
  numbers = [_number_of(t, f'{tags_key}[{i}]', annotation.names) for i, t in enumerate(tags)]
  return TaggedWords(found, tuple(numbers))


def parse(row: Mapping, shape: str, annotation: Annotation) -> LabeledText | TaggedWords | Steps:
  """Parses a raw row.

  Args:
    row: the raw row.
    shape: one of SHAPES.
    annotation: of the source's labels.

  Raises:
    ValueError: the row is unusable; the message is the reason.
  """
  if shape == 'masked':
    return LabeledText((read_text(row, _one_of(row, SINGLE, 'text')),), ())
  if shape == step_rows.SHAPE:
    return step_rows.parse(row)
  return (_from_class if shape == 'class' else _from_tags)(row, annotation)


def unread(row: Mapping, shape: str) -> set[str]:
  """Returns the columns of a row for `parse` that are not null and that it does not read."""
  if shape == step_rows.SHAPE:
    return step_rows.unread(row)
  if shape == 'masked':
    known = {_one_of(row, SINGLE, 'text')}
  elif shape == 'class':
    known = {*_text_columns(row), _label_column(row)}
  else:
    known = {*_WORDS, _one_of(row, _TAGS, 'tags')}
    known |= set() if any(has(row, k) for k in _WORDS) else {*SINGLE}
  known |= {*row_numbers.NUMBERS, 'id', 'group'}
  return {str(k) for k, v in row.items() if v is not None and k not in known}


def names_of(rows: Iterable[Mapping], shape: str) -> tuple[str, ...]:
  """Returns the names of the labels of rows, in the order of their numbers.

  Names that are texts are sorted; numbers 0, 1, ... up to the largest one name themselves; true and
  false are 'false' and 'true'. Rows without a label are left to `parse`.

  Raises:
    ValueError: names and numbers together, or a number below 0.
  """
  found: set[Any] = set()
  for row in rows:
    try:
      key = _label_column(row) if shape == 'class' else _one_of(row, _TAGS, 'tags')
    except ValueError:
      continue
    value = from_json(row[key])
    for one in value if isinstance(value, list) else [value]:
      found.add(_named(one))
  numbers = {v for v in found if isinstance(v, int)}
  if numbers and len(numbers) != len(found):
    names = sorted(found - numbers)[:3]
    raise ValueError(f'labels are numbers, such as {min(numbers)}, and texts, such as {names}')
  if numbers and min(numbers) < 0:
    raise ValueError(f'a label is {min(numbers)}; expected numbers from 0')
  if numbers:
    return tuple(map(str, range(max(numbers) + 1)))
  return tuple(sorted(found))


def _named(value: Any) -> str | int:
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, float) and math.isfinite(value) and value.is_integer():
    return int(value)
  if isinstance(value, str):
    text = value.strip()
    return int(text) if text.isdigit() else text
  if isinstance(value, int):
    return value
  raise ValueError(f'a label is {value!r}; expected a text or a whole number')
