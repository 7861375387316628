"""The one renderer of chat templates: sandboxed, bounded in size and work, the same result on every
day.

A template comes with a model that a stranger published, so it is hostile until shown otherwise.
Four fences: jinja2's immutable sandbox (no underscore attributes, no mutation); a short list of
filters and globals; a budget of steps and characters that every loop turn, call, filter,
concatenation and output charges (budget.py); and a deadline. What is not bounded is the time of a
single built-in operation on values that the budget allowed (a comparison of two nested lists, say);
all templates of real models stay far below every limit.

`encode.py` turns the text into tokens and masks. No other file renders a template.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.sandbox
import jinja2.visitor

from ftjax.data import budget, filters
from ftjax.data.budget import CURRENT, charge_deep, charge_shallow
from ftjax.runtime.errors import DataError

MAX_TEMPLATE = 1_000_000  # characters of template source
MAX_OUTPUT = 16_000_000  # characters of rendered text
MAX_WORK = 64_000_000  # characters and list items produced on the way
MAX_STEPS = 300_000  # loop turns, calls, filters, concatenations
MORE_STEPS = 200  # the same, more for every message
MAX_SECONDS = 20.0
MAX_INT_BITS = 4096


def _bounded(filter_fn):
  """A filter that charges for what it is given and for what it makes."""

  @functools.wraps(
    filter_fn
  )  # keeps jinja's marker of who wants the environment or context as first argument
  def paying(*args, **options):
    for arg in args:
      charge_shallow(arg)
    return charge_shallow(filter_fn(*args, **options))

  return paying


def _batch(value, linecount, fill_with=None) -> list:
  CURRENT.get().charge(max(linecount, 0))
  return list(jinja2.filters.do_batch(charge_shallow(value), linecount, fill_with))


@jinja2.pass_environment
def _join(environment, value, d='', attribute=None) -> str:
  return filters.join(environment.getitem, value, d, attribute)


@jinja2.pass_environment
def _slice(environment, value, slices, fill_with=None) -> list:
  CURRENT.get().charge(max(slices, 0))
  return list(jinja2.filters.sync_do_slice(charge_shallow(value), slices, fill_with))


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
  """Makes every loop turn and every macro or block body charge, and `~` charge for its parts."""

  loops = 0

  def _toll(self, body: Sequence[nodes.Node], line: int, method='toll', more=()) -> nodes.Call:
    size = sum(len(d.data) for n in body for d in n.find_all(nodes.TemplateData))
    size += sum(
      len(o.data)
      for n in body
      for o in getattr(n, 'nodes', ())
      if isinstance(o, nodes.TemplateData)
    )
    charge = nodes.EnvironmentAttribute(method, lineno=line)
    return nodes.Call(charge, [nodes.Const(size, lineno=line), *more], [], None, None, lineno=line)

  def _body(self, node):
    toll = self._toll(node.body, node.lineno)
    self.generic_visit(node)
    node.body.insert(0, nodes.ExprStmt(toll, lineno=node.lineno))
    return node

  visit_Macro = visit_CallBlock = visit_AssignBlock = visit_FilterBlock = visit_Block = _body

  def visit_For(self, node):
    # The last of several targets: of `for i, message in ...` the message.
    names = list(node.target.find_all(nodes.Name)) or [node.target]
    self.loops += 1
    more = [
      nodes.Const(self.loops, lineno=node.lineno),
      nodes.Name(names[-1].name, 'load', lineno=node.lineno),
    ]
    toll = self._toll(node.body, node.lineno, 'turn', more)
    self.generic_visit(node)
    node.body.insert(0, nodes.ExprStmt(toll, lineno=node.lineno))
    if node.test is not None:  # turns that the test skips count as well
      node.test = nodes.And(self._toll([], node.lineno), node.test, lineno=node.lineno)
    return node

  def visit_Concat(self, node):
    self.generic_visit(node)
    join = nodes.EnvironmentAttribute('concat_paying', lineno=node.lineno)
    return nodes.Call(join, node.nodes, [], None, None, lineno=node.lineno)


_DICT_NAMES = frozenset(dir(dict))  # which jinja finds before a dict's own keys
_HARMLESS = frozenset({'is_integer', 'bit_length', 'fromkeys'})  # methods of numbers and types


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  intercepted_binops = frozenset({'+', '*', '**', '%'})

  @staticmethod
  def toll(size: int) -> bool:
    CURRENT.get().charge(size)
    return True

  @staticmethod
  def turn(size: int, loop: int, target: Any) -> None:
    CURRENT.get().turn(size, loop, target)

  concat_paying = staticmethod(filters.concat)

  def call_binop(self, context, operator, left, right):
    if operator == '+':
      if type(left) is str and type(right) is str:
        CURRENT.get().charge(len(left) + len(right))
        return left + right
      if isinstance(left, str | list | tuple):
        charge_shallow(left)
        charge_shallow(right)
    elif operator in ('*', '**') and isinstance(left, int) and isinstance(right, int):
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
          CURRENT.get().charge(len(sequence) * max(times, 0))
    elif operator == '%' and isinstance(left, str):
      filters.check_percent(left)
      charge_deep(right if isinstance(right, list | tuple) else [right] * left.count('%'))
    return super().call_binop(context, operator, left, right)

  def getattr(self, obj, attribute):
    if type(obj) is dict and attribute in obj and attribute not in _DICT_NAMES:
      return obj[attribute]
    return super().getattr(obj, attribute)

  def getitem(self, obj, argument):
    if type(argument) is str and type(obj) is dict and argument in obj:
      return obj[argument]
    if isinstance(argument, slice):
      charge_shallow(obj)
    return super().getitem(obj, argument)

  def wrap_str_format(self, value):
    inner = super().wrap_str_format(value)  # None unless value is a str.format
    if inner is None:
      return None

    def format_charging(*args, **kwargs):
      form = value.__self__
      filters.check_format(form)
      charge_deep([args, kwargs] * (form.count('{') or 1))
      return inner(*args, **kwargs)

    return format_charging

  def call(__self, __context, __obj, *args, **kwargs):
    CURRENT.get().charge()
    owner, name = getattr(__obj, '__self__', None), getattr(__obj, '__name__', '')
    if isinstance(owner, str):
      # Inside loops and blocks jinja passes its variables along, which only its own callables take.
      given = {k: v for k, v in kwargs.items() if k not in ('_loop_vars', '_block_vars')}
      charge_shallow(owner)
      if name == 'encode':  # bytes are outside the budget
        raise jinja2.exceptions.SecurityError('calls str.encode')
      if name in filters.PADDING:
        CURRENT.get().charge(max(0, filters.PADDING[name](owner, *args, **given)))
      if name == 'replace':
        return filters.replace(owner, *args, **given)
      if name == 'join':
        return _join(__self, *args, d=owner, **given)
    elif isinstance(owner, bytes | bytearray | int | float | type) and name not in _HARMLESS:
      raise jinja2.exceptions.SecurityError(f'calls {name} of {type(owner).__name__}')
    return super().call(__context, __obj, *args, **kwargs)


def _make_environment() -> _Environment:
  env = _Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    optimized=False,  # constant folding would compute outside the budget
    finalize=charge_deep,
    extensions=['jinja2.ext.loopcontrols', _Generation],
  )
  env.filters = {name: _bounded(env.filters[name]) for name in filters.PLAIN}
  env.filters |= {
    'tojson': filters.tojson,
    'join': _join,
    'replace': filters.replace,
    'indent': filters.indent,
    'string': filters.to_string,
    'center': filters.center,
    'format': filters.percent,
    'batch': _batch,
    'slice': _slice,
    'sum': _bounded(filters.sum_numbers),
  }
  env.globals = {
    'range': filters.bounded_range,
    'namespace': env.globals['namespace'],
    'dict': dict,
    'cycler': env.globals['cycler'],
    'joiner': env.globals['joiner'],
    'raise_exception': _raise_exception,
    'strftime_now': filters.strftime_now,
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


@functools.lru_cache(maxsize=16)
def find_tags(template: str) -> tuple[str, ...]:
  """Returns the texts that a template looks for inside other texts (`'</think>' in content`,
  `content.split('x')`), of two characters or more, without mere names; sorted."""
  try:
    tree = _ENVIRONMENT.parse(template)
  except jinja2.exceptions.TemplateError:  # rendering will say so
    return ()
  found: list[nodes.Node] = []
  for compare in tree.find_all(nodes.Compare):
    if any(op.op in ('in', 'notin') for op in compare.ops):
      found.append(compare.expr)
  for call in tree.find_all(nodes.Call):
    if isinstance(call.node, nodes.Getattr) and call.node.attr in _SEEKING:
      found += call.args[:1]
  for filtered in tree.find_all(nodes.Filter):
    if filtered.name == 'replace':
      found += filtered.args[:1]
  texts = {n.value for n in found if isinstance(n, nodes.Const) and isinstance(n.value, str)}
  return tuple(sorted(t for t in texts if len(t) > 1 and t.strip() and not t.isidentifier()))


def name_template(template: str) -> str:
  """How messages call a template: its first characters and a hash."""
  start = ' '.join(template[:48].split())
  return f'chat template {start!r}... (sha256 {hashlib.sha256(template.encode()).hexdigest()[:12]})'


# Methods of texts whose first argument is looked for.
_SEEKING = frozenset(
  (
    *('split', 'rsplit', 'partition', 'rpartition', 'replace', 'removeprefix', 'removesuffix'),
    *('startswith', 'endswith', 'find', 'rfind', 'index', 'rindex', 'count'),
  )
)


# What a rendering sets itself, or what has a meaning in templates.
_RESERVED = frozenset(
  {'messages', 'tools', 'add_generation_prompt', 'bos_token', 'eos_token', 'loop', 'self', 'super'}
) | frozenset(_ENVIRONMENT.globals)


def check_kwargs(kwargs: Mapping[str, Any]) -> None:
  """Refuses arguments of a template that would change what the rendering itself passes.

  Raises:
    DataError: by name.
  """
  for name in kwargs:
    if not isinstance(name, str) or name in _RESERVED or name.startswith('_'):
      raise DataError(
        f'chat_template_kwargs: {name!r} is set by the rendering itself; expected names that only '
        f'the template knows, none of {sorted(_RESERVED)}'
      )


@dataclasses.dataclass(frozen=True)
class Traced:
  """A rendered conversation.

  Attributes:
    text: all of it.
    starts: per message the characters written before the turn of the template's main loop that is
      for this message; None where no such turn was seen. A guess, to be checked on prefixes.
  """

  text: str
  starts: tuple[int | None, ...]


def trace(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  *,
  generation_prompt: bool,
  special_tokens: Mapping[str, str],
  tools: Sequence[Mapping] | None = None,
  kwargs: Mapping[str, Any] | None = None,
) -> Traced:
  """Renders a conversation and records where each message begins.

  Args:
    special_tokens: texts by name, `bos_token` and `eos_token` among them.
    For the others and for errors see `render`.
  """
  copies = [dict(m) for m in messages]  # the same message may stand twice in a conversation
  spent = budget.Budget(MAX_STEPS + MORE_STEPS * len(copies), MAX_WORK, MAX_SECONDS)
  spent.places = {id(m): i for i, m in enumerate(copies)}
  text = _render(template, copies, generation_prompt, special_tokens, tools, kwargs, spent)
  return Traced(text, _starts(spent, len(copies)))


def _starts(spent: budget.Budget, n: int) -> tuple[int | None, ...]:
  """Of all loops over the messages the one during which most is written."""
  by_loop: dict[tuple[bool, int], dict[int, int]] = {}
  for is_index, marks in ((False, spent.marks), (True, spent.index_marks)):
    for loop, place, size in marks:
      if place < n:
        by_loop.setdefault((is_index, loop), {}).setdefault(place, size)
  best, best_written = {}, -1
  for found in by_loop.values():
    sizes = [found[k] for k in sorted(found)]
    written = sizes[-1] - sizes[0]
    if written > best_written and all(a <= b for a, b in itertools.pairwise(sizes)):
      best, best_written = found, written
  return tuple(best.get(k) for k in range(n))


def render(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  *,
  generation_prompt: bool,
  bos_token: str,
  eos_token: str,
  tools: Sequence[Mapping] | None = None,
  special_tokens: Mapping[str, str] | None = None,
  kwargs: Mapping[str, Any] | None = None,
) -> str:
  """The text of a conversation, as HF's `apply_chat_template(tokenize=False)` writes it.

  Args:
    template: jinja source.
    messages: `{'role', 'content', ...}` each.
    generation_prompt: also open the assistant's turn, as before sampling.
    bos_token, eos_token: their texts; '' where there is none.
    tools: JSON schemas of functions, for templates that show them.
    special_tokens: texts of other special tokens by name, `pad_token` say.
    kwargs: further names that the template sees, such as `enable_thinking`.

  Raises:
    DataError: the template cannot be compiled, refuses the messages, or goes over a limit of this
    module; or `kwargs` holds a name that the rendering sets itself.
  """
  spent = budget.Budget(MAX_STEPS + MORE_STEPS * len(messages), MAX_WORK, MAX_SECONDS)
  special = {**(special_tokens or {}), 'bos_token': bos_token, 'eos_token': eos_token}
  return _render(template, messages, generation_prompt, special, tools, kwargs, spent)


def _render(template, messages, generation_prompt, special, tools, kwargs, spent) -> str:
  check_kwargs(kwargs or {})
  token = CURRENT.set(spent)
  try:
    pieces = []
    for piece in _compile(template).generate(
      {
        'documents': None,
        **(kwargs or {}),
        **special,
        'messages': list(messages),
        'tools': None if tools is None else list(tools),
        'add_generation_prompt': generation_prompt,
      }
    ):
      spent.size += len(piece)
      if spent.size > MAX_OUTPUT:
        raise budget.OverLimit(f'writes more than {MAX_OUTPUT} characters')
      pieces.append(piece)
    return ''.join(pieces)
  except (jinja2.exceptions.TemplateError, budget.OverLimit) as error:
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
    CURRENT.reset(token)
