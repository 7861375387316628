"""Finds out with sentinels which content of a conversation its rendering contains.

Every text, number and name of a conversation is replaced by a unique word of nine letters (numbers
by unique numbers); a sentinel that is missing from the output is not rendered. Results depend on
the shape of a conversation alone, so that a data set needs one rendering per shape.

`dialect.py` renders sentinel conversations and keeps the results, `spans.py` uses them.
"""

import dataclasses
import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.runtime import strict_json

# Keys of a message with metadata, not content.
BOOKKEEPING = frozenset(
  (
    *('role', 'type', 'id', 'index', 'weight', 'tool_call_id', 'call_id', 'uuid', 'message_id'),
    *('timestamp', 'created', 'created_at', 'model', 'finish_reason', 'stop_reason'),
  )
)
REASONING = ('reasoning_content', 'reasoning', 'thinking')
# Keys of JSON schemas whose values sentinels would break.
_SCHEMA_KEPT = frozenset({'type', 'required', '$ref', '$schema', '$id'})
# Texts that separate reasoning from an answer; sentinels keep them.
THINK_TAGS = ('<think>', '</think>', '<thinking>', '</thinking>', '[THINK]', '[/THINK]')

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Nth:
  """A key by its position, in an object whose keys are content."""

  i: int


def tag_pattern(tags: Sequence[str]) -> re.Pattern:
  """Returns a pattern that finds `tags` and THINK_TAGS, longest first."""
  found = sorted({*THINK_TAGS, *tags}, key=lambda t: (-len(t), t))
  return re.compile('(' + '|'.join(map(re.escape, found)) + ')')


def text_shape(text: str, tags: re.Pattern) -> Any:
  """Returns the form of a text: blank or not, and its tags in order."""
  if tags.search(text) is None:
    return 'x' if text.strip() else text
  return tuple(p if i % 2 or not p.strip() else 'x' for i, p in enumerate(tags.split(text)))


def _shape(value: Any, tags: re.Pattern, free: bool = False, schema: bool = False) -> Any:
  """Returns the form of a value, without texts and numbers; `free`: its keys are content."""
  if isinstance(value, str):
    return text_shape(value, tags)
  if isinstance(value, bool) or value is None:
    return value
  if isinstance(value, int | float):
    return type(value).__name__
  if isinstance(value, Mapping):
    inner = []
    for key, item in value.items():
      if schema and not free and key in _SCHEMA_KEPT:
        inner.append((key, json.dumps(item) if key == 'type' else None))
      else:
        owns = (key == 'properties' and not free) if schema else free or key == 'arguments'
        inner.append((None if free else key, _shape(item, tags, owns, schema)))
    return ('{', *inner)
  if isinstance(value, list | tuple):
    return ('[', *(_shape(v, tags, free and not schema, schema) for v in value))
  return type(value).__name__


def message_shape(message: Mapping[str, Any], tags: re.Pattern) -> Any:
  """Returns the form of a message: hashable, equal for messages that templates treat alike."""
  content = message.get('content')
  if len(message) == 2 and isinstance(content, str):  # role and content: most messages
    return message['role'], text_shape(content, tags)
  kept = [(k, v) for k, v in message.items() if k not in BOOKKEEPING]
  return (message['role'], *((k, _shape(v, tags, k == 'arguments')) for k, v in kept))


def tools_shape(tools: Sequence[Mapping], tags: re.Pattern) -> Any:
  """Returns the form of a row's functions."""
  return _shape(list(tools), tags, schema=True)


def ids_shape(messages: Sequence[Mapping[str, Any]]) -> Any:
  """Returns which ids of tool calls are equal, and the length of each."""
  seen: dict[str, int] = {}
  found = []
  for message in messages:
    if 'tool_calls' not in message and message['role'] != 'tool':
      continue
    calls = message.get('tool_calls')
    ids = [c.get('id') for c in calls if isinstance(c, Mapping)] if isinstance(calls, list) else []
    for one in (*ids, message.get('tool_call_id')):
      text = str(one)
      found.append((seen.setdefault(text, len(seen)), len(text)))
  return tuple(found)


class Sentinels:
  """A conversation with its content replaced by sentinels.

  Attributes:
    messages, tools: the conversation.
    places: (path, sentinel) pairs; a path begins with 'messages' or 'tools'.
  """

  def __init__(
    self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping] | None, tags: re.Pattern
  ):
    self._tags, self._count = tags, 0
    self.places: list[tuple[Path, str]] = []
    self._names: dict[str, str] = {}  # of functions that were called
    self.messages = [self._message(m, ('messages', i)) for i, m in enumerate(messages)]
    self.tools = None
    if tools is not None:
      self.tools = [self._schema(t, ('tools', i), {}) for i, t in enumerate(tools)]

  def _next(self, path: Path) -> str:
    n, letters = self._count, ''
    self._count += 1
    for _ in range(7):
      n, digit = divmod(n, 26)
      letters = chr(ord('a') + digit) + letters
    self.places.append((path, 'zq' + letters))
    return 'zq' + letters

  def _text(self, text: str, path: Path) -> str:
    parts = self._tags.split(text)
    return ''.join(p if i % 2 or not p.strip() else self._next(path) for i, p in enumerate(parts))

  def _number(self, value: float, path: Path) -> float:
    self._count += 1
    found = type(value)(7_310_000 + self._count)
    self.places.append((path, str(found)))
    return found

  def _value(self, value: Any, path: Path, free: bool = False) -> Any:
    if isinstance(value, str):
      return self._text(value, path)
    if isinstance(value, bool) or value is None:
      return value
    if isinstance(value, int | float):
      return self._number(value, path)
    if isinstance(value, Mapping):
      out = {}
      for i, (key, item) in enumerate(value.items()):
        at = (*path, Nth(i) if free else key)
        if key in BOOKKEEPING and not free:
          out[key] = item
        elif key == 'arguments' and not free:
          out[key] = self._arguments(item, at)
        else:
          out[self._next(at) if free else key] = self._value(item, at, free)
      return out
    if isinstance(value, list | tuple):
      return [self._value(v, (*path, i), free) for i, v in enumerate(value)]
    return value

  def _arguments(self, value: Any, path: Path) -> Any:
    if isinstance(value, str):  # JSON as text
      try:
        found = as_object(value)
      except ValueError:  # left to templates that render text
        found = None
      if found is None:
        return self._text(value, path)
      # Values inside the text have no path of their own.
      start = len(self.places)
      written = json.dumps(self._value(found, path, free=True))
      self.places[start:] = [(path, sentinel) for _, sentinel in self.places[start:]]
      return written
    return self._value(value, path, free=True)

  def _message(self, message: Mapping[str, Any], path: Path) -> dict[str, Any]:
    out = {}
    for key, value in message.items():
      at = (*path, key)
      if key in BOOKKEEPING:
        out[key] = value
      elif key == 'name' and message['role'] == 'tool':
        out[key] = self._names.get(str(value), value)
      elif key == 'tool_calls' and isinstance(value, list):
        out[key] = [self._call(c, (*at, i)) for i, c in enumerate(value)]
      elif isinstance(value, str | list | tuple | Mapping):
        out[key] = self._value(value, at)
      else:
        out[key] = value
    return out

  def _call(self, call: Any, path: Path) -> Any:
    found = self._value(call, path)
    if isinstance(call, Mapping):
      inner = isinstance(call.get('function'), Mapping)
      given, marked = (call['function'], found['function']) if inner else (call, found)
      if isinstance(given.get('name'), str):
        self._names[given['name']] = marked['name']
    return found

  def _schema(self, value: Any, path: Path, names: Mapping[str, str]) -> Any:
    """Replaces the content of a schema; `names`: sentinels of the properties of its parent."""
    if isinstance(value, list | tuple):
      return [self._schema(v, (*path, i), names) for i, v in enumerate(value)]
    if not isinstance(value, Mapping):
      return self._value(value, path)
    out, names = {}, {}
    for key, item in value.items():
      at = (*path, key)
      if key == 'properties' and isinstance(item, Mapping):
        names = {name: self._next((*at, Nth(i))) for i, name in enumerate(item)}
        out[key] = {
          names[name]: self._schema(inner, (*at, Nth(i)), {})
          for i, (name, inner) in enumerate(item.items())
        }
      elif key in _SCHEMA_KEPT:
        out[key] = item
      else:
        out[key] = self._schema(item, at, {})
    if isinstance(out.get('required'), list):
      out['required'] = [names.get(n, n) if isinstance(n, str) else n for n in out['required']]
    return out

  def missing(self, text: str) -> list[Path]:
    """Returns the paths whose sentinels a rendered text lacks, each once, in order."""
    text = text.lower()
    return list(dict.fromkeys(path for path, word in self.places if word not in text))


def as_object(text: str) -> dict | None:
  """Returns the object of a JSON text, {} for an empty text; None where it is no object.

  Raises:
    ValueError: a repeated key, of which JSON readers keep one value.
  """
  if not text.strip():
    return {}
  try:
    found = strict_json.loads(text)
  except strict_json.RepeatedKey as error:
    raise ValueError(f'in the arguments of a tool call {error}') from error
  except (ValueError, RecursionError):
    return None
  return found if isinstance(found, dict) else None


def name_place(
  path: Path, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping] | None
) -> str:
  """Returns a path as text: 'messages[1].tool_calls[0].function.arguments.city'."""
  here: Any = {'messages': messages, 'tools': tools}
  name = ''
  for step in path:
    if isinstance(step, int):
      name += f'[{step}]'
    else:
      step = list(here)[step.i] if isinstance(step, Nth) else step
      name += f'.{step}' if name else step
    here = here[step]
  return name


_MOST_LISTED = 5
_CONTAINER = re.compile(r'messages\[\d+\]\.[^.\[]+|tools\[\d+\]')


def list_places(places: Sequence[str]) -> str:
  """Returns paths as text, shortened to the key of the message, or the tool, if there are many."""
  if len(places) > _MOST_LISTED:
    places = list(dict.fromkeys(_CONTAINER.match(p).group() for p in places))
  more = f' and {len(places) - 8} more' if len(places) > 8 else ''
  return ', '.join(places[:8]) + more


def find_value(
  path: Path, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping] | None
) -> Any:
  """Returns the value at a path."""
  here: Any = {'messages': messages, 'tools': tools}
  for step in path:
    here = here[list(here)[step.i] if isinstance(step, Nth) else step]
  return here


def lost_words(text: str, rendered: str, tags: re.Pattern) -> list[str]:
  """Returns the words of a text that its rendering contains in no escaped form.

  Words with a tag are skipped: templates remove tags on purpose.
  """
  if text.strip() in rendered:
    return []
  rendered = rendered.casefold()
  lost = []
  for word in {w: None for line in tags.split(text)[::2] for w in line.split()}:
    escaped = html.escape(word)
    forms = (word, json.dumps(word)[1:-1], json.dumps(word, ensure_ascii=False)[1:-1], escaped)
    forms += (escaped.replace('&#x27;', '&#39;').replace('&quot;', '&#34;'),)  # as jinja does
    if not any(form.casefold() in rendered for form in forms):
      lost.append(word)
  return lost
