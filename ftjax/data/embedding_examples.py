"""Tokenizes groups of texts that are to have vectors, and fits them to the sequence length.

The texts of a group stand one after the other, each with the special tokens that the tokenizer adds
to one text. `Encoded.labels` is the number of the text that a token is of.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from ftjax.data.embedding_rows import TextGroup
from ftjax.data.encode import Encoded
from ftjax.data.formats import Bad
from ftjax.data.tokenizer import Tokenizer


def encode(rows: Sequence[TextGroup], tokenizer: Tokenizer) -> list[list[Encoded] | Bad]:
  """Tokenizes rows: per row a list of one example, or Bad.

  `Encoded.supervised` marks the tokens of the texts, and not those that the tokenizer adds.
  """
  found = iter(tokenizer.encode_batch([text for row in rows for text in row.texts]))
  out: list[list[Encoded] | Bad] = []
  for row in rows:
    parts = [next(found) for _ in row.texts]
    if empty := [i for i, part in enumerate(parts) if not len(part)]:
      out.append(Bad(f'text {empty[0] + 1} of the row has no token'))
    else:
      out.append([dataclasses.replace(_joined(parts, tokenizer), value=row.score)])
  return out


def _joined(parts: Sequence[np.ndarray], tokenizer: Tokenizer) -> Encoded:
  tokens, sequence, labels = [], [], []
  for number, part in enumerate(parts):
    for ids, own in tokenizer.around([part])[0]:
      tokens.append(ids)
      sequence.append(np.full(len(ids), number if own >= 0 else -1, np.int8))
      labels.append(np.full(len(ids), number, np.int32))
  joined = np.concatenate(sequence)
  return Encoded(
    tokens=np.concatenate(tokens).astype(np.int32),
    supervised=joined >= 0,
    is_chat=False,
    sequence=joined,
    labels=np.concatenate(labels),
  )


def fit(example: Encoded, seq_len: int, on_overlength: str) -> Encoded | None:
  """Applies the over-length policy to the texts of a group, which share `seq_len` tokens: the
  longest ones lose tokens until all have room, those around a text stay.

  'truncate_right' removes the ends of texts, 'truncate_left' their beginnings.

  Returns:
    the example, a shorter one, or None where it is dropped.

  Raises:
    ValueError: policy 'error' and a longer example, or no room for a token of each text.
  """
  over = len(example.tokens) - seq_len
  if over <= 0:
    return example
  if on_overlength == 'drop':
    return None
  count = int(example.labels[-1]) + 1
  if on_overlength == 'error':
    raise ValueError(
      f'{count} texts of {len(example.tokens)} tokens together, more than seq_len={seq_len}; raise '
      "seq_len, or set data.on_overlength to 'drop', 'truncate_left' or 'truncate_right'"
    )
  places = [np.flatnonzero(example.sequence == number) for number in range(count)]
  room = sum(map(len, places)) - over
  if room < count:
    raise ValueError(
      f'seq_len={seq_len} has no room for a token of each of {count} texts; raise it'
    )
  kept = np.ones(len(example.tokens), bool)
  for place, size in zip(places, _levelled([len(p) for p in places], room), strict=True):
    gone = place[size:] if on_overlength == 'truncate_right' else place[: len(place) - size]
    kept[gone] = False
  return dataclasses.replace(
    example,
    tokens=example.tokens[kept],
    supervised=example.supervised[kept],
    sequence=example.sequence[kept],
    labels=example.labels[kept],
  )


def _levelled(sizes: Sequence[int], room: int) -> list[int]:
  """Returns how many tokens of each text are kept: at most a level that all share."""
  out, left = [0] * len(sizes), len(sizes)
  for i in sorted(range(len(sizes)), key=sizes.__getitem__):
    out[i] = min(sizes[i], room // left)
    room, left = room - out[i], left - 1
  return out


def text_id(tokens: np.ndarray) -> tuple[float, float]:
  """Returns two whole numbers below 2^24, which float32 holds, that stand for the tokens of a text:
  those of equal texts are equal, and those of other texts differ but for one in 2^48.
  """
  digest = hashlib.blake2b(np.ascontiguousarray(tokens, '<i4').tobytes(), digest_size=6).digest()
  return float(int.from_bytes(digest[:3], 'little')), float(int.from_bytes(digest[3:], 'little'))
