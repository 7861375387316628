"""Computes the order of training rows as a pure function of (data fingerprint, seed, row number).

A source has R rows in every epoch, because lengths are packed once. An epoch permutes the examples
of equal length, and the rows. Any row is computed without the rows before it; only the permutation
of its own epoch is needed.

Random bits come from Philox keyed with a hash, read raw and sorted: NumPy guarantees the raw stream
of a bit generator across versions, but not the result of `Generator.permutation`.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from ftjax.data import packing
from ftjax.runtime.errors import ConfigError, DataError


def _random_keys(count: int, *names: str | int) -> np.ndarray:
  """Returns random bits keyed by `names`: uint64[count]; sorting them gives a permutation."""
  name = '/'.join(map(str, names)).encode()
  key = np.frombuffer(hashlib.sha256(name).digest()[:16], '<u8').astype(np.uint64)
  return np.random.Philox(key=key).random_raw(count)


class SourceSchedule:
  """Rows of one source, epoch after epoch.

  Attributes:
    rows_per_epoch: R.
    fill: fraction of the R * seq_len positions that have a token.
    fingerprint: sha256 hex of all that the order depends on.
  """

  def __init__(
    self,
    lengths: np.ndarray,
    seq_len: int,
    *,
    fingerprint: str,
    seed: int,
    packed: bool,
    most: int | None = None,
    ranks: np.ndarray | None = None,
  ):
    """Packs the lengths.

    Args:
      lengths: int32[n] tokens of each example, at most `seq_len`.
      seq_len: T, tokens of a row.
      fingerprint: that of the examples, `Corpus.fingerprint`.
      seed: the seed of the run.
      packed: several examples in a row, or one.
      most: examples that a row may hold when packed; None: as many as find room.
      ranks: float[n], of a curriculum: in every epoch, rows with a smaller mean over their examples
        come first, and rows of equal means in random order. None: no curriculum.

    Raises:
      DataError: there is no example.
    """
    if not len(lengths):
      raise DataError('a source without examples cannot be scheduled (data.train)')
    counts = np.bincount(lengths, minlength=seq_len + 1)
    self._lengths = np.asarray(lengths)
    self._groups = (
      packing.pack_lengths(counts, seq_len, most) if packed else packing.one_per_row(counts)
    )
    self._row_ends = np.cumsum([rows for rows, _ in self._groups])
    self.rows_per_epoch = int(self._row_ends[-1])
    self.fill = float(self._lengths.sum(dtype=np.int64) / (self.rows_per_epoch * seq_len))
    self._slots = self._number_slots(np.cumsum(counts) - counts)
    described = f'{fingerprint} {seed} {seq_len} {packed} {most}'
    self._ranks, self._row_of_slot = None, None
    if ranks is not None:
      self._ranks = np.asarray(ranks, np.float64)
      self._row_of_slot = self._rows_of_slots()
      described += f' {hashlib.sha256(self._ranks.astype("<f8").tobytes()).hexdigest()}'
    self.fingerprint = hashlib.sha256(described.encode()).hexdigest()
    self._epoch = functools.lru_cache(maxsize=2)(self._permute)

  def _number_slots(self, first_of_length: np.ndarray) -> list[tuple[tuple[int, int], ...]]:
    """Returns per group ((slots in each row, first slot), ...), one entry a length.

    Slots are numbered length by length, so that slot p takes the p-th example in an order that
    sorts by length.
    """
    following = first_of_length.copy()
    slots = []
    for rows, lengths in self._groups:
      entries = []
      for length in dict.fromkeys(lengths):
        copies = lengths.count(length)
        entries.append((copies, int(following[length])))
        following[length] += copies * rows
      slots.append(tuple(entries))
    return slots

  def _rows_of_slots(self) -> np.ndarray:
    """Returns the row of each slot, int64[n]."""
    out = np.zeros(len(self._lengths), np.int64)
    for (rows, _), end, entries in zip(self._groups, self._row_ends, self._slots, strict=True):
      for copies, first in entries:
        out[first : first + copies * rows] = np.repeat(np.arange(end - rows, end), copies)
    return out

  def _permute(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the example of each slot, and the row at each position of an epoch."""
    # One sort by (length, random bits): 22 bits of length, 42 of chance.
    keys = _random_keys(len(self._lengths), self.fingerprint, epoch, 'places') >> np.uint64(22)
    keys |= self._lengths.astype(np.uint64) << np.uint64(42)
    order = np.argsort(keys, kind='stable')
    keys = _random_keys(self.rows_per_epoch, self.fingerprint, epoch, 'rows')
    if self._ranks is None:
      return order, np.argsort(keys, kind='stable')
    count = np.bincount(self._row_of_slot, minlength=self.rows_per_epoch)
    total = np.bincount(self._row_of_slot, self._ranks[order], self.rows_per_epoch)
    return order, np.lexsort((keys, total / count))

  def row(self, index: int) -> tuple[int, tuple[int, ...]]:
    """Returns (epoch, ids of its examples) of row number `index` since the start of training."""
    epoch, position = divmod(index, self.rows_per_epoch)
    order, row_order = self._epoch(epoch)
    row = int(row_order[position])
    group = int(np.searchsorted(self._row_ends, row, side='right'))
    nth = row - int(self._row_ends[group]) + self._groups[group][0]
    ids: list[int] = []
    for copies, first in self._slots[group]:
      slot = first + nth * copies
      ids += order[slot : slot + copies].tolist()
    return epoch, tuple(ids)


@dataclasses.dataclass(frozen=True)
class Row:
  """One row to train on: its source, the epoch of that source, and the examples in it."""

  source: int
  epoch: int
  examples: tuple[int, ...]


class Mixture:
  """Rows of several sources, interleaved evenly by their shares.

  In a period of P rows source s has quota[s] rows, of which the k-th is near (k + 1/2) / quota[s]
  of the period. Each source counts its own epochs, and all its rows occur in each of them.

  Attributes:
    sources: the schedules, in order. quotas: rows of each in a period.
    rows_per_epoch: sum of the sources' rows; without weights each row occurs once in so many.
    fingerprint: sha256 hex of all that the order depends on.
  """

  def __init__(self, sources: Sequence[SourceSchedule], weights: Sequence[float | None]):
    """Interleaves sources.

    Args:
      sources: one schedule each.
      weights: relative numbers of rows; all None: each source's own number of rows.

    Raises:
      ConfigError: some sources have a weight and others none.
    """
    self.sources = tuple(sources)
    rows = [s.rows_per_epoch for s in self.sources]
    self.rows_per_epoch = sum(rows)
    given = [w for w in weights if w is not None]
    if given and len(given) != len(rows):
      raise ConfigError(
        f'data.train: weights {list(weights)}; give every source a weight (a share of rows) or none'
      )
    quotas = _round_shares(given, self.rows_per_epoch) if given else rows
    divisor = math.gcd(*quotas)
    self.quotas = tuple(q // divisor for q in quotas)
    self._source_at, self._rank_at = _interleave(self.quotas)
    described = ' '.join([*(s.fingerprint for s in self.sources), *map(str, self.quotas)])
    self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

  def row(self, index: int) -> Row:
    """Returns row number `index` since the start of training."""
    period, position = divmod(index, len(self._source_at))
    source = int(self._source_at[position])
    nth = period * self.quotas[source] + int(self._rank_at[position])
    epoch, examples = self.sources[source].row(nth)
    return Row(source, epoch, examples)


def _round_shares(weights: Sequence[float], total: int) -> list[int]:
  """Divides `total` rows in proportion to weights, at least one each (largest remainders)."""
  exact = [w / sum(weights) * total for w in weights]
  quotas = [max(1, math.floor(x)) for x in exact]
  by_remainder = sorted(range(len(exact)), key=lambda i: (math.floor(exact[i]) - exact[i], i))
  for i in by_remainder[: max(0, total - sum(quotas))]:
    quotas[i] += 1
  return quotas


def _interleave(quotas: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the source of each position of a period, and the number of its rows before it."""
  at = np.concatenate([(np.arange(q) + 0.5) / q for q in quotas])
  source = np.repeat(np.arange(len(quotas), dtype=np.int32), quotas)
  rank = np.concatenate([np.arange(q, dtype=np.int64) for q in quotas])
  order = np.argsort(at, kind='stable')
  return source[order], rank[order]
