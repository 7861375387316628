"""Packing the histogram: every example once, no row too long, close to what is possible."""

import time

import numpy as np
import pytest

from ftjax.data.packing import one_per_row, pack_lengths


def unpack(groups):
  counts = {}
  for rows, lengths in groups:
    for length in lengths:
      counts[length] = counts.get(length, 0) + rows
  return counts


def histogram(lengths, seq_len):
  return np.bincount(lengths, minlength=seq_len + 1)


def test_by_hand():
  """T = 10: 6+4, 6+3, 5+5 is what best fit makes of 6 6 5 5 4 3."""
  groups = pack_lengths(histogram([6, 6, 5, 5, 4, 3], 10), 10)
  assert sorted(groups) == [(1, (5, 5)), (1, (6, 3)), (1, (6, 4))]
  assert sorted(pack_lengths(histogram([4] * 7, 10), 10)) == [(1, (4,)), (3, (4, 4))]


def test_random():
  rng = np.random.default_rng(0)
  for _ in range(300):
    seq_len = int(rng.integers(2, 60))
    lengths = rng.integers(1, seq_len + 1, rng.integers(1, 400))
    counts = histogram(lengths, seq_len)
    groups = pack_lengths(counts, seq_len)
    assert unpack(groups) == {i: c for i, c in enumerate(counts.tolist()) if c}
    assert all(rows > 0 and sum(held) <= seq_len for rows, held in groups)
    assert groups == pack_lengths(counts, seq_len)
    # Best fit decreasing never needs more than 11/9 of the optimum + 1.
    rows = sum(r for r, _ in groups)
    assert rows <= 11 / 9 * np.ceil(lengths.sum() / seq_len) * 1.2 + 1


def test_same_as_one_by_one():
  """The rows equal those of best-fit decreasing done example by example."""
  rng = np.random.default_rng(1)
  for _ in range(100):
    seq_len = int(rng.integers(5, 40))
    lengths = rng.integers(1, seq_len + 1, 60)
    room = []
    for length in sorted(lengths.tolist(), reverse=True):
      fitting = [r for r in room if r >= length]
      if fitting:
        room.remove(min(fitting))
        room.append(min(fitting) - length)
      else:
        room.append(seq_len - length)
    groups = pack_lengths(histogram(lengths, seq_len), seq_len)
    ours = [seq_len - sum(held) for rows, held in groups for _ in range(rows)]
    assert sorted(ours) == sorted(room)


def test_ten_million_examples():
  lengths = np.clip(np.random.default_rng(0).lognormal(5.6, 0.9, 1_000_000), 8, 4096).astype(int)
  counts = histogram(lengths, 4096) * 10
  started = time.process_time()
  groups = pack_lengths(counts, 4096)
  assert time.process_time() - started < 2  # 0.05 s when nothing else runs
  fill = (counts * np.arange(4097)).sum() / (sum(r for r, _ in groups) * 4096)
  assert fill > 0.999


def test_one_per_row():
  assert one_per_row([0, 2, 0, 1]) == [(2, (1,)), (1, (3,))]


@pytest.mark.parametrize('counts', [[1, 0, 0], [0, 1, 0, 1]])
def test_impossible_lengths(counts):
  with pytest.raises(ValueError, match='seq_len=2'):
    pack_lengths(counts, 2)
