"""The choice of tokens against exact probabilities; buckets of lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ftjax.generation import sampling as sampling_lib
from ftjax.generation.padding import bucket
from ftjax.generation.sampling import Sampling, sample
from ftjax.runtime.errors import ConfigError

DRAWS = 4000
LOGITS = np.log(np.float32([0.30, 0.05, 0.20, 0.02, 0.25, 0.10, 0.03, 0.05]))


@functools.partial(jax.jit, static_argnums=1)
def draw_many(logits, sampling):
  keys = jax.random.split(jax.random.key(7), DRAWS)
  return sample(jnp.broadcast_to(logits, (DRAWS, logits.size)), keys, sampling)[0]


def counts(sampling, logits=LOGITS):
  return np.bincount(np.asarray(draw_many(jnp.asarray(logits), sampling)), minlength=logits.size)


def oracle(logits, sampling):
  """Exact probabilities, in float64: sort, cut to k, renormalize, cut to the smallest set with mass
  p: the order of HF's warpers.
  """
  p = np.exp(np.float64(logits) / sampling.temperature)
  p /= p.sum()
  order = np.argsort(-p, kind='stable')
  kept = order[: sampling.top_k or None]
  if sampling.top_p < 1:
    kept = kept[: 1 + np.searchsorted(np.cumsum(p[kept]) / p[kept].sum(), sampling.top_p)]
  out = np.zeros_like(p)
  out[kept] = p[kept] / p[kept].sum()
  return out


@pytest.mark.parametrize(
  'sampling',
  [
    Sampling(1.0),
    Sampling(0.5),
    Sampling(2.0),
    Sampling(1.0, top_k=3),
    Sampling(0.7, top_k=1),
    Sampling(1.0, top_k=8),
    Sampling(1.0, top_k=100),
    Sampling(1.0, top_p=0.72),
    Sampling(1.0, top_p=0.78),
    Sampling(2.0, top_p=0.5),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, top_k=2, top_p=0.72),
    Sampling(1.0, top_k=5, top_p=0.4),
    Sampling(1.0, top_k=3, top_p=0.8),
  ],
  ids=str,
)
def test_frequencies_are_the_exact_probabilities(sampling):
  """Chi-square of 4,000 draws with a fixed seed; what has no probability is never drawn."""
  seen, expected = counts(sampling), oracle(LOGITS, sampling) * DRAWS
  inside = expected > 0
  assert not seen[~inside].any()
  if inside.sum() > 1:
    assert stats.chisquare(seen[inside], expected[inside]).pvalue > 0.01


@pytest.mark.parametrize(
  ('sampling', 'kept'),
  [
    (Sampling(1.0, top_k=2), [0, 2]),
    (Sampling(1.0, top_k=4), [0, 2, 3, 4]),
    (Sampling(1.0, top_p=0.6), [0, 2, 3]),
  ],
  ids=str,
)
def test_of_equally_likely_tokens_the_first_stay(sampling, kept):
  logits = np.log(np.array([4, 1, 2, 2, 2, 1], np.float32))
  assert np.flatnonzero(counts(sampling, logits)).tolist() == kept


def test_no_token_is_left_out_at_top_p_1():
  """In float32 the sum over so many reaches 1 before the last."""
  logits = jnp.linspace(0, -30, 50_000)[None]
  kept = sampling_lib._truncate(logits, Sampling(1.0, top_k=50_000))
  assert np.isfinite(np.asarray(kept)).all()


def test_the_order_of_the_vocabulary_does_not_matter():
  order = np.random.default_rng(0).permutation(8)
  shuffled = counts(Sampling(1.0, top_k=3, top_p=0.9), LOGITS[order])
  assert set(np.flatnonzero(shuffled)) == {i for i, v in enumerate(order) if v in (0, 2, 4)}


def test_temperature_zero_is_the_likeliest():
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
  keys = jax.random.split(jax.random.key(0), 5)
  got, _ = sample(rows, keys, Sampling(0.0, top_k=3, top_p=0.5))
  np.testing.assert_array_equal(got, np.argmax(rows, -1))
  assert got.dtype == jnp.int32


@pytest.mark.parametrize('settings', [(-0.1, 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0), (1.0, 0, 1.1)])
def test_settings_out_of_range(settings):
  with pytest.raises(ConfigError, match='temperature'):
    Sampling(*settings)


@pytest.mark.parametrize(
  'sampling', [Sampling(), Sampling(1.0), Sampling(1.0, top_k=5), Sampling(1, top_p=0.8)]
)
def test_ids_beyond_the_tokenizer_s_are_as_if_their_rows_were_not_there(sampling):
  """Whatever the model thinks of them: here each such row is the likeliest."""
  tall = jnp.concatenate([LOGITS, np.float32([9, 10, 11])])
  keys = jax.random.split(jax.random.key(7), 200)
  rows = [jnp.broadcast_to(z, (200, z.size)) for z in (tall, jnp.asarray(LOGITS))]
  run = jax.jit(sampling_lib.sample, static_argnums=(2, 3))
  token, logprob = run(rows[0], keys, sampling, 8)
  without = run(rows[1], keys, sampling, None)
  np.testing.assert_array_equal(token, without[0])
  whole = jax.nn.log_softmax(tall)
  np.testing.assert_allclose(logprob, whole[token], atol=1e-5)


def test_buckets_hold_their_prompts_with_little_padding():
  sizes = [bucket(n) for n in range(1, 5000)]
  for n, size in enumerate(sizes, 1):
    assert n <= size <= max(16, n * 3 / 2)
  assert sizes == sorted(sizes) and len(set(sizes)) <= 40
