"""Raw rows to examples: which columns a row has, what they mean, and what makes a row unusable.

A row becomes one of three frozen dataclasses. Every reader of rows goes through `Part`s, `chat` and
`answered`: supervised rows (`parse`), prompts to sample from and questions of evaluation tasks
(prompt_rows.py), pairs and labelled answers (preference_rows.py). So `system`, `tools` and
`chat_template_kwargs` mean the same in all of them. `messages.py` checks messages, `sources.py`
yields the rows, `encode.py` takes the examples.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ftjax.data import messages as messages_lib
from ftjax.data.messages import looks_like_messages, parse_json, read_list, read_text

# Columns that belong to any conversation, wherever its messages stand.
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
  """A conversation. `trained[i]` is False for turns never to be supervised; None means all may
  be. `template_kwargs`: of the row, for the template."""

  messages: tuple[dict[str, Any], ...]
  tools: tuple[dict[str, Any], ...] | None = None
  trained: tuple[bool, ...] | None = None
  template_kwargs: Mapping[str, Any] | None = None


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


class Part(NamedTuple):
  """Consecutive messages of a row.

  Attributes:
    key: the column they stand in, for messages of errors.
    messages: unchecked.
    trained: whether assistant messages among them may be supervised.
    start: number of the first one in its column.
  """

  key: str
  messages: Sequence[Any]
  trained: bool = False
  start: int = 0


def _tools(row: Mapping) -> tuple[dict, ...] | None:
  """The functions a row offers: a list, or a string with the list as JSON. `functions` is OpenAI's
  older column, whose entries are what `tools` has under 'function'."""
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
  """A row's own variables for the chat template: an object, or JSON text of one."""
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
  """Raises ValueError where a row of plain text has what only a conversation can show."""
  for name in keys:
    if row.get(name) not in (None, [], {}) and str(row[name]).strip():
      raise ValueError(
        f'{name!r} belongs to a conversation, but {key!r} is plain text, which no template renders;'
        f' give {key!r} as messages'
      )


def chat(row: Mapping, parts: Sequence[Part]) -> Chat:
  """Returns the conversation of a row: its messages in order, checked, with SHARED columns.

  Args:
    row: the row, of which SHARED are read here.
    parts: its messages; where none is `trained`, nothing need be supervised: a prompt.

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
        f"the column 'system' stands beside a {messages[0]['role']} message; keep one of them"
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
  """Returns a prompt with its answer, which alone may be supervised.

  Args:
    row: of which SHARED are read.
    prompt: messages, or plain text.
    answer: a text, a message or a list of messages. Messages after a prompt in plain text must
      repeat it, messages after messages may.
    key: the column of the answer.

  Raises:
    ValueError: they cannot be used, or not together.
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
  """Returns whether a user message among these is the prompt's text."""
  for message in messages:
    if not isinstance(message, Mapping):
      continue
    role = message.get('role') or message.get('from')
    content = message.get('content') or message.get('value')
    if role in ('user', 'human') and isinstance(content, str) and content.strip() == prompt.strip():
      return True
  return False


def _alpaca_prompt(row: Mapping, has_template: bool) -> tuple[Mapping, Part | str]:
  """(the row without what the prompt has of it, the prompt)."""
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
  """Returns the prompt side of a row that stands in the column `key`, one of PROMPT_KEYS.

  Returns:
    (the row whose SHARED columns still belong to it, its messages or plain text).

  Raises:
    ValueError: the column holds neither.
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
  """keys: those by which a row is known. others: further columns that are read."""

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

# Columns that may hold a prompt, by the format whose prompts they are.
PROMPT_KEYS = {
  'messages': 'messages',
  'sharegpt': 'conversations',
  'prompt_completion': 'prompt',
  'alpaca': 'instruction',
}


def has(row: Mapping, key: str) -> bool:
  """Returns whether a row has a column and it is not null."""
  return row.get(key) is not None


def is_bool(value: Any) -> bool:
  """Returns whether a value is true or false, in CSV the words."""
  return isinstance(value, bool) or (
    isinstance(value, str) and value.strip().lower() in ('true', 'false')
  )


def _as_number(value: Any) -> float | None:
  """A number, in CSV the text of one; else None."""
  if isinstance(value, bool) or not isinstance(value, int | float | str):
    return None
  try:
    return float(value)
  except ValueError:
    return None


def judged_reason(row: Mapping) -> str | None:
  """Returns why a row is one that judges answers, and which algorithm reads it; else None.

  A label counts only where it is true or false, or 0 or 1 beside a prompt and a completion alone,
  and a score where it stands beside a prompt and one completion, or is negative: other labels and
  scores are metadata.
  """
  pair = "rows of preference pairs are for algorithm='dpo' (or 'reward_model')"
  plain = next((n for n, f in _FORMATS.items() if all(has(row, k) for k in f.keys)), 'messages')
  override = (
    f'to train on them as plain answers, name the format of the answers: data.train=PATH::{plain}'
  )
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
    ValueError: none fits, or the row judges answers, which no plain format does.
  """
  if reason := judged_reason(row):
    raise ValueError(reason)
  for name, form in _FORMATS.items():
    if all(has(row, k) for k in form.keys):
      return name
  for name, form in _FORMATS.items():  # null in this row: its reader says so
    if all(k in row for k in form.keys):
      return name
  wanted = '; '.join(f'{n}: {" + ".join(f.keys)}' for n, f in _FORMATS.items() if n != 'lines')
  raise ValueError(f'keys {sorted(map(str, row))} fit no format ({wanted})')


def parse(row: Mapping, form: str, has_template: bool, is_named: bool = False) -> Example:
  """A raw row as an example.

  Args:
    row: the parsed JSON object, CSV line or Parquet row.
    form: one of `FORMATS`.
    has_template: whether the tokenizer can render a chat; without it alpaca rows take the published
      prompt layout.
    is_named: whether the config names the format; else rows that judge answers are refused.

  Raises:
    ValueError: the row cannot be used; the message is the reason, without file and line.
  """
  if form not in _FORMATS:
    raise ValueError(
      f'{form!r} rows judge answers; this algorithm reads one of {list(FORMATS)}. '
      + (judged_reason(row) or '')
    )
  if not is_named and (reason := judged_reason(row)):
    raise ValueError(reason)
  return _FORMATS[form].read(row, has_template)


def unread(row: Mapping, form: str) -> set[str]:
  """Returns the columns of a row, not null, that the reader of a format does not look at."""
  known = (*_FORMATS[form].keys, *_FORMATS[form].others)
  return {str(k) for k, v in row.items() if v is not None and k not in known}


# Columns that may hold messages, which CSV has as JSON text; columns whose empty cell is no null.
_CELLS_WITH_MESSAGES = ('prompt', 'completion', 'chosen', 'rejected')
_REQUIRED = frozenset(k for f in _FORMATS.values() for k in f.keys) | {'chosen', 'rejected'}


def from_cells(cells: Mapping[str, str]) -> dict[str, Any]:
  """Returns the row of a CSV line: JSON text of messages is parsed, empty optional cells go."""
  row: dict[str, Any] = {}
  for key, cell in cells.items():
    if not cell and key not in _REQUIRED:
      continue
    row[key] = cell
    if key in _CELLS_WITH_MESSAGES and cell.lstrip()[:1] in ('[', '{'):
      try:
        value = parse_json(cell, key, 'messages')
      except ValueError:  # a text that begins like JSON
        continue
      if looks_like_messages(value):
        row[key] = value
  return row
