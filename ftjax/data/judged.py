"""Rows that say which answer is better, or how good one is: their formats, tokens and lengths.

A row has one of three shapes. A 'pair' has two answers to one prompt; it becomes one example, the
prompt with the chosen answer followed by the prompt with the rejected one, and the place of the
border is stored with it. A 'label' is an answer judged good or bad, a 'score' an answer with a
number. Prompts of both sides of a pair are the same ids, whatever is cut.

`cache.py` stores what stands here, `batches.py` lays it out in rows."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ftjax.data import encode as encode_lib
from ftjax.data import formats
from ftjax.data.encode import Encoded
from ftjax.data.formats import Bad, Chat, Completion
from ftjax.data.tokenizer import Tokenizer

SHAPES = ('pair', 'label', 'score')
Answer = Chat | Completion


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two answers to one prompt; `margin`: by how much the chosen one is better, in rewards."""

  chosen: Answer
  rejected: Answer
  margin: float


@dataclasses.dataclass(frozen=True)
class Judged:
  """An answer and its value: a score, or 1 for good and 0 for bad."""

  answer: Answer
  value: float


def _number(row: Mapping, key: str, usual: float | None = None) -> float:
  value = row.get(key, usual)
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise ValueError(f'{key!r} is {value!r}, expected a finite number')
  return float(value)


def _label(row: Mapping) -> float:
  value = row.get('label')
  if not isinstance(value, bool) and value not in (0, 1):
    raise ValueError(f"'label' is {value!r}, expected true (good) or false (bad)")
  return float(value)


def _answer(prompt: Any, answer: Any, key: str) -> Answer:
  """A prompt and its answer, both texts or both messages."""
  if isinstance(prompt, str) and isinstance(answer, str):
    return formats.parse({'prompt': prompt, 'completion': answer}, 'prompt_completion', True)
  if isinstance(prompt, list) and isinstance(answer, list | dict):
    answer = [answer] if isinstance(answer, dict) else answer
    if len(answer) != 1:
      raise ValueError(f'{key!r} has {len(answer)} messages after the prompt, expected one answer')
    found = formats.parse({'messages': prompt + answer}, 'messages', True)
    if found.messages[-1]['role'] != 'assistant':
      raise ValueError(f'{key!r} ends with a message of {found.messages[-1]["role"]!r}')
    return found
  kinds = type(prompt).__name__, type(answer).__name__
  raise ValueError(f"'prompt' is {kinds[0]} and {key!r} is {kinds[1]}; expected texts, or messages")


_TURN = re.compile(r'\n\n(Human|Assistant):')


def _dialogue(text: str, key: str) -> list[dict[str, str]]:
  """Messages of a text like '\\n\\nHuman: ...\\n\\nAssistant: ...' (Bai et al. 2022, HH-RLHF)."""
  start, *parts = _TURN.split(text)
  if start.strip() or not parts:
    raise ValueError(f"{key!r} is a text but no dialogue of '\\n\\nHuman:' and '\\n\\nAssistant:'")
  roles = {'Human': 'user', 'Assistant': 'assistant'}
  said = zip(parts[::2], parts[1::2], strict=True)
  return [{'role': roles[who], 'content': content.strip()} for who, content in said]


def _sharegpt(turns: Any, key: str) -> list[dict]:
  """Messages of sharegpt turns, which are checked later."""
  turns = [turns] if isinstance(turns, dict) else turns
  if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
    raise ValueError(f'{key!r} is no list of turns {{"from": ..., "value": ...}}')
  roles = {'system': 'system', 'human': 'user', 'gpt': 'assistant'}
  if unknown := [t.get('from') for t in turns if t.get('from') not in roles]:
    raise ValueError(f"{key!r}: 'from' is {unknown[0]!r}, expected one of {list(roles)}")
  return [{'role': roles[t['from']], 'content': t.get('value')} for t in turns]


def _from_pair(row: Mapping) -> Pair:
  chosen, rejected, prompt = row.get('chosen'), row.get('rejected'), row.get('prompt')
  if 'conversations' in row:
    prompt = _sharegpt(row['conversations'], 'conversations')
    chosen, rejected = _sharegpt(chosen, 'chosen'), _sharegpt(rejected, 'rejected')
  elif prompt is None:
    if isinstance(chosen, str) and isinstance(rejected, str):
      chosen, rejected = _dialogue(chosen, 'chosen'), _dialogue(rejected, 'rejected')
    if not (isinstance(chosen, list) and isinstance(rejected, list) and chosen):
      raise ValueError("without 'prompt', 'chosen' and 'rejected' must be lists of messages")
    prompt = chosen[:-1]
    if rejected[:-1] != prompt:
      raise ValueError("'chosen' and 'rejected' differ before their last message")
    chosen, rejected = chosen[-1:], rejected[-1:]
  sides = _answer(prompt, chosen, 'chosen'), _answer(prompt, rejected, 'rejected')
  return Pair(*sides, _number(row, 'margin', 0.0))


def _single(row: Mapping) -> Answer:
  if 'messages' not in row:
    return _answer(row.get('prompt'), row.get('completion'), 'completion')
  messages = row['messages']
  if not isinstance(messages, list) or not messages:
    raise ValueError("'messages' is no list of messages, or an empty one")
  return _answer(messages[:-1], messages[-1:], 'messages')


class _Format(NamedTuple):
  shape: str
  keys: tuple[str, ...]
  read: Callable[[Mapping], Pair | Judged]


_FORMATS = {
  'preference': _Format('pair', ('chosen', 'rejected'), _from_pair),
  'labelled': _Format('label', ('label',), lambda r: Judged(_single(r), _label(r))),
  'scored': _Format('score', ('score',), lambda r: Judged(_single(r), _number(r, 'score'))),
}
FORMATS = tuple(_FORMATS)


def parse(row: Mapping, shape: str, form: str | None) -> Pair | Judged:
  """A raw row as a pair or a judged answer.

  Args:
    row: the parsed row.
    shape: what the algorithm needs, one of SHAPES.
    form: the format that the config names, or None.

  Raises:
    ValueError: the row cannot be used; the message is the reason.
  """
  wanted = next(n for n, f in _FORMATS.items() if f.shape == shape)
  if form not in (None, wanted):
    raise ValueError(f'format {form!r} gives no {shape}; this algorithm reads {wanted!r} rows')
  lacking = [k for k in _FORMATS[wanted].keys if k not in row]
  if lacking:
    raise ValueError(
      f'no key {lacking[0]!r}, which {wanted!r} rows have; got {sorted(map(str, row))}'
    )
  return _FORMATS[wanted].read(row)


def encode(rows: Sequence[Pair | Judged], tokenizer: Tokenizer) -> list[list[Encoded] | Bad]:
  """Tokens of rows, the answers supervised: per row a list of one example, or Bad."""
  sides = [
    s for r in rows for s in ((r.chosen, r.rejected) if isinstance(r, Pair) else (r.answer,))
  ]
  found = iter(encode_lib.encode_answers(sides, tokenizer))
  out: list[list[Encoded] | Bad] = []
  for row in rows:
    if isinstance(row, Judged):
      answer = next(found)
      out.append(
        answer if isinstance(answer, Bad) else [dataclasses.replace(answer, value=row.value)]
      )
    else:
      out.append(_join(next(found), next(found), row.margin))
  return out


def _join(chosen: Encoded | Bad, rejected: Encoded | Bad, margin: float) -> list[Encoded] | Bad:
  """A pair as one example."""
  for name, side in (('chosen', chosen), ('rejected', rejected)):
    if isinstance(side, Bad):
      return Bad(f'{name}: {side.reason}')
  n = _prompt_tokens(chosen)
  if _prompt_tokens(rejected) != n or not np.array_equal(chosen.tokens[:n], rejected.tokens[:n]):
    return Bad('the prompt has no token that both answers could follow')
  pair = Encoded(
    tokens=np.concatenate([chosen.tokens, rejected.tokens]),
    supervised=np.concatenate([chosen.supervised, rejected.supervised]),
    is_chat=chosen.is_chat,
    straddled=chosen.straddled + rejected.straddled,
    boundary=len(chosen.tokens),
    value=margin,
  )
  return [pair]


def _prompt_tokens(side: Encoded) -> int:
  return int(side.supervised.argmax())


def over(pair: Encoded, seq_len: int) -> tuple[bool, bool]:
  """Which sides of a pair that does not fit are longer than half a row: (chosen, rejected)."""
  n = len(pair.tokens)
  half = seq_len // 2
  return n > seq_len and pair.boundary > half, n > seq_len and n - pair.boundary > half


def is_identical(pair: Encoded) -> bool:
  """Returns whether both sides of a pair are the same tokens, which no loss can tell apart."""
  return np.array_equal(pair.tokens[: pair.boundary], pair.tokens[pair.boundary :])


def fit(pair: Encoded, seq_len: int, on_overlength: str) -> Encoded | None:
  """Applies the over-length policy to a pair, whose two sides share a row of `seq_len` tokens.

  'truncate_left' takes the same tokens from the beginning of both prompts, no more than needed.
  'truncate_right' shortens the end of the longer answer, or of both down to half a row.

  Returns:
    the pair, a shorter one, or None where it is dropped: by the policy 'drop', or because an answer
    or the whole prompt would be lost.

  Raises:
    ValueError: policy 'error' and a longer pair.
  """
  n, a, prompt = len(pair.tokens), pair.boundary, _prompt_tokens(pair)
  b = n - a
  if n <= seq_len:
    return pair
  if on_overlength == 'drop':
    return None
  if on_overlength == 'error':
    raise ValueError(
      f'{a} tokens with the chosen and {b} with the rejected answer, together more than '
      f'seq_len={seq_len}; raise seq_len, or set data.on_overlength to '
      "'drop', 'truncate_left' or 'truncate_right'"
    )
  if on_overlength == 'truncate_left':
    cut = -(-(n - seq_len) // 2)
    if cut >= prompt:
      return None
    kept = [slice(cut, a), slice(a + cut, n)]
  else:
    half = seq_len // 2
    keep_a = min(a, max(half, seq_len - b))
    keep_b = min(b, max(half, seq_len - a))
    if min(keep_a, keep_b) <= prompt:
      return None
    kept = [slice(0, keep_a), slice(a, a + keep_b)]
  tokens = [pair.tokens[k] for k in kept]
  return dataclasses.replace(
    pair,
    tokens=np.concatenate(tokens),
    supervised=np.concatenate([pair.supervised[k] for k in kept]),
    boundary=len(tokens[0]),
  )
