"""Formats numbers and texts of a report: values with intervals, p values, durations, sizes, and
texts of strangers without characters that control a terminal or the direction of text.
"""

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

MISSING = '-'
LEVEL = '95 %'  # of all intervals; see evaluation/comparison.py

_KEPT = frozenset('\n\t\u200c\u200d')  # line end, tab; joiners of Persian, Hindi and emoji
_TITLES = {'base': 'base', 'base_shots': 'base + examples', 'tuned': 'tuned'}
_LONGEST_NAME = 80
_OUTCOMES = {'better': 'BETTER', 'worse': 'WORSE', 'undecided': 'UNDECIDED'}


def clean(text: str) -> str:
  """Returns a text whose control and format characters are written as `\\u202e`, so that they
  have no effect on a page or a terminal. Line ends become '\\n'.
  """
  text = text.replace('\r\n', '\n').replace('\r', '\n')
  if text.isascii() and text.isprintable():
    return text
  return ''.join(c if c in _KEPT or _is_harmless(c) else _escape(c) for c in text)


def _is_harmless(c: str) -> bool:
  # Cc: control. Cf: format, such as the direction of text. Cs: half a surrogate pair, which UTF-8
  # cannot hold. Zl, Zp: line ends of their own.
  return unicodedata.category(c) not in ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')


def _escape(c: str) -> str:
  return f'\\u{ord(c):04x}' if ord(c) < 0x10000 else f'\\U{ord(c):08x}'


def one_line(text: str, limit: int = 0) -> str:
  """Returns a text on one line, cut with '...' to `limit` characters (0: any number)."""
  shown = ' '.join(clean(text).split())
  return shown[: limit - 3] + '...' if limit and len(shown) > limit else shown


def name(value: Any) -> str:
  """Returns the name of a task, metric or class for a table: one line, not too long."""
  return one_line(str(value), _LONGEST_NAME)


def title(model: str) -> str:
  """Returns the name of a model in tables."""
  return _TITLES.get(model) or name(model)


def outcome(name: str) -> str:
  """Returns an outcome as a word of a table: BETTER, WORSE or UNDECIDED."""
  return _OUTCOMES.get(name, 'UNDECIDED')


def number(value: Any, form: str = 'number', sign: str = '') -> str:
  """Returns a figure of a metric; '-' for None and what is not finite.

  Args:
    value: the figure.
    form: 'fraction' (0.873), 'points' (27.4) or 'number' (four digits).
    sign: '+' for a difference.
  """
  if not is_finite(value):
    return MISSING
  if form == 'fraction':
    return f'{value:{sign}.3f}'
  if form == 'points':
    return f'{value:{sign}.1f}'
  if value == 0 or 1e-3 <= abs(value) < 1e5:
    return f'{value:{sign}.4g}' if abs(value) < 1e4 else f'{value:{sign}.0f}'
  return f'{value:{sign}.3g}'


def is_finite(value: Any) -> bool:
  """Returns whether a value of JSON is a finite number."""
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return is_number and abs(value) <= 1.7e308


def interval(found: Mapping[str, Any] | None, form: str, sign: str = '') -> str:
  """Returns a value with its interval, `0.873 [0.837, 0.902]`; '-' where it has none.

  found: {"value", "low", "high"}, each of which may be missing.
  """
  found = found or {}
  text = number(found.get('value'), form, sign)
  low, high = found.get('low'), found.get('high')
  if text == MISSING or not (is_finite(low) and is_finite(high)):
    return text
  return f'{text} [{number(low, form, sign)}, {number(high, form, sign)}]'


def p_value(value: Any) -> str:
  """Returns a p value with two or three digits: 0.21, 0.0042, 1e-19."""
  if not is_finite(value):
    return MISSING
  if value <= 0:
    return '0'
  if value < 1e-4:
    return f'{value:.0e}'
  return f'{value:.4f}' if value < 0.1 else f'{value:.2f}'


def count(value: Any) -> str:
  """Returns a count with thousands separators."""
  return f'{round(value):,}' if is_finite(value) else MISSING


def examples(value: Any) -> str:
  """Returns a number of examples: 1 example, 400 examples."""
  return f'{count(value)} example{"" if value == 1 else "s"}'


def duration(seconds: Any) -> str:
  """Returns a duration: 4.2 ms, 12.3 s, 3 min 05 s, 2 h 05 min."""
  if not is_finite(seconds):
    return MISSING
  if seconds < 0.995:
    return f'{1000 * seconds:.3g} ms'
  if seconds < 59.95:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f'{minutes} min {rest:02d} s'
  return f'{minutes // 60} h {minutes % 60:02d} min'


def share(value: Any) -> str:
  """Returns a fraction in per cent: 87.3 %."""
  return f'{100 * value:.1f} %' if is_finite(value) else MISSING


def number_of(value: Any) -> float:
  """Returns a value of metrics.jsonl as a float: NaN for text, and for 'NaN' and its kind, which
  telemetry/metrics_writer.py writes as strings.
  """
  if isinstance(value, bool):
    return float(value)
  if isinstance(value, (int, float)):
    return float(value) if abs(value) <= 1.7e308 else math.inf
  if value in ('NaN', 'Infinity', '-Infinity'):
    return float(value)
  return math.nan


def width(text: str) -> int:
  """Returns the columns that a text takes on a terminal: two for a wide character of East Asia,
  none for one that combines with the character before it.
  """
  if text.isascii():
    return len(text)
  return sum(
    0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in 'WF' else 1
    for c in text
  )


def pad(text: str, columns: int, is_right: bool = False) -> str:
  """Returns a text that takes exactly `columns` columns: filled with blanks, or cut with '...'."""
  if width(text) > columns:
    while text and width(text) > columns - 3:
      text = text[:-1]
    text += '...'
  room = ' ' * (columns - width(text))
  return room + text if is_right else text + room
