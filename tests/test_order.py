"""The order of rows: each example once an epoch, another order each epoch, any row at once."""

import collections
import time

import numpy as np
import pytest

from ftjax.data.order import Mixture, SourceSchedule
from ftjax.runtime.errors import ConfigError, DataError

T = 32
PINNED = [(3, 4), (6,), (2, 5), (0, 1), (0, 4), (3,), (5, 2), (6, 1)]


def lengths(n, seed=0):
  return np.random.default_rng(seed).integers(1, T + 1, n).astype(np.int32)


def source(n=200, *, data_seed=0, seed=1, packed=True, fingerprint='f', **more):
  return SourceSchedule(
    lengths(n, data_seed), T, fingerprint=fingerprint, seed=seed, packed=packed, **more
  )


def epoch_of(s, epoch):
  r = s.rows_per_epoch
  return [s.row(i) for i in range(epoch * r, (epoch + 1) * r)]


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('n', [1, 2, 77, 500])
def test_every_example_once_per_epoch(n, packed):
  s, sizes = source(n, packed=packed), lengths(n)
  for epoch in (0, 1, 5):
    rows = epoch_of(s, epoch)
    assert all(e == epoch for e, _ in rows)
    assert sorted(i for _, ids in rows for i in ids) == list(range(n))
    assert all(sizes[list(ids)].sum() <= T for _, ids in rows)
    if not packed:
      assert all(len(ids) == 1 for _, ids in rows)


def test_epochs_differ_in_rows_and_in_their_order():
  s = source()
  first, second = (epoch_of(s, e) for e in (0, 1))
  assert [ids for _, ids in first] != [ids for _, ids in second]
  together = [{frozenset(ids) for _, ids in rows} for rows in (first, second)]
  assert len(together[0] & together[1]) < len(together[0]) / 2


def test_same_inputs_same_order_and_each_input_matters():
  base = epoch_of(source(), 0)
  assert epoch_of(source(), 0) == base
  for other in (source(seed=2), source(fingerprint='g'), source(packed=False)):
    assert epoch_of(other, 0) != base


def test_seek_equals_iterate():
  s = source()
  iterated = [s.row(i) for i in range(4 * s.rows_per_epoch)]
  fresh = source()
  for i in np.random.default_rng(0).permutation(len(iterated)):
    assert fresh.row(int(i)) == iterated[i]


def test_seek_is_quick():
  s = SourceSchedule(lengths(200_000), T, fingerprint='f', seed=0, packed=True)
  s.row(0)
  started = time.process_time()
  s.row(10**12 + 7)  # 10 million epochs on; one permutation
  far = time.process_time() - started
  assert far < 1.0


def test_pinned_order():
  """The order is part of a checkpoint's meaning: these numbers may never change."""
  s = SourceSchedule(
    np.array([3, 1, 2, 3, 1, 2, 3], np.int32), 4, fingerprint='pinned', seed=7, packed=True
  )
  assert [s.row(i)[1] for i in range(2 * s.rows_per_epoch)] == PINNED


def test_positions_are_uniform():
  """Over many epochs each example comes first about equally often."""
  s = SourceSchedule(np.full(5, T, np.int32), T, fingerprint='u', seed=0, packed=True)
  first = collections.Counter(s.row(5 * e)[1][0] for e in range(2000))
  assert all(abs(first[i] - 400) < 5 * 18 for i in range(5))  # 18 is one standard deviation


def test_empty_source():
  with pytest.raises(DataError, match='without examples'):
    SourceSchedule(np.zeros(0, np.int32), T, fingerprint='f', seed=0, packed=True)


def test_mixture_without_weights_has_every_row_once():
  sources = [source(50), source(200, data_seed=3, fingerprint='g'), source(7, fingerprint='h')]
  m = Mixture(sources, [None, None, None])
  assert m.rows_per_epoch == sum(s.rows_per_epoch for s in sources)
  for epoch in (0, 1, 3):
    rows = [m.row(epoch * m.rows_per_epoch + i) for i in range(m.rows_per_epoch)]
    assert all(r.epoch == epoch for r in rows)
    for k, n in enumerate((50, 200, 7)):
      assert sorted(e for r in rows if r.source == k for e in r.examples) == list(range(n))


def test_mixture_is_even():
  """Any stretch of rows holds each source's share, give or take two rows."""
  m = Mixture([source(300), source(100, fingerprint='g')], [3.0, 1.0])
  picks = np.array([m.row(i).source for i in range(3 * m.rows_per_epoch)])
  for width in (4, 10, 50):
    share = np.convolve(picks == 1, np.ones(width), 'valid')
    assert np.abs(share - width / 4).max() <= 2


def test_weighted_mixture_counts_epochs_apart_and_drops_nothing():
  sources = [source(20), source(200, fingerprint='g')]
  m = Mixture(sources, [1.0, 1.0])
  rows = [m.row(i) for i in range(6 * m.rows_per_epoch)]
  for k, s in enumerate(sources):
    mine = [(r.epoch, r.examples) for r in rows if r.source == k]
    assert mine == [s.row(i) for i in range(len(mine))]
  small = max(r.epoch for r in rows if r.source == 0)
  large = max(r.epoch for r in rows if r.source == 1)
  assert small > 3 * large


def test_mixture_seeks():
  m = Mixture([source(30), source(80, fingerprint='g')], [0.3, 0.7])
  rows = [m.row(i) for i in range(500)]
  assert [m.row(i) for i in reversed(range(500))] == rows[::-1]


def test_tiny_weights_still_get_a_row():
  m = Mixture([source(100), source(5, fingerprint='g')], [1.0, 1e-9])
  assert min(m.quotas) == 1


def test_all_weights_or_none():
  with pytest.raises(ConfigError, match='every source a weight'):
    Mixture([source(3), source(4)], [1.0, None])


def test_fingerprints_differ_between_mixtures():
  a, b = source(30), source(80, fingerprint='g')
  prints = [
    Mixture(s, w).fingerprint for s, w in (((a, b), [1, 2]), ((b, a), [1, 2]), ((a, b), [2, 1]))
  ]
  assert len(set(prints)) == 3
