"""Choosing tokens against exact probabilities; answers that depend on neither batch nor padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tiny_model import TINY, UNTIED, ids, init, logits, tokens_at

from ftjax.generation import sampler
from ftjax.generation.sampler import Sampler, Sampling, choose
from ftjax.runtime.errors import ConfigError

DRAWS = 4000
LOGITS = np.log(np.float32([0.30, 0.05, 0.20, 0.02, 0.25, 0.10, 0.03, 0.05]))


@functools.partial(jax.jit, static_argnums=1)
def draw_many(logits, sampling):
  keys = jax.random.split(jax.random.key(7), DRAWS)
  return choose(jnp.broadcast_to(logits, (DRAWS, logits.size)), keys, sampling)


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
  kept = sampler._truncate(logits, Sampling(1.0, top_k=50_000))
  assert np.isfinite(np.asarray(kept)).all()


def test_the_order_of_the_vocabulary_does_not_matter():
  order = np.random.default_rng(0).permutation(8)
  shuffled = counts(Sampling(1.0, top_k=3, top_p=0.9), LOGITS[order])
  assert set(np.flatnonzero(shuffled)) == {i for i, v in enumerate(order) if v in (0, 2, 4)}


def test_temperature_zero_is_the_likeliest():
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
  got = choose(rows, jax.random.split(jax.random.key(0), 5), Sampling(0.0, top_k=3, top_p=0.5))
  np.testing.assert_array_equal(got, np.argmax(rows, -1))
  assert got.dtype == jnp.int32


@pytest.mark.parametrize('settings', [(-0.1, 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0), (1.0, 0, 1.1)])
def test_settings_out_of_range(settings):
  with pytest.raises(ConfigError, match='temperature'):
    Sampling(*settings)


# Generation. One sampler for most tests: its programs are compiled once for a batch size.
PROMPTS = [
  ids(1, n, seed=n)[0].tolist() for n in (5, 1, 12, 3)
]  # all in one bucket, so that alone and together run over the same padding or another
NEW = 24
GREEDY, WARM = Sampling(), Sampling(1.0)


@pytest.fixture(scope='module')
def params():
  return init(TINY)


@pytest.fixture(scope='module')
def plain():
  return Sampler(TINY, jnp.float32, (), 0)


@pytest.fixture(scope='module')
def greedy(plain, params):
  return plain.generate(params, PROMPTS, NEW, GREEDY)


@pytest.fixture(scope='module')
def warm(plain, params):
  return plain.generate(params, PROMPTS, NEW, WARM, seed=3, row_ids=[10, 11, 12, 13])


def test_greedy_is_the_argmax_of_the_full_forward(params, greedy):
  """Each answer is fed back whole: every token of it is the likeliest after those before it."""
  length = max(map(len, PROMPTS)) + NEW
  tokens, segments = np.zeros((2, len(PROMPTS), length), np.int32)
  for b, (prompt, answer) in enumerate(zip(PROMPTS, greedy, strict=True)):
    assert len(answer) == NEW
    whole = prompt + answer
    tokens[b, : len(whole)], segments[b, : len(whole)] = whole, 1
  likeliest = logits(TINY, params, tokens, tokens_at(segments)).argmax(-1)
  for b, (prompt, answer) in enumerate(zip(PROMPTS, greedy, strict=True)):
    begin = len(prompt) - 1
    assert likeliest[b, begin : begin + NEW].tolist() == answer


def test_alone_as_in_a_batch(plain, params, greedy, warm):
  """Greedy, and by the key (seed, row id, position): the slot and the other rows do not count."""
  for b in (1, 2):
    assert plain.generate(params, [PROMPTS[b]], NEW, GREEDY) == [greedy[b]]
    alone = plain.generate(params, [PROMPTS[b]], NEW, WARM, seed=3, row_ids=[10 + b])
    assert alone == [warm[b]]


def test_in_another_order(plain, params, greedy, warm):
  order = [3, 1, 0, 2]
  prompts = [PROMPTS[b] for b in order]
  assert plain.generate(params, prompts, NEW, GREEDY) == [greedy[b] for b in order]
  turned = plain.generate(params, prompts, NEW, WARM, seed=3, row_ids=[10 + b for b in order])
  assert turned == [warm[b] for b in order]


def test_beside_a_longer_prompt(plain, params, warm):
  """Which pads the others to a wider bucket: their keys count from the prompt, not the padding."""
  prompts = [*PROMPTS[:3], ids(1, 40, seed=9)[0].tolist()]
  answers = plain.generate(params, prompts, NEW, WARM, seed=3, row_ids=[10, 11, 12, 13])
  assert answers[:3] == warm[:3]


def test_keys_are_of_seed_row_and_position(plain, params, warm):
  assert plain.generate(params, PROMPTS, NEW, WARM, seed=4, row_ids=[10, 11, 12, 13]) != warm
  same = plain.generate(params, [PROMPTS[0]] * 4, NEW, WARM, seed=3, row_ids=[10, 10, 11, 12])
  assert same[0] == same[1] == warm[0]
  assert len({tuple(a) for a in same}) == 3
  default = plain.generate(params, [PROMPTS[0]] * 4, NEW, WARM, seed=3)
  assert len({tuple(a) for a in default}) == 4
  assert len(set(warm[0])) > NEW // 2, 'one key for all positions draws like tokens'


@pytest.mark.parametrize('most', [1, 17, 18])
def test_max_tokens_cuts_the_same_answer(plain, params, greedy, most):
  assert plain.generate(params, PROMPTS, most, GREEDY) == [a[:most] for a in greedy]


def test_an_answer_ends_before_its_first_stop_token_and_stays_so(params, greedy):
  """One row stops at once, one in the first dispatch, and others go on for several more; the pad
  token is no stop token and no part of an answer.
  """
  stops = (greedy[0][4], greedy[2][0])
  expected = []
  for answer in greedy:
    expected.append(answer[: min((i for i, t in enumerate(answer) if t in stops), default=NEW)])
  lengths = {len(a) for a in expected}
  assert {0, NEW} <= lengths and len(lengths) > 2, 'choose other stop tokens'
  sampled = Sampler(TINY, jnp.float32, stops, 0).generate(params, PROMPTS, 3 * NEW, GREEDY)
  for got, want in zip(sampled, expected, strict=True):
    assert got[:NEW] == want
    assert (len(got) > NEW) == (len(want) == NEW)


def test_stop_strings_end_between_dispatches(plain, params, greedy):
  """`ended` sees every answer so far; a row it ends gets no more tokens, the others all."""
  mark = greedy[0][6]
  seen = []

  def ended(answer):
    seen.append(list(answer))
    return mark in answer

  answers = plain.generate(params, PROMPTS, NEW, GREEDY, ended=ended)
  for answer, whole in zip(answers, greedy, strict=True):
    # The first token comes with the prompt, sixteen more with each dispatch.
    cuts = [n for n in (1, 1 + sampler.TOKENS_PER_DISPATCH, NEW) if mark in whole[:n]]
    assert answer == whole[: min([*cuts, NEW])]
  assert answers[0] == greedy[0][: 1 + sampler.TOKENS_PER_DISPATCH]
  assert all(any(g[: len(a)] == a for g in greedy) for a in seen)


def test_answers_are_streamed(plain, params, greedy):
  shown = []
  plain.generate(params, PROMPTS, NEW, GREEDY, stream=lambda a: shown.append([list(x) for x in a]))
  assert shown[-1] == greedy
  assert [len(a[0]) for a in shown] == [1, 17, 24]


@pytest.mark.parametrize('sampling', [GREEDY, WARM, Sampling(1.0, top_k=5), Sampling(1, top_p=0.8)])
def test_ids_beyond_the_tokenizer_s_are_as_if_their_rows_were_not_there(sampling):
  """Whatever the model thinks of them: here each such row is the likeliest."""
  tall = jnp.concatenate([LOGITS, np.float32([9, 10, 11])])
  keys = jax.random.split(jax.random.key(7), 200)
  rows = [jnp.broadcast_to(z, (200, z.size)) for z in (tall, jnp.asarray(LOGITS))]
  run = jax.jit(sampler.sample, static_argnums=(2, 3))
  token, logprob, kept = run(rows[0], keys, sampling, 8)
  without = run(rows[1], keys, sampling, None)
  np.testing.assert_array_equal(token, without[0])
  np.testing.assert_allclose(kept, without[2], atol=1e-6)
  whole = jax.nn.log_softmax(tall)
  np.testing.assert_allclose(logprob, whole[token], atol=1e-5)


def test_answers_hold_no_ids_beyond_the_tokenizer_s(params, greedy):
  assert max(max(a) for a in greedy) >= 171
  bound = Sampler(TINY, jnp.float32, (), 0, vocab_size=171)
  for sampling in (GREEDY, WARM):
    assert max(max(a) for a in bound.generate(params, PROMPTS, NEW, sampling)) < 171


def test_an_untied_head_is_used():
  params = init(UNTIED)
  answer = Sampler(UNTIED, jnp.float32, (), 0).generate(params, [PROMPTS[2]], 1, GREEDY)
  tokens = np.array([PROMPTS[2]], np.int32)
  assert answer[0][0] == logits(UNTIED, params, tokens, tokens_at(np.ones((1, 12))))[0, -1].argmax()


@pytest.mark.parametrize('prompts', [[], [[1, 2], []]])
def test_empty_prompts_are_refused(plain, params, prompts):
  with pytest.raises(ConfigError, match='at least one token'):
    plain.generate(params, prompts, 4, GREEDY)


def test_a_split_sequence_is_refused(use_mesh):
  use_mesh(context=2)
  with pytest.raises(ConfigError, match=r'mesh\.context=2'):
    Sampler(TINY, jnp.float32, (), 0).generate(init(TINY), PROMPTS, 4, GREEDY)


def test_buckets_hold_their_prompts_with_little_padding():
  sizes = [sampler.bucket(n) for n in range(1, 5000)]
  for n, size in enumerate(sizes, 1):
    assert n <= size <= max(16, n * 3 / 2)
  assert sizes == sorted(sizes) and len(set(sizes)) <= 40
