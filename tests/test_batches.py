"""Batches: by hand, packed == unpacked, slices of a batch, order, evaluation; and their
tables."""

import numpy as np
import pytest
from test_token_cache import build, chat_rows, write
from tiny_tokenizer import tiny_files

from ftjax.data import describe
from ftjax.data.batches import Stream, empty, eval_batches, fill_row
from ftjax.data.order import Mixture, SourceSchedule
from ftjax.data.tokenizer import Tokenizer

T = 64


def make_stream(tmp_path, *, packed=True, batch_size=4, sizes=(30, 12), seed=0):
  corpora = [
    build(tmp_path, write(tmp_path / f'{k}.jsonl', chat_rows(n, words=1 + k)), seq_len=T)
    for k, n in enumerate(sizes)
  ]
  schedules = [
    SourceSchedule(c.lengths, T, fingerprint=c.fingerprint, seed=seed, packed=packed)
    for c in corpora
  ]
  mixture = Mixture(schedules, [None] * len(sizes))
  return Stream(mixture, corpora, T, batch_size), mixture, corpora


def pieces(batch):
  """(tokens, labels, weights) of every segment, as a sorted list."""
  out = []
  for row in range(len(batch['tokens'])):
    for segment in range(1, batch['segments'][row].max(initial=0) + 1):
      at = batch['segments'][row] == segment
      out.append(tuple(tuple(batch[k][row][at].tolist()) for k in ('tokens', 'labels', 'weights')))
  return sorted(out)


def test_by_hand():
  """Two examples in a row of 7: 11 12 13 (12, 13 supervised) and 21 22 (22 supervised)."""
  batch = empty(2, 7)
  fill_row(
    batch,
    1,
    [
      (np.array([11, 12, 13]), np.array([False, True, True])),
      (np.array([21, 22]), np.array([True, True])),  # nothing predicts a first token
    ],
  )
  assert batch['tokens'][1].tolist() == [11, 12, 13, 21, 22, 0, 0]
  assert batch['labels'][1].tolist() == [12, 13, 0, 22, 0, 0, 0]
  assert batch['weights'][1].tolist() == [1, 1, 0, 1, 0, 0, 0]
  assert batch['segments'][1].tolist() == [1, 1, 1, 2, 2, 0, 0]
  assert batch['positions'][1].tolist() == [0, 1, 2, 0, 1, 0, 0]
  assert not any(a[0].any() for a in batch.values())
  kinds = {k: a.dtype.name for k, a in batch.items()}
  assert kinds.pop('weights') == 'float32' and set(kinds.values()) == {'int32'}
  with pytest.raises(ValueError, match='seq_len'):
    fill_row(batch, 0, [(np.arange(8), np.ones(8, bool))])


def epoch_of(stream, mixture):
  steps = -(-mixture.rows_per_epoch // stream.batch_size)
  parts = [stream.batch(s) for s in range(steps)]
  extra = steps * stream.batch_size - mixture.rows_per_epoch
  whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
  return {k: v[: len(v) - extra] for k, v in whole.items()}


def test_packed_and_unpacked_hold_the_same_examples(tmp_path):
  packed, unpacked = (epoch_of(*make_stream(tmp_path, packed=p)[:2]) for p in (True, False))
  assert len(packed['tokens']) < len(unpacked['tokens']) == 42
  assert pieces(packed) == pieces(unpacked)
  assert unpacked['segments'].max() == 1


def test_epoch_supervises_every_supervised_token_once(tmp_path):
  stream, mixture, corpora = make_stream(tmp_path)
  assert epoch_of(stream, mixture)['weights'].sum() == sum(c.supervised for c in corpora)


def test_slices_make_the_whole(tmp_path):
  """What several hosts read together is the batch that one host reads."""
  stream, _, _ = make_stream(tmp_path)
  for step in (0, 3, 1000):
    whole = stream.batch(step)
    parts = [stream.batch(step, rows) for rows in ([0, 3], [2, 1])]
    for key, value in whole.items():
      np.testing.assert_array_equal(value, parts[0][key] + parts[1][key])
    assert not parts[0]['segments'][1:3].any() and not parts[1]['segments'][[0, 3]].any()


def test_step_is_all_the_state(tmp_path):
  one, two = make_stream(tmp_path)[0], make_stream(tmp_path)[0]
  for step in (5, 0, 77):
    for key, value in one.batch(step).items():
      np.testing.assert_array_equal(value, two.batch(step)[key])
  other = make_stream(tmp_path, seed=1)[0]
  assert any((other.batch(s)['tokens'] != one.batch(s)['tokens']).any() for s in range(3))


def test_batches_hold_the_examples_of_their_rows(tmp_path):
  stream, mixture, corpora = make_stream(tmp_path)
  steps = 2 * mixture.rows_per_epoch // stream.batch_size
  for step in range(steps):
    batch = stream.batch(step)
    rows = [mixture.row(4 * step + i) for i in range(4)]
    tokens = [t for i in range(4) for t in batch['tokens'][i][batch['segments'][i] > 0]]
    assert tokens == [t for r in rows for e in r.examples for t in corpora[r.source].example(e)[0]]


@pytest.mark.parametrize('packed', [True, False])
def test_evaluation_is_finite_ordered_and_filled_up(tmp_path, packed):
  _, _, (corpus, _) = make_stream(tmp_path)
  batches = list(eval_batches(corpus, 4, T, packed=packed))
  assert all(b['tokens'].shape == (4, T) for b in batches)
  tokens = [t for b in batches for r in range(4) for t in b['tokens'][r][b['segments'][r] > 0]]
  assert tokens == [t for i in range(len(corpus)) for t in corpus.example(i)[0]]
  assert sum(b['weights'].sum() for b in batches) == corpus.supervised
  rows = sum(int(b['segments'].any(1).sum()) for b in batches)
  assert (rows == len(corpus)) is not packed and len(batches) == -(-rows // 4)


def test_table(tmp_path):
  stream, _, _ = make_stream(tmp_path, batch_size=2)
  batch, t = stream.batch(0), Tokenizer(tiny_files())
  text = describe.table(batch, t, [1])
  lines = text.splitlines()[2:]
  assert len(lines) == (batch['segments'][1] > 0).sum()
  assert text.count(' yes ') == batch['weights'][1].sum()
  marked = [line for line in lines if ' yes ' in line]
  assert any("'<|im_end|>'" in line for line in marked)
  assert not any("'<|im_start|>'" in line for line in marked)


def test_summary(tmp_path):
  _, mixture, corpora = make_stream(tmp_path)
  text = describe.summary(corpora, mixture)
  assert '0.jsonl: 30 examples of 30 rows read' in text
  assert f'{corpora[1].tokens:,} tokens, {corpora[1].supervised:,} supervised' in text
  assert f'mixture: {mixture.rows_per_epoch} packed sequences per epoch' in text


@pytest.mark.parametrize('n', [1, 2, 39, 40, 41, 80, 81, 5000])
def test_a_histogram_of_lengths_counts_each_example_once(n):
  lengths = np.random.default_rng(n).integers(3, 3 + n, size=200)
  found = describe.length_histogram(lengths)
  edges, counts = found['edges'], found['counts']
  assert sum(counts) == 200 and 1 <= len(counts) == len(edges) - 1 <= 40
  assert edges[0] == lengths.min() and edges[-2] <= lengths.max() < edges[-1]
  for low, high, count in zip(edges, edges[1:], counts, strict=False):
    assert count == ((lengths >= low) & (lengths < high)).sum()
  assert describe.length_histogram([]) == {}
