"""Scores the tool calls of a completion: names and arguments equal as JSON.

The gold calls of a row are those of a conversation ({"name", "arguments"}, also within "function"),
or, as in the Berkeley Function-Calling Leaderboard, allow several values of an argument:
{"get_weather": {"city": ["Paris", "Paris, France"], "unit": ["celsius", ""]}}, where '' among them
means that the argument may be left out.
"""

import ast
import collections
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.evaluation.metric import Metric, of_sums, proportion, ratio, read_values
from ftjax.evaluation.metrics.structure import json_equal
from ftjax.grading.json_text import read_json

# Between such marks a model writes its calls as JSON.
_BLOCKS = re.compile(r'<tool_call>(.*?)(?:</tool_call>|\Z)', re.DOTALL)
_FUNCTION = re.compile(r'<function=([^<>\s]{1,100})>(.*?)(?:</function>|\Z)', re.DOTALL)
_MARK = re.compile(r'\[TOOL_CALLS\]|<\|python_tag\|>')
_STARTS = re.compile(r'(?:```[\w]{0,10}\s*)?(?:\{|\[\s*\{|\[\s*[A-Za-z_][\w.]*\()')
_MAX_PYTHON = 20_000  # ast needs memory far beyond the text's


@dataclasses.dataclass(frozen=True)
class Call:
  """A call that a model made: a name, and arguments as JSON values."""

  name: str
  arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Expected:
  """A right call. allowed: the values that each argument may have; optional: may be left out."""

  name: str
  allowed: Mapping[str, tuple[Any, ...]]
  optional: frozenset[str] = frozenset()

  def accepts(self, call: Call) -> bool:
    """Returns whether a call has this name and allowed arguments only, all that are needed."""
    given = call.arguments
    return (
      call.name == self.name
      and self.allowed.keys() - self.optional <= given.keys() <= self.allowed.keys()
      and all(any(json_equal(v, a) for a in self.allowed[k]) for k, v in given.items())
    )


def read_expected(value: Any) -> tuple[Expected, ...]:
  """Returns the gold calls of a row: a list, or one; [] where no call is right.

  Raises:
    ValueError: another form.
  """
  out = []
  for item in value if isinstance(value, list) else [value]:
    if isinstance(item, dict) and len(item) == 1 and not item.keys() & {'name', 'function'}:
      name, arguments = next(iter(item.items()))
      if not isinstance(arguments, dict) or not all(
        isinstance(v, list) and v for v in arguments.values()
      ):
        raise ValueError(f'call {name!r}: expected {{argument: [allowed values]}}: {arguments!r}')
      optional = frozenset(k for k, vs in arguments.items() if '' in vs)
      out.append(Expected(name, {k: tuple(vs) for k, vs in arguments.items()}, optional))
    else:
      call = _read_call(item)
      out.append(Expected(call.name, {k: (v,) for k, v in call.arguments.items()}))
  return tuple(out)


def _read_call(item: Any) -> Call:
  """Returns the call of {"name", "arguments"}; arguments may be JSON as text, or "parameters"."""
  if isinstance(item, dict) and isinstance(item.get('function'), dict):
    item = item['function']
  if not isinstance(item, dict) or not isinstance(item.get('name'), str):
    raise ValueError(f'expected a call with "name" and "arguments", got {item!r}')
  arguments = item.get('arguments', item.get('parameters', {}))
  if isinstance(arguments, str):
    arguments = read_json(arguments) if arguments.strip() else {}
  if not isinstance(arguments, dict):
    raise ValueError(f'call {item["name"]!r}: arguments are {arguments!r}; expected an object')
  return Call(item['name'], arguments)


def parse_calls(text: str) -> tuple[Call, ...]:
  """Returns the calls of a completion; () for a text without any.

  Forms: JSON between <tool_call> tags (Hermes, Qwen), after [TOOL_CALLS] (Mistral) or
  <|python_tag|> (Llama 3); <function=NAME>{...}</function>; the whole text as JSON, with or without
  a ``` fence; the whole text as a Python list [f(x=1), g()] of constants.

  Raises:
    ValueError: a text that begins such a form and does not complete it.
  """
  if blocks := _BLOCKS.findall(text):
    return tuple(call for block in blocks for call in _read_calls(read_json(block)))
  if functions := _FUNCTION.findall(text):
    return tuple(_read_call({'name': n, 'arguments': body.strip()}) for n, body in functions)
  mark = _MARK.search(text)
  text = (text[mark.end() :] if mark else text).strip()
  if not mark and not _STARTS.match(text):
    return ()
  try:
    found = read_json(text)
  except ValueError:
    return _read_python(text)
  return tuple(_read_calls(found))


def _read_calls(found: Any) -> list[Call]:
  return [_read_call(item) for item in (found if isinstance(found, list) else [found])]


def _read_python(text: str) -> tuple[Call, ...]:
  """Returns the calls of '[f(x=1), g()]' without running anything. Raises ValueError."""
  try:
    if len(text) > _MAX_PYTHON:
      raise ValueError(f'{len(text)} characters')
    body = ast.parse(text, mode='eval').body
    calls = body.elts if isinstance(body, ast.List) else [body]
    return tuple(_read_python_call(c) for c in calls)
  except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
    raise ValueError(f'no calls can be read: {error}') from error


def _read_python_call(node: ast.expr) -> Call:
  if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
    raise ValueError('expected NAME(ARGUMENT=VALUE, ...)')
  arguments = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
  json.dumps(arguments, allow_nan=False)  # sets and bytes are no JSON: TypeError
  return Call(ast.unparse(node.func), arguments)


def count_accepted(given: Sequence[Call], wanted: Sequence[Expected]) -> int:
  """Returns the size of the largest matching of calls to gold calls that accept them."""
  owner: dict[int, int] = {}

  def place(i: int, seen: set[int]) -> bool:
    for j, expected in enumerate(wanted):
      if j not in seen and expected.accepts(given[i]):
        seen.add(j)
        if j not in owner or place(owner[j], seen):
          owner[j] = i
          return True
    return False

  return sum(place(i, set()) for i in range(len(given)))


def call_values(
  text: str, wanted: Sequence[Expected], is_ordered: bool = False
) -> dict[str, tuple[float, ...]]:
  """Returns the scores of a completion's tool calls.

  Args:
    wanted: the right calls; none where the right response has no call.
    is_ordered: the calls must come in this order.

  Returns:
    calls_right: 1 where the calls are the right ones, no more and no less; names_right: the same
    by names alone; calls_parsed: 0 where a call was begun that cannot be read; calls: (right,
    given, wanted).
  """
  try:
    given, is_parsed = parse_calls(text), True
  except ValueError:
    given, is_parsed = (), False
  right = count_accepted(given, wanted)
  is_right = is_parsed and right == len(given) == len(wanted)
  names, gold = [c.name for c in given], [e.name for e in wanted]
  same_names = is_parsed and collections.Counter(names) == collections.Counter(gold)
  if is_ordered:
    is_right = is_right and all(e.accepts(c) for e, c in zip(wanted, given, strict=True))
    same_names = same_names and names == gold
  return {
    'calls_right': (float(is_right),),
    'names_right': (float(same_names),),
    'calls_parsed': (float(is_parsed),),
    'calls': (float(right), float(len(given)), float(len(wanted))),
  }


RIGHT = proportion('calls_right', 'tool calls right')
NAMES = proportion('names_right', 'tool names right')
PARSED = proportion('calls_parsed', 'tool calls readable')
F1 = Metric(
  'call_f1',
  'tool call F1',
  read_values('calls'),
  of_sums(lambda sums: ratio(2 * sums[:, 0], sums[:, 1] + sums[:, 2])),
)
METRICS = (RIGHT, NAMES, F1, PARSED)
