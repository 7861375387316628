"""Attention against a plain softmax, and the exact zeros of its mask rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import place, tokens_at

from ftjax.models import attention

attend = jax.jit(attention.attend)
HEADS, KV = ('batch', 'seq', 'heads', None), ('batch', 'seq', 'kv_heads', None)
# Row 0: two documents and padding at the end. Row 1: padding first, one document.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0], [0, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 7]])


def arrays(batch=2, length=12, heads=4, kv=2, dim=8, seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(batch, length, n, dim) for n in (heads, kv, kv)]
  return [rng.normal(size=s).astype(np.float32) for s in shapes]


def run(q, k, v, segments, positions=None):
  where = tokens_at(segments, positions)
  return np.asarray(attend(place(q, *HEADS), place(k, *KV), place(v, *KV), where, where))


def plain(q, k, v, segments, positions):
  """One query at a time, in float64."""
  q, k, v = (a.astype(np.float64) for a in (q, k, v))
  out = np.zeros_like(q)
  group = q.shape[2] // k.shape[2]
  for b, t, n in np.ndindex(q.shape[:3]):
    seen = [
      s
      for s in range(k.shape[1])
      if segments[b, s] == segments[b, t] and positions[b, s] <= positions[b, t]
    ]
    scores = k[b, seen, n // group] @ q[b, t, n] / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max())
    out[b, t, n] = weights @ v[b, seen, n // group] / weights.sum()
  return out


@pytest.mark.parametrize('kv', [1, 2, 4])
def test_against_a_plain_softmax(kv):
  q, k, v = arrays(kv=kv)
  positions = np.asarray(tokens_at(SEGMENTS).positions)
  expected = plain(q, k, v, SEGMENTS, positions)
  np.testing.assert_allclose(run(q, k, v, SEGMENTS), expected, atol=2e-6)


@pytest.mark.parametrize('kv', [1, 2, 4])
def test_gradients_against_the_compilers(kv):
  """Of a random sum of the outputs; the plain form repeats k and v and masks with -inf."""
  q, k, v = arrays(kv=kv)
  positions = np.asarray(tokens_at(SEGMENTS).positions)
  mask = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (positions[:, :, None] >= positions[:, None])
  factors = np.random.default_rng(2).normal(size=q.shape).astype(np.float32)

  def dense(q, k, v):
    k, v = (jnp.repeat(a, 4 // kv, axis=2) for a in (k, v))
    scores = jnp.einsum('BTNH,BSNH->BNTS', q, k) / np.sqrt(8)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    return (jnp.einsum('BNTS,BSNH->BTNH', weights, v) * factors).sum()

  where = tokens_at(SEGMENTS)

  def ours(q, k, v):
    return (attend(q, k, v, where, where) * factors).sum()

  expected = jax.jit(jax.grad(dense, argnums=(0, 1, 2)))(q, k, v)
  got = jax.grad(ours, argnums=(0, 1, 2))(place(q, *HEADS), place(k, *KV), place(v, *KV))
  for g, e in zip(got, expected, strict=True):
    np.testing.assert_allclose(g, e, atol=2e-6 * np.abs(e).max())


def test_large_scores_do_not_overflow():
  q, k, v = arrays()
  q *= 300
  positions = np.asarray(tokens_at(SEGMENTS).positions)
  np.testing.assert_allclose(run(q, k, v, SEGMENTS), plain(q, k, v, SEGMENTS, positions), atol=2e-4)


def test_heads_that_share_a_key_are_neighbours():
  """As in HF, queries n and n + 1 share kv head n // 2: the same as K = N with repeated k, v."""
  q, k, v = arrays()
  repeated = run(q, k.repeat(2, 2), v.repeat(2, 2), SEGMENTS)
  np.testing.assert_allclose(run(q, k, v, SEGMENTS), repeated, atol=1e-6)


@pytest.mark.parametrize('changed', [1, 2, 0])
def test_a_document_is_deaf_to_the_others_exactly(changed):
  q, k, v = arrays()
  before = run(q, k, v, SEGMENTS)
  inside = changed == SEGMENTS
  for a in (q, k, v):
    a[inside] = 1e4 * np.random.default_rng(1).normal(size=a[inside].shape)
  after = run(q, k, v, SEGMENTS)
  np.testing.assert_array_equal(after[~inside], before[~inside])
  assert (after[inside] != before[inside]).any()


def test_gradients_of_one_document_reach_no_other():
  q, k, v = arrays()
  where = tokens_at(SEGMENTS)

  def out_of_two(q, k, v):
    y = attend(q, k, v, where, where)
    return jnp.where((SEGMENTS == 2)[:, :, None, None], y, 0.0).sum()

  places = place(q, *HEADS), place(k, *KV), place(v, *KV)
  for g in jax.jit(jax.grad(out_of_two, argnums=(0, 1, 2)))(*places):
    assert (np.asarray(g)[SEGMENTS != 2] == 0).all()
  assert np.abs(np.asarray(g)[SEGMENTS == 2]).min() > 0


def test_the_future_is_unseen_exactly():
  q, k, v = arrays()
  before = run(q, k, v, np.ones((2, 12)))
  for t in range(11):
    later_k, later_v = k.copy(), v.copy()
    later_k[:, t + 1 :], later_v[:, t + 1 :] = 1e4, -1e4
    after = run(q, later_k, later_v, np.ones((2, 12)))
    np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])
    assert (after[:, t + 1 :] != before[:, t + 1 :]).any()


def test_a_token_sees_itself_and_the_first_sees_nothing_else():
  q, k, v = arrays()
  out = run(q, k, v, SEGMENTS)
  np.testing.assert_allclose(out[0, 4], v[0, 4].repeat(2, 0), atol=1e-6)
  np.testing.assert_allclose(out[1, 3], v[1, 3].repeat(2, 0), atol=1e-6)


def test_order_in_the_row_does_not_matter():
  """Positions, not indices, say what comes first: a shuffled sequence gives shuffled answers."""
  q, k, v = arrays()
  positions = np.asarray(tokens_at(SEGMENTS).positions)
  expected = run(q, k, v, SEGMENTS)
  order = np.random.default_rng(0).permutation(12)
  shuffled = run(*(a[:, order] for a in (q, k, v, SEGMENTS, positions)))
  np.testing.assert_allclose(shuffled, expected[:, order], atol=1e-6)


def test_padding_is_finite_even_where_it_sees_nothing():
  """Decoding shows a left-padded query keys of segment 0 at positions above its own, or none."""
  q, k, v = arrays()
  query, key = tokens_at(np.zeros((2, 12))), tokens_at(np.ones((2, 12)))
  out = attend(place(q, *HEADS), place(k, *KV), place(v, *KV), query, key)
  assert np.isfinite(np.asarray(out)).all()


def test_bfloat16_scores_are_summed_in_float32():
  q, k, v = (a.astype(jnp.bfloat16) for a in arrays(dim=64))
  positions = np.asarray(tokens_at(SEGMENTS).positions)
  out = run(q, k, v, SEGMENTS)
  assert out.dtype == jnp.bfloat16
  expected = plain(*(a.astype(np.float32) for a in (q, k, v)), SEGMENTS, positions)
  # bfloat16 keeps 8 bits: weights and result are rounded to 2^-9 of values up to 3.
  assert np.abs(out.astype(np.float32) - expected)[SEGMENTS > 0].max() <= 3 * 2**-8


def test_on_a_mesh_as_on_one_device(use_mesh):
  q, k, v = arrays()
  expected = run(q, k, v, SEGMENTS)
  for sizes in ({'context': 4, 'tensor': 2}, {'data': 2, 'context': 2, 'tensor': 2}):
    use_mesh(**sizes)
    np.testing.assert_allclose(run(q, k, v, SEGMENTS), expected, atol=1e-6)
