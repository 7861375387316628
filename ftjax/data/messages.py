"""Checks messages of conversations in the forms that rows have: OpenAI's and sharegpt's keys.

`formats.py` finds the messages in a row. A checked message has `role` and `content`, a text, and
every other key of the row's message that is not null: no content is dropped here, so that content
which a template does not render can be refused.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.runtime import strict_json

ROLES = ('system', 'developer', 'user', 'assistant', 'tool')

# Names of the reasoning before an answer. Checked messages have the first.
REASONING = ('reasoning_content', 'reasoning', 'thinking')

_SHAREGPT_ROLES = {
  'system': 'system',
  'developer': 'developer',
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'chatgpt': 'assistant',
  'model': 'assistant',
  'assistant': 'assistant',
  'function_call': 'assistant',
  'tool_call': 'assistant',
  'observation': 'tool',
  'tool': 'tool',
  'tool_response': 'tool',
  'function_response': 'tool',
}
_SHAREGPT_CALLS = ('function_call', 'tool_call')


def read_text(row: Mapping, key: str, empty: bool = False) -> str:
  """Returns a string of a row; `empty` allows it to be only white space, or to be missing.

  Raises:
    ValueError: no such key, or no usable text.
  """
  value = row.get(key)
  if value is None and empty:
    return ''
  if key not in row:
    raise ValueError(f'no key {key!r}; got keys {sorted(map(str, row))}')
  if not isinstance(value, str):
    raise ValueError(f'{key!r} is {type(value).__name__}, expected a string')
  if not empty and not value.strip():
    raise ValueError(f'{key!r} is empty')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'{key!r} holds half a surrogate pair at character {error.start}') from error
  return value


def parse_json(text: str, key: str, expected: str) -> Any:
  """Returns the value of a column or key with JSON text.

  Raises:
    ValueError: the text is not JSON.
  """
  try:
    return strict_json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{key!r} is a string but not JSON: {error}; expected {expected}') from error


def _content(message: Mapping) -> str:
  """Returns the text of a message, from a string or OpenAI's list of text parts."""
  value = message.get('content')
  if not isinstance(value, list):
    return read_text(message, 'content', empty=True)
  parts = []
  for part in value:
    if not isinstance(part, Mapping) or part.get('type') != 'text':
      kind = part.get('type') if isinstance(part, Mapping) else type(part).__name__
      raise ValueError(
        f"content part of type {kind!r}; only {{'type': 'text', 'text': ...}} is read"
      )
    unknown = [k for k, v in part.items() if k not in ('type', 'text') and v not in (None, [], {})]
    if unknown:
      raise ValueError(f'content part with the key {unknown[0]!r}, which is not read')
    parts.append(read_text(part, 'text', empty=True))
  return ''.join(parts)


def _function_calls(value: Any, place: str) -> list[dict[str, Any]]:
  """Returns calls `{"name": ..., "arguments": ...}`, one or a list, also as JSON text, in OpenAI's
  newer form."""
  if isinstance(value, str):
    try:
      value = strict_json.loads(value)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{place}: function_call is not JSON: {error}') from error
  calls = value if isinstance(value, list) else [value]
  for call in calls:
    if not isinstance(call, Mapping) or not isinstance(call.get('name'), str):
      raise ValueError(f"{place}: function_call without a 'name'")
  return [
    {'type': 'function', 'function': dict(call) | {'arguments': call.get('arguments', {})}}
    for call in calls
  ]


def _from_sharegpt(turn: Mapping, place: str) -> dict[str, Any]:
  """Converts a turn `{"from": ..., "value": ...}` to OpenAI's keys; other keys are kept."""
  role = turn['from']
  if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
    raise ValueError(f"{place}: 'from' is {role!r}, expected one of {list(_SHAREGPT_ROLES)}")
  if 'value' not in turn:
    raise ValueError(f"{place}: no key 'value'; got keys {sorted(map(str, turn))}")
  rest = {k: v for k, v in turn.items() if k not in ('from', 'value', 'role')}
  if role in _SHAREGPT_CALLS:
    calls = _function_calls(turn['value'], place)
    return {'role': 'assistant', 'content': '', 'tool_calls': calls} | rest
  return {'role': _SHAREGPT_ROLES[role], 'content': turn['value']} | rest


def _tool_calls(message: dict[str, Any], place: str) -> list[Any] | None:
  """Removes `tool_calls` and OpenAI's older `function_call` from a message; returns the calls."""
  calls, old = message.pop('tool_calls', None), message.pop('function_call', None)
  if isinstance(calls, str) and calls.strip():
    calls = parse_json(calls, 'tool_calls', 'a list of calls')
  if calls and old:
    raise ValueError(f"{place}: both 'tool_calls' and 'function_call'; keep one of them")
  if old:
    return _function_calls(old, place)
  if calls and not (isinstance(calls, list) and all(isinstance(c, Mapping) for c in calls)):
    raise ValueError(f"{place}: 'tool_calls' is no list of objects")
  return [_wrapped(c) for c in calls] if calls else None


def _wrapped(call: Mapping) -> Mapping:
  """Converts a call `{"name": ..., "arguments": ...}` to OpenAI's form; keeps others."""
  if 'function' in call or 'name' not in call:
    return call
  function = {k: call[k] for k in ('name', 'arguments') if k in call}
  return {'type': 'function', 'function': function} | {
    k: v for k, v in call.items() if k not in function
  }


def _reasoning(message: dict[str, Any], place: str) -> str:
  """Removes the keys of REASONING from a message; returns their text, '' for none."""
  found = {k: message.pop(k) for k in REASONING if k in message}
  for key, value in found.items():
    if not isinstance(value, str):
      raise ValueError(f'{place}: {key!r} is {type(value).__name__}, expected a string')
  texts = list(dict.fromkeys(t for t in found.values() if t))
  if len(texts) > 1:
    raise ValueError(
      f'{place}: {" and ".join(found)} differ, but both hold the reasoning; keep one of them'
    )
  return texts[0] if texts else ''


def check(raw: Any, place: str) -> dict[str, Any]:
  """Returns one checked message; keys whose value is null are left out.

  Raises:
    ValueError: the message is unusable; the error begins with `place`.
  """
  if not isinstance(raw, Mapping):
    raise ValueError(f'{place} is {type(raw).__name__}, expected {{"role": ..., "content": ...}}')
  if raw.get('role') is None and 'from' in raw:
    raw = _from_sharegpt(raw, place)
  message = {k: v for k, v in raw.items() if v is not None and k not in ('weight', 'content')}
  try:
    json.dumps(message, ensure_ascii=False, default=str).encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'{place} holds half a surrogate pair') from error
  role = message.get('role')
  role = 'tool' if role == 'function' else role  # OpenAI's name before there were tools
  if role not in ROLES:
    raise ValueError(f'{place}: role is {role!r}, expected one of {list(ROLES)}')
  try:
    content = _content(raw)
  except ValueError as error:
    raise ValueError(f'{place}: {error}') from error
  calls, reasoning = _tool_calls(message, place), _reasoning(message, place)
  if 'content' not in raw and not calls:
    raise ValueError(f"{place}: no key 'content'; got keys {sorted(map(str, raw))}")
  if role == 'assistant' and not content.strip() and not calls:
    raise ValueError(f'{place}: the assistant message has empty content')
  message |= {'role': role}
  message |= {'tool_calls': calls} if calls else {}
  message |= {'reasoning_content': reasoning} if reasoning else {}
  return {'role': role, 'content': content} | message


def check_order(messages: Sequence[Mapping[str, Any]]) -> None:
  """Raises ValueError for checked messages in an impossible order."""
  for i, message in enumerate(messages):
    role, before = message['role'], messages[i - 1]['role'] if i else None
    if role in ('system', 'developer') and i and before not in ('system', 'developer'):
      raise ValueError(f'messages[{i}]: a {role} message after a {before} message')
    if role == 'user' and before == 'user':
      raise ValueError(f'messages[{i}]: two user messages in a row; join them')
    # A function call may follow a text of the assistant; two answers may not.
    calls = message.get('tool_calls') or (i and messages[i - 1].get('tool_calls'))
    if role == 'assistant' and before == 'assistant' and not calls:
      raise ValueError(f'messages[{i}]: two assistant messages in a row; join them')
    if role == 'tool' and before not in ('assistant', 'tool'):
      raise ValueError(f'messages[{i}]: a tool message after {before!r}, expected after assistant')


def read_list(row: Mapping, key: str) -> list:
  """Returns the unchecked messages of a column: a list, or JSON text of one (CSV has no lists).

  Raises:
    ValueError: it is not a list, or an empty one.
  """
  value = row.get(key)
  if isinstance(value, str):
    value = parse_json(value, key, 'a list of messages')
  if not isinstance(value, list):
    raise ValueError(f'{key!r} is {type(value).__name__}, expected a list of messages')
  if not value:
    raise ValueError(f'the list of messages is empty: {key!r}')
  return value


def read_weight(raw: Mapping, place: str) -> bool:
  """Returns whether an assistant's message may be supervised: False where its `weight` is 0.

  Raises:
    ValueError: a weight other than 0 and 1.
  """
  weight = raw.get('weight')
  if weight not in (None, 0, 1):
    raise ValueError(f'{place}: weight is {weight!r}, expected 0 or 1')
  return weight != 0


def looks_like_messages(value: Any) -> bool:
  """Returns whether a JSON value is a message or a list of messages."""
  items = value if isinstance(value, list) else [value]
  return bool(items) and all(
    isinstance(m, dict) and (('role' in m and len(m) > 1) or ('from' in m and 'value' in m))
    for m in items
  )
