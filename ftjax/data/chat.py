"""The one renderer of chat templates: sandboxed, bounded in size and work, the same result on every
day.

A template comes with a model that a stranger published, so it is hostile until shown otherwise.
Four fences: jinja2's immutable sandbox (no underscore attributes, no mutation); a short list of
filters and globals; a budget of steps and characters that every loop turn, call, filter,
concatenation and output pays into; and a deadline looked at whenever something is paid. What is not
bounded is the time of a single built-in operation on values that the budget allowed (a comparison
of two nested lists, say); all templates of real models stay far below every limit.

`encode.py` turns the text into tokens and masks. No other file renders a template.
"""

import contextvars
import datetime
import functools
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.sandbox
import jinja2.visitor

from ftjax.runtime.errors import DataError

MAX_TEMPLATE = 1_000_000  # characters of template source
MAX_OUTPUT = 16_000_000  # characters of rendered text
MAX_WORK = 64_000_000  # characters and list items produced on the way
MAX_STEPS = 300_000  # loop turns, calls, filters
MAX_SECONDS = 20.0
MAX_INT_BITS = 4096

# What `strftime_now` sees. A clock would make tokens depend on the day; this is the date that Llama
# 3's own template falls back to when there is no clock.
FIXED_DATE = datetime.datetime(2024, 7, 26)

_FILTERS = tuple(
  [
    'abs',
    'capitalize',
    'count',
    'd',
    'default',
    'dictsort',
    'e',
    'escape',
    'first',
    'float',
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
    'reject',
    'rejectattr',
    'reverse',
    'round',
    'safe',
    'select',
    'selectattr',
    'sort',
    'title',
    'trim',
    'unique',
    'upper',
    'wordcount',
  ]
)
# Methods of strings that make a long one out of a short one and a number, or bytes.
_PADDING = frozenset({'ljust', 'rjust', 'center', 'zfill', 'expandtabs', 'format_map', 'translate'})
_PADDING |= {'encode'}  # bytes are outside the budget
_WIDE_FORMAT = re.compile(r'\d{4}|\{[^{}]*\{|\*')


class _Budget:
  """What one rendering may still spend."""

  def __init__(self):
    self.steps, self.work = MAX_STEPS, MAX_WORK
    self.deadline = time.monotonic() + MAX_SECONDS

  def pay(self, work: int = 0) -> None:
    self.steps -= 1
    self.work -= work
    if self.steps < 0:
      raise jinja2.exceptions.SecurityError(f'takes more than {MAX_STEPS} steps')
    if self.work < 0:
      raise jinja2.exceptions.SecurityError(f'makes more than {MAX_WORK} characters or items')
    if time.monotonic() > self.deadline:
      raise jinja2.exceptions.SecurityError(f'takes more than {MAX_SECONDS} seconds')


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar('budget')


def _pay_for(value: Any) -> Any:
  """Pays for a value about to become text or to be walked; nested lists pay for every path through
  them."""
  budget = _BUDGET.get()
  stack = [value]
  while stack:
    item = stack.pop()
    if isinstance(item, str):
      budget.pay(len(item))
    elif isinstance(item, dict):
      budget.pay(len(item))
      stack.extend(item)
      stack.extend(item.values())
    elif isinstance(item, list | tuple):
      budget.pay(len(item))
      stack.extend(item)
    elif isinstance(item, range):
      budget.pay(len(item))
  return value


def _pay_shallow(value: Any) -> Any:
  _BUDGET.get().pay(len(value) if isinstance(value, str | list | tuple | range | dict) else 0)
  return value


def _bounded(filter_fn):
  """A filter that pays for what it is given and for what it makes."""

  @functools.wraps(
    filter_fn
  )  # keeps jinja's marker of who wants the environment or context as first argument
  def paying(*args, **options):
    for arg in args:
      _pay_shallow(arg)
    return _pay_shallow(filter_fn(*args, **options))

  return paying


def _concat(*parts: Any) -> str:
  return ''.join(str(_pay_for(p)) for p in parts)


@jinja2.pass_environment
def _join(environment, value, d='', attribute=None) -> str:
  if attribute is not None:
    value = [environment.getitem(v, attribute) for v in value]
  items = [str(_pay_for(v)) for v in value]
  _BUDGET.get().pay(len(d) * len(items))
  return d.join(items)


def _replace(text, old, new, count=-1) -> str:
  text = str(_pay_for(text))
  _BUDGET.get().pay(text.count(old) * len(new))
  return text.replace(old, new, -1 if count is None else count)


def _string(value) -> str:
  return str(_pay_for(value))


def _indent(text, width=4, first=False, blank=False) -> str:
  """jinja's `indent`, with a width that cannot explode."""
  pad = width if isinstance(width, str) else ' ' * min(int(width), 1000)
  lines = str(text).splitlines()
  _BUDGET.get().pay(len(text) + len(pad) * len(lines))
  done = [pad + s if (i or first) and (s or blank) else s for i, s in enumerate(lines)]
  return '\n'.join(done) + ('\n' if str(text).endswith('\n') else '')


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  """JSON as HF's renderer writes it: no HTML escapes, keys in the order they stand."""
  _pay_for(value)
  if isinstance(indent, int) and not 0 <= indent <= 16:
    raise jinja2.exceptions.SecurityError(f'tojson with {indent=}')
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _range(*bounds: int) -> range:
  return _pay_shallow(jinja2.sandbox.safe_range(*bounds))


def _strftime_now(form: str) -> str:
  return FIXED_DATE.strftime(form[:100])


def _raise_exception(message: str):
  raise jinja2.exceptions.TemplateError(message)


class _Generation(jinja2.ext.Extension):
  """Accepts `{% generation %} ... {% endgeneration %}`; masks come from prefixes, so the tag only
  opens a scope."""

  tags = frozenset({'generation'})

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.Scope(body, lineno=line)


class _Meter(jinja2.visitor.NodeTransformer):
  """Makes every loop turn and every macro or block body pay, and `~` pay for what it joins."""

  def _toll(self, body: Sequence[nodes.Node], line: int) -> nodes.Call:
    size = sum(len(d.data) for n in body for d in n.find_all(nodes.TemplateData))
    size += sum(
      len(o.data)
      for n in body
      for o in getattr(n, 'nodes', ())
      if isinstance(o, nodes.TemplateData)
    )
    pay = nodes.EnvironmentAttribute('toll', lineno=line)
    return nodes.Call(pay, [nodes.Const(size, lineno=line)], [], None, None, lineno=line)

  def _body(self, node):
    toll = self._toll(node.body, node.lineno)
    self.generic_visit(node)
    node.body.insert(0, nodes.ExprStmt(toll, lineno=node.lineno))
    return node

  visit_Macro = visit_CallBlock = visit_AssignBlock = visit_FilterBlock = visit_Block = _body

  def visit_For(self, node):
    node = self._body(node)
    if node.test is not None:  # turns that the test skips count as well
      node.test = nodes.And(self._toll([], node.lineno), node.test, lineno=node.lineno)
    return node

  def visit_Concat(self, node):
    self.generic_visit(node)
    join = nodes.EnvironmentAttribute('concat_paying', lineno=node.lineno)
    return nodes.Call(join, node.nodes, [], None, None, lineno=node.lineno)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  intercepted_binops = frozenset({'+', '*', '**', '%'})

  @staticmethod
  def toll(size: int) -> bool:
    _BUDGET.get().pay(size)
    return True

  concat_paying = staticmethod(_concat)

  def call_binop(self, context, operator, left, right):
    if operator in ('*', '**') and isinstance(left, int) and isinstance(right, int):
      bits = (
        left.bit_length() * max(abs(right), 1)
        if operator == '**'
        else left.bit_length() + right.bit_length()
      )
      if bits > MAX_INT_BITS:
        raise jinja2.exceptions.SecurityError(f'computes an integer of {bits} bits')
    elif operator == '*':
      for sequence, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(sequence, str | list | tuple):
          _BUDGET.get().pay(len(sequence) * max(times, 0))
    elif operator == '+' and isinstance(left, str | list | tuple):
      _pay_shallow(left)
      _pay_shallow(right)
    elif operator == '%' and isinstance(left, str):
      if _WIDE_FORMAT.search(left):
        raise jinja2.exceptions.SecurityError(f'formats with {left[:40]!r}')
      _pay_for(right if isinstance(right, list | tuple) else [right] * left.count('%'))
    return super().call_binop(context, operator, left, right)

  def getitem(self, obj, argument):
    if isinstance(argument, slice):
      _pay_shallow(obj)
    return super().getitem(obj, argument)

  def wrap_str_format(self, value):
    inner = super().wrap_str_format(value)  # None unless value is a str.format
    if inner is None:
      return None

    def format_paying(*args, **kwargs):
      form = value.__self__
      if _WIDE_FORMAT.search(form):
        raise jinja2.exceptions.SecurityError(f'formats with {form[:40]!r}')
      _pay_for([args, kwargs] * (form.count('{') or 1))
      return inner(*args, **kwargs)

    return format_paying

  def call(__self, __context, __obj, *args, **kwargs):
    _BUDGET.get().pay()
    owner, name = getattr(__obj, '__self__', None), getattr(__obj, '__name__', '')
    if isinstance(owner, bytes | bytearray | int | float | type):
      raise jinja2.exceptions.SecurityError(f'calls {name} of {type(owner).__name__}')
    if isinstance(owner, str):
      _pay_shallow(owner)
      if name in _PADDING:
        raise jinja2.exceptions.SecurityError(
          f'calls str.{name}, which could make a text of any size'
        )
      if name == 'replace':
        return _replace(owner, *args, **kwargs)
      if name == 'join':
        return _join(__self, *args, d=owner)
    return super().call(__context, __obj, *args, **kwargs)


def _sum(values, attribute=None, start=0):
  """jinja's `sum`, of numbers alone: lists would be joined outside the budget."""
  if not isinstance(start, int | float):
    raise jinja2.exceptions.SecurityError(f'sums from {type(start).__name__}')
  return sum(values if attribute is None else [v[attribute] for v in values], start)


def _make_environment() -> _Environment:
  env = _Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    optimized=False,  # constant folding would compute outside the budget
    finalize=_pay_for,
    extensions=['jinja2.ext.loopcontrols', _Generation],
  )
  env.filters = {name: _bounded(env.filters[name]) for name in _FILTERS}
  env.filters |= {
    'tojson': _tojson,
    'join': _join,
    'replace': _replace,
    'indent': _indent,
    'string': _string,
    'sum': _bounded(_sum),
  }
  env.globals = {
    'range': _range,
    'namespace': env.globals['namespace'],
    'dict': dict,
    'raise_exception': _raise_exception,
    'strftime_now': _strftime_now,
  }
  return env


_ENVIRONMENT = _make_environment()


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
  if len(template) > MAX_TEMPLATE:
    raise DataError(
      f'{name_template(template)}: {len(template)} characters, more than {MAX_TEMPLATE}'
    )
  tree = _Meter().visit(_ENVIRONMENT.parse(template))
  code = _ENVIRONMENT.compile(tree)
  return jinja2.Template.from_code(_ENVIRONMENT, code, _ENVIRONMENT.make_globals(None))


def name_template(template: str) -> str:
  """How messages call a template: its first characters and a hash."""
  start = ' '.join(template[:48].split())
  return f'chat template {start!r}... (sha256 {hashlib.sha256(template.encode()).hexdigest()[:12]})'


def render(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  *,
  generation_prompt: bool,
  bos_token: str,
  eos_token: str,
  tools: Sequence[Mapping] | None = None,
) -> str:
  """The text of a conversation, as HF's `apply_chat_template(tokenize=False)` writes it.

  Args:
    template: jinja source.
    messages: `{'role', 'content', ...}` each.
    generation_prompt: also open the assistant's turn, as before sampling.
    bos_token, eos_token: their texts; '' where there is none.
    tools: JSON schemas of functions, for templates that show them.

  Raises:
    DataError: the template cannot be compiled, refuses the messages, or goes over a limit of this
    module.
  """
  token = _BUDGET.set(_Budget())
  try:
    pieces, size = [], 0
    for piece in _compile(template).generate(
      messages=list(messages),
      tools=None if tools is None else list(tools),
      documents=None,
      add_generation_prompt=generation_prompt,
      bos_token=bos_token,
      eos_token=eos_token,
    ):
      size += len(piece)
      if size > MAX_OUTPUT:
        raise jinja2.exceptions.SecurityError(f'writes more than {MAX_OUTPUT} characters')
      pieces.append(piece)
    return ''.join(pieces)
  except jinja2.exceptions.TemplateError as error:
    reason = getattr(error, 'message', None) or str(error)
    raise DataError(f'{name_template(template)}: {reason}') from error
  except (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    SyntaxError,
  ) as error:
    if isinstance(error, DataError):
      raise
    raise DataError(f'{name_template(template)}: {type(error).__name__}: {error}') from error
  except (RecursionError, MemoryError) as error:
    raise DataError(f'{name_template(template)}: {type(error).__name__}') from error
  finally:
    _BUDGET.reset(token)
