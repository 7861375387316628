"""Rows to arrays: tokens, shifted labels, weights, segments and positions, all [B, T].

Labels are shifted here, on the host. Segment ids are 1, 2, ... for the examples of a row and 0 for
padding, which no segment matches; positions start at 0 in every example. Token 0 stands on padding;
what is supervised is decided by position alone, never by a token's id.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from ftjax.data.cache import Corpus
from ftjax.data.schedule import Mixture

Batch = dict[str, np.ndarray]


def empty(batch_size: int, seq_len: int) -> Batch:
  """A batch of nothing but padding: int32 and float32 [B, T]."""
  shape = (batch_size, seq_len)
  return {
    'tokens': np.zeros(shape, np.int32),
    'labels': np.zeros(shape, np.int32),
    'weights': np.zeros(shape, np.float32),
    'segments': np.zeros(shape, np.int32),
    'positions': np.zeros(shape, np.int32),
  }


def fill_row(batch: Batch, row: int, examples: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
  """Writes examples (tokens, supervised) one after another into a row of padding.

  Raises:
    ValueError: they are longer than the row.
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


class Stream:
  """Training batches by step number; nothing is remembered between calls."""

  def __init__(self, mixture: Mixture, corpora: Sequence[Corpus], seq_len: int, batch_size: int):
    """Joins a schedule with the corpora its sources were made from, in the same order."""
    self._mixture, self._corpora = mixture, tuple(corpora)
    self.seq_len, self.batch_size = seq_len, batch_size

  def batch(self, step: int, rows: Collection[int] | None = None) -> Batch:
    """The batch of a step; with `rows` only those are read, and the others are padding.

    Returns:
      tokens, labels, segments, positions int32[B, T], weights float32[B, T]; labels[t] is
      tokens[t + 1] where that token is supervised and of the same example (weight 1), else 0.
    """
    batch = empty(self.batch_size, self.seq_len)
    for i in range(self.batch_size) if rows is None else sorted(rows):
      row = self._mixture.row(step * self.batch_size + i)
      corpus = self._corpora[row.source]
      fill_row(batch, i, (corpus.example(e) for e in row.examples))
    return batch

  def examples(self, step: int) -> list[tuple[int, int, int]]:
    """(source, example, epoch) of every example in the batch of a step, in the order of the
    rows."""
    rows = (self._mixture.row(step * self.batch_size + i) for i in range(self.batch_size))
    return [(row.source, e, row.epoch) for row in rows for e in row.examples]


def _fill_in_order(lengths: np.ndarray, seq_len: int, packed: bool) -> Iterator[list[int]]:
  """Numbers of consecutive examples that share a row."""
  row: list[int] = []
  used = 0
  for i, length in enumerate(lengths.tolist()):
    if row and (not packed or used + length > seq_len):
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
) -> Iterator[Batch]:
  """Every example once, in order; the last batch is filled up with rows of weight 0.

  Args:
    corpus: examples of at most `seq_len` tokens.
    batch_size: B, rows of each batch.
    seq_len: T.
    packed: put consecutive examples into one row while they fit, or one in each.
    wanted: rows of each batch that are read, the others are padding; None: all.
  """
  rows = list(_fill_in_order(corpus.lengths, seq_len, packed))
  for start in range(0, len(rows), batch_size):
    batch = empty(batch_size, seq_len)
    for i, ids in enumerate(rows[start : start + batch_size]):
      if wanted is None or i in wanted:
        fill_row(batch, i, (corpus.example(e) for e in ids))
    yield batch
