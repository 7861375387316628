"""Makes batches: tokens, labels, weights, segments and positions [B, T], and values [B].

Labels are shifted here, on the host. Segment ids are 1, 2, ... for the examples of a row and 0 for
padding, which no segment matches; positions start at 0 in every example. Padding has token 0;
supervision is decided by position alone, never by a token's id. Preference data have values. Tags
of words are labels that are not shifted; what a whole text is to be given is in `targets`
[B, S, numbers], by document. The texts of groups that are to have vectors are segments of their
own: text k of group g of K texts is segment g K + k + 1, and numbers may be missing.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from ftjax.data import embedding_examples
from ftjax.data.annotated_rows import SHAPES as ANNOTATED
from ftjax.data.order import Mixture
from ftjax.data.policy import TEXT_SHAPES
from ftjax.data.sides import Sides
from ftjax.data.token_cache import Corpus

Batch = dict[str, np.ndarray]

# Arrays of every batch, [B, T].
ARRAYS = ('tokens', 'labels', 'weights', 'segments', 'positions')


# Shapes of the arrays that a batch has for each document of a row: (S, ...), by name.
Documents = Mapping[str, tuple[int, ...]]


def empty(
  batch_size: int,
  seq_len: int,
  shape: str = 'text',
  columns: Iterable[str] = (),
  documents: Documents | None = None,
) -> Batch:
  """Creates a batch of padding.

  Arrays are int32 and float32 [B, T], float32[B] for `columns` and, where the shape of the examples
  (see token_cache.Corpus) is one of preference_rows.SHAPES, for `values`; float32[B, S, ...] for
  `documents`, and then float32[B, T] for `token_types`. Groups of texts have `row_numbers`
  float32[B], 0, 1, ...
  """
  by_row = (*(() if shape in ('text', *ANNOTATED) else ('values',)), *columns)
  numbers = {'row_numbers': np.arange(batch_size, dtype=np.float32)} if shape == 'texts' else {}
  out = {k: np.zeros((batch_size, *rest), np.float32) for k, rest in (documents or {}).items()}
  shape = (batch_size, seq_len)
  out |= {'token_types': np.zeros(shape, np.float32)} if documents else {}
  return (
    {k: np.zeros(batch_size, np.float32) for k in by_row}
    | numbers
    | out
    | {
      'tokens': np.zeros(shape, np.int32),
      'labels': np.zeros(shape, np.int32),
      'weights': np.zeros(shape, np.float32),
      'segments': np.zeros(shape, np.int32),
      'positions': np.zeros(shape, np.int32),
    }
  )


def fill_row(batch: Batch, row: int, examples: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
  """Writes examples (tokens, supervised) one after another into a row of padding.

  Raises:
    ValueError: the examples are longer than the row.
  """
  start, seq_len = 0, batch['tokens'].shape[1]
  for segment, (tokens, supervised) in enumerate(examples, 1):
    end = start + len(tokens)
    if end > seq_len:
      raise ValueError(
        f'fill_row: examples of {end} tokens or more in a row of {seq_len} (seq_len)'
      )
    batch['tokens'][row, start:end] = tokens
    batch['segments'][row, start:end] = segment
    batch['positions'][row, start:end] = np.arange(len(tokens))
    # The last token of an example predicts nothing: its successor is another document.
    batch['labels'][row, start : end - 1] = np.where(supervised[1:], tokens[1:], 0)
    batch['weights'][row, start : end - 1] = supervised[1:]
    start = end


def _mismatched(own, other, room: int) -> tuple[np.ndarray, np.ndarray]:
  """Joins the prompt of one example and the answer of another, up to `room` tokens.

  Examples are (tokens, supervised). KTO estimates its reference point with these pairs
  (losses/preference.py).
  """
  prompt, answer = own[0][: own[1].argmax()], other[0][other[1].argmax() :]
  tokens = np.concatenate([prompt, answer])[:room]
  return tokens, np.arange(len(tokens)) >= len(prompt)


def _weigh(batch: Batch, row: int, corpus: Corpus, ids: Sequence[int]) -> None:
  """Multiplies the weights of a row's examples with those of the corpus."""
  if corpus.weights is not None:
    factors = np.concatenate([[0.0], corpus.weights[list(ids)]]).astype(np.float32)
    batch['weights'][row] *= factors[batch['segments'][row]]


def _fill_top_tokens(batch: Batch, row: int, corpus: Corpus, ids: Sequence[int]) -> None:
  """Writes a teacher's likeliest tokens at the supervised positions of a row's examples."""
  start = 0
  for i in ids:
    supervised = corpus.example(i)[1]
    places = start + np.flatnonzero(supervised[1:])
    for name, values in corpus.top_tokens.read(i).items():
      batch[name][row, places] = values
    start += len(supervised)


def _fill_annotated(
  batch: Batch, row: int, corpus: Corpus, ids: Sequence[int], weighed: bool
) -> None:
  """Writes texts with labels into a row of padding; weighed: with the weights of the corpus."""
  fill_row(batch, row, [corpus.example(i) for i in ids])
  batch['weights'][row] = 0.0
  batch['labels'][row] = 0
  start = 0
  for number, i in enumerate(ids):
    labels, factor = corpus.labels(i), 1.0
    end = start + len(labels)
    if weighed and corpus.weights is not None:
      factor = corpus.weights[i]
    if corpus.shape != 'class':
      batch['labels'][row, start:end] = np.maximum(labels, 0)
      batch['weights'][row, start:end] = np.where(labels >= 0, factor, 0.0)
    else:
      batch['token_types'][row, start:end] = corpus.token_types(i)
      batch['document_weights'][row, number] = factor
      _fill_target(batch['targets'][row, number], labels[labels >= 0], corpus.value(i))
    start = end


def _fill_groups(batch: Batch, row: int, corpus: Corpus, ids: Sequence[int], weighed: bool) -> None:
  """Writes groups of texts into a row of padding, each text a segment with positions of its own;
  weighed: with the weights of the corpus.
  """
  with_ids = 'text_ids' in batch
  size, start = batch['text_ids'].shape[2] // 2 if with_ids else 2, 0
  for group, i in enumerate(ids):
    tokens, texts = corpus.example(i)[0], corpus.labels(i)
    end = start + len(tokens)
    begins = np.searchsorted(texts, np.arange(size))
    batch['tokens'][row, start:end] = tokens
    batch['segments'][row, start:end] = group * size + texts + 1
    batch['positions'][row, start:end] = np.arange(len(tokens)) - begins[texts]
    has_weight = weighed and corpus.weights is not None
    batch['document_weights'][row, group] = corpus.weights[i] if has_weight else 1.0
    if with_ids:
      for k in range(int(texts[-1]) + 1):
        own = embedding_examples.text_id(tokens[texts == k])
        batch['text_ids'][row, group, 2 * k : 2 * k + 2] = own
    else:
      batch['targets'][row, group] = corpus.value(i)
    start = end


def _fill_target(target: np.ndarray, labels: np.ndarray, value: float) -> None:
  """Writes what one text is to be given, float32[numbers]: 1 for each of its labels where there is
  a number for each label, else the number of its label, or its value.
  """
  if len(target) > 1:
    target[labels] = 1.0
  else:
    target[0] = labels[0] if len(labels) else value


def _fill(batch: Batch, row: int, corpus: Corpus, ids: Sequence[int], other: Callable) -> None:
  """Writes examples of a corpus into a row.

  A labeled example is followed by its prompt with the answer of the example `other()`.
  """
  parts = [side for i in ids for side in corpus.sides(i)]
  if corpus.shape == 'label':
    room = batch['tokens'].shape[1] - len(parts[0][0])
    parts.append(_mismatched(parts[0], other(), room))
  fill_row(batch, row, parts)
  if corpus.shape != 'text':
    batch['values'][row] = corpus.value(ids[0])
  for name, column in corpus.columns.items():
    batch[name][row] = column[ids[0]]
  if corpus.top_tokens is not None:
    _fill_top_tokens(batch, row, corpus, ids)


class Stream:
  """Training batches by step number; stateless."""

  def __init__(
    self,
    mixture: Mixture,
    corpora: Sequence[Corpus],
    seq_len: int,
    batch_size: int,
    documents: Documents | None = None,
    sides: Sides | None = None,
  ):
    """Joins a schedule with the corpora of its sources, in the same order; sides: of examples for
    an encoder-decoder.
    """
    self._documents, self._sides = documents, sides
    self._mixture, self._corpora = mixture, tuple(corpora)
    self.seq_len, self.batch_size = seq_len, batch_size

  def batch(self, step: int, rows: Collection[int] | None = None) -> Batch:
    """Returns the batch of a step; with `rows` the other rows are padding.

    Returns:
      tokens, labels, segments, positions int32[B, T], weights float32[B, T]; labels[t] is
      tokens[t + 1] where that token is supervised and of the same example, else 0. The weight is
      then 1, or that of the example (Corpus.weights), else 0. The sides of a pair are segments 1
      and 2 of its row. With Corpus.top_tokens also its arrays. For an encoder-decoder the arrays of
      sides.py.
    """
    first, sides = self._corpora[0], self._sides
    if sides is not None:
      batch = sides.empty(self.batch_size)
    else:
      sizes = (self.batch_size, self.seq_len)
      batch = empty(*sizes, first.shape, first.columns, self._documents)
    if first.top_tokens is not None:
      batch |= first.top_tokens.empty(self.batch_size, self.seq_len)
    for i in range(self.batch_size) if rows is None else sorted(rows):
      row = self._mixture.row(step * self.batch_size + i)
      other = functools.partial(self._first, step, (i + 1) % self.batch_size)
      corpus = self._corpora[row.source]
      if corpus.shape in ANNOTATED:
        fill = _fill_groups if corpus.shape == 'texts' else _fill_annotated
        fill(batch, i, corpus, row.examples, weighed=True)
        continue
      if sides is not None:
        sides.fill(batch, i, corpus, row.examples, row.epoch)
      else:
        _fill(batch, i, corpus, row.examples, other)
      if corpus.shape in TEXT_SHAPES:
        _weigh(batch, i, corpus, row.examples)
    return batch

  def _first(self, step: int, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first example of row i of a step."""
    row = self._mixture.row(step * self.batch_size + i)
    return self._corpora[row.source].example(row.examples[0])


def fill_in_order(
  lengths: np.ndarray, seq_len: int, packed: bool, most: int | None = None
) -> Iterator[list[int]]:
  """Yields the indices of consecutive examples that share a row, at most `most`."""
  row: list[int] = []
  used = 0
  for i, length in enumerate(lengths.tolist()):
    if row and (not packed or used + length > seq_len or len(row) == most):
      yield row
      row, used = [], 0
    row.append(i)
    used += length
  if row:
    yield row


def eval_batches(
  corpus: Corpus,
  batch_size: int,
  seq_len: int,
  *,
  packed: bool,
  wanted: Collection[int] | None = None,
  documents: Documents | None = None,
  sides: Sides | None = None,
) -> Iterator[Batch]:
  """Yields batches with every example once, in order; the last one is padded.

  Args:
    corpus: examples of at most `seq_len` tokens.
    batch_size: B, rows of each batch.
    seq_len: T.
    packed: put consecutive examples into one row while they fit, or one in each.
    wanted: rows of each batch to read, the others are padding; None: all.
    documents: see `empty`; a row then holds at most S examples.
    sides: of examples for an encoder-decoder.
  """
  most = min((rest[0] for rest in documents.values()), default=None) if documents else None
  lengths = corpus.lengths if sides is None else sides.lengths(corpus)
  rows = list(fill_in_order(lengths, seq_len, packed, most))
  settings = (batch_size, seq_len, wanted, documents, sides)
  for start in range(0, len(rows), batch_size):
    yield batch_of(corpus, rows[start : start + batch_size], *settings)


def batch_of(
  corpus: Corpus,
  rows: Sequence[Sequence[int]],
  batch_size: int,
  seq_len: int,
  wanted: Collection[int] | None = None,
  documents: Documents | None = None,
  sides: Sides | None = None,
) -> Batch:
  """Returns a batch of rows, each given by the indices of its examples, and padding.

  A labeled example is mismatched with the next one of the corpus. `wanted`, `sides` as in
  eval_batches; documents are corrupted as in epoch 0.
  """
  if sides is not None:
    batch = sides.empty(batch_size)
  else:
    batch = empty(batch_size, seq_len, corpus.shape, corpus.columns, documents)
  if corpus.top_tokens is not None:
    batch |= corpus.top_tokens.empty(batch_size, seq_len)
  for i, ids in enumerate(rows):
    if wanted is not None and i not in wanted:
      continue
    if sides is not None:
      sides.fill(batch, i, corpus, ids, epoch=0)
    elif corpus.shape in ANNOTATED:
      fill = _fill_groups if corpus.shape == 'texts' else _fill_annotated
      fill(batch, i, corpus, ids, weighed=False)
    else:
      other = functools.partial(corpus.example, (ids[0] + 1) % len(corpus))
      _fill(batch, i, corpus, ids, other)
  return batch
