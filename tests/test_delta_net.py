"""The gated delta net against its definition token by token; packed rows, padding and the cache of
a model with both kinds of layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY, ids, init, logits, place, tokens_at

from ftjax.models import delta_net, head, kinds, kv_cache
from ftjax.models.architecture import DeltaNetSpec
from ftjax.runtime import trees

# The norm divides by what a state returns, which is little at a first token: with a small eps it
# multiplies rounding errors.
NET = DeltaNetSpec(2, 8, 4, 6, conv_width=4, eps=1e-3)
(_FULL,) = TINY.stacks[0][0]
_LINEAR = dataclasses.replace(_FULL, mixer=NET)
HYBRID = dataclasses.replace(TINY, stacks=(((_LINEAR, _FULL), 2),))
B, T = 2, 40
# Of one row. With chunks of 8: borders inside chunks, between them (8, 24), and several inside the
# four tokens that a convolution sees.
DOCUMENTS = (8, 13, 1, 1, 2, 9)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
  monkeypatch.setattr(delta_net, 'CHUNK', 8)


def random_inputs(length, seed=0):
  """q, k, v, g, beta of `recur` for G = 2, and the number of each token's document."""
  rng = np.random.default_rng(seed)
  q, k = (rng.normal(size=(B, length, 2, 8)) for _ in range(2))
  v = rng.normal(size=(B, length, 2, 2, 6))
  g, beta = -rng.exponential(0.2, (B, length, 2, 2)), rng.uniform(size=(B, length, 2, 2))
  begins = rng.uniform(size=(B, length)) < 0.1
  return *(np.float32(x) for x in (q, k, v, g, beta)), np.cumsum(begins, 1).astype(np.int32)


def by_definition(q, k, v, g, beta, run, state):
  """(y, state), token by token in float64."""
  q, k, v, g, beta, state = (np.asarray(x, np.float64) for x in (q, k, v, g, beta, state))
  q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
  y = np.zeros(v.shape)
  for b, t in np.ndindex(run.shape):
    for n, m in np.ndindex(v.shape[2:4]):
      s = state[b, n, m]
      if t and run[b, t] != run[b, t - 1]:
        s[:] = 0
      s *= np.exp(g[b, t, n, m])
      s += np.outer(k[b, t, n], beta[b, t, n, m] * (v[b, t, n, m] - k[b, t, n] @ s))
      y[b, t, n, m] = q[b, t, n] @ s / np.sqrt(q.shape[-1])
  return y, state


@pytest.mark.parametrize(('length', 'chunk'), [(1, 64), (7, 64), (64, 64), (131, 64), (40, 8)])
def test_chunks_are_the_recurrence(length, chunk, monkeypatch):
  monkeypatch.setattr(delta_net, 'CHUNK', chunk)
  *floats, run = random_inputs(length)
  state = np.random.default_rng(1).normal(size=(B, 2, 2, 8, 6)).astype(np.float32)
  for runs in (run, np.zeros_like(run)):
    found = jax.jit(delta_net.recur)(*floats, runs, state)
    for a, b in zip(found, by_definition(*floats, runs, state), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize('decay', [300.0, 1e6])
def test_what_follows_a_token_that_forgets_everything_is_as_exact(decay, monkeypatch):
  monkeypatch.setattr(delta_net, 'CHUNK', 64)
  *floats, run = random_inputs(131)
  floats[3] = np.where(np.random.default_rng(3).uniform(size=floats[3].shape) < 0.1, -decay, -0.02)
  floats[3] = np.float32(floats[3])
  state = np.zeros((B, 2, 2, 8, 6), np.float32)
  found = jax.jit(delta_net.recur)(*floats, run, state)
  for a, b in zip(found, by_definition(*floats, run, state), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def step_by_step(q, k, v, g, beta, run, state):
  """`recur` as a scan over tokens, which JAX differentiates."""

  def unit(x):
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)

  def step(s, token):
    q, k, v, g, beta, begins = token
    s = jnp.where(begins[:, None, None, None, None], 0.0, s) * jnp.exp(g)[..., None, None]
    error = beta[..., None] * (v - jnp.einsum('BKH,BKGHV->BKGV', k, s))
    s = s + jnp.einsum('BKH,BKGV->BKGHV', k, error)
    return s, jnp.einsum('BKH,BKGHV->BKGV', q, s)

  begins = np.diff(run, axis=1, prepend=run[:, :1]) != 0
  tokens = (unit(q) * q.shape[-1] ** -0.5, unit(k), v, g, beta, begins)
  state, y = jax.lax.scan(step, state, [jnp.moveaxis(x, 1, 0) for x in tokens])
  return jnp.moveaxis(y, 0, 1), state


def test_gradients_are_those_of_the_recurrence():
  *floats, run = random_inputs(T - 3)
  state = np.random.default_rng(1).normal(size=(B, 2, 2, 8, 6)).astype(np.float32)
  factors = np.random.default_rng(2).normal(size=floats[2].shape).astype(np.float32)

  def gradient(function):
    def loss(*floats):
      *floats, state = floats
      y, after = function(*floats, run, state)
      return (y * factors).sum() + (after * after).sum()

    return jax.jit(jax.grad(loss, range(6)))(*floats, state)

  for a, b in zip(gradient(delta_net.recur), gradient(step_by_step), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def packed():
  """(tokens, segments) int32[B, T]: the documents in both rows, the second turned round and with
  padding at both ends and between two documents.
  """
  segments = np.zeros((B, T), np.int32)
  for row, (start, lengths) in enumerate(((0, DOCUMENTS), (2, DOCUMENTS[::-1]))):
    for i, n in enumerate(lengths):
      segments[row, start : start + n] = i + 1
      start += n + (row and i == 2)
  return ids(B, T), segments


def alone(tokens, segments):
  """Each document in a row of its own, from its first place on."""
  rows = [(r, d) for r in range(B) for d in range(1, len(DOCUMENTS) + 1)]
  out = np.zeros((2, len(rows), max(DOCUMENTS)), np.int32)
  for i, (r, d) in enumerate(rows):
    inside = segments[r] == d
    out[0, i, : inside.sum()], out[1, i, : inside.sum()] = tokens[r, inside], 1
  return rows, *out


def test_packed_is_separate():
  tokens, segments = packed()
  params = init(HYBRID)
  together = logits(HYBRID, params, tokens, tokens_at(segments))
  rows, single, ones = alone(tokens, segments)
  apart = logits(HYBRID, params, single, tokens_at(ones))
  for i, (r, d) in enumerate(rows):
    np.testing.assert_allclose(together[r, segments[r] == d], apart[i, ones[i] > 0], atol=5e-5)
  assert np.isfinite(together).all()


@functools.partial(jax.jit, static_argnums=4)
def _gradient(params, tokens, where, labels, remat):
  def loss(params):
    x = kinds.apply(HYBRID, params, tokens, where, dtype=jnp.float32, remat=remat)
    table = kinds.head_weights(HYBRID, params)
    weights = (labels >= 0).astype(jnp.float32)
    return head.cross_entropy_sums(x, table, labels, weights, head.LossConfig())[0]

  return jax.grad(loss)(params)


def gradient(params, tokens, segments, labels, remat='none'):
  """Of the summed loss by all parameters, flat."""
  arrays = (place(a, 'batch', 'seq') for a in (tokens, labels))
  tokens, labels = arrays
  found = _gradient(params, tokens, tokens_at(segments), labels, remat)
  return {n: np.asarray(x) for n, x in trees.flatten(found).items()}


def next_tokens(tokens, segments):
  """Labels int32[B, T]: -1 at the last token of a document and on padding."""
  following = np.roll(segments, -1, 1)
  following[:, -1] = 0
  return np.where((segments > 0) & (segments == following), np.roll(tokens, -1, 1), -1)


@pytest.mark.full
def test_gradients_of_packed_are_those_of_separate():
  tokens, segments = packed()
  params = init(HYBRID)
  together = gradient(params, tokens, segments, next_tokens(tokens, segments))
  _, single, ones = alone(tokens, segments)
  apart = gradient(params, single, ones, next_tokens(single, ones))
  for name, found in together.items():
    assert np.abs(found).max() > 0
    np.testing.assert_allclose(found, apart[name], atol=2e-5 * np.abs(apart[name]).max())


@pytest.mark.full
@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_rematerialization_changes_no_gradient(remat):
  tokens, segments = packed()
  params, labels = init(HYBRID), next_tokens(*packed())
  plain = gradient(params, tokens, segments, labels)
  for name, found in gradient(params, tokens, segments, labels, remat).items():
    np.testing.assert_allclose(found, plain[name], atol=2e-6 * np.abs(plain[name]).max())


def test_a_document_changes_no_other_exactly():
  """Nor does what stands on padding."""
  tokens, segments = packed()
  params, where = init(HYBRID), tokens_at(segments)
  before = logits(HYBRID, params, tokens, where)
  for d in range(len(DOCUMENTS) + 1):
    changed = np.where(segments == d, ids(B, T, seed=3), tokens)
    after = logits(HYBRID, params, changed, where)
    others = (segments != d) & (segments > 0)
    np.testing.assert_array_equal(after[others], before[others])
    assert (after[segments == d] != before[segments == d]).any()


def test_gradients_cross_no_border_exactly():
  """Of one document's hidden states by the embeddings: zero on all others and on padding."""
  tokens, segments = packed()
  params, where = init(HYBRID), tokens_at(segments)
  placed = place(tokens, 'batch', 'seq')
  factors = np.random.default_rng(0).normal(size=(B, T, HYBRID.model_dim)).astype(np.float32)

  @jax.jit
  def pull(noise, factors):
    def loss(noise):
      x = kinds.apply(HYBRID, params, placed, where, dtype=jnp.float32, noise=noise)
      return (x * factors).sum()

    return jax.grad(loss)(noise)

  zero = place(np.zeros_like(factors), 'batch', 'seq', 'act_embed')
  for d in range(1, len(DOCUMENTS) + 1):
    inside = (segments == d)[..., None]
    g = np.asarray(pull(zero, place(factors * inside, 'batch', 'seq', 'act_embed')))
    assert (g[segments != d] == 0).all()
    assert (np.abs(g[segments == d]).max(-1) > 0).all()


def test_within_a_document_the_state_and_the_convolution_reach_on():
  """What the tests above find at a border is no dead layer: the first token changes all after it,
  through linear layers alone.
  """
  linear = dataclasses.replace(HYBRID, stacks=(((_LINEAR,), 2),))
  params, where = init(linear), tokens_at(np.ones((B, T), np.int32))
  tokens = ids(B, T)
  before, changed = logits(linear, params, tokens, where), tokens.copy()
  changed[:, 0] += 1
  change = np.abs(logits(linear, params, changed, where) - before).max(-1)
  assert (change > 1e-4).all()
  changed = tokens.copy()
  changed[:, 20:] += 1
  np.testing.assert_array_equal(logits(linear, params, changed, where)[:, :20], before[:, :20])


def decoded(params, tokens, segments, prompt):
  """Hidden states [B, T, D] by a prefill of two pieces and a step for each other token."""
  positions = np.asarray(tokens_at(segments).positions)
  decode = jax.jit(functools.partial(kinds.decode, HYBRID, dtype=jnp.float32))
  memory = kv_cache.empty(HYBRID, B, T + 4, jnp.float32)
  parts, at = [], 0
  for length in [prompt, 12] + [1] * (T - prompt - 12):
    cut = slice(at, at + length)
    where = (place(a[:, cut], 'batch', 'seq') for a in (segments, positions))
    x, memory = decode(
      *(params, place(tokens[:, cut], 'batch', 'seq'), delta_net.Tokens(*where), memory),
      jnp.asarray(at, jnp.int32),
    )
    parts.append(np.asarray(x))
    at += length
  return np.concatenate(parts, 1), memory


@pytest.mark.parametrize('prompt', [pytest.param(2, marks=pytest.mark.full), 13])
def test_cache_is_the_full_forward(prompt):
  """Padded on the left, also by more than the first piece holds."""
  params, tokens = init(HYBRID), ids(B, T)
  segments = np.ones((B, T), np.int32)
  segments[1, :10] = 0
  where = tokens_at(segments)
  apply = functools.partial(jax.jit, static_argnums=0, static_argnames='dtype')(kinds.apply)
  full = apply(HYBRID, params, place(tokens, 'batch', 'seq'), where, dtype=jnp.float32)
  found, memory = decoded(params, tokens, segments, prompt)
  inside = segments > 0
  np.testing.assert_allclose(found[inside], np.asarray(full)[inside], atol=5e-5)
  states = memory.states['stack0/block0']
  assert states['state'].dtype == jnp.float32 and states['state'].shape == (2, B, 4, 8, 6)
  assert states['inputs'].shape == (2, B, 3, 2, NET.channels)
  assert memory.entries.keys() == {'stack0/block1'}


def test_padding_changes_no_state():
  """A slot that is empty, or whose sequence ended, keeps what it has."""
  params = init(HYBRID)
  _, before = decoded(params, ids(B, T), np.ones((B, T), np.int32), 2)
  none = place(np.zeros((B, 5), np.int32), 'batch', 'seq')
  where = delta_net.Tokens(none, none)
  _, after = kinds.decode(
    HYBRID, params, none, where, before, jnp.asarray(0, jnp.int32), dtype=jnp.float32
  )
  for slot, arrays in before.states.items():
    for name, x in arrays.items():
      np.testing.assert_array_equal(after.states[slot][name], x)
      assert np.abs(x).max() > 0
