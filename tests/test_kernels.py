"""Every attention kernel against plain autodiff of a plain softmax, with and without window and
cap: outputs, gradients, and exact zeros between documents. The kernels of TPUs and GPUs run in
interpret mode here; that they compile for such devices is shown by tests/test_plan.py. Rows
that are split: tests/multidevice/test_context.py.
"""

import dataclasses
import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.models import attention
from ftjax.models.attention import Problem
from ftjax.models.kernels import blocked, dense, splash, triton
from ftjax.planning import topology
from ftjax.runtime import sharding

B, T, K, H = 2, 256, 2, 16
# (window, soft cap, causal): the window ends within blocks and within documents.
FEATURES = [
  (None, None, True),
  (50, None, True),
  (None, 2.0, True),
  (None, None, False),
  (50, 2.0, False),
]


def rows(heads=4, dtype=jnp.float32, seed=0):
  """q, k, v, segments, positions: three documents and padding; one document after padding; padding
  alone.
  """
  rng = np.random.default_rng(seed)
  q, k, v = (jnp.asarray(rng.normal(size=(B + 1, T, n, H)), dtype) for n in (heads, K, K))
  segments = np.zeros((B + 1, T), np.int32)
  segments[0, :100], segments[0, 100:101], segments[0, 101:230] = 1, 2, 3
  segments[1, 30:] = 1
  positions = np.zeros((B + 1, T), np.int32)
  for b in range(B + 1):
    for s in np.unique(segments[b]):
      (where,) = np.nonzero(segments[b] == s)
      positions[b, where] = np.arange(len(where))
  return q, k, v, jnp.asarray(segments), jnp.asarray(positions)


def plain(q, k, v, segments, positions, window=None, soft_cap=None, causal=True):
  """The rule as it reads, in the dtype of q: all scores, k and v repeated, -inf outside."""
  k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
  scores = jnp.einsum('BTNH,BSNH->BNTS', q, k) / np.sqrt(q.shape[-1])
  if soft_cap is not None:
    scores = soft_cap * jnp.tanh(scores / soft_cap)
  behind = positions[:, :, None] - positions[:, None]
  mask = segments[:, :, None] == segments[:, None]
  if causal:
    mask &= behind >= 0
  if window is not None:
    mask &= abs(behind) < window
  weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
  return jnp.einsum('BNTS,BSNH->BTNH', weights, v)


def by_dense(q, k, v, segments, positions, window=None, soft_cap=None, causal=True):
  where = (segments, positions, segments, positions)
  return dense.attend(q, k, v, dense.visible(where, window, causal), soft_cap)


def by_blocked(q, k, v, segments, positions, window=None, soft_cap=None, causal=True):
  where = (segments, positions, segments, positions)
  return blocked.attend(q, k, v, where, window, soft_cap, causal)


def _interpreted(attend, q, k, v, where, window, soft_cap, causal=True):
  """In an island, as models run it: interpret mode knows no Explicit axes."""
  how = dict(window=window, soft_cap=soft_cap, causal=causal, interpret=True)
  island = functools.partial(attend, **how)
  specs = dict(in_specs=(jax.P(),) * 4, out_specs=jax.P())
  return jax.jit(jax.shard_map(island, check_vma=False, **specs))(q, k, v, where)


def by_splash(q, k, v, segments, positions, window=None, soft_cap=None, causal=True):
  del positions
  return _interpreted(splash.attend, q, k, v, (segments, segments), window, soft_cap, causal)


def by_triton(q, k, v, segments, positions, window=None, soft_cap=None, causal=True):
  where = (segments, positions, segments, positions)
  return _interpreted(triton.attend, q, k, v, where, window, soft_cap, causal)


KERNELS = [by_dense, by_blocked, by_splash, by_triton]
features = pytest.mark.parametrize(('window', 'soft_cap', 'causal'), FEATURES)


def gradients(
  attend, q, k, v, segments, positions, factors, window=None, soft_cap=None, causal=True
):
  def total(q, k, v):
    y = attend(q, k, v, segments, positions, window, soft_cap, causal)
    return (y.astype(factors.dtype) * factors).sum()

  return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)


@functools.cache
def exact(heads, window, soft_cap, causal):
  """Outputs and gradients of `plain` in float64."""
  q, k, v, *where = rows(heads)
  factors = np.random.default_rng(1).normal(size=q.shape)
  with jax.enable_x64(True):
    q, k, v = (jnp.asarray(np.asarray(a), jnp.float64) for a in (q, k, v))
    out = np.asarray(plain(q, k, v, *where, window, soft_cap, causal))
    found = gradients(plain, q, k, v, *where, jnp.asarray(factors), window, soft_cap, causal)
  return out, [np.asarray(a) for a in found], factors.astype(np.float32)


@pytest.mark.parametrize('attend', KERNELS)
@pytest.mark.parametrize(
  ('heads', 'window', 'soft_cap', 'causal'),
  [(2, None, None, True), *((4, *x) for x in FEATURES)],
)
def test_outputs_and_gradients_are_the_exact_ones(attend, heads, window, soft_cap, causal):
  q, k, v, *where = rows(heads)
  out, expected, factors = exact(heads, window, soft_cap, causal)
  np.testing.assert_allclose(attend(q, k, v, *where, window, soft_cap, causal), out, atol=3e-6)
  found = gradients(attend, q, k, v, *where, factors, window, soft_cap, causal)
  for a, b in zip(found, expected, strict=True):
    assert np.isfinite(a).all()  # the row that is all padding too
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('attend', KERNELS)
def test_bfloat16_stays_near_the_plain_one_in_float32(attend):
  q, k, v, *where = rows(dtype=jnp.bfloat16)
  expected = plain(*(a.astype(jnp.float32) for a in (q, k, v)), *where)
  got = attend(q, k, v, *where)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.03)


@pytest.mark.parametrize('attend', KERNELS)
@features
def test_documents_are_deaf_to_each_other_exactly(attend, window, soft_cap, causal):
  """Document 3 is changed to huge values: outputs and gradients of document 1 keep every bit."""
  q, k, v, segments, positions = rows()
  other = (segments == 3)[:, :, None, None]
  changed = [jnp.where(other, 1e4 * a, a) for a in (q, k, v)]
  mine = np.asarray(segments == 1)
  how = segments, positions, window, soft_cap, causal
  before, after = (attend(*x, *how) for x in ((q, k, v), changed))
  np.testing.assert_array_equal(np.asarray(before)[mine], np.asarray(after)[mine])
  assert (np.asarray(before)[segments == 3] != np.asarray(after)[segments == 3]).any()
  factors = jnp.where((segments == 1)[:, :, None, None], 1.0, 0.0)
  how = segments, positions, factors, window, soft_cap, causal
  for gradient in gradients(attend, q, k, v, *how):
    assert not np.asarray(gradient)[~mine].any() and np.asarray(gradient)[mine].any()


@pytest.mark.parametrize('attend', KERNELS)
def test_the_future_is_unseen_exactly(attend):
  q, k, v, *where = rows()
  later = (np.arange(T) >= 60)[None, :, None, None]
  changed = attend(q, *(jnp.where(later, -a, a) for a in (k, v)), *where)
  np.testing.assert_array_equal(changed[:, :60], attend(q, k, v, *where)[:, :60])


@pytest.mark.parametrize('attend', KERNELS)
def test_what_lies_before_the_window_is_unseen_exactly(attend):
  q, k, v, *where = rows()
  early = (np.arange(T) < 120)[None, :, None, None]
  changed = attend(q, *(jnp.where(early, -a, a) for a in (k, v)), *where, 50)
  before = attend(q, k, v, *where, 50)
  np.testing.assert_array_equal(changed[:, 169:], before[:, 169:])  # 169 - 120 < 50
  assert (changed[0, 168] != before[0, 168]).any() and (changed[1, 168] != before[1, 168]).any()


def test_queries_may_be_fewer_than_keys():
  """As under a split sequence: the second half of the queries sees all keys."""
  q, k, v, segments, positions = rows()
  half = slice(T // 2, None)
  where = (segments[:, half], positions[:, half], segments, positions)
  expected = by_dense(q, k, v, segments, positions)[:, half]
  found = [
    blocked.attend(q[:, half], k, v, where, None, None),
    _interpreted(triton.attend, q[:, half], k, v, where, None, None),
  ]
  for got in found:
    np.testing.assert_allclose(got, expected, atol=3e-6)


def test_blocks_that_cannot_see_each_other_are_skipped():
  """Two documents of whole blocks: the triton kernel computes a triangle of each, and no more."""
  count = 8
  segments = np.repeat([1, 1, 1, 2, 2, 2, 2, 2], triton.BLOCK)[None].astype(np.int32)
  positions = np.concatenate([np.arange(n * triton.BLOCK) for n in (3, 5)])[None]
  where = (segments, positions, segments, positions)
  first, last = triton._range(triton._reachable(where, None))
  np.testing.assert_array_equal(first[0], [0, 0, 0, 3, 3, 3, 3, 3])
  np.testing.assert_array_equal(last[0], np.arange(count) + 1)
  first, last = triton._range(triton._reachable(where, triton.BLOCK))
  np.testing.assert_array_equal(first[0], [0, 0, 1, 3, 3, 4, 5, 6])


@pytest.mark.parametrize(
  ('platform', 'context', 'queries', 'keys', 'name'),
  [
    ('cpu', 1, 256, 256, 'dense'),
    ('cpu', 1, 4096, 4096, 'blocked'),
    ('gpu', 1, 8192, 8192, 'triton'),
    ('gpu', 4, 8192, 8192, 'triton'),
    ('gpu', 1, 1, 512, 'dense'),
    ('cpu', 1, 1032, 1032, 'dense'),  # no block divides
    ('cpu', 8, 1024, 1024, 'blocked'),
    ('tpu', 1, 128, 128, 'splash'),
    ('tpu', 1, 100, 100, 'dense'),
    ('tpu', 2, 8192, 8192, 'splash'),
    ('tpu', 64, 4096, 4096, 'dense'),  # 64 queries a device
    ('tpu', 1, 1, 512, 'dense'),  # decoding
    ('tpu', 1, 1024, 2048, 'blocked'),  # reading a prompt into a cache
  ],
)
def test_the_kernel_is_chosen_by_platform_and_length(platform, context, queries, keys, name):
  for window, soft_cap, causal in FEATURES:
    sizes = platform, context, queries, keys, 128, 'bfloat16'
    problem = Problem(*sizes, window, soft_cap, causal=causal)
    assert attention.kernel(problem) == name


@pytest.mark.parametrize(
  ('dtype', 'head_dim', 'capability', 'why'),
  [
    ('float32', 128, (9, 0), 'float32'),
    ('bfloat16', 96, (9, 0), 'head_dim 96'),
    ('bfloat16', 128, (8, 0), 'compute capability 8.0'),
  ],
)
def test_problems_that_the_gpu_kernel_rejects_are_logged(
  dtype, head_dim, capability, why, caplog, monkeypatch
):
  caplog.set_level('INFO')
  monkeypatch.setattr(attention, '_logged', set())
  problem = Problem('gpu', 1, 8192, 8192, head_dim, dtype, capability=capability)
  assert attention.kernel(problem) == 'blocked'
  for queries in (8192, 4096):  # once, for all shapes
    attention._log_choice('blocked', dataclasses.replace(problem, queries=queries, keys=queries))
  assert caplog.text.count('kernel on gpu: blocked') == 1 and why in caplog.text


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


@pytest.mark.parametrize(
  ('name', 'compiler', 'kernels'),
  [
    ('v5e:2x4', 'libtpu', ('splash_mqa_fwd', 'splash_mqa_dq', 'splash_mqa_dkv')),
    (
      'h200:8',
      'jax_cuda13_plugin',
      ('attention_forward', 'attention_queries', 'attention_keys'),
    ),
  ],
)
def test_the_platforms_kernel_compiles_for_devices_that_are_not_here(
  name, compiler, kernels, monkeypatch
):
  """With a split sequence, a window and a cap; without the kernel memory is many times more."""
  if importlib.util.find_spec(compiler) is None:
    pytest.skip(f'needs {compiler}')
  where = topology.parse(name)
  for key, value in topology.environment(where).items():
    monkeypatch.setitem(os.environ, key, value)
  sizes = dict.fromkeys(sharding.AXES, 1) | {'context': 2, 'fsdp': -1}
  mesh = sharding.make_mesh(sizes, topology.devices(where))
  length, batch = 4096, mesh.shape['fsdp']

  def temporaries():
    def like(heads):
      names = ('batch', 'seq') if heads is None else ('batch', 'seq', 'heads', None)
      place = jax.sharding.NamedSharding(mesh, sharding.spec(*names))
      if heads is None:
        return jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=place)
      shape = (batch, length, heads, 128)
      return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    def total(q, k, v, *where):
      where = attention.Tokens(*where)
      return attention.attend(q, k, v, where, where, 1000, 50.0).astype(jnp.float32).sum()

    with jax.set_mesh(mesh), jax.default_matmul_precision('default'):
      shapes = [like(n) for n in (8, 2, 2, None, None)]
      gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
      compiled = gradient.lower(*shapes).compile()
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes

  text, size = temporaries()
  assert all(kernel in text for kernel in kernels)
  monkeypatch.setattr(attention, 'kernel', lambda problem: 'blocked')
  text, other = temporaries()
  assert not any(kernel in text for kernel in kernels) and other > 4 * size
