"""Parses raw rows into examples: the row formats, their columns, and what makes a row unusable.

A row becomes one of three frozen dataclasses. Every reader of rows uses `Part`s, `chat` and
`answered`: supervised rows (`parse`), prompts and questions of evaluation tasks (prompt_rows.py),
pairs and labeled answers (preference_rows.py). So `system`, `tools` and `chat_template_kwargs` mean
the same in all of them. `messages.py` checks messages, `sources.py` yields the rows, `encode.py`
tokenizes the examples.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ftjax.data import messages as messages_lib
from ftjax.data.messages import looks_like_messages, parse_json, read_list, read_text
from ftjax.data.row_numbers import NUMBERS

# Columns of any conversation, whichever column has its messages.
SHARED = ('system', 'tools', 'functions', 'chat_template_kwargs')

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
  """A conversation.

  Attributes:
    trained: whether each message may be supervised; None: all may.
    template_kwargs: arguments of the chat template from the row.
  """

  messages: tuple[dict[str, Any], ...]
  tools: tuple[dict[str, Any], ...] | None = None
  trained: tuple[bool, ...] | None = None
  template_kwargs: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
  """A prompt and its completion, as plain text."""

  prompt: str
  completion: str


@dataclasses.dataclass(frozen=True)
class Text:
  """A document."""

  text: str


@dataclasses.dataclass(frozen=True)
class Bad:
  """An unusable row, with the reason."""

  reason: str


Example = Chat | Completion | Text


class Part(NamedTuple):
  """Consecutive messages of a row.

  Attributes:
    key: their column, for messages of errors.
    messages: unchecked.
    trained: whether assistant messages among them may be supervised.
    start: index of the first one in its column.
  """

  key: str
  messages: Sequence[Any]
  trained: bool = False
  start: int = 0


def _tools(row: Mapping) -> tuple[dict, ...] | None:
  """Returns the functions of a row, from a list or its JSON text.

  `functions` is OpenAI's older column, whose entries `tools` has under 'function'.
  """
  found = {key: _list_of_objects(row, key) for key in ('tools', 'functions')}
  if all(found.values()):
    raise ValueError("both 'tools' and 'functions'; keep one of them")
  if found['functions']:
    return tuple(
      f if 'function' in f else {'type': 'function', 'function': f} for f in found['functions']
    )
  return found['tools']


def _list_of_objects(row: Mapping, key: str) -> tuple[dict, ...] | None:
  value = row.get(key)
  if isinstance(value, str) and value.strip():
    value = parse_json(value, key, 'a list of functions')
  if not value or isinstance(value, str):
    return None
  if not isinstance(value, list) or not all(isinstance(t, dict) for t in value):
    raise ValueError(f'{key!r} is no list of objects')
  return tuple(value)


def _template_kwargs(row: Mapping) -> dict[str, Any] | None:
  """Returns a row's arguments of the chat template, from an object or its JSON text."""
  key = 'chat_template_kwargs'
  value = row.get(key)
  if isinstance(value, str):
    value = parse_json(value, key, 'an object') if value.strip() else None
  if value is None or value == {}:
    return None
  if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
    raise ValueError(f'{key!r} is {type(value).__name__}, expected an object')
  return value


def refuse_shared(row: Mapping, key: str, keys: Sequence[str] = SHARED) -> None:
  """Raises ValueError where a row of plain text has columns of a conversation."""
  for name in keys:
    if row.get(name) not in (None, [], {}) and str(row[name]).strip():
      raise ValueError(
        f'{name!r} belongs to a conversation, but {key!r} is plain text, which no template renders;'
        f' give {key!r} as messages'
      )


def chat(row: Mapping, parts: Sequence[Part]) -> Chat:
  """Returns the conversation of a row: its messages in order, checked, with SHARED columns.

  Args:
    row: the row; its SHARED columns are read here.
    parts: its messages; where none is `trained`, the conversation is a prompt.

  Raises:
    ValueError: messages or columns that cannot be used.
  """
  messages, trained = [], []
  for part in parts:
    for i, raw in enumerate(part.messages, part.start):
      place = f'{part.key}[{i}]'
      message = messages_lib.check(raw, place)
      may = messages_lib.read_weight(raw, place)
      messages.append(message)
      trained.append(message['role'] == 'assistant' and may and part.trained)
  if not messages:
    raise ValueError('the list of messages is empty')
  if (system := read_text(row, 'system', empty=True)).strip():
    if messages[0]['role'] in ('system', 'developer'):
      raise ValueError(
        f"both the column 'system' and a {messages[0]['role']} message; keep one of them"
      )
    messages.insert(0, {'role': 'system', 'content': system})
    trained.insert(0, False)
  messages_lib.check_order(messages)
  is_prompt = not any(p.trained for p in parts)
  if not is_prompt and not any(trained):
    raise ValueError('no assistant message to learn from')
  flags = None if is_prompt else tuple(trained)
  return Chat(tuple(messages), _tools(row), flags, _template_kwargs(row))


def answered(row: Mapping, prompt: Part | str, answer: Any, key: str) -> Chat | Completion:
  """Returns a prompt with its answer; only the answer may be supervised.

  Args:
    row: the row; its SHARED columns are read.
    prompt: messages, or plain text.
    answer: a text, a message or a list of messages. Messages after a prompt in plain text must
      repeat it, messages after messages may.
    key: the column of the answer.

  Raises:
    ValueError: one of them is unusable, or they do not fit together.
  """
  answer = [answer] if isinstance(answer, Mapping) else answer
  if isinstance(prompt, str):
    if isinstance(answer, str):
      refuse_shared(row, 'prompt')
      checked = read_text({'prompt': prompt}, 'prompt', empty=True)
      return Completion(checked, read_text({key: answer}, key))
    if isinstance(answer, list) and asks(answer[:-1], prompt):
      return chat(row, [Part(key, answer[:-1]), Part(key, answer[-1:], True, len(answer) - 1)])
    raise ValueError(
      f"'prompt' is str and {key!r} is {type(answer).__name__}; they must both be strings or both "
      'lists of messages, or the messages must repeat the prompt'
    )
  if isinstance(answer, str):
    read_text({key: answer}, key)
    answer = [{'role': 'assistant', 'content': answer}]
  if not isinstance(answer, list):
    raise ValueError(
      f"'prompt' is list and {key!r} is {type(answer).__name__}; expected a text or messages"
    )
  n = len(prompt.messages)
  repeats = len(answer) > n > 0 and list(answer[:n]) == list(prompt.messages)
  return chat(row, [prompt, Part(key, answer[n:], True, n) if repeats else Part(key, answer, True)])


def asks(messages: Sequence[Any], prompt: str) -> bool:
  """Returns whether one of these messages is the user's, with the prompt's text."""
  for message in messages:
    if not isinstance(message, Mapping):
      continue
    role = message.get('role') or message.get('from')
    content = message.get('content') or message.get('value')
    if role in ('user', 'human') and isinstance(content, str) and content.strip() == prompt.strip():
      return True
  return False


def _alpaca_prompt(row: Mapping, has_template: bool) -> tuple[Mapping, Part | str]:
  """Returns (the row without columns that the prompt contains, the prompt)."""
  instruction = read_text(row, 'instruction')
  given, system = read_text(row, 'input', empty=True), read_text(row, 'system', empty=True)
  if row.get('history'):
    raise ValueError("alpaca 'history' is not read; write the conversation as 'messages'")
  if has_template:
    content = f'{instruction}\n\n{given}' if given.strip() else instruction
    return row, Part('instruction', [{'role': 'user', 'content': content}])
  layout = _ALPACA_WITH_INPUT if given.strip() else _ALPACA_WITHOUT_INPUT
  prompt = layout.format(instruction=instruction, input=given)
  rest = {k: v for k, v in row.items() if k != 'system'}
  return rest, f'{system}\n\n{prompt}' if system.strip() else prompt


def opening(row: Mapping, key: str, has_template: bool) -> tuple[Mapping, Part | str]:
  """Reads the prompt of a row from the column `key`, one of PROMPT_KEYS.

  Returns:
    (the row without columns that the prompt contains, its messages or plain text).

  Raises:
    ValueError: the column is neither text nor messages.
  """
  if key == 'instruction':
    return _alpaca_prompt(row, has_template)
  if key == 'prompt' and not isinstance(row[key], list):
    if not isinstance(row[key], str):
      kind = type(row[key]).__name__
      raise ValueError(f"'prompt' is {kind}, expected a text or a list of messages")
    return row, read_text(row, 'prompt', empty=True)
  return row, Part(key, row[key] if key == 'prompt' else read_list(row, key))


def _from_messages(row: Mapping, has_template: bool) -> Example:
  return chat(row, [Part('messages', read_list(row, 'messages'), True)])


def _from_sharegpt(row: Mapping, has_template: bool) -> Example:
  return chat(row, [Part('conversations', read_list(row, 'conversations'), True)])


def _from_prompt_completion(row: Mapping, has_template: bool) -> Example:
  if row.get('completion') is None:
    read_text(row, 'completion')
  if row.get('prompt') is None:
    read_text(row, 'prompt')
  _, prompt = opening(row, 'prompt', has_template)
  return answered(row, prompt, row['completion'], 'completion')


def _from_alpaca(row: Mapping, has_template: bool) -> Example:
  output = read_text(row, 'output')
  rest, prompt = _alpaca_prompt(row, has_template)
  return answered(rest, prompt, output, 'output')


def _from_text(row: Mapping, has_template: bool) -> Example:
  return Text(read_text(row, 'text'))


class _Format(NamedTuple):
  """keys: the columns that identify the format. others: further columns that are read."""

  keys: tuple[str, ...]
  others: tuple[str, ...]
  read: Callable[[Mapping, bool], Example]


# Detection looks for the keys in this order.
_FORMATS = {
  'messages': _Format(('messages',), SHARED, _from_messages),
  'sharegpt': _Format(('conversations',), SHARED, _from_sharegpt),
  'prompt_completion': _Format(('prompt', 'completion'), SHARED, _from_prompt_completion),
  'alpaca': _Format(('instruction', 'output'), ('input', 'history', *SHARED), _from_alpaca),
  'text': _Format(('text',), (), _from_text),
  # A .txt file with one document a line; sources.py reads the lines.
  'lines': _Format(('text',), (), _from_text),
}
FORMATS = tuple(_FORMATS)

# Columns with a prompt, by format.
PROMPT_KEYS = {
  'messages': 'messages',
  'sharegpt': 'conversations',
  'prompt_completion': 'prompt',
  'alpaca': 'instruction',
}


def has(row: Mapping, key: str) -> bool:
  """Returns whether a row has a column that is not null."""
  return row.get(key) is not None


def is_bool(value: Any) -> bool:
  """Returns whether a value is a bool, or its text as in CSV."""
  return isinstance(value, bool) or (
    isinstance(value, str) and value.strip().lower() in ('true', 'false')
  )


def _as_number(value: Any) -> float | None:
  """Returns a number, also from its text as in CSV; else None."""
  if isinstance(value, bool) or not isinstance(value, int | float | str):
    return None
  try:
    return float(value)
  except ValueError:
    return None


def labeled_reason(row: Mapping) -> str | None:
  """Returns why a row is preference data, with the algorithm that reads it; else None.

  A label counts if it is a bool, or 0 or 1 in a row with only a prompt and a completion. A score
  counts in a row with a prompt and a completion, or if it is negative. Other labels and scores are
  metadata.
  """
  pair = "rows of preference pairs are for algorithm='dpo' (or 'reward_model')"
  plain = next((n for n, f in _FORMATS.items() if all(has(row, k) for k in f.keys)), 'messages')
  override = f'to train on the answers alone, name their format: data.train=PATH::{plain}'
  if has(row, 'chosen') and has(row, 'rejected'):
    return f"the row has 'chosen' and 'rejected': {pair}: set algorithm='dpo'; {override}"
  output = row.get('output')
  if isinstance(output, list) and len(output) == 2 and has(row, 'instruction'):
    return f"'output' is a chosen and a rejected answer: {pair}: set algorithm='dpo'; {override}"
  has_completion = has(row, 'prompt') and has(row, 'completion')
  has_answer = has_completion or any(has(row, k) for k in ('messages', 'conversations', 'output'))
  for key in ('label', 'kto_tag'):
    is_alone = has_completion and {*row} <= {'prompt', 'completion', key}
    if has_answer and (is_bool(row.get(key)) or (is_alone and row.get(key) in (0, 1))):
      return (
        f'{key!r} is {row[key]!r}: rows that label answers good or bad are for KTO: set '
        f"algorithm='dpo' with dpo.loss='kto'; {override}"
      )
  score = _as_number(row.get('score'))
  if has_answer and score is not None and (has_completion or score < 0):
    return (
      f"'score' is {row['score']!r}: rows that score answers are for algorithm='reward_model' with "
      f"reward_model.objective='scores'; {override}"
    )
  return None


def detect(row: Mapping) -> str:
  """Returns the format whose columns a row has.

  Raises:
    ValueError: no format fits, or the row is preference data.
  """
  if reason := labeled_reason(row):
    raise ValueError(reason)
  for name, form in _FORMATS.items():
    if all(has(row, k) for k in form.keys):
      return name
  for name, form in _FORMATS.items():  # null in this row: the format's reader reports it
    if all(k in row for k in form.keys):
      return name
  wanted = '; '.join(f'{n}: {" + ".join(f.keys)}' for n, f in _FORMATS.items() if n != 'lines')
  raise ValueError(f'keys {sorted(map(str, row))} fit no format ({wanted})')


def parse(row: Mapping, form: str, has_template: bool, is_named: bool = False) -> Example:
  """Parses a raw row.

  Args:
    row: the parsed JSON object, CSV line or Parquet row.
    form: one of `FORMATS`.
    has_template: whether the tokenizer has a chat template; without it alpaca rows take the
      published prompt layout.
    is_named: whether the config names the format; else preference data is refused.

  Raises:
    ValueError: the row is unusable; the message is the reason, without file and line.
  """
  if form not in _FORMATS:
    raise ValueError(
      f'{form!r} rows are preference data; this algorithm reads one of {list(FORMATS)}. '
      + (labeled_reason(row) or '')
    )
  if not is_named and (reason := labeled_reason(row)):
    raise ValueError(reason)
  return _FORMATS[form].read(row, has_template)


def unread(row: Mapping, form: str) -> set[str]:
  """Returns the columns of a row that are not null and that a format does not read."""
  known = (*_FORMATS[form].keys, *_FORMATS[form].others, *NUMBERS)
  return {str(k) for k, v in row.items() if v is not None and k not in known}


# Columns that may have messages, as JSON text in CSV; columns whose empty cell is not null.
_CELLS_WITH_MESSAGES = ('prompt', 'completion', 'chosen', 'rejected')
_REQUIRED = frozenset(k for f in _FORMATS.values() for k in f.keys) | {'chosen', 'rejected'}


def from_cells(cells: Mapping[str, str]) -> dict[str, Any]:
  """Returns the row of a CSV line: messages are parsed from JSON, empty optional cells dropped."""
  row: dict[str, Any] = {}
  for key, cell in cells.items():
    if not cell and key not in _REQUIRED:
      continue
    row[key] = cell
    if key in _CELLS_WITH_MESSAGES and cell.lstrip()[:1] in ('[', '{'):
      try:
        value = parse_json(cell, key, 'messages')
      except ValueError:  # a text that only begins like JSON
        continue
      if looks_like_messages(value):
        row[key] = value
  return row
