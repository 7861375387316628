"""Tokenizes texts with labels, and fits them to the sequence length.

A text has the special tokens that the tokenizer's own post-processor adds, as transformers gives it
to a classifier. Labels are numbers beside the tokens: the label of a text stands at its first
token, several labels at its first tokens, and those of words at their first sub-words.

`annotated_rows.py` parses the rows, `token_cache.py` stores the examples, `batches.py` arranges
them in batches.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ftjax.data import step_rows
from ftjax.data.annotated_rows import Annotation, LabeledText, TaggedWords
from ftjax.data.encode import Encoded
from ftjax.data.formats import Bad
from ftjax.data.step_rows import Steps
from ftjax.data.tokenizer import Tokenizer

NONE = -1  # a token without a label


def encode(
  rows: Sequence[LabeledText | TaggedWords | Steps],
  tokenizer: Tokenizer,
  annotation: Annotation,
  seq_len: int = 0,
) -> list[list[Encoded] | Bad]:
  """Tokenizes rows: per row a list of one example, or Bad.

  A text without labels becomes several examples where it has more than `seq_len` tokens with those
  around it: parts of equal lengths, nothing left out; 0: one.

  `Encoded.supervised` marks the tokens of the texts, and not those that the tokenizer adds.
  """
  if annotation.kind == 'masked':
    return _encode_documents(rows, tokenizer, seq_len)
  if annotation.kind == step_rows.SHAPE:
    return step_rows.encode(rows, tokenizer, annotation.separator)
  if rows and isinstance(rows[0], TaggedWords):
    return _encode_words(rows, tokenizer, annotation)
  return _encode_texts(rows, tokenizer, annotation.kind)


def _encode_texts(
  rows: Sequence[LabeledText], tokenizer: Tokenizer, kind: str
) -> list[list[Encoded] | Bad]:
  found = iter(tokenizer.encode_batch([text for row in rows for text in row.texts]))
  out: list[list[Encoded] | Bad] = []
  for row in rows:
    parts = [next(found) for _ in row.texts]
    if empty := [i for i, part in enumerate(parts) if not len(part)]:
      out.append(Bad(f'text {empty[0] + 1} of the row has no token'))
      continue
    example = _joined(parts, tokenizer)
    labels = np.full(len(example.tokens), NONE, np.int32)
    value = 0.0
    if kind in ('single', 'multi'):
      if len(row.values) > len(labels):
        out.append(Bad(f'{len(row.values)} labels of a text of {len(labels)} tokens'))
        continue
      labels[: len(row.values)] = row.values
    else:
      value = row.values[0]
    out.append([dataclasses.replace(example, labels=labels, value=value)])
  return out


def _encode_documents(
  rows: Sequence[LabeledText], tokenizer: Tokenizer, seq_len: int
) -> list[list[Encoded] | Bad]:
  around = len(tokenizer.prefix_ids) + len(tokenizer.suffix_ids)
  out: list[list[Encoded] | Bad] = []
  for ids in tokenizer.encode_batch([row.texts[0] for row in rows]):
    if not len(ids):
      out.append(Bad('the text of the row has no token'))
      continue
    room = max(seq_len - around, 1) if seq_len else len(ids)
    parts = np.array_split(ids, -(-len(ids) // room))
    examples = [_joined([part], tokenizer) for part in parts]
    out.append(
      [
        dataclasses.replace(e, labels=np.where(e.sequence >= 0, e.tokens, NONE).astype(np.int32))
        for e in examples
      ]
    )
  return out


def _joined(parts: Sequence[np.ndarray], tokenizer: Tokenizer) -> Encoded:
  """Returns one or two texts with the tokens around them, without labels."""
  pieces, second = tokenizer.around(parts)
  sequence = np.concatenate([np.full(len(ids), number, np.int8) for ids, number in pieces])
  return Encoded(
    tokens=np.concatenate([ids for ids, _ in pieces]).astype(np.int32),
    supervised=sequence >= 0,
    is_chat=False,
    boundary=second,
    sequence=sequence,
  )


def _encode_words(
  rows: Sequence[TaggedWords], tokenizer: Tokenizer, annotation: Annotation
) -> list[list[Encoded] | Bad]:
  """Tokenizes words joined by spaces: then each tokenizer sees them as in a text of its own."""
  later = _continued(annotation)
  texts = [' '.join(row.words) for row in rows]
  out: list[list[Encoded] | Bad] = []
  for row, (ids, _, ends) in zip(rows, tokenizer.encode_spans(texts), strict=True):
    sizes = np.array([len(w) for w in row.words])
    begins = np.cumsum(sizes + 1) - sizes - 1
    # The word of each token: that of its last character, since a token may begin with the space.
    word = np.searchsorted(begins, np.maximum(ends - 1, 0), 'right') - 1
    is_first = np.r_[True, word[1:] != word[:-1]] if len(word) else np.zeros(0, bool)
    if lost := sorted({*range(len(row.words))} - {*word.tolist()}):
      out.append(
        Bad(f'word {lost[0]}, {row.words[lost[0]]!r}, has no token of its own, so none its label')
      )
      continue
    tags = np.array(row.tags, np.int32)[word]
    example = _joined([ids], tokenizer)
    labels = np.full(len(example.tokens), NONE, np.int32)
    labels[example.sequence >= 0] = np.where(is_first, tags, later[tags])
    out.append([dataclasses.replace(example, labels=labels)])
  return out


def _continued(annotation: Annotation) -> np.ndarray:
  """Returns the label of the further sub-words of a word by that of the word, int32[R]: an entity
  that begins, B-X, continues as I-X.
  """
  names = annotation.names
  if not annotation.all_subwords:
    return np.full(len(names), NONE, np.int32)
  inside = {name: number for number, name in enumerate(names)}
  found = [
    inside.get(f'I-{name[2:]}', number) if name.startswith('B-') else number
    for number, name in enumerate(names)
  ]
  return np.array(found, np.int32)


def fit(example: Encoded, seq_len: int, on_overlength: str, shape: str) -> Encoded | None:
  """Applies the over-length policy: removes tokens of the texts, never those around them. Of two
  texts the longer one is shortened first, as the `tokenizers` library's longest_first does.

  'truncate_right' removes their ends, 'truncate_left' their beginnings.

  Returns:
    the example, a shorter one, or None where it is dropped.

  Raises:
    ValueError: policy 'error' and a longer example, or no room for any text.
  """
  if shape == step_rows.SHAPE:
    return step_rows.fit(example, seq_len, on_overlength)
  over = len(example.tokens) - seq_len
  if over <= 0:
    return example
  if on_overlength == 'drop':
    return None
  if on_overlength == 'error':
    raise ValueError(
      f'{len(example.tokens)} tokens, more than seq_len={seq_len}; raise seq_len, or set '
      "data.on_overlength to 'drop', 'truncate_left' or 'truncate_right'"
    )
  places = [np.flatnonzero(example.sequence == part) for part in (0, 1)]
  sizes = [len(p) for p in places]
  if over >= sum(sizes):
    raise ValueError(f'seq_len={seq_len} has no room beside the tokens around a text; raise it')
  kept = np.ones(len(example.tokens), bool)
  for place, size in zip(places, _longest_first(*sizes, sum(sizes) - over), strict=True):
    gone = place[size:] if on_overlength == 'truncate_right' else place[: len(place) - size]
    kept[gone] = False
  labels, left = example.labels, int(kept.sum())
  if shape == 'class':  # they stand at the beginning, whichever tokens go
    if (labels[left:] != NONE).any():
      raise ValueError(f'more labels than seq_len={seq_len} tokens')
    labels = labels[:left]
  else:
    labels = labels[kept]
  return dataclasses.replace(
    example,
    tokens=example.tokens[kept],
    supervised=example.supervised[kept],
    sequence=example.sequence[kept],
    labels=labels,
    boundary=int(kept[: example.boundary].sum()),
  )


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
  """Returns how many tokens of each of two texts are kept."""
  if not second:
    return min(first, room), 0
  short, long = sorted((first, second))
  if 2 * short > room:
    short, long = room // 2, room // 2 + room % 2
  else:
    long = min(long, room - short)
  return (short, long) if first <= second else (long, short)
