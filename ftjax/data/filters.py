"""Filters, methods and functions that chat templates call, each charging the rendering's budget.

`chat.py` puts them into its sandbox; what is not here is jinja's own.
"""

import datetime
import json
import re
import string
from collections.abc import Callable
from typing import Any

from ftjax.data.budget import CURRENT, OverLimit, charge_deep, charge_shallow

# What `strftime_now` sees. A clock would make tokens depend on the day; this is the date that Llama
# 3's own template falls back to when there is no clock.
FIXED_DATE = datetime.datetime(2024, 7, 26)

MAX_RANGE = 100_000

# Filters of jinja that are safe once their arguments and results are charged.
PLAIN = (
  'abs',
  'attr',
  'capitalize',
  'count',
  'd',
  'default',
  'dictsort',
  'e',
  'escape',
  'filesizeformat',
  'first',
  'float',
  'forceescape',
  'groupby',
  'int',
  'items',
  'last',
  'length',
  'list',
  'lower',
  'map',
  'max',
  'min',
  'pprint',
  'reject',
  'rejectattr',
  'reverse',
  'round',
  'safe',
  'select',
  'selectattr',
  'sort',
  'striptags',
  'title',
  'trim',
  'truncate',
  'unique',
  'upper',
  'urlencode',
  'wordcount',
  'xmlattr',
)


def concat(*parts: Any) -> str:
  """Returns the texts of all parts joined, as `~` does."""
  return ''.join([str(charge_deep(p)) for p in parts])


def join(getitem: Callable, value, d='', attribute=None) -> str:
  """Returns what jinja's `join` does; `getitem(item, attribute)` looks into an item."""
  if attribute is not None:
    value = [getitem(v, attribute) for v in value]
  items = [str(charge_deep(v)) for v in value]
  CURRENT.get().charge(len(d) * len(items))
  return d.join(items)


def to_string(value: Any) -> str:
  """Returns what jinja's `string` does."""
  return str(charge_deep(value))


def center(value: Any, width: int = 80) -> str:
  """Returns the text in the middle of `width` characters."""
  CURRENT.get().charge(max(width, 0))
  return str(charge_deep(value)).center(width)


def percent(value: Any, *args, **kwargs) -> str:
  """Returns what jinja's `format` does, which is `%`."""
  check_percent(str(value))
  charge_deep([args, kwargs])
  return str(value) % (kwargs or args)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  """Returns JSON as HF's renderer writes it: no HTML escapes, keys in their order."""
  charge_deep(value)
  if (len(indent) if isinstance(indent, str) else indent or 0) not in range(17):
    raise OverLimit(f'tojson with {indent=}')
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def bounded_range(*bounds: int) -> range:
  """Returns a range of at most as many integers as jinja's sandbox allows."""
  found = range(*bounds)
  if len(found) > MAX_RANGE:
    raise OverLimit(f'makes a range of more than {MAX_RANGE} integers')
  return charge_shallow(found)


def strftime_now(form: str) -> str:
  """Returns the fixed date in a format of `strftime`."""
  return FIXED_DATE.strftime(form[:100])


def sum_numbers(values, attribute=None, start=0):
  """Returns jinja's `sum`, of numbers alone: lists would be joined outside the budget."""
  if not isinstance(start, int | float):
    raise OverLimit(f'sums from {type(start).__name__}')
  return sum(values if attribute is None else [v[attribute] for v in values], start)


def replace(text: Any, old: str, new: str, count: int | None = -1) -> str:
  """Returns what `str.replace` does."""
  text = str(charge_deep(text))
  CURRENT.get().charge(text.count(old) * len(new))
  return text.replace(old, new, -1 if count is None else count)


def indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
  """Returns what jinja's `indent` does, with a width that cannot explode."""
  pad = width if isinstance(width, str) else ' ' * min(int(width), 1000)
  lines = (str(s) + '\n').splitlines()
  CURRENT.get().charge(len(s) + len(pad) * len(lines))
  start, rest = lines[0], lines[1:]
  return (pad if first else '') + '\n'.join(
    [start, *(pad + line if line or blank else line for line in rest)]
  )


# A conversion of `%`: key, flags, width, precision, length, type.
_PERCENT = re.compile(r'%(?:\([^)]*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?.', re.DOTALL)
_WIDEST = 3  # digits


def check_percent(form: str) -> None:
  """Raises OverLimit where `form % values` could pad without end."""
  for found in _PERCENT.finditer(form):
    if any(n and (n == '*' or len(n) > _WIDEST) for n in found.groups()):
      raise OverLimit(f'formats with {form[:40]!r}')


def check_format(form: str) -> None:
  """Raises OverLimit where `form.format(...)` could pad without end.

  Raises:
    ValueError: no format string.
  """
  for _, _, spec, _ in string.Formatter().parse(form):
    if spec and ('{' in spec or re.search(rf'\d{{{_WIDEST + 1}}}', spec)):
      raise OverLimit(f'formats with {form[:40]!r}')


# Methods of str that make a long text out of a short one and a number: how many characters more.
PADDING = {
  'ljust': lambda s, width, *_: width,
  'rjust': lambda s, width, *_: width,
  'center': lambda s, width, *_: width,
  'zfill': lambda s, width: width,
  'expandtabs': lambda s, tabsize=8: s.count('\t') * tabsize,
  'translate': lambda s, table: (
    len(s) * max([1, *(len(v) for v in table.values() if isinstance(v, str))])
  ),
}
