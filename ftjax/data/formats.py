"""Raw rows to examples: which keys a row has, which roles they mean, and what makes a row unusable.

A row becomes one of three frozen dataclasses. `sources.py` yields the rows, `encode.py` takes the
examples.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

ROLES = ('system', 'developer', 'user', 'assistant', 'tool')

_SHAREGPT_ROLES = {
  'system': 'system',
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'assistant': 'assistant',
  'function_call': 'assistant',
  'observation': 'tool',
  'tool': 'tool',
}

# The prompt layout published with the Alpaca data.
_ALPACA_WITH_INPUT = (
  'Below is an instruction that describes a task, paired with an input that provides further '
  'context. Write a response that appropriately completes the request.\n\n'
  '### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:'
)
_ALPACA_WITHOUT_INPUT = (
  'Below is an instruction that describes a task. Write a response that appropriately '
  'completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:'
)


@dataclasses.dataclass(frozen=True)
class Chat:
  """A conversation. `trained[i]` is False for turns never to be supervised; None means all may
  be."""

  messages: tuple[dict[str, Any], ...]
  tools: tuple[dict[str, Any], ...] | None = None
  trained: tuple[bool, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
  """A prompt and what follows it, as plain text."""

  prompt: str
  completion: str


@dataclasses.dataclass(frozen=True)
class Text:
  """A document."""

  text: str


@dataclasses.dataclass(frozen=True)
class Bad:
  """Stands where a row or an example should be, and says why there is none."""

  reason: str


Example = Chat | Completion | Text


def _text(row: Mapping, key: str, empty: bool = False) -> str:
  """A string of a row; `empty` allows it to hold nothing but white space, or to be missing."""
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


def _list(row: Mapping, key: str) -> list:
  value = row.get(key)
  if not isinstance(value, list):
    raise ValueError(f'{key!r} is {type(value).__name__}, expected a list of messages')
  return value


def _content(message: Mapping) -> str:
  """The text of a message: a string, or the OpenAI list of text parts."""
  value = message.get('content')
  if not isinstance(value, list):
    return _text(message, 'content', empty=True)
  parts = []
  for part in value:
    if not isinstance(part, Mapping) or part.get('type') != 'text':
      kind = part.get('type') if isinstance(part, Mapping) else type(part).__name__
      raise ValueError(
        f"content part of type {kind!r}; only {{'type': 'text', 'text': ...}} is read"
      )
    parts.append(_text(part, 'text', empty=True))
  return ''.join(parts)


def _message(raw: Any, place: str) -> dict[str, Any]:
  """One checked message; keys whose value is None (absent columns of Parquet) are left out."""
  if not isinstance(raw, Mapping):
    raise ValueError(f'{place} is {type(raw).__name__}, expected {{"role": ..., "content": ...}}')
  message = {k: v for k, v in raw.items() if v is not None and k not in ('weight', 'content')}
  try:
    json.dumps(message, ensure_ascii=False, default=str).encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'{place} holds half a surrogate pair') from error
  role = message.get('role')
  if role not in ROLES:
    raise ValueError(f'{place}: role is {role!r}, expected one of {list(ROLES)}')
  if 'content' not in raw and not message.get('tool_calls'):
    raise ValueError(f"{place}: no key 'content'; got keys {sorted(map(str, raw))}")
  try:
    content = _content(raw)
  except ValueError as error:
    raise ValueError(f'{place}: {error}') from error
  if role == 'assistant' and not content.strip() and not message.get('tool_calls'):
    raise ValueError(f'{place}: the assistant says nothing')
  return {'role': role, 'content': content} | message


def _check_order(messages: list[dict[str, Any]]) -> None:
  for i, message in enumerate(messages):
    role, before = message['role'], messages[i - 1]['role'] if i else None
    if role in ('system', 'developer') and i and before not in ('system', 'developer'):
      raise ValueError(f'messages[{i}]: a {role} message after a {before} message')
    if role == 'user' and before == 'user':
      raise ValueError(f'messages[{i}]: two user messages in a row; join them')
    # A call of a function may follow what was said before it; two answers may not follow each
    # other.
    calls = message.get('tool_calls') or (i and messages[i - 1].get('tool_calls'))
    if role == 'assistant' and before == 'assistant' and not calls:
      raise ValueError(f'messages[{i}]: two assistant messages in a row; join them')
    if role == 'tool' and before not in ('assistant', 'tool'):
      raise ValueError(f'messages[{i}]: a tool message after {before!r}, expected after assistant')


def _tools(row: Mapping) -> tuple[dict, ...] | None:
  """The functions a row offers: a list, or a string with the list as JSON."""
  value = row.get('tools')
  if isinstance(value, str) and value.strip():
    try:
      value = json.loads(value)
    except ValueError as error:
      raise ValueError(f"'tools' is a string but not JSON: {error}") from error
  if not value:
    return None
  if not isinstance(value, list) or not all(isinstance(t, dict) for t in value):
    raise ValueError("'tools' is no list of objects")
  return tuple(value)


def _chat(raw: list, tools: tuple[dict, ...] | None, first_trained: int = 0) -> Chat:
  """Checks messages and builds the example; assistant turns before `first_trained` are context."""
  if not raw:
    raise ValueError('the list of messages is empty')
  messages = [_message(m, f'messages[{i}]') for i, m in enumerate(raw)]
  _check_order(messages)
  trained = []
  for i, (given, message) in enumerate(zip(raw, messages, strict=True)):
    weight = given.get('weight')
    if weight not in (None, 0, 1):
      raise ValueError(f'messages[{i}]: weight is {weight!r}, expected 0 or 1')
    trained.append(message['role'] == 'assistant' and weight != 0 and i >= first_trained)
  if not any(trained):
    raise ValueError('no assistant message to learn from')
  return Chat(tuple(messages), tools, tuple(trained))


def unread(row: Mapping, form: str) -> set[str]:
  """Returns the columns of a row, not null, that the reader of a format does not look at."""
  known = (*_READERS[form][0], 'tools', 'system', 'input', 'history')
  return {str(k) for k, v in row.items() if v is not None and k not in known}


def parse_prompt(messages: list) -> list[dict[str, Any]]:
  """Checks the messages of a conversation that the assistant answers next.

  Raises:
    ValueError: a message that cannot be used.
  """
  return [_message(m, f'messages[{i}]') for i, m in enumerate(messages)]


def _from_messages(row: Mapping, has_template: bool) -> Example:
  return _chat(_list(row, 'messages'), _tools(row))


def _from_prompt_completion(row: Mapping, has_template: bool) -> Example:
  prompt, completion = row.get('prompt'), row.get('completion')
  if isinstance(prompt, list) and isinstance(completion, list):
    return _chat(prompt + completion, _tools(row), first_trained=len(prompt))
  if isinstance(prompt, list) or isinstance(completion, list):
    raise ValueError("'prompt' and 'completion' must both be strings or both lists of messages")
  return Completion(_text(row, 'prompt', empty='prompt' in row), _text(row, 'completion'))


def _from_alpaca(row: Mapping, has_template: bool) -> Example:
  instruction, output = _text(row, 'instruction'), _text(row, 'output')
  given, system = _text(row, 'input', empty=True), _text(row, 'system', empty=True)
  if row.get('history'):
    raise ValueError("alpaca 'history' is not read; write the conversation as 'messages'")
  if not has_template:
    layout = _ALPACA_WITH_INPUT if given.strip() else _ALPACA_WITHOUT_INPUT
    prompt = layout.format(instruction=instruction, input=given)
    return Completion(f'{system}\n\n{prompt}' if system.strip() else prompt, output)
  messages = [{'role': 'system', 'content': system}] if system.strip() else []
  content = f'{instruction}\n\n{given}' if given.strip() else instruction
  messages += [{'role': 'user', 'content': content}, {'role': 'assistant', 'content': output}]
  return _chat(messages, None)


def _function_call(value: str, place: str) -> list[dict[str, Any]]:
  """A sharegpt function call, `{"name": ..., "arguments": {...}}` or a list of them, as
  OpenAI's."""
  try:
    calls = json.loads(value)
  except ValueError as error:
    raise ValueError(f'{place}: function_call is not JSON: {error}') from error
  calls = calls if isinstance(calls, list) else [calls]
  for call in calls:
    if not isinstance(call, dict) or not isinstance(call.get('name'), str):
      raise ValueError(f"{place}: function_call without a 'name'")
  return [
    {'type': 'function', 'function': {'name': c['name'], 'arguments': c.get('arguments', {})}}
    for c in calls
  ]


def _from_sharegpt(row: Mapping, has_template: bool) -> Example:
  messages: list[dict[str, Any]] = []
  if (system := _text(row, 'system', empty=True)).strip():
    messages.append({'role': 'system', 'content': system})
  for i, turn in enumerate(_list(row, 'conversations')):
    place = f'conversations[{i}]'
    if not isinstance(turn, Mapping):
      raise ValueError(f'{place} is {type(turn).__name__}, expected {{"from": ..., "value": ...}}')
    speaker = turn.get('from')
    if speaker not in _SHAREGPT_ROLES:
      raise ValueError(f"{place}: 'from' is {speaker!r}, expected one of {list(_SHAREGPT_ROLES)}")
    value = _text(turn, 'value', empty='value' in turn)
    if speaker == 'function_call':
      calls = _function_call(value, place)
      messages.append({'role': 'assistant', 'content': '', 'tool_calls': calls})
    else:
      messages.append({'role': _SHAREGPT_ROLES[speaker], 'content': value})
    if turn.get('weight') is not None:
      messages[-1]['weight'] = turn['weight']
  return _chat(messages, _tools(row))


def _from_text(row: Mapping, has_template: bool) -> Example:
  return Text(_text(row, 'text'))


# Detection looks for the keys in this order.
_READERS = {
  'messages': (('messages',), _from_messages),
  'sharegpt': (('conversations',), _from_sharegpt),
  'prompt_completion': (('prompt', 'completion'), _from_prompt_completion),
  'alpaca': (('instruction', 'output'), _from_alpaca),
  'text': (('text',), _from_text),
}
FORMATS = tuple(_READERS)


def detect(row: Mapping) -> str:
  """The format whose keys a row has.

  Raises:
    ValueError: none fits.
  """
  for name, (keys, _) in _READERS.items():
    if all(k in row for k in keys):
      return name
  wanted = '; '.join(f'{name}: {" + ".join(keys)}' for name, (keys, _) in _READERS.items())
  raise ValueError(f'keys {sorted(map(str, row))} fit no format ({wanted})')


def parse(row: Mapping, form: str, has_template: bool) -> Example:
  """A raw row as an example.

  Args:
    row: the parsed JSON object, CSV line or Parquet row.
    form: one of `FORMATS`.
    has_template: whether the tokenizer can render a chat; without it alpaca rows take the published
      prompt layout.

  Raises:
    ValueError: the row cannot be used; the message is the reason, without file and line.
  """
  if form not in _READERS:
    raise ValueError(f'{form!r} rows judge answers; this algorithm reads one of {list(FORMATS)}')
  return _READERS[form][1](row, has_template)
