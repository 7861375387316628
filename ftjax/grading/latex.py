r"""Normalizes answers written in LaTeX or plain text, so that gold and generated answers compare.

`normalize` removes layout, wrappers and spelling variants; `split_unit` removes a trailing unit;
`split_list` parses tuples, sets, intervals and lists. math_answers.py compares the results. All
functions are linear in the length of the text.
"""

import re

_WRAPPERS = (('$$', '$$'), ('$', '$'), ('\\(', '\\)'), ('\\[', '\\]'), ('**', '**'))
_STYLED = re.compile(
  r'\\(?:text|textbf|textit|textrm|textsf|texttt|mbox|emph|mathrm|mathbf|mathit|mathsf|mathtt'
  r'|operatorname|boldsymbol|bm|boxed|fbox)\s?\{'
)
_SUPERSCRIPTS = str.maketrans('⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺', '0123456789-+')
_SUPERSCRIPT = re.compile('[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+')
_CHARACTERS = {
  '\u2212': '-',
  '\u00d7': '\\times ',
  '\u00b7': '\\cdot ',
  '\u22c5': '\\cdot ',
  '\u00f7': '\\div ',
  '\u03c0': '\\pi ',
  '\u221e': '\\infty ',
  '\u222a': '\\cup ',
  '\u2208': '\\in ',
  '\u00b0': '^{\\circ}',
  '\u00bd': '\\frac{1}{2}',
  '\u00bc': '\\frac{1}{4}',
  '\u00be': '\\frac{3}{4}',
  '\u00a0': ' ',
  '\u2009': ' ',
  '\u202f': ' ',
}
_CHARACTER = re.compile('|'.join(_CHARACTERS))
# A number with spaces between groups of three digits, and nothing else.
_SPACED = re.compile(r'[-+]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?')
# Between a digit and exactly three more, these separate thousands.
_THOUSANDS = re.compile(r'(?<=[0-9])(?:\\[,!: ]|\{,\}|~|\u00a0|\u2009|\u202f)(?=[0-9]{3}(?![0-9]))')
# A word in \text{..} or without it.
_WORD = r'\s?(?:\\text\{{\s?{0}\s?\}}|{0})'
# In this order.
_SPELLINGS = tuple(
  (re.compile(pattern), spelling)
  for pattern, spelling in (
    (r'\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])\s?', ''),
    (r'(?<!\\)\\(?:[,;: ]|q?quad(?![A-Za-z]))|(?<!\\)~', ' '),
    (r'(?<!\\)\\!', ''),
    (r'\\[dtc]frac(?![A-Za-z])', r'\\frac'),
    (r'\\frac\s?([0-9])\s?([0-9])(?![0-9])', r'\\frac{\1}{\2}'),
    (r'\\frac\s?([0-9])\s?\{', r'\\frac{\1}{'),
    (r'(\\frac\s?\{[^{}]{0,60}\})\s?([0-9])', r'\1{\2}'),
    (r'\u221a\s?([0-9]{1,30}|[A-Za-z])', r'\\sqrt{\1}'),
    (r'\\sqrt\s?([0-9A-Za-z])', r'\\sqrt{\1}'),
    (r'(?:\{\})?\^\s?\{?\s?\\circ(?![A-Za-z])\s?\}?|\\degree(?![A-Za-z])', r'^{\\circ}'),
    (r'\\l(?:brace)(?![A-Za-z])', r'\\{'),
    (r'\\r(?:brace)(?![A-Za-z])', r'\\}'),
    (r'\\(?:mathbf|mathrm|boldsymbol|bm)\{([A-Za-z0-9.]{1,60})\}(?=.)', r'\1'),
    (r'\s?percent$', '%'),
    (r'(?<=[0-9])\s?([AaPp])\.\s?([Mm])\.?$', r' \1\2'),
    (r'\\varnothing(?![A-Za-z])', r'\\emptyset'),
    (rf'(?<=[0-9]){_WORD.format("thousand")}$', r' \\times 10^{3}'),
    (rf'(?<=[0-9]){_WORD.format("million")}$', r' \\times 10^{6}'),
    (rf'(?<=[0-9]){_WORD.format("billion")}$', r' \\times 10^{9}'),
    (rf'(?<=[0-9]){_WORD.format("trillion")}$', r' \\times 10^{12}'),
    (r'\s+', ' '),
  )
)


def normalize(text: str) -> str:
  r"""Returns an answer without layout: math delimiters, bold marks, \left, \text{..} or \boxed{..}
  around the whole, a final period; fractions, roots, degrees, spaces and thousands separators in
  one spelling. Words, digits of other scripts and everything that may change the value stay.
  """
  text = _THOUSANDS.sub(',', text)
  text = _SUPERSCRIPT.sub(lambda m: f'^{{{m.group().translate(_SUPERSCRIPTS)}}}', text)
  text = _unwrap(_CHARACTER.sub(lambda m: _CHARACTERS[m.group()], text))
  for pattern, spelling in _SPELLINGS:
    text = pattern.sub(spelling, text)
  text = _unwrap(text)
  if _SPACED.fullmatch(text):
    return text.replace(' ', '')
  letter = re.fullmatch(r'\(?([A-Z])\)', text)  # the option (B) or B)
  return letter[1] if letter else text


def _unwrap(text: str) -> str:
  """Returns a text without delimiters around the whole of it."""
  for _ in range(8):
    before = text
    text = text.strip().rstrip('.;').strip()
    if text.endswith('\\'):  # `5.\ `
      text = text[:-1].rstrip()
    for start, end in _WRAPPERS:
      inner = text[len(start) : -len(end)]
      # `$5$ or $6$` is not wrapped as a whole.
      if len(text) > len(start + end) and text.startswith(start) and text.endswith(end):
        text = text if start in inner or end in inner else inner
    styled = _STYLED.match(text)
    opens = styled.end() - 1 if styled else 0
    if text[opens : opens + 1] == '{' and _closing(text, opens) == len(text) - 1:
      text = text[opens + 1 : -1]
    if text == before:
      return text
  return text


def _closing(text: str, start: int) -> int:
  """Returns the index of the brace that closes the one at `start`, -1 if it is not closed."""
  depth = 0
  for at in range(start, len(text)):
    if text[at] in '{}' and text[at - 1 : at] != '\\':
      depth += 1 if text[at] == '{' else -1
      if not depth:
        return at
  return -1


# Units by their first name; other units are not compared.
_UNITS = {
  spelling: names.split()[0]
  for names in (
    'mm millimeter millimeters millimetre millimetres',
    'cm centimeter centimeters centimetre centimetres',
    'm meter meters metre metres',
    'km kilometer kilometers kilometre kilometres',
    'in inch inches',
    'ft foot feet',
    'yd yard yards',
    'mi mile miles',
    'mg milligram milligrams',
    'g gram grams',
    'kg kilogram kilograms',
    'lb lbs pound pounds',
    'ml mL milliliter milliliters millilitre millilitres',
    'L l liter liters litre litres',
    'ms millisecond milliseconds',
    's sec secs second seconds',
    'min mins minute minutes',
    'h hr hrs hour hours',
    'day days',
    'week weeks',
    'month months',
    'year years',
    'degree degrees deg',
    'am AM a.m A.M',  # `_name` removes the last period
    'pm PM p.m P.M',
    'radian radians rad',
    'dollar dollars',
    'cent cents',
    'euro euros',
    'mph',
    'unit units',
    'C',
    'F',
    'K',
    'N',
    'J',
    'W',
    'V',
    'A',
    'Hz',
    'kHz',
    'Pa',
    'mol',
  )
  for spelling in names.split()
}
_POWER = r'(?:\^\{?(?P<power>[23])\}?)?'
_TEXT_UNIT = re.compile(
  rf'\\(?:text|mathrm|mbox|textrm|operatorname)\{{(?P<unit>[^{{}}]{{0,60}})\}}{_POWER}$'
)
# `5m` is a product, `5 m` a length.
_PLAIN_UNIT = re.compile(
  r'(?<![\\A-Za-z{])(?P<unit>(?:(?:square|cubic|sq|cu)\.? )?'
  rf'(?:[A-Za-z]{{2,12}}|[A-Za-z]{{1,12}}/[A-Za-z]{{1,8}}|(?<=[0-9] )[A-Za-z])){_POWER}$'
)
_NO_UNIT = re.compile(
  r'\b(?:or|and|not|maybe|perhaps|to|hundreds?|thousands?|[mbtr]+illions?|dozens?|times)\b|[=<>,;?]|[04-9]|\d\d',
  re.IGNORECASE,
)
_OF_ANGLES = re.compile(r'\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)')
_DEGREES = '^{\\circ}'


def split_unit(text: str) -> tuple[str, str]:
  r"""Returns (value, unit) of a normalized answer: '5', 'cm' of '5 \text{cm}'. The unit is '' where
  there is none.

  Any words in \text{..} after a value count as a unit; without it only known units do, and words of
  four or more letters after a space ('8 apples'): others are products.
  """
  found = _TEXT_UNIT.search(text)
  if found and (_NO_UNIT.search(found['unit']) or not text[: found.start()].strip()):
    return text, ''
  if not found:
    found = _PLAIN_UNIT.search(text)
    if found and (not _is_value(text[: found.start()]) or not _may_be_unit(found)):
      found = None
  value, unit = text, ''
  if found:
    value, unit = text[: found.start()].rstrip(), _name(found['unit'], found['power'])
  if value.endswith(_DEGREES) and not _OF_ANGLES.search(value):
    value, unit = value.removesuffix(_DEGREES).rstrip(), unit or 'degree'
  return value, unit


def _is_value(text: str) -> bool:
  """Returns whether a text ends with a number."""
  return re.search(r'[0-9})]\s?$', text) is not None


def _may_be_unit(m: re.Match) -> bool:
  """Returns whether plain letters after a value are a known unit or a word, not a product."""
  is_word = re.search(r'[0-9] $', m.string[: m.start()]) and re.fullmatch('[a-z]{4,}', m['unit'])
  return _is_known(m['unit']) or bool(is_word and not _NO_UNIT.search(m['unit']))


def _is_known(unit: str) -> bool:
  words = re.split(r'[/ ]', re.sub(r'^(?:square|cubic|sq|cu)\.? ', '', unit))
  return all(word in _UNITS for word in words)


def _name(unit: str, power: str | None) -> str:
  """Returns a unit in one spelling: 'cm^2' of 'square centimeters'."""
  unit = unit.strip().rstrip('.')
  squared = re.match(r'(square|sq|cubic|cu)\.? ', unit)
  if squared:
    power, unit = ('2' if squared[1].startswith('s') else '3'), unit[squared.end() :]
  inside = re.search(r'\^\{?([23])\}?$', unit)
  if inside:
    power, unit = inside[1], unit[: inside.start()]
  names = [_UNITS.get(word, word) for word in unit.split('/')]
  return '/'.join(names) + (f'^{power}' if power else '')


def units_differ(first: str, second: str) -> bool:
  """Returns whether two units, from `split_unit`, are known and different."""
  if not (first and second) or first == second:
    return False
  return all(_is_known(re.sub(r'\^[23]$', '', u)) for u in (first, second))


_OPENING = {'(': '(', '[': '[', '\\{': '{'}
_CLOSING = {')': ')', ']': ']', '\\}': '}'}
_SEPARATOR = re.compile(r'\\text\{,?\s?(?:and|or)\s?\}|(?<=[^A-Za-z ]) (?:and|or) ')


def split_list(text: str) -> tuple[str, list[str]] | None:
  r"""Returns (brackets, items) of a normalized tuple, interval, set or list: '(]', ['1', '2'] of
  '(1,2]'; '' for a list without brackets and '{}' for \{..\}; None for anything else.

  A list without brackets may also be joined by 'and' or 'or', or by \pm: '\pm 2' is 2 and -2.
  """
  brackets, inner = _bracketed(text)
  items = _split(inner)
  if not brackets:
    items = [item for part in items for item in _signs(part)]
  if not items or not all(items) or (len(items) < 2 and brackets != '{}'):
    return None
  return brackets, items


def _bracketed(text: str) -> tuple[str, str]:
  """Returns (brackets, text between them), or ('', text)."""
  opening = next((o for o in _OPENING if text.startswith(o)), None)
  closing = next((c for c in _CLOSING if text.endswith(c)), None)
  if not opening or not closing or len(text) <= len(opening + closing):
    return '', text
  if text.endswith('\\\\}'):
    return '', text
  inner = text[len(opening) : -len(closing)]
  if _least_depth(inner) < 0:
    return '', text
  return _OPENING[opening] + _CLOSING[closing], inner.strip()


def _least_depth(text: str) -> int:
  depth = least = 0
  for char in text:
    depth += (char in '([{') - (char in ')]}')
    least = min(least, depth)
  return least


def _split(text: str) -> list[str]:
  """Returns the parts between commas outside of all brackets."""
  text = _SEPARATOR.sub(',', text)
  parts, depth, start = [], 0, 0
  for at, char in enumerate(text):
    depth += (char in '([{') - (char in ')]}')
    if char == ',' and not depth:
      parts.append(text[start:at].strip())
      start = at + 1
  parts.append(text[start:].strip())
  # '1, 2, and 3' has a comma before the word.
  return [p for i, p in enumerate(parts) if p or not 0 < i < len(parts) - 1]


def _signs(text: str) -> list[str]:
  if text.count('\\pm') != 1:
    return [text]
  return [re.sub(r'\\pm\s?', sign, text).removeprefix('+') for sign in '+-']


def words(text: str) -> str | None:
  """Returns the letters of a normalized answer that consists of words, without spaces; None for
  anything else and for a single letter.
  """
  if not re.fullmatch(r"[A-Za-z](?:[A-Za-z .'\u2019]|(?<=[a-z]{3})-(?=[a-z]{3}))*", text):
    return None
  letters = ''.join(text.split())
  return letters if len(letters) > 1 else None


def same_words(answer: str, gold: str) -> bool:
  """Returns whether two results of `words` are equal. Case counts if the gold answer has only
  capitals (`AB` may differ from `ab`) or two letters, but not in `yes` and `no`.
  """
  if gold.lower() != 'no' and (len(gold) < 3 or gold.isupper()):
    return answer == gold
  return answer.lower() == gold.lower()
