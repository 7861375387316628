"""Every attention kernel against the dense one: outputs, gradients, and exact zeros between
documents. The TPU's kernel runs in interpret mode here; that it compiles for TPUs is shown by
tests/test_plan.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.models import attention
from ftjax.models.kernels import blocked, dense, splash

B, T, K, H = 2, 256, 2, 16


def rows(heads=4, dtype=jnp.float32, seed=0):
  """q, k, v, segments, positions: three documents and padding; one document after padding."""
  rng = np.random.default_rng(seed)
  q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in (heads, K, K))
  segments = np.zeros((B, T), np.int32)
  segments[0, :100], segments[0, 100:101], segments[0, 101:230] = 1, 2, 3
  segments[1, 30:] = 1
  positions = np.zeros((B, T), np.int32)
  for b in range(B):
    for s in np.unique(segments[b]):
      (where,) = np.nonzero(segments[b] == s)
      positions[b, where] = np.arange(len(where))
  return q, k, v, jnp.asarray(segments), jnp.asarray(positions)


def by_dense(q, k, v, segments, positions):
  mask = segments[:, :, None] == segments[:, None]
  return dense.attend(q, k, v, mask & (positions[:, :, None] >= positions[:, None]))


def by_blocked(q, k, v, segments, positions):
  return blocked.attend(q, k, v, (segments, positions, segments, positions))


def by_splash(q, k, v, segments, positions):
  """In an island, as models run it: interpret mode knows no Explicit axes."""
  del positions
  island = functools.partial(splash.attend, interpret=True)
  specs = dict(in_specs=(jax.P(),) * 4, out_specs=jax.P())
  return jax.jit(jax.shard_map(island, check_vma=False, **specs))(q, k, v, segments)


KERNELS = [by_blocked, by_splash]


def gradients(attend, q, k, v, segments, positions, factors):
  def total(q, k, v):
    return (attend(q, k, v, segments, positions).astype(jnp.float32) * factors).sum()

  return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)


@pytest.mark.parametrize('attend', KERNELS)
@pytest.mark.parametrize('heads', [2, 4])
def test_outputs_and_gradients_are_the_dense_ones(attend, heads):
  q, k, v, *where = rows(heads)
  np.testing.assert_allclose(attend(q, k, v, *where), by_dense(q, k, v, *where), atol=3e-6)
  factors = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
  expected = gradients(by_dense, q, k, v, *where, factors)
  for a, b in zip(gradients(attend, q, k, v, *where, factors), expected, strict=True):
    np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize('attend', KERNELS)
def test_bfloat16_stays_near_the_dense_one_in_float32(attend):
  q, k, v, *where = rows(dtype=jnp.bfloat16)
  exact = by_dense(*(a.astype(jnp.float32) for a in (q, k, v)), *where)
  got = attend(q, k, v, *where)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize('attend', KERNELS)
def test_documents_are_deaf_to_each_other_exactly(attend):
  """Document 3 is changed to huge values: outputs and gradients of document 1 keep every bit."""
  q, k, v, segments, positions = rows()
  other = (segments == 3)[:, :, None, None]
  changed = [jnp.where(other, 1e4 * a, a) for a in (q, k, v)]
  mine = np.asarray(segments == 1)
  before, after = (attend(*x, segments, positions) for x in ((q, k, v), changed))
  np.testing.assert_array_equal(np.asarray(before)[mine], np.asarray(after)[mine])
  factors = jnp.where((segments == 1)[:, :, None, None], 1.0, 0.0)
  for gradient in gradients(attend, q, k, v, segments, positions, factors):
    assert not np.asarray(gradient)[~mine].any() and np.asarray(gradient)[mine].any()


@pytest.mark.parametrize('attend', KERNELS)
def test_the_future_is_unseen_exactly(attend):
  q, k, v, *where = rows()
  later = (np.arange(T) >= 60)[None, :, None, None]
  changed = attend(q, *(jnp.where(later, -a, a) for a in (k, v)), *where)
  np.testing.assert_array_equal(changed[:, :60], attend(q, k, v, *where)[:, :60])


def test_queries_may_be_fewer_than_keys():
  """As under a split sequence: the second half of the queries sees all keys."""
  q, k, v, segments, positions = rows()
  half = slice(T // 2, None)
  got = blocked.attend(
    q[:, half], k, v, (segments[:, half], positions[:, half], segments, positions)
  )
  expected = by_dense(q, k, v, segments, positions)[:, half]
  np.testing.assert_allclose(got, expected, atol=3e-6)


@pytest.mark.parametrize(
  ('platform', 'context', 'queries', 'keys', 'name'),
  [
    ('cpu', 1, 256, 256, 'dense'),
    ('cpu', 1, 4096, 4096, 'blocked'),
    ('gpu', 1, 8192, 8192, 'blocked'),
    ('cpu', 1, 1032, 1032, 'dense'),  # no block divides
    ('cpu', 8, 1024, 1024, 'blocked'),
    ('tpu', 1, 128, 128, 'splash'),
    ('tpu', 1, 100, 100, 'dense'),
    ('tpu', 2, 8192, 8192, 'blocked'),  # the kernel's mask goes by index
    ('tpu', 1, 1, 512, 'dense'),  # decoding
    ('tpu', 1, 1024, 2048, 'blocked'),  # reading a prompt into a cache
  ],
)
def test_the_kernel_is_chosen_by_platform_and_length(platform, context, queries, keys, name):
  assert attention.kernel(platform, context, queries, keys) == name


def test_memory_of_the_blocked_kernel_grows_with_the_row():
  """Twice the row: about twice the temporaries, where scores would be four times."""

  def temporaries(length):
    shapes = [(1, length, n, H) for n in (4, 2, 2)] + [(1, length)] * 2
    kinds = (jnp.float32,) * 3 + (jnp.int32,) * 2
    like = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, kinds, strict=True)]
    total = lambda q, k, v, *where: by_blocked(q, k, v, *where).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*like).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temporaries(2048), temporaries(4096)
  assert long < 2.5 * short and long < 4 * 4096 * 4096 * 4 / 2
