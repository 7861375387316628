"""Puts the examples of an encoder-decoder into batches: what the encoder reads in arrays [B, S],
what the decoder reads and writes in arrays [B, T], with the same segment numbers, so that a decoder
attends to its own document alone.

The decoder's input is the target shifted by one place, with the model's start token first. Corpora
hold both sides (source_target.py), or documents of which both are made (span_corruption.py).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ftjax.data import span_corruption
from ftjax.data.span_corruption import Corruption
from ftjax.data.token_cache import Corpus

Batch = dict[str, np.ndarray]
# Arrays of a batch, int32[B, S], of what the encoder reads.
ARRAYS = ('source_tokens', 'source_segments', 'source_positions')


@dataclasses.dataclass(frozen=True)
class Sides:
  """How the examples of a corpus become rows of both sides.

  source_len: S. seq_len: T. start_id: token that a decoder begins with. corruption: of documents,
  of which both sides are made; None: the corpus holds both.
  """

  source_len: int
  seq_len: int
  start_id: int
  corruption: Corruption | None = None

  def lengths(self, corpus: Corpus) -> np.ndarray:
    """Returns int32[n], the places of a row of T that an example takes: as many as its target, or
    as its source takes of S, whichever is more. Examples whose sum is at most T fit on both sides.
    """
    if self.corruption is None:
      source, target = corpus.boundaries, corpus.lengths - corpus.boundaries
    else:
      source, target = span_corruption.lengths(corpus.lengths, self.corruption)
    share = -(-source.astype(np.int64) * self.seq_len // self.source_len)
    return np.maximum(share, target).astype(np.int32)

  def pair(self, corpus: Corpus, i: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (source, target) of example i, int32[s] and int32[t], the target without the start
    token.
    """
    tokens, _ = corpus.example(i)
    if self.corruption is not None:
      return span_corruption.corrupt(tokens, self.corruption, corpus.fingerprint, epoch, i)
    border = int(corpus.boundaries[i])
    return tokens[:border], tokens[border:]

  def empty(self, batch_size: int) -> Batch:
    """Creates a batch of padding."""
    source, target = (batch_size, self.source_len), (batch_size, self.seq_len)
    names = ('tokens', 'labels', 'segments', 'positions')
    out = {n: np.zeros(target, np.int32) for n in names}
    out |= {n: np.zeros(source, np.int32) for n in ARRAYS}
    return out | {'weights': np.zeros(target, np.float32)}

  def fill(self, batch: Batch, row: int, corpus: Corpus, ids: Sequence[int], epoch: int) -> None:
    """Writes examples one after another into a row of padding."""
    begin = at = 0
    for segment, i in enumerate(ids, 1):
      source, target = self.pair(corpus, i, epoch)
      here, there = slice(begin, begin + len(source)), slice(at, at + len(target))
      if here.stop > self.source_len or there.stop > self.seq_len:
        raise ValueError(
          f'Sides.fill: {here.stop} and {there.stop} tokens in a row of {self.source_len} and '
          f'{self.seq_len}'
        )
      batch['source_tokens'][row, here] = source
      batch['source_segments'][row, here] = segment
      batch['source_positions'][row, here] = np.arange(len(source))
      batch['tokens'][row, there] = [self.start_id, *target[:-1]]
      batch['labels'][row, there] = target
      batch['weights'][row, there] = 1
      batch['segments'][row, there] = segment
      batch['positions'][row, there] = np.arange(len(target))
      begin, at = here.stop, there.stop
