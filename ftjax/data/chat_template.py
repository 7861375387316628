"""Renders chat templates. `encode.py` turns the text into tokens and masks.

The same conversation gives the same text on every day and machine. template_sandbox.py has jinja's
environment with its limits on time and memory.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes as nodes

from ftjax.data import template_sandbox
from ftjax.data.template_sandbox import CURRENT, ENVIRONMENT, OverLimit, Rendering
from ftjax.runtime.errors import DataError

MAX_TEMPLATE = 1_000_000  # characters of template source
MAX_OUTPUT = 16_000_000  # characters of rendered text


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
  if len(template) > MAX_TEMPLATE:
    raise DataError(
      f'{name_template(template)}: {len(template)} characters, more than {MAX_TEMPLATE}'
    )
  return template_sandbox.compile_template(template)


@functools.lru_cache(maxsize=16)
def find_tags(template: str) -> tuple[str, ...]:
  """Returns the texts that a template searches for in other texts, sorted.

  As in `'</think>' in content` or `content.split('x')`; of two characters or more, no identifiers.
  """
  try:
    tree = ENVIRONMENT.parse(template)
  except (jinja2.exceptions.TemplateError, RecursionError):  # rendering reports it
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
  """Returns the name of a template for messages: its first characters and a hash."""
  start = ' '.join(template[:48].split())
  return f'chat template {start!r}... (sha256 {hashlib.sha256(template.encode()).hexdigest()[:12]})'


# Methods of str that search for their first argument.
_SEEKING = frozenset(
  (
    *('split', 'rsplit', 'partition', 'rpartition', 'replace', 'removeprefix', 'removesuffix'),
    *('startswith', 'endswith', 'find', 'rfind', 'index', 'rindex', 'count'),
  )
)


# Names that the rendering sets or that have a meaning in templates.
_RESERVED = frozenset(
  {'messages', 'tools', 'add_generation_prompt', 'bos_token', 'eos_token', 'loop', 'self', 'super'}
) | frozenset(ENVIRONMENT.globals)


def check_kwargs(kwargs: Mapping[str, Any]) -> None:
  """Checks that template arguments override none of the names that the rendering sets.

  Raises:
    DataError: the message has the name.
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
    text: the rendered text, whole.
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
  """Renders a conversation as HF's `apply_chat_template(tokenize=False)` does, and records where
  each message begins.

  Args:
    template: jinja source.
    messages: `{'role', 'content', ...}` each.
    generation_prompt: also open the assistant's turn, as before sampling.
    special_tokens: texts by name, `bos_token` and `eos_token` among them; '' where there is none.
    tools: JSON schemas of functions, for templates that show them.
    kwargs: further names that the template sees, such as `enable_thinking`.

  Raises:
    DataError: the template cannot be compiled, refuses the messages, or exceeds a limit of
    template_sandbox.py; or `kwargs` holds a name that the rendering sets itself. The message names
    the template.
  """
  copies = [dict(m) for m in messages]  # the same message may stand twice in a conversation
  rendering = Rendering(copies)
  text = _render(template, copies, generation_prompt, special_tokens, tools, kwargs, rendering)
  return Traced(text, _starts(rendering, len(copies)))


def _starts(rendering: Rendering, n: int) -> tuple[int | None, ...]:
  """Returns the starts of n messages in the loop over them during which most is written."""
  by_loop: dict[tuple[bool, int], dict[int, int]] = {}
  for is_index, marks in ((False, rendering.marks), (True, rendering.index_marks)):
    for loop, message, written in marks:
      if message < n:
        by_loop.setdefault((is_index, loop), {}).setdefault(message, written)
  best, most = {}, -1
  for found in by_loop.values():
    sizes = [found[k] for k in sorted(found)]
    if sizes[-1] - sizes[0] > most and all(a <= b for a, b in itertools.pairwise(sizes)):
      best, most = found, sizes[-1] - sizes[0]
  return tuple(best.get(k) for k in range(n))


def _render(template, messages, generation_prompt, special, tools, kwargs, rendering) -> str:
  check_kwargs(kwargs or {})
  names = {
    'documents': None,
    **(kwargs or {}),
    **special,
    'messages': list(messages),
    'tools': None if tools is None else list(tools),
    'add_generation_prompt': generation_prompt,
  }
  token = CURRENT.set(rendering)
  try:
    pieces = []
    for piece in _compile(template).generate(names):
      rendering.written += len(piece)
      if rendering.written > MAX_OUTPUT:
        raise OverLimit(f'writes more than {MAX_OUTPUT} characters')
      pieces.append(piece)
    return ''.join(pieces)
  except (jinja2.exceptions.TemplateError, OverLimit) as error:
    reason = getattr(error, 'message', None) or str(error)
    raise DataError(f'{name_template(template)}: {reason}') from error
  except _RAISED as error:
    if isinstance(error, DataError):
      raise
    raise DataError(f'{name_template(template)}: {type(error).__name__}: {error}') from error
  finally:
    CURRENT.reset(token)


# What a faulty template raises while it is compiled or rendered.
_RAISED = (
  *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, SyntaxError),
  *(AssertionError, RecursionError, MemoryError),
)
