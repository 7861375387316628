"""Reads study.space: config keys, and the values that a study gives them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ftjax.config import overrides, saved_config, section
from ftjax.config.overrides import Override
from ftjax.runtime.errors import ConfigError

KEY = 'study.space'
_DIGITS = 4  # significant digits of numbers of a range: a point is what is printed of it
_FORMS = ('log', 'uniform', 'int', 'logint')
_EXAMPLE = "such as 'optim.lr=log:1e-5:1e-3' or 'lora.rank=8,16,32'"

Point = dict[str, Any]  # {key: value}


@dataclasses.dataclass(frozen=True)
class Dimension:
  """A key and the values that it may take.

  Attributes:
    key: dotted name.
    form: 'choices', 'uniform', 'log' (equally likely orders of magnitude), 'int' or 'logint'.
    values: of 'choices'.
    low, high: ends of the other forms, both included.
  """

  key: str
  form: str
  values: tuple[Any, ...] = ()
  low: float = 0.0
  high: float = 0.0

  @property
  def is_integer(self) -> bool:
    return self.form in ('int', 'logint')

  @property
  def is_log(self) -> bool:
    return self.form in ('log', 'logint')

  def at(self, place: float) -> Any:
    """Returns the value at a place in [0, 1] of the range, or of the list of choices."""
    if self.form == 'choices':
      return self.values[min(int(place * len(self.values)), len(self.values) - 1)]
    if self.is_integer:  # each integer has a piece of the same length, or of its share of the logs
      low, high = self.low - 0.5, self.high + 0.5
      number = math.exp(_between(math.log(low), math.log(high), place)) if self.is_log else None
      number = _between(low, high, place) if number is None else number
      return self.rounded(number)
    if self.is_log:
      return self.rounded(math.exp(_between(math.log(self.low), math.log(self.high), place)))
    return self.rounded(_between(self.low, self.high, place))

  def rounded(self, number: float) -> int | float:
    """Returns a number of the range as it is given to a run."""
    if self.is_integer:
      return int(min(max(round(number), self.low), self.high))
    return min(max(float(f'{number:.{_DIGITS}g}'), self.low), self.high)

  def place(self, value: Any) -> float:
    """Returns the place in [0, 1] of a value of a range, the inverse of `at`."""
    low, high = (self.low - 0.5, self.high + 0.5) if self.is_integer else (self.low, self.high)
    if self.is_log:
      low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)

  def index(self, value: Any) -> int:
    """Returns the place of a value in the list of choices; lists of JSON count as tuples."""
    return [_with_lists(v) for v in self.values].index(_with_lists(value))

  def all_values(self) -> tuple[Any, ...]:
    """Returns the values of a grid.

    Raises:
      ConfigError: a range of real numbers.
    """
    if self.form == 'choices':
      return self.values
    if self.form == 'int':
      return tuple(range(int(self.low), int(self.high) + 1))
    raise ConfigError(
      f'{KEY}: {self.key} is a range, {self.form}:{self.low:g}:{self.high:g}; a grid takes values, '
      f"such as '{self.key}={self.low:g},{self.high:g}'"
    )


def _with_lists(value: Any) -> Any:
  if isinstance(value, tuple | list):
    return [_with_lists(v) for v in value]
  return type(value).__name__, value  # 1 is not True


def _between(low: float, high: float, place: float) -> float:
  return low + (high - low) * place


def parse_all(texts: Sequence[str], c: section.Section) -> tuple[Dimension, ...]:
  """Returns the dimensions of study.space.

  Args:
    texts: KEY=VALUE,VALUE or KEY=FORM:LOW:HIGH.
    c: the config whose keys are changed.

  Raises:
    ConfigError: another form, no such key, a value that the key cannot take, a key twice.
  """
  out = []
  for text in texts:
    if not isinstance(text, str):
      raise ConfigError(f'{KEY}: {text!r}; expected texts, {_EXAMPLE}')
    out.append(_parse(text, c))
  keys = [d.key for d in out]
  if twice := sorted({k for k in keys if keys.count(k) > 1}):
    raise ConfigError(f'{KEY}: {twice[0]} is given twice; expected each key once')
  return tuple(out)


def _parse(text: str, c: section.Section) -> Dimension:
  key, equals, rest = (part.strip() for part in text.partition('='))
  if not (key and equals and rest):
    raise ConfigError(f'{KEY}: {text!r}; expected KEY=VALUES, {_EXAMPLE}')
  if key.startswith('study.') or key == 'stop_at':
    raise ConfigError(f'{KEY}: {text!r}: {key} belongs to the study, and not to its runs')
  form, colon, ends = rest.partition(':')
  if colon and form in _FORMS:
    return _range(text, key, form, ends.split(':'), c)
  pieces = [piece.strip() for piece in rest.split('|' if '|' in rest else ',')]
  values = tuple(_value(text, key, piece, c) for piece in pieces)
  if '' in pieces or len(set(map(repr, values))) < len(values):
    raise ConfigError(f'{KEY}: {text!r}; expected different values, separated by , or |')
  return Dimension(key, 'choices', values)


def _range(text: str, key: str, form: str, ends: list[str], c: section.Section) -> Dimension:
  is_integer = form in ('int', 'logint')
  try:
    low, high = (float(int(e)) if is_integer else float(e) for e in ends)
  except ValueError as error:
    what = 'two whole numbers' if is_integer else 'two numbers'
    raise ConfigError(f'{KEY}: {text!r}; expected {what}, {key}={form}:LOW:HIGH') from error
  if not low < high or not math.isfinite(low) or not math.isfinite(high):
    raise ConfigError(f'{KEY}: {text!r}; expected LOW below HIGH')
  if form in ('log', 'logint') and low <= 0:
    raise ConfigError(f'{KEY}: {text!r}; a logarithmic range begins above 0')
  usual = section.flat(c).get(key)
  if isinstance(usual, int) and not isinstance(usual, bool) and not is_integer:
    raise ConfigError(
      f'{KEY}: {text!r}: {key} takes whole numbers; write {key}={"log" * (form == "log")}int:...'
    )
  for end in (low, high):
    _value(text, key, str(int(end)) if is_integer else repr(end), c)
  return Dimension(key, form, (), low, high)


def _value(text: str, key: str, piece: str, c: section.Section) -> Any:
  """Returns the value that a text means for a key."""
  changed = with_values(c, {})
  try:
    overrides.apply(changed, [Override(key, piece)])
  except ConfigError as error:
    raise ConfigError(f'{KEY}: {text!r}: {str(error).removeprefix("--config.")}') from error
  found = section.plain(changed).get(key)
  return tuple(found) if isinstance(found, list) else found


def with_values(c: section.Section, values: Point) -> section.Section:
  """Returns a copy of a config with other values of some keys.

  Raises:
    ConfigError: a value that a key cannot take.
  """
  return saved_config.from_plain(section.plain(c) | values, KEY)
