"""Defines the jinja2 environment of chat templates, with limits on time and memory.

A template comes with a model that a stranger published. jinja2's ImmutableSandboxedEnvironment
refuses underscore attributes and changes of the values that it is given. This file adds a deadline
in processor time, so that a busy machine refuses nothing, and a limit on the characters and list
items that one rendering makes. Every loop turn, call, filter, concatenation and output is counted.
Not bounded is the time of one built-in operation on values within the limit, such as the comparison
of two nested lists. Templates of published models stay far below both limits.
"""

import contextvars
import datetime
import functools
import json
import re
import string
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.sandbox
import jinja2.visitor

MAX_MADE = 64_000_000  # characters, list items and steps of one rendering
MAX_SECONDS = 20.0  # processor time of one rendering
MAX_INT_BITS = 4096
MAX_WIDTH = 999  # characters that a format pads one value to

# `strftime_now` returns this date: a clock would make tokens depend on the day. The template of
# Llama 3 falls back to the same date where there is no clock.
FIXED_DATE = datetime.datetime(2024, 7, 26)


class OverLimit(Exception):
  """A template that exceeds a limit of this module."""


class Rendering:
  """Counts the work of one rendering and records where its loops turn.

  Attributes:
    written: characters of output so far, updated by the caller.
    marks: (number of a For node, index of the message of this turn, `written` at that time).
    index_marks: the same for loops over integers, with the integer.
  """

  __slots__ = ('_deadline', '_index_of', '_made', '_steps', 'index_marks', 'marks', 'written')

  def __init__(self, messages: Sequence[Mapping[str, Any]] = ()):
    """Starts the clock. Turns of loops are recorded where `messages` are given."""
    self._deadline = time.thread_time() + MAX_SECONDS
    self._index_of = {id(m): i for i, m in enumerate(messages)}
    self._made = self._steps = self.written = 0
    self.marks: list[tuple[int, int, int]] = []
    self.index_marks: list[tuple[int, int, int]] = []

  def count(self, size: int = 0) -> None:
    """Counts one step that makes `size` characters or items. Raises OverLimit."""
    self._steps += 1
    self._made += size + 1
    if self._made > MAX_MADE:
      raise OverLimit(f'makes more than {MAX_MADE} characters or items')
    if (size > 4096 or not self._steps % 64) and time.thread_time() > self._deadline:
      raise OverLimit(f'takes more than {MAX_SECONDS} seconds')

  def turn(self, loop: int, target: Any) -> None:
    """Counts a turn of loop number `loop`, for the item `target`."""
    self.count()
    if self._index_of:
      index = self._index_of.get(id(target))
      if index is not None:
        self.marks.append((loop, index, self.written))
      elif type(target) is int:
        self.index_marks.append((loop, target, self.written))


CURRENT: contextvars.ContextVar[Rendering] = contextvars.ContextVar('rendering')


_SIZED = (str, list, tuple, dict)


def _size(value: Any) -> int:
  return len(value) if isinstance(value, _SIZED) else 0


def _text_size(value: Any) -> int:
  """Counts the text of a value, and returns the characters and items that it has at least.

  A list that occurs twice counts twice.
  """
  count, total, stack = CURRENT.get().count, 0, [value]
  while stack:
    item = stack.pop()
    size = len(item) if isinstance(item, (*_SIZED, range)) else 0
    count(size)
    total += size
    if isinstance(item, list | tuple | dict):
      stack.extend(item)
      if isinstance(item, dict):
        stack.extend(item.values())
  return total


def _count_text(value: Any) -> Any:
  """Counts the text of a value, and returns the value."""
  if type(value) is str:
    CURRENT.get().count(len(value))
  else:
    _text_size(value)
  return value


def _counted(value: Any) -> Any:
  CURRENT.get().count(_size(value))
  return value


def _concat(*parts: Any) -> str:
  return ''.join([str(_count_text(p)) for p in parts])


@jinja2.pass_environment
def _join(environment, value, d='', attribute=None) -> str:
  if attribute is not None:
    value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
  items = [str(_count_text(v)) for v in value]
  CURRENT.get().count(len(d) * len(items))
  return d.join(items)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  """Returns JSON as HF's renderer writes it: no HTML escapes, keys in their order."""
  if (len(indent) if isinstance(indent, str) else indent or 0) not in range(17):
    raise OverLimit(f'calls tojson with {indent=}')
  if separators is not None and max(map(len, separators), default=0) > 16:
    raise OverLimit('calls tojson with separators of more than 16 characters')
  if indent:
    _count_indents(value, len(indent) if isinstance(indent, str) else indent)
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _count_indents(value: Any, width: int) -> None:
  """Counts the characters that indent the lines of a value's JSON, `width` a level."""
  count, stack = CURRENT.get().count, [(value, 1)]
  while stack:
    item, depth = stack.pop()
    if isinstance(item, list | tuple | dict):
      count(len(item) * depth * width)
      inner = item.values() if isinstance(item, dict) else item
      stack.extend((x, depth + 1) for x in inner)


def _strftime_now(form: str) -> str:
  return FIXED_DATE.strftime(form[:100])


def _raise_exception(message: str):
  raise jinja2.exceptions.TemplateError(message)


# Flags, width and precision of a `%` conversion; wide: an argument or four digits.
_CONVERSION = re.compile(r'[#0 +-]*(\*|\d*)(?:\.(\*|\d*))?')

_PARENTHESIS = re.compile('[()]')


def _has_wide_percent(form: str) -> bool:
  """Returns whether a `%` format has a width or precision of four digits or by an argument.

  Takes linear time. Names in parentheses may hold parentheses, as Python reads them.
  """
  at = form.find('%')
  while at >= 0:
    at += 1
    if form.startswith('(', at):
      depth = 1
      while depth and (found := _PARENTHESIS.search(form, at + 1)):
        at = found.start()
        depth += 1 if found[0] == '(' else -1
      if depth:
        return False  # the name does not end: Python refuses the format
      at += 1
    found = _CONVERSION.match(form, at)
    if any(part and (part == '*' or len(part) > 3) for part in found.groups()):
      return True
    at = form.find('%', max(found.end() + form.startswith('%', found.end()), at))
  return False


def _percent_size(form: str, *args, **kwargs) -> int:
  if _has_wide_percent(str(form)):
    raise OverLimit(f'formats with {str(form)[:40]!r}')
  return str(form).count('%') * (MAX_WIDTH + _text_size([args, kwargs]))


def _format_size(form: str, *args, **kwargs) -> int:
  for _, _, spec, _ in string.Formatter().parse(form):
    if spec and ('{' in spec or re.search(r'\d{4}', spec)):
      raise OverLimit(f'formats with {form[:40]!r}')
  return form.count('{') * (MAX_WIDTH + _text_size([args, kwargs]))


def _width(text, width=80, *_) -> int:
  return width


# Methods of texts and filters that make much out of little: how many characters or items, from the
# same arguments.
GROWTH: dict[str, Callable[..., int]] = {
  'center': _width,
  'ljust': _width,
  'rjust': _width,
  'zfill': _width,
  'expandtabs': lambda text, tabsize=8: text.count('\t') * tabsize,
  'translate': lambda text, table: len(text) * max(map(_size, table.values()), default=1),
  'replace': lambda text, old, new, *_: str(text).count(str(old)) * _size(new),
  'indent': lambda text, width=4, *_, **__: (_size(width) or int(width)) * (text.count('\n') + 1),
  'format': _percent_size,
  'batch': lambda value, linecount, *_: linecount,
  'slice': lambda value, slices, *_: slices,
  'round': lambda value, precision=0, *_: precision**2,
  # Of lists it would be their concatenation, which takes quadratic time.
  'sum': lambda values, attribute=None, start=0: 0 if isinstance(start, int | float) else MAX_MADE,
}

# Filters that turn their first argument into text, whatever it is.
_TEXT_FILTERS = frozenset(
  (
    *('capitalize', 'center', 'e', 'escape', 'forceescape', 'format', 'indent', 'lower', 'pprint'),
    *('replace', 'safe', 'string', 'striptags', 'title', 'tojson', 'trim', 'truncate', 'upper'),
    *('urlencode', 'wordcount', 'xmlattr'),
  )
)
_DROPPED_FILTERS = frozenset({'random', 'urlize', 'wordwrap'})
# Attributes that lead to bytes, which are not counted.
_REFUSED_ATTRIBUTES = frozenset({'encode', 'to_bytes', 'from_bytes', 'maketrans'})
_DICT_NAMES = frozenset(dir(dict))  # which jinja finds before a dict's own keys


def _bounded(name: str, filter_fn: Callable) -> Callable:
  """Returns the filter with its arguments and its result counted."""
  growth = GROWTH.get(name)
  # jinja passes the environment or context as the first argument to those that ask for it.
  first = 0 if getattr(filter_fn, 'jinja_pass_arg', None) is None else 1

  @functools.wraps(filter_fn)  # keeps jinja_pass_arg
  def bounded(*args, **kwargs):
    if name in _TEXT_FILTERS:
      _count_text(args[first])
    if growth is not None:
      CURRENT.get().count(max(0, growth(*args[first:], **kwargs)))
    return _counted(filter_fn(*args, **kwargs))

  return bounded


class _Generation(jinja2.ext.Extension):
  """Accepts `{% generation %} ... {% endgeneration %}`. The tag only opens a scope: masks come from
  prefixes."""

  tags = frozenset({'generation'})

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.Scope(body, lineno=line)


class _Meter(jinja2.visitor.NodeTransformer):
  """Inserts calls that count loop turns, `~` and slices, where jinja calls nothing."""

  loops = 0

  def _call(self, method: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(
      nodes.EnvironmentAttribute(method, lineno=line), args, [], None, None, lineno=line
    )

  def visit_For(self, node):
    # The last of several targets: of `for i, message in ...` the message.
    target = (list(node.target.find_all(nodes.Name)) or [node.target])[-1]
    self.loops += 1
    args = [
      nodes.Const(self.loops, lineno=node.lineno),
      nodes.Name(target.name, 'load', lineno=node.lineno),
    ]
    self.generic_visit(node)
    turn = self._call('count_turn', args, node.lineno)
    node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
    if node.test is not None:  # turns that the test skips count as well
      node.test = nodes.And(
        self._call('count_step', [], node.lineno), node.test, lineno=node.lineno
      )
    return node

  def visit_Concat(self, node):
    self.generic_visit(node)
    return self._call('concat_values', node.nodes, node.lineno)

  def visit_Getitem(self, node):
    self.generic_visit(node)
    if not isinstance(node.arg, nodes.Slice):
      return node
    bounds = [node.arg.start, node.arg.stop, node.arg.step]
    args = [b or nodes.Const(None, lineno=node.lineno) for b in bounds]
    return self._call('slice_value', [node.node, *args], node.lineno)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  intercepted_binops = frozenset({'+', '*', '**', '%'})
  concat_values = staticmethod(_concat)

  @staticmethod
  def count_step() -> bool:
    CURRENT.get().count()
    return True

  @staticmethod
  def count_turn(loop: int, target: Any) -> None:
    CURRENT.get().turn(loop, target)

  @staticmethod
  def slice_value(value: Any, start, stop, step) -> Any:
    return _counted(value[start:stop:step])

  @staticmethod
  def concat(parts) -> str:
    """Joins the output of a macro or block; jinja calls it."""
    parts = list(parts)
    CURRENT.get().count(sum(map(len, parts)))
    return ''.join(parts)

  def call_binop(self, context, operator, left, right):
    if operator == '+' and type(left) is str and type(right) is str:
      CURRENT.get().count(len(left) + len(right))
      return left + right
    if operator == '%' and isinstance(left, str):
      size = _percent_size(left, right)
    elif operator == '+':
      size = _size(left) + _size(right)
    elif operator != '%' and isinstance(left, int) and isinstance(right, int):
      times = max(abs(right), 1) if operator == '**' else 1
      bits = left.bit_length() * times + right.bit_length()
      if bits > MAX_INT_BITS:
        raise OverLimit(f'computes an integer of {bits} bits')
      size = 0
    elif operator == '*':
      size = _size(left) * right if _size(left) else _size(right) * left if _size(right) else 0
    else:
      size = 0
    CURRENT.get().count(max(0, size))
    return super().call_binop(context, operator, left, right)

  def is_safe_attribute(self, obj, attr, value):
    return attr not in _REFUSED_ATTRIBUTES and super().is_safe_attribute(obj, attr, value)

  def getattr(self, obj, attribute):
    if type(obj) is dict and attribute in obj and attribute not in _DICT_NAMES:
      return obj[attribute]  # the usual case, without an exception on the way
    return super().getattr(obj, attribute)

  def wrap_str_format(self, value):
    inner = super().wrap_str_format(value)  # None unless value is a str.format
    if inner is None:
      return None

    def bounded(*args, **kwargs):
      CURRENT.get().count(_format_size(value.__self__, *args, **kwargs))
      return inner(*args, **kwargs)

    return bounded

  def call(__self, __context, __obj, *args, **kwargs):
    owner = getattr(__obj, '__self__', None)
    if isinstance(owner, str):
      # Inside loops and blocks jinja passes its variables along, which only its own callables take.
      given = {k: v for k, v in kwargs.items() if k not in ('_loop_vars', '_block_vars')}
      if __obj.__name__ == 'join':
        return _join(__self, *args, d=owner, **given)
      growth = GROWTH.get(__obj.__name__)
      CURRENT.get().count(len(owner) + (max(0, growth(owner, *args, **given)) if growth else 0))
    return _counted(super().call(__context, __obj, *args, **kwargs))


@jinja2.pass_environment  # else jinja would compute constants while it compiles
def _finalize(environment, value: Any) -> Any:
  return _count_text(value)


def _make_environment() -> _Environment:
  env = _Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    optimized=False,  # constants are computed while rendering, where they are counted
    finalize=_finalize,
    extensions=['jinja2.ext.loopcontrols', _Generation],
  )
  kept = {n: f for n, f in env.filters.items() if n not in _DROPPED_FILTERS}
  env.filters = {n: _bounded(n, f) for n, f in (kept | {'tojson': _tojson}).items()}
  env.filters['join'] = _join
  env.globals.pop('lipsum')
  env.globals |= {'raise_exception': _raise_exception, 'strftime_now': _strftime_now}
  return env


ENVIRONMENT = _make_environment()


def compile_template(source: str) -> jinja2.Template:
  """Returns a template whose rendering is counted by the `Rendering` in `CURRENT`.

  Raises:
    jinja2.exceptions.TemplateError: it is no jinja.
  """
  code = ENVIRONMENT.compile(_Meter().visit(ENVIRONMENT.parse(source)))
  return jinja2.Template.from_code(ENVIRONMENT, code, ENVIRONMENT.make_globals(None))
