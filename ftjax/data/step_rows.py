"""Rows of solutions in steps, each step with a label: parsed, tokenized, fitted to the sequence
length. The columns are those of TRL's stepwise supervision: prompt, completions, labels.

The tokens are the prompt's, then of each step its own and the separator's, each tokenized apart, as
TRL's PRMTrainer joins them; the label of a step stands at the last token of its separator."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftjax.data import encode as encode_lib
from ftjax.data import row_numbers
from ftjax.data.encode import Encoded
from ftjax.data.formats import Bad, Chat
from ftjax.data.messages import check, check_order, parse_json, read_text
from ftjax.data.tokenizer import Tokenizer

SHAPE = 'steps'
# A label is kept as a whole number: the probability that the step is right, in millionths.
WHOLE = 1_000_000
_NONE = -1  # a token without a label


@dataclasses.dataclass(frozen=True)
class Steps:
  """A prompt, a text or messages, with the steps of a solution, and of each step the probability
  that it is right.
  """

  prompt: str | Chat
  steps: tuple[str, ...]
  values: tuple[float, ...]


def _list(row: Mapping, key: str) -> list:
  value = row.get(key)
  if isinstance(value, str) and value.strip().startswith('['):
    with contextlib.suppress(ValueError):
      value = parse_json(value, key, 'a list')
  if value is None:
    raise ValueError(f'no {key!r}; expected the columns prompt, completions and labels')
  if not isinstance(value, list):
    raise ValueError(f'{key!r} is {type(value).__name__}, expected a list')
  return value


def read_prompt(row: Mapping) -> str | Chat:
  """Returns the prompt of a row, a text or messages.

  Raises:
    ValueError: there is none, or it is neither.
  """
  if not isinstance(row.get('prompt'), list):
    return read_text(row, 'prompt')
  messages = [check(m, f'prompt[{i}]') for i, m in enumerate(row['prompt'])]
  check_order(messages)
  return Chat(tuple(messages), None)


def read_steps(row: Mapping) -> tuple[str, ...]:
  """Returns the steps of a row.

  Raises:
    ValueError: there are none, or one is no text.
  """
  steps = _list(row, 'completions')
  if not steps:
    raise ValueError("'completions' is empty, expected the steps of a solution")
  for i, step in enumerate(steps):
    read_text({f'completions[{i}]': step}, f'completions[{i}]')
  return tuple(steps)


def _value(label: Any, place: str) -> float:
  found = float(label) if isinstance(label, bool) else row_numbers.finite(label)
  if found is None or not 0 <= found <= 1:
    raise ValueError(f'{place} is {label!r}, expected true or false, or a number from 0 to 1')
  return found


def parse(row: Mapping) -> Steps:
  """Parses a raw row.

  Raises:
    ValueError: the row is unusable; the message is the reason.
  """
  prompt, steps, labels = read_prompt(row), read_steps(row), _list(row, 'labels')
  if len(labels) != len(steps):
    raise ValueError(f'{len(steps)} completions and {len(labels)} labels; expected one for each')
  return Steps(prompt, steps, tuple(_value(x, f'labels[{i}]') for i, x in enumerate(labels)))


def unread(row: Mapping) -> set[str]:
  """Returns the columns of a row that are not null and that `parse` does not read."""
  known = {'prompt', 'completions', 'labels', *row_numbers.NUMBERS, 'id', 'group'}
  return {str(k) for k, v in row.items() if v is not None and k not in known}


def encode(
  rows: Sequence[Steps], tokenizer: Tokenizer, separator: str
) -> list[list[Encoded] | Bad]:
  """Tokenizes rows: per row a list of one example, or Bad. `Encoded.supervised` marks the ends of
  the steps.
  """
  end = tokenizer.encode_batch([separator])[0]
  found = iter(tokenizer.encode_batch([step for row in rows for step in row.steps]))
  out: list[list[Encoded] | Bad] = []
  for row in rows:
    steps = [next(found) for _ in row.steps]
    if not len(end):
      out.append(Bad(f'prm.separator={separator!r} has no token'))
      continue
    if empty := [i for i, ids in enumerate(steps) if not len(ids)]:
      out.append(Bad(f'completions[{empty[0]}] has no token'))
      continue
    try:
      prompt = encode_lib.encode_prompt(row.prompt, tokenizer)
    except ValueError as error:
      out.append(Bad(str(error)))
      continue
    out.append([joined(prompt, steps, end, row.values, tokenizer)])
  return out


def joined(
  prompt: Sequence[int],
  steps: Sequence[np.ndarray],
  end: np.ndarray,
  values: Sequence[float],
  tokenizer: Tokenizer,
) -> Encoded:
  """Returns the example of the ids of a prompt, of steps and of what follows each, with the
  probability that each step is right.
  """
  pieces = [np.asarray(prompt), *(np.concatenate([ids, end]) for ids in steps)]
  tokens = np.concatenate(pieces).astype(np.int32)
  ends = np.cumsum([len(p) for p in pieces])[1:] - 1
  labels = np.full(len(tokens), _NONE, np.int32)
  labels[ends] = np.rint(np.array(values) * WHOLE).astype(np.int32)
  bos = int(len(tokens) > 0 and tokens[0] == tokenizer.bos_id)
  return Encoded(tokens, labels >= 0, False, bos=bos, labels=labels)


def fit(example: Encoded, seq_len: int, on_overlength: str) -> Encoded | None:
  """Applies the over-length policy. 'truncate_right' removes the last steps, 'truncate_left' the
  beginning after BOS, with the labels of what is removed.

  Returns:
    the example, a shorter one, or None where it is dropped or no label is left.

  Raises:
    ValueError: policy 'error' and a longer example.
  """
  n = len(example.tokens)
  if n <= seq_len:
    return example
  if on_overlength == 'drop':
    return None
  if on_overlength == 'error':
    raise ValueError(
      f'{n} tokens, more than seq_len={seq_len}; raise seq_len, or set data.on_overlength to '
      "'drop', 'truncate_left' or 'truncate_right'"
    )
  kept = np.arange(seq_len)
  if on_overlength == 'truncate_left':
    kept[example.bos :] += n - seq_len
  labels = example.labels[kept]
  if not (labels >= 0).any():
    return None
  return dataclasses.replace(
    example, tokens=example.tokens[kept], supervised=labels >= 0, labels=labels
  )
