"""Attention over a split sequence: rows in zigzag order, every kernel, packed rows with random
documents, against the dense kernel on one device.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from tiny_model import TINY, place

from ftjax.algorithms import sft
from ftjax.config import keys as config
from ftjax.experiment import size_checks
from ftjax.models import attention
from ftjax.models.kernels import dense
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError
from ftjax.training import prefetch

B, T, N, K, H = 2, 1024, 2, 1, 16
HEADS, KV, WHERE = (
  ('batch', 'seq', 'heads', None),
  ('batch', 'seq', 'kv_heads', None),
  ('batch', 'seq'),
)
FEATURES = [(None, None, True), (200, 1.5, True), (200, None, False)]


def arrays():
  """q, k, v, factors; documents of random lengths and padding, and one row of padding alone."""
  rng = np.random.default_rng(0)
  q, k, v, factors = (rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K, N))
  segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
  cuts = [0, *sorted(rng.integers(1, 950, 6)), 980, T]
  for i, (a, b) in enumerate(itertools.pairwise(cuts)):
    segments[0, a:b] = (i + 1) if b < T else 0
    positions[0, a:b] = np.arange(b - a)
  positions[1] = np.arange(T)
  return q, k, v, factors, segments, positions


@functools.cache
def expected(window, soft_cap, causal):
  q, k, v, factors, *where = arrays()
  mask = dense.visible((*where, *where), window, causal)
  out, pull = jax.vjp(lambda *a: dense.attend(*a, mask, soft_cap), q, k, v)
  return [np.asarray(a) for a in (out, *pull(jnp.asarray(factors)))]


def on_mesh(name, ways, window, soft_cap, causal, monkeypatch, *cases):
  """Output and gradients of each case with `name` as kernel, in the rows' natural order."""
  monkeypatch.setattr(attention, 'kernel', lambda problem: name)
  order = sharding.zigzag(T, ways)

  @jax.jit
  def both(q, k, v, factors, where):
    how = where, where, window, soft_cap, causal
    out, pull = jax.vjp(lambda *a: attention.attend(*a, *how), q, k, v)
    return out, *pull(factors)

  names = (HEADS, KV, KV, HEADS, WHERE, WHERE)
  for case in cases:
    *floats, segments, positions = (
      place(a[:, order], *n) for a, n in zip(case, names, strict=True)
    )
    found = both(*floats, attention.Tokens(segments, positions))
    yield [np.asarray(a)[:, np.argsort(order)] for a in found]


@pytest.mark.parametrize(('window', 'soft_cap', 'causal'), FEATURES)
@pytest.mark.parametrize('ways', [2, 4])
@pytest.mark.parametrize('name', ['dense', 'blocked', 'splash', 'triton'])
def test_outputs_and_gradients_are_those_of_one_device(
  name, ways, window, soft_cap, causal, use_mesh, monkeypatch
):
  wanted = expected(window, soft_cap, causal)
  use_mesh(context=ways, data=2)
  (found,) = on_mesh(name, ways, window, soft_cap, causal, monkeypatch, arrays())
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('name', ['splash', 'triton'])
def test_documents_are_deaf_to_each_other_exactly(name, use_mesh, monkeypatch):
  """The third document turns huge, and only others' outputs are asked for: not a bit changes."""
  use_mesh(context=4)
  calm, loud = arrays(), arrays()
  other = calm[4] == 3
  calm[3][other] = loud[3][other] = 0
  for a in loud[:3]:
    a[other] *= 1e4
  before, after = on_mesh(name, 4, None, None, True, monkeypatch, calm, loud)
  for a, b in zip(before, after, strict=True):
    np.testing.assert_array_equal(a[~other], b[~other])
  assert (before[0][other] != after[0][other]).any()
  for gradient in after[1:]:
    assert not gradient[other].any()


@pytest.mark.parametrize('ways', [1, 2, 4])
def test_the_order_of_a_split_row(ways):
  order = sharding.zigzag(16, ways)
  np.testing.assert_array_equal(np.sort(order), np.arange(16))
  if ways > 1:
    shards = order.reshape(ways, -1)
    for i, shard in enumerate(shards):
      chunks = np.arange(16).reshape(2 * ways, -1)
      np.testing.assert_array_equal(shard, np.concatenate([chunks[i], chunks[-1 - i]]))
    # Pairs (query, key) under a causal mask, the same for every shard to within its diagonal.
    pairs = (shards + 1).sum(1)
    assert len(set(pairs)) == 1
  back = sharding.unzigzag(jnp.asarray(order)[None, :, None], ways)
  np.testing.assert_array_equal(back[0, :, 0], np.arange(16))


def test_a_row_that_cannot_be_cut():
  with pytest.raises(ValueError, match='rows of 12 tokens cannot be cut into 8 chunks'):
    sharding.zigzag(12, 4)


def test_the_feed_brings_rows_into_order_and_moves_all_arrays_alike(use_mesh):
  mesh = use_mesh(context=4, data=2)
  where = NamedSharding(mesh, sharding.spec(None, 'batch', 'seq'))
  batch = {k: np.arange(64).reshape(2, 2, 16) + n for n, k in enumerate(('tokens', 'labels'))}
  placed = prefetch.place(batch, dict.fromkeys(batch, where))
  np.testing.assert_array_equal(placed['tokens'], batch['tokens'][..., sharding.zigzag(16, 4)])
  np.testing.assert_array_equal(placed['labels'], np.asarray(placed['tokens']) + 1)


def test_a_row_length_that_cannot_be_cut_is_refused_before_anything_is_compiled(use_mesh):
  c = config.default()
  c.seq_len, c.batch_size, c.eval.batch_size = 20, 4, 4
  with pytest.raises(ConfigError, match=r'seq_len=20 is no multiple of 2 x mesh.context=8'):
    size_checks.check(c, TINY, use_mesh(context=4))


def test_noise_on_embeddings_goes_with_the_tokens(use_mesh):
  """NEFTune's noise of a token is the same wherever the token lies."""

  def noise(ways):
    mesh = use_mesh(context=ways)
    rows = NamedSharding(mesh, sharding.spec('batch', 'seq'))
    segments = np.repeat([[1, 1, 2, 0]], 8, axis=1).reshape(1, -1).astype(np.int32)
    batch = prefetch.place({'segments': segments}, {'segments': rows})
    keys = jax.random.split(jax.random.key(0), 1)
    made = jax.jit(lambda b, k: sft.embedding_noise(5.0, b, 16, k))(batch, keys)
    return np.asarray(made)[:, np.argsort(sharding.zigzag(32, ways))]

  np.testing.assert_array_equal(noise(4), noise(1))
