"""Checks instructions that a program can check: numbers of words, keywords, case, JSON, bullets.

A row has `constraints: [{"kind": "max_words", "value": 50}, ...]`. Kinds with a number: `words`,
`sentences`, `paragraphs`, `bullets`, `characters`, exactly, or with `min_` or `max_` before them.
With one text or a list: `include`, `exclude`. With a text: `starts_with`, `ends_with`. Without a
value: `lowercase`, `uppercase`, `json`. Strict and loose accuracy are those of IFEval (Zhou et al.
2023, arXiv:2311.07911); its own constraints need an English tokenizer, these no language.
"""

import dataclasses
import difflib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftjax.evaluation.metric import Metric, of_sums, proportion, ratio, read_values
from ftjax.grading.json_text import read_json

_BULLET = re.compile(r'^[ \t]*[-*+\u2022][ \t]+\S', re.MULTILINE)
_BLANK_LINES = re.compile(r'\n[^\S\n]*\n\s*')
# A full stop ends a sentence before white space; those of scripts without spaces do anywhere. It
# matches at the first of several marks alone and never gives any back: linear time.
_MARKS = '.!?\u2026\u061f\u06d4\u0964'
_CLOSING = '"\')\\]\u2019\u201d\u00bb*'
_SENTENCE_END = re.compile(
  rf'(?<![{_MARKS}])[{_MARKS}]++[{_CLOSING}]*+(?=\s|$)|[\u3002\uff01\uff1f]++'
)


@dataclasses.dataclass(frozen=True)
class Constraint:
  """One instruction: a kind of KINDS, and its value: a number, a text, texts, or None."""

  kind: str
  value: int | str | tuple[str, ...] | None = None

  def holds(self, text: str) -> bool:
    """Returns whether a completion follows the instruction; a blank one follows none."""
    return bool(text.strip()) and KINDS[self.kind].holds(text, self.value)


@dataclasses.dataclass(frozen=True)
class Kind:
  """How a constraint is checked. takes: 'number', 'text', 'texts' or 'nothing'."""

  takes: str
  holds: Callable[[str, Any], bool]


def count_words(text: str) -> int:
  """Returns the number of runs without white space that have a letter or digit."""
  return sum(any(c.isalnum() for c in run) for run in text.split())


def count_sentences(text: str) -> int:
  """Returns the number of parts between sentence ends that have a letter or digit."""
  return sum(any(c.isalnum() for c in part) for part in _SENTENCE_END.split(text))


def count_paragraphs(text: str) -> int:
  """Returns the number of parts between blank lines that are not blank."""
  return sum(bool(part.strip()) for part in _BLANK_LINES.split(text))


def count_bullets(text: str) -> int:
  """Returns the number of lines that begin with -, *, + or a bullet, and a space."""
  return len(_BULLET.findall(text))


def has_keyword(text: str, keyword: str) -> bool:
  """Returns whether a text has a keyword as whole words, in any case.

  At an end of the keyword that is a letter of a script without case, such as Chinese, another
  letter may follow: words are not separated there.
  """
  text, keyword = _fold(text), _fold(keyword)
  start, end = (_is_of_spaced_script(c) for c in (keyword[0], keyword[-1]))
  before, after = r'(?<!\w)' * start, r'(?!\w)' * end
  return re.search(before + re.escape(keyword) + after, text) is not None


def _is_of_spaced_script(char: str) -> bool:
  return char.isalnum() and unicodedata.category(char) != 'Lo'


def _fold(text: str) -> str:
  return ' '.join(unicodedata.normalize('NFC', text).casefold().split())


def _is_case(text: str, change: Callable[[str], str]) -> bool:
  return text == change(text)


def _is_json(text: str, _: None) -> bool:
  try:
    read_json(text)
  except ValueError:
    return False
  return True


def _starts(text: str, start: str) -> bool:
  return _fold(text).startswith(_fold(start))


def _ends(text: str, end: str) -> bool:
  return _fold(text.strip().strip('"')).endswith(_fold(end))


_COUNTS: dict[str, Callable[[str], int]] = {
  'words': count_words,
  'sentences': count_sentences,
  'paragraphs': count_paragraphs,
  'bullets': count_bullets,
  'characters': len,
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
  '': lambda n, value: n == value,
  'min_': lambda n, value: n >= value,
  'max_': lambda n, value: n <= value,
}


def _counted(count: Callable[[str], int], compare: Callable[[int, int], bool]) -> Kind:
  return Kind('number', lambda text, value: compare(count(text.strip()), value))


KINDS: Mapping[str, Kind] = {
  prefix + name: _counted(count, compare)
  for name, count in _COUNTS.items()
  for prefix, compare in _COMPARISONS.items()
} | {
  'include': Kind('texts', lambda text, value: all(has_keyword(text, k) for k in value)),
  'exclude': Kind('texts', lambda text, value: not any(has_keyword(text, k) for k in value)),
  'starts_with': Kind('text', _starts),
  'ends_with': Kind('text', _ends),
  'lowercase': Kind('nothing', lambda text, _: _is_case(text, str.lower)),
  'uppercase': Kind('nothing', lambda text, _: _is_case(text, str.upper)),
  'json': Kind('nothing', _is_json),
}


def read_constraints(value: Any) -> tuple[Constraint, ...]:
  """Returns the constraints of a row.

  Raises:
    ValueError: no list of one or more constraints, an unknown kind, a value of another type.
  """
  if not isinstance(value, list) or not value:
    raise ValueError(f'"constraints": expected a list of one or more, got {value!r}')
  return tuple(map(_read, value))


def _read(item: Any) -> Constraint:
  if not isinstance(item, dict) or not isinstance(item.get('kind'), str):
    raise ValueError(f'"constraints": expected {{"kind": ..., "value": ...}}, got {item!r}')
  kind, value = item['kind'], item.get('value')
  if kind not in KINDS:
    near = difflib.get_close_matches(kind, KINDS, n=1)
    hint = f'did you mean {near[0]}?' if near else f'expected one of {", ".join(KINDS)}'
    raise ValueError(f'"constraints": there is no kind {kind!r}; {hint}')
  if others := sorted(map(str, item.keys() - {'kind', 'value'})):
    raise ValueError(f'"constraints": {kind}: unknown keys {others}; expected kind and value')
  takes = KINDS[kind].takes
  if takes == 'texts':
    value = tuple(value) if isinstance(value, list) else (value,)
  is_right = {
    'number': isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    'text': _is_text(value),
    'texts': isinstance(value, tuple) and bool(value) and all(map(_is_text, value)),
    'nothing': value is None,
  }[takes]
  if not is_right:
    raise ValueError(f'"constraints": {kind}: got the value {value!r}, expected {_FORMS[takes]}')
  return Constraint(kind, value)


_FORMS = {
  'number': 'a whole number, 0 or more',
  'text': 'a text that is not blank',
  'texts': 'a text that is not blank, or a list of them',
  'nothing': 'none',
}


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and bool(value.strip())


def loose_forms(text: str) -> tuple[str, ...]:
  """Returns the eight forms of which one must follow an instruction for IFEval's loose accuracy:
  with and without the first line, the last line, and asterisks."""
  lines = text.split('\n')
  cut = [text, *('\n'.join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
  return (*cut, *(form.replace('*', '') for form in cut))


def constraint_values(text: str, constraints: Sequence[Constraint]) -> dict[str, tuple[float, ...]]:
  """Returns the scores of one completion.

  Returns:
    prompt_strict, prompt_loose: 1 where all constraints hold; instructions: (how many hold
    strictly, loosely, how many there are).
  """
  forms = loose_forms(text)
  strict = [c.holds(text) for c in constraints]
  loose = [any(map(c.holds, forms)) for c in constraints]
  return {
    'prompt_strict': (float(all(strict)),),
    'prompt_loose': (float(all(loose)),),
    'instructions': (float(sum(strict)), float(sum(loose)), float(len(constraints))),
  }


def _share(name: str, title: str, column: int) -> Metric:
  value = of_sums(lambda sums: ratio(sums[:, column], sums[:, 2]))
  return Metric(name, title, read_values('instructions'), value)


PROMPT_STRICT = proportion('prompt_strict', 'all instructions followed')
PROMPT_LOOSE = proportion('prompt_loose', 'all instructions followed, loosely')
INSTRUCTION_STRICT = _share('instruction_strict', 'instructions followed', 0)
INSTRUCTION_LOOSE = _share('instruction_loose', 'instructions followed, loosely', 1)
METRICS = (PROMPT_STRICT, INSTRUCTION_STRICT, PROMPT_LOOSE, INSTRUCTION_LOOSE)
