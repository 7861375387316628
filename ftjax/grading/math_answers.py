r"""Grades answers to math questions: extracts them from a text, parses exact numbers, compares.

Gold and generated answers are normalized in the same way (latex.py). Numbers are rationals, so
1,234 == 1234.0 == \frac{2468}{2} without a tolerance. Tuples, sets, intervals and lists are
compared item by item, words letter by letter. Other formulas (\sqrt{2}, x+1) are compared by
symbols.py.
"""

import dataclasses
import re
from fractions import Fraction

from ftjax.grading.final_answer import MARK, final_answer, gold_text
from ftjax.grading.latex import normalize, same_words, split_list, split_unit, units_differ, words
from ftjax.grading.symbols import can_do_symbols, symbolic_equal
from ftjax.runtime.errors import ConfigError

MODES = ('strict', 'flexible')
SYMBOLIC = ('auto', 'on', 'off')

# Most statements of the answer in one completion: in the reasoning, the conclusion and a summary.
_MAX_STATEMENTS = 3
_MAX_STATEMENT_CHARS = 200
# Characters at the end in which the last number is searched.
_TAIL_CHARS = 1000
# A completion of at least so many characters that is contained in the prompt is a copy, no answer.
_ECHO_CHARS = 40
_MAX_EXPONENT = 300
_MAX_ITEMS = 20

# Only ASCII digits: [0-9], where \d would take look-alikes of other scripts.
_PLAIN = (
  r'(?:[0-9]{1,3}(?:(?:,|\{,\}|\\[,!])[0-9]{3})++(?![0-9])|[0-9]{1,100}+)(?:\.[0-9]{1,100}+)?'
  r'|\.[0-9]{1,100}+'
)
_LATEX = r'\\[dt]?frac\s?(?:\{{\s?(-?{0})\s?\}}\s?\{{\s?({0})\s?\}}|([0-9])\s?([0-9]))'.format(
  r'[0-9.,]{1,60}'
)
_CURRENCY = r'(?:\\\$|US\$|[$€£¥])'
_NUMBER = re.compile(
  rf'(?:(?P<sign>[-+\u2212])\s?)?(?:{_CURRENCY}\s?)?(?P<sign2>[-+\u2212])?'
  rf'(?:(?:(?P<whole>[0-9]{{1,30}})\s?)?{_LATEX}|(?P<mixed>[0-9]{{1,30}})\s(?P<up>[0-9]{{1,30}})/'
  rf'(?P<down>[0-9]{{1,30}})(?![0-9])|(?P<top>{_PLAIN})(?:\s?/\s?(?P<bottom>{_PLAIN}))?'
  r'(?:[eE](?P<e>[-+]?[0-9]{1,3})(?![0-9])|\s?(?:\\times|\\cdot|\u00d7)\s?10\^\{?(?P<ten>-?[0-9]{1,3})\}?)?)'
  r'(?P<percent>\s?\\?%)?'
)
# Directly before a number: it is then no answer, or one of several.
_DENIED = re.compile(
  r"(?:(?:\b(?:not|never|maybe|perhaps|possibly|probably)|n['\u2019]t)(?: (?:be|equal(?: to)?))?"
  r'|\b(?:less|more|fewer|greater|other|rather) than|(?<!left )\bover|\b(?:under|above|below'
  r'|almost|nearly|exceeds?|or)) (?:(?:an?|the) )?[(\[]?$',
  re.IGNORECASE,
)
_NAMED = re.compile(r'(?:[A-Za-z]|\\[a-z]{2,8})(?:_\{?\w{1,8}\}?)?\s?(?:=|\\in(?![A-Za-z]))\s?')
# `7 2` is not 72.
_SPACE = re.compile(r'(?<![0-9])\s+|\s+(?![0-9])')
_BOLD = re.compile(r'(?<![\w)\]}*])\*\*([^*\n]{1,100})\*\*(?![\w*])')
_INLINE = re.compile(r'(?:\$([^$\n]{1,200})\$|\\\((.{1,200}?)\\\)|\\\[(.{1,200}?)\\\])[.\s]{0,9}$')
_STATES = re.compile(r'\banswer\s{0,3}(?:is\b|:|=)', re.IGNORECASE)
# Between the last two numbers: a list of guesses.
_LIST = re.compile(
  r'[\s,;/|&()\[\]{}"\'*.$:?_-]*(?:(?:or|and|to|maybe|perhaps|either|possibly)\b[\s,;/|&()"\'*.$-]*)*'
)


@dataclasses.dataclass(frozen=True)
class Number:
  """An exact value; percent: whether `value` is followed by a percent sign."""

  value: Fraction
  percent: bool = False

  def equals(self, other: 'Number') -> bool:
    """Returns whether the values are equal; a percentage like 50% equals the numbers 50 and 0.5."""
    if self.percent == other.percent:
      return self.value == other.value
    share, plain = (self, other) if self.percent else (other, self)
    return plain.value in (share.value, share.value / 100)

  def latex(self) -> str:
    """Returns the value without separators: 1000000, \\frac{1}{3}."""
    top, bottom = abs(self.value.numerator), self.value.denominator
    sign = '-' if self.value < 0 else ''
    return f'{sign}{top}' if bottom == 1 else f'{sign}\\frac{{{top}}}{{{bottom}}}'


def _plain(text: str) -> Fraction:
  return Fraction(re.sub(r'\{,\}|\\[,!]|,', '', text))


def _value(m: re.Match) -> Number | None:
  """Returns the number of a match of _NUMBER; None for a denominator of 0 or an invalid part."""
  top, bottom, top1, bottom1 = m.group(4, 5, 6, 7)
  try:
    if top or top1:
      value = _plain(top or top1) / _plain(bottom or bottom1)
      whole = m['whole']
    elif m['mixed']:
      value, whole = Fraction(int(m['up']), 1) / int(m['down']), m['mixed']
    else:
      value = _plain(m['top']) / (_plain(m['bottom']) if m['bottom'] else 1)
      whole = None
  except (ValueError, ZeroDivisionError):
    return None
  if whole:
    value += int(whole)
  exponent = int(m['e'] or m['ten'] or 0)
  if abs(exponent) > _MAX_EXPONENT:
    return None
  value *= Fraction(10) ** exponent
  signs = [s for s in (m['sign'], m['sign2']) if s]
  if len(signs) > 1:
    return None
  return Number(-value if signs and signs[0] != '+' else value, m['percent'] is not None)


def parse_number(text: str) -> Number | None:
  """Parses a whole text as one number: sign, currency, thousands separators, decimals, fractions
  (also mixed and LaTeX), exponents up to 300, percent; a unit after it is ignored. Returns None for
  anything else, 'nan' and 'inf' too."""
  if len(text) > _MAX_STATEMENT_CHARS:
    return None
  return _number(split_unit(normalize(text))[0])


def _number(text: str) -> Number | None:
  match = _NUMBER.fullmatch(text)
  return _value(match) if match else None


def last_number(text: str) -> str | None:
  """Returns the last number of a text, as written; None if it is not clearly the text's answer.

  Rejected: a member of a list of guesses (71 or 72), part of an unfinished expression (9**9,
  48+24), of a date, a time or a word with digits of other scripts, a number in a question, and one
  that is negated, uncertain or a bound (not 72, maybe 72, less than 72).
  """
  tail = _BOLD.sub(r'\1', text[-_TAIL_CHARS:])
  found = [m for m in _NUMBER.finditer(tail) if not _is_in_word(tail, m.start())]
  if not found:
    return None
  last = found[-1]
  before, after = tail[: last.start()], tail[last.end() :]
  left, right = before.rstrip(), after.lstrip()
  if '?' in after or _is_denied(before):
    return None
  if _joins(left, last, before) or right[:1] in tuple('+*^/\u00d7\u00f7'):
    return None
  if after[:1].isnumeric() or (after[1:2].isnumeric() and not after[:1].isspace()):
    return None
  if before[-1:].isnumeric() or before[-1:] in tuple('.,:_'):
    return None
  if len(found) > 1:
    between = MARK.sub(' ', tail[found[-2].end() : last.start()])
    guesses = re.search(r'\bor\b', between) and not re.search(r'[.!?\n=]', between)
    if guesses or _LIST.fullmatch(between):
      return None
  return last.group().strip()


def _is_denied(before: str) -> bool:
  """Returns whether the words before an answer negate it or make it one of several."""
  return _DENIED.search(re.sub(r'[ \t]+', ' ', before[-60:].rstrip('$\\*'))) is not None


def _is_in_word(text: str, start: int) -> bool:
  """Returns whether a number is part of a word or unit: H2, cm2, m^2."""
  before = text[max(start - 2, 0) : start]
  return before[-1:].isalpha() or (before[-1:] == '^' and before[:1].isalpha())


def _joins(left: str, match: re.Match, before: str) -> bool:
  """Returns whether an operator joins the number to the text before it."""
  if re.search(r'(?:[-+*^/\u00d7\u00f7\u00b7\u2212]|\\(?:times|cdot|div|pm))$', left):
    # A dash or a bullet that begins a line is no operator.
    return not re.search(r'(?:^|\n)\s*[-*]\s+$', before)
  if not match['sign']:
    return False
  # 'is -3' is a negative number; 'x-3', '5 -3' and 'n - 3' are not.
  glued = before[-1:].isalnum() or match.group()[1:2].isspace()
  return bool(re.search(r'[\w)}\]%]$' if glued else r'[0-9)}\]%]$', left))


def boxed(text: str) -> list[str] | None:
  r"""Returns the contents of every \boxed{..}; None if one is nested, empty or not closed."""
  parts = re.split(r'\\(?:f?boxed)\s?\{', text)
  out = []
  for i, part in enumerate(parts[1:]):
    depth, end = 1, -1
    for at, char in enumerate(part[: _MAX_STATEMENT_CHARS + 1]):
      depth += (char == '{') - (char == '}')
      if not depth:
        end = at
        break
    if end < 0 or not part[:end].strip() or (i and not out):
      return None
    out.append(part[:end].strip())
  return out


def statements(text: str, mode: str) -> list[str]:
  r"""Returns every statement of an answer in a text; empty if there is none.

  strict: one \boxed{..}, or one `#### ANSWER` as the last line. flexible: every \boxed{..} and
  every `####`; without them a text that is a number or words alone, a formula at the end, or the
  last number.
  """
  boxes = boxed(text)
  if boxes is None:
    return []
  marked = [rest.partition('\n')[0].strip() for rest in text.split('####')[1:]]
  if mode == 'strict':
    if marked and text.rpartition('####')[2].strip() != marked[-1]:
      return []
    return (boxes + marked) if len(boxes + marked) == 1 else []
  # A number with words after it is parsed by the rules of the last number.
  lines = [line if parse_number(line) else last_number(line) or line for line in marked]
  if boxes or lines:
    return boxes + lines
  if len(_STATES.findall(text)) > _MAX_STATEMENTS:
    return []
  if parse_number(text) or (len(text) <= _MAX_STATEMENT_CHARS and words(normalize(text))):
    return [text]
  formula = _INLINE.search(text[-2 * _MAX_STATEMENT_CHARS :])
  if formula and _is_denied(text[: text.rindex(formula.group().strip())]):
    return []
  if formula:
    return [next(g for g in formula.groups() if g)]
  number = last_number(text)
  return [number] if number else []


def equal(answer: str, gold: str, symbolic: bool) -> bool:
  """Returns whether a statement equals the gold answer: as a number, item by item, letter by
  letter, or as symbols. Units are compared only if both are known, names only if both exist: x=5
  equals 5 but not y=5.
  """
  if len(answer) > _MAX_STATEMENT_CHARS:
    return False
  (answer, unit), (gold, wanted_unit) = (split_unit(normalize(t)) for t in (answer, gold))
  if units_differ(unit, wanted_unit):
    return False
  names = [_name(t) for t in (answer, gold)]
  if all(names) and len({re.sub(r'\s', '', m.group()) for m in names}) > 1:
    return False
  answer, gold = (t[m.end() :] if m else t for t, m in zip((answer, gold), names, strict=True))
  return _equal(answer, gold, symbolic)


def _name(text: str) -> re.Match | None:
  """Returns the match of `x=` before a text; None if each item of a list has its own."""
  found = _NAMED.match(text)
  items = split_list(text) if found else None
  return None if items and any(_NAMED.match(item) for item in items[1][1:]) else found


def _equal(answer: str, gold: str, symbolic: bool) -> bool:
  ours, theirs = _number(answer), _number(gold)
  if ours and theirs:
    return ours.equals(theirs)
  if _SPACE.sub('', answer) == _SPACE.sub('', gold) != '':
    return True
  given, wanted = words(answer), words(gold)
  if given and wanted:
    return same_words(given, wanted)
  given = None if ours else split_list(answer)
  wanted = None if theirs else split_list(gold)
  if given and wanted:
    return _equal_items(given, wanted, symbolic)
  if (given or wanted or ' ')[0] == '':  # a list does not equal a single answer
    return False
  answer, gold = (
    n.latex() if n and not n.percent else t for n, t in ((ours, answer), (theirs, gold))
  )
  return symbolic and symbolic_equal(answer, gold)


def _equal_items(
  given: tuple[str, list[str]], wanted: tuple[str, list[str]], symbolic: bool
) -> bool:
  """Returns whether two results of `split_list` are equal: sets and lists without brackets in any
  order, tuples and intervals in the given order.
  """
  (ours, answers), (theirs, golds) = given, wanted
  unordered = ('', '{}')
  if len(answers) != len(golds) or len(golds) > _MAX_ITEMS:
    return False
  if ours != theirs and not (ours in unordered and theirs in unordered):
    return False
  if theirs not in unordered:
    return all(equal(a, g, symbolic) for a, g in zip(answers, golds, strict=True))
  left = list(golds)
  for answer in answers:
    found = next((g for g in left if equal(answer, g, symbolic)), None)
    if found is None:
      return False
    left.remove(found)
  return True


@dataclasses.dataclass(frozen=True)
class Math:
  """Reward 1 if the completion's answer equals the gold answer, else 0.

  Attributes:
    mode: one of MODES, see `statements`.
    symbolic: whether math-verify compares formulas. auto: if it is installed.
    column: of the gold answers; of a text with `####` or a box, only the answer there is used.
  """

  mode: str = 'flexible'
  symbolic: str = 'auto'
  column: str = 'answer'

  def __post_init__(self):
    for name, value, allowed in (
      ('mode', self.mode, MODES),
      ('symbolic', self.symbolic, SYMBOLIC),
    ):
      if value not in allowed:
        raise ConfigError(f'math: {name}={value!r}; expected one of {allowed}')
    if self.symbolic == 'on' and not can_do_symbols():
      raise ConfigError(
        "math: symbolic=on needs math-verify; pip install '.[rewards]' in the checkout of ftjax, "
        'or symbolic=off'
      )

  @property
  def inputs(self) -> tuple[str, ...]:
    return ('completions', 'prompts', self.column)

  @property
  def isolated(self) -> bool:
    """Returns whether sympy is used, which may hang."""
    return self.symbolic != 'off' and can_do_symbols()

  def warm(self) -> None:
    """Imports what the first score needs, before time limits apply."""
    if self.isolated:
      symbolic_equal('\\sqrt{4}', '2')

  def check(self, gold) -> None:
    """Raises ValueError for a gold answer that cannot be used."""
    self._gold(gold)

  def score(self, completion: str, prompt: str, gold) -> float:
    """Returns the reward; raises ValueError for a gold answer that cannot be used."""
    wanted = self._gold(gold)
    text = final_answer(completion, prompt)
    if text is None or (len(text) >= _ECHO_CHARS and text in prompt):
      return 0.0
    given = statements(text, self.mode)
    if not 1 <= len(given) <= _MAX_STATEMENTS:
      return 0.0
    return float(all(equal(g, wanted, self.isolated) for g in given))

  def _gold(self, value) -> str:
    text = gold_text(value, self.column)
    if '####' in text:
      text = text.rpartition('####')[2].strip()
    elif boxes := boxed(text):
      text = boxes[-1]
    if not text or len(text) > _MAX_STATEMENT_CHARS:
      raise ValueError(f'column {self.column!r}: {text[:60]!r}... is no answer to compare with')
    return text
