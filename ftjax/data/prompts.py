"""Prompts to sample from, with the columns of their rows for the rewards.

A row has `prompt` (a text, or messages) or `messages`, and any other columns. Messages that end
with an assistant's turn, and `prompt` with `completion`, are rows of supervised tuning: the prompt
is what stands before, and the text of the answer becomes the column `answer` unless there is one.
All prompts are kept in memory. `schedule.py` orders them, one a row.
"""

import dataclasses
import hashlib
import itertools
import json
from typing import Any

import numpy as np

from ftjax.data import encode, formats, sources
from ftjax.data.formats import Bad, Chat
from ftjax.data.sources import Spec
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError, DataError

ON_OVERLENGTH = ('error', 'drop')
_MAX_REPORTED = 20  # bad rows listed in one message


@dataclasses.dataclass(frozen=True)
class Prompt:
  """ids: what the model reads. columns: of its row, JSON values; what was the prompt is not one of
  them. place: 'file.jsonl:17'. said: the prompt as text, or as messages.
  """

  ids: list[int]
  columns: dict[str, Any]
  place: str
  said: str | list[dict[str, Any]] = ''


@dataclasses.dataclass(frozen=True)
class Prompts:
  """The prompts of one source, in its order.

  dropped: rows left out for their length. fingerprint: sha256 hex of ids and columns in order.
  """

  name: str
  rows: tuple[Prompt, ...]
  dropped: int
  fingerprint: str

  @property
  def lengths(self) -> np.ndarray:
    """int32[n], tokens of each prompt."""
    return np.array([len(p.ids) for p in self.rows], np.int32)

  @property
  def columns(self) -> tuple[str, ...]:
    """Names of the columns that every row has, sorted."""
    return tuple(sorted(set.intersection(*(set(p.columns) for p in self.rows))))


def _split(messages: list) -> tuple[list, str | None]:
  """(the conversation up to where the assistant speaks, the answer that stood there)."""
  last = messages[-1] if messages else None
  if not isinstance(last, dict) or last.get('role') != 'assistant':
    return messages, None
  said = last.get('content')
  return messages[:-1], said if isinstance(said, str) else None


def _parse(row: dict[str, Any]) -> tuple[str | list, dict[str, Any]]:
  """(prompt, columns) of a raw row."""
  columns = {k: v for k, v in row.items() if k not in ('prompt', 'messages')}
  if 'prompt' in row:
    prompt, answer = row['prompt'], row.get('completion')
    if not isinstance(prompt, str | list):
      raise ValueError(f"'prompt' is {type(prompt).__name__}, expected a text or messages")
  elif 'messages' in row:
    if not isinstance(row['messages'], list):
      raise ValueError(f"'messages' is {type(row['messages']).__name__}, expected a list")
    prompt, answer = _split(row['messages'])
  else:
    raise ValueError(f"neither 'prompt' nor 'messages'; got keys {sorted(map(str, row))}")
  if isinstance(answer, list):
    answer = _split(answer)[1]
  if isinstance(answer, str):
    columns.setdefault('answer', answer)
  return prompt, columns


def _encode(row: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], dict[str, Any], Any]:
  """(ids, columns, the prompt as it was said)."""
  prompt, columns = _parse(row)
  said = prompt
  if isinstance(prompt, list):
    if not prompt:
      raise ValueError('there is no message before the answer')
    messages = formats.parse_prompt(prompt)
    if messages[-1]['role'] == 'assistant':
      raise ValueError('the prompt ends with a turn of the assistant, who is to speak next')
    tools = row.get('tools') or None
    if tools is not None and not isinstance(tools, list):
      raise ValueError(f"'tools' is {type(tools).__name__}, expected a list")
    prompt = Chat(tuple(messages), tuple(tools) if tools else None)
  ids = encode.encode_prompt(prompt, tokenizer)
  if not ids:
    raise ValueError('the prompt has no tokens')
  return ids, columns, said


def read(
  spec: Spec, tokenizer: Tokenizer, room: int, on_overlength: str, limit: int | None = None
) -> Prompts:
  """All prompts of a source.

  Args:
    spec: a source; formats other than those above are refused.
    tokenizer: with a template where there are messages.
    room: tokens that a prompt may have.
    on_overlength: 'error' or 'drop'.
    limit: most rows that are read; None: all.

  Raises:
    ConfigError: another policy, or a format that holds no prompts.
    DataError: rows that cannot be used, by file and line; no prompt left.
  """
  if on_overlength not in ON_OVERLENGTH:
    raise ConfigError(
      f'data.on_overlength={on_overlength!r}; prompts are not cut, expected one of {ON_OVERLENGTH}'
    )
  if spec.format not in (None, 'messages', 'prompt_completion'):
    raise ConfigError(
      f"data: {spec.path}::{spec.format} holds no prompts; expected rows with 'prompt' or "
      "'messages'"
    )
  names, rows, bad, dropped = sources.source_names(spec), [], [], 0
  digest = hashlib.sha256(b'ftjax prompts 1\n')
  for number, line, row in itertools.islice(sources.scan(spec), limit):
    place = f'{names[number]}:{line}'
    try:
      if isinstance(row, Bad):
        raise ValueError(row.reason)
      ids, columns, said = _encode(row, tokenizer)
      if len(ids) > room and on_overlength == 'error':
        raise ValueError(
          f'a prompt of {len(ids)} tokens leaves no room: {room} tokens beside rollout.max_tokens; '
          "raise seq_len or set data.on_overlength='drop'"
        )
    except ValueError as error:
      bad.append(f'{place}: {error}')
      if len(bad) == _MAX_REPORTED:
        break
      continue
    if len(ids) > room:
      dropped += 1
      continue
    rows.append(Prompt(ids, columns, place, said))
    digest.update(json.dumps([ids, columns], sort_keys=True, default=str).encode() + b'\n')
  if bad:
    raise DataError('rows that cannot be used:\n  ' + '\n  '.join(bad))
  if not rows:
    raise DataError(f'{spec.path}: no prompt in it ({dropped} were longer than {room} tokens)')
  return Prompts(spec.path, tuple(rows), dropped, digest.hexdigest())
