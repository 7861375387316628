"""Parses rows with prompts: those of rollouts, evaluation tasks and generation.

Columns mean the same as in training rows, see formats.py; an answer in the row is separated from
its prompt.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ftjax.data import formats
from ftjax.data import messages as messages_lib
from ftjax.data.formats import SHARED, Chat, Completion

_ANSWER_KEYS = {'prompt': 'completion', 'instruction': 'output'}


class Prompt(NamedTuple):
  """The prompt of a row.

  Attributes:
    asked: a conversation that the assistant answers next, or plain text to complete.
    answer: the text of the row's answer; None without one, or where it is not text.
    read: the columns that `asked` was read from, SHARED among them.
  """

  asked: Chat | str
  answer: str | None
  read: frozenset[str]


def prompt_key(row: Mapping, form: str | None = None) -> str:
  """Returns the column with a row's prompt, by the format or the only one of the row.

  Raises:
    ValueError: none, or several with different prompts.
  """
  if form is not None:
    return formats.PROMPT_KEYS[form]
  given = [k for k in formats.PROMPT_KEYS.values() if formats.has(row, k)]
  if not given:
    raise ValueError(f"neither 'prompt' nor 'messages'; got keys {sorted(map(str, row))}")
  if 'messages' in given and 'prompt' in given and isinstance(row['prompt'], str):
    listed = row['messages'] if isinstance(row['messages'], list) else []
    if formats.asks(listed, row['prompt']):  # a copy of the first question, as in many data sets
      given.remove('prompt')
  if len(given) > 1:
    raise ValueError(
      f'the columns {given} all hold a prompt; name the format of the right one, as in '
      f'PATH::{next(f for f, k in formats.PROMPT_KEYS.items() if k == given[0])}'
    )
  return given[0]


def read_prompt(row: Mapping, has_template: bool, form: str | None = None) -> Prompt:
  """Reads the prompt of a row: its messages without a last one by the assistant, or plain text.

  Args:
    row: a row with one of the columns of formats.PROMPT_KEYS.
    has_template: as for `formats.parse`.
    form: the format in the config, or None.

  Raises:
    ValueError: the row has no usable prompt.
  """
  key = prompt_key(row, form)
  if not formats.has(row, key):
    raise ValueError(f'no key {key!r}; got keys {sorted(map(str, row))}')
  rest, prompt = formats.opening(row, key, has_template)
  answer: Any = row.get(_ANSWER_KEYS.get(key, ''))
  read = {key, 'system', *(('input',) if key == 'instruction' else ())}
  if isinstance(prompt, str):
    formats.refuse_shared(rest, key)
    text = answer if isinstance(answer, str) else None
    return Prompt(prompt, text, frozenset(read))
  messages = list(prompt.messages)
  if key in ('messages', 'conversations') and messages and _role(messages[-1]) == 'assistant':
    answer = messages_lib.check(messages.pop(), f'{key}[{len(messages)}]')
  if not messages:
    raise ValueError('there is no message before the answer')
  asked = formats.chat(rest, [prompt._replace(messages=messages)])
  if asked.messages[-1]['role'] == 'assistant':
    raise ValueError(
      'the prompt ends with an assistant message, expected one that the assistant answers'
    )
  text = answer[-1] if isinstance(answer, list) and answer else answer
  text = text.get('content') if isinstance(text, Mapping) else text
  text = text if isinstance(text, str) else None
  return Prompt(asked, text, frozenset(read | {*SHARED}))


def ends_with_assistant(row: Mapping, form: str | None = None) -> bool:
  """Returns whether the last message of a row is the assistant's.

  Raises:
    ValueError: as `prompt_key`.
  """
  value = row.get(prompt_key(row, form))
  return isinstance(value, list) and bool(value) and _role(value[-1]) == 'assistant'


def _role(message: Any) -> str | None:
  """Returns the role of an unchecked message; None for an unusable message."""
  try:
    return messages_lib.check(message, '')['role']
  except ValueError:
    return None


def with_answer(asked: Chat | str, answer: str) -> Chat | Completion:
  """Returns a prompt with a text as its answer."""
  if isinstance(asked, str):
    return Completion(asked, answer)
  messages = (*asked.messages, {'role': 'assistant', 'content': answer})
  return dataclasses.replace(asked, messages=messages)
