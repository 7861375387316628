"""Tokenizes pairs, labeled answers and scored answers, and fits them to the sequence length.

A 'pair' has two answers to one prompt. It becomes one example: the prompt with the chosen answer,
followed by the prompt with the rejected one, and the index of the border. A 'label' is an answer
with good or bad, a 'score' an answer with a number. The prompts of both sides of a pair have the
same ids, also after truncation.

`preference_rows.py` parses the rows, `token_cache.py` stores the examples, `batches.py` arranges
them in batches.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ftjax.data import encode as encode_lib
from ftjax.data.encode import Encoded
from ftjax.data.formats import Bad
from ftjax.data.preference_rows import LabeledExample, Pair
from ftjax.data.tokenizer import Tokenizer


def encode(
  rows: Sequence[Pair | LabeledExample], tokenizer: Tokenizer
) -> list[list[Encoded] | Bad]:
  """Tokenizes rows, with the answers supervised: per row a list of one example, or Bad."""
  sides = [
    s for r in rows for s in ((r.chosen, r.rejected) if isinstance(r, Pair) else (r.answer,))
  ]
  found = iter(encode_lib.encode_answers(sides, tokenizer))
  out: list[list[Encoded] | Bad] = []
  for row in rows:
    if isinstance(row, LabeledExample):
      answer = next(found)
      out.append(
        answer if isinstance(answer, Bad) else [dataclasses.replace(answer, value=row.value)]
      )
    else:
      out.append(_join(next(found), next(found), row.margin))
  return out


def _join(chosen: Encoded | Bad, rejected: Encoded | Bad, margin: float) -> list[Encoded] | Bad:
  """Joins the sides of a pair into one example."""
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
    boundary_tokens=chosen.boundary_tokens + rejected.boundary_tokens,
    boundary=len(chosen.tokens),
    value=margin,
    unrendered=tuple(dict.fromkeys(chosen.unrendered + rejected.unrendered)),
    bos=min(chosen.bos, n),
    head=min(chosen.head, rejected.head, n),
  )
  return [pair]


def _prompt_tokens(side: Encoded) -> int:
  return int(side.supervised.argmax())


def over(pair: Encoded, seq_len: int) -> tuple[bool, bool]:
  """Returns whether each side of a too long pair exceeds half of `seq_len`: (chosen, rejected)."""
  n = len(pair.tokens)
  half = seq_len // 2
  return n > seq_len and pair.boundary > half, n > seq_len and n - pair.boundary > half


def is_identical(pair: Encoded) -> bool:
  """Returns whether both sides of a pair have the same tokens, and so no preference."""
  return np.array_equal(pair.tokens[: pair.boundary], pair.tokens[pair.boundary :])


def fit(pair: Encoded, seq_len: int, on_overlength: str) -> Encoded | None:
  """Applies the over-length policy to a pair, whose two sides share `seq_len` tokens.

  'truncate_left' removes the same tokens from both prompts, no more than needed: those after BOS
  or, where enough follow, after the system turn (`encode.head_length`).
  'truncate_right' removes the end of the longer answer, or of both down to half of `seq_len`.

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
    heads = (encode_lib.head_length(pair, seq_len // 2), pair.bos)
    head = next((h for h in heads if cut < prompt - h), None)
    if head is None:
      return None
    kept = [
      np.r_[start : start + head, start + head + cut : end] for start, end in ((0, a), (a, n))
    ]
  else:
    half = seq_len // 2
    keep_a = min(a, max(half, seq_len - b))
    keep_b = min(b, max(half, seq_len - a))
    if min(keep_a, keep_b) <= prompt:
      return None
    head = min(pair.head, prompt)
    kept = [np.r_[0:keep_a], np.r_[a : a + keep_b]]
  tokens = [pair.tokens[k] for k in kept]
  return dataclasses.replace(
    pair,
    tokens=np.concatenate(tokens),
    supervised=np.concatenate([pair.supervised[k] for k in kept]),
    boundary=len(tokens[0]),
    head=head,
  )
