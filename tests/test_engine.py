"""Completions that depend on seed, prompt and index alone, whatever slots, order and neighbours;
their log-probabilities against the trainer's forward.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from tiny_model import QWEN2, TINY, ids, init, logits, logprobs, tokens_at

from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.runtime.errors import ConfigError

# Two buckets of length, and a prompt of one token, of which nothing is prefilled.
PROMPTS = [ids(1, n, seed=n)[0].tolist() for n in (5, 1, 12, 3, 21)]
GROUP, MOST = 3, 20
# About one token in 13 ends a completion, so that lengths are ragged and most slots are refilled.
STOPS = tuple(range(0, 256, 13))
WARM = Sampling(1.0)


@functools.cache
def params():
  return init(TINY)


@functools.cache
def engine(slots, stops=STOPS, dispatch=4):
  return Engine(TINY, jnp.float32, stops, 0, slots=slots, tokens_per_dispatch=dispatch)


def generate(slots=8, prompts=PROMPTS, **changes):
  stops, dispatch = changes.pop('stops', STOPS), changes.pop('dispatch', 4)
  settings = {'group': GROUP, 'max_tokens': MOST, 'sampling': WARM, 'seed': 3} | changes
  return engine(slots, stops, dispatch).generate(params(), prompts, **settings)


@functools.cache
def usual():
  return generate()


def tokens(rollout):
  return [[c.tokens for c in row] for row in rollout.completions]


def scores(rollout):
  return np.concatenate([c.logprobs for row in rollout.completions for c in row])


def whole_rows(rollout):
  """(tokens, labels, weights, segments) int32[rows, 48] of prompts with their completions; weights
  are 1 where a label is a completion's token.
  """
  arrays = np.zeros((4, sum(map(len, rollout.completions)), 48), np.int32)
  pairs = [(p, c) for p, row in zip(PROMPTS, rollout.completions, strict=True) for c in row]
  for i, (prompt, c) in enumerate(pairs):
    whole = prompt + c.tokens
    arrays[0, i, : len(whole)], arrays[1, i, : len(whole) - 1] = whole, whole[1:]
    arrays[2, i, len(prompt) - 1 : len(whole) - 1], arrays[3, i, : len(whole)] = 1, 1
  return arrays


@pytest.mark.parametrize('slots', [1, 3])
def test_the_number_of_slots_does_not_matter(slots):
  rollout = generate(slots)
  assert tokens(rollout) == tokens(usual())
  np.testing.assert_allclose(scores(rollout), scores(usual()), atol=1e-5)


def test_slots_are_refilled_and_the_ring_goes_round():
  """What the test above compares with a single slot is no easy case."""
  lengths = {len(c) for row in tokens(usual()) for c in row}
  assert len(lengths) > 6 and MOST in lengths and min(lengths) < 4
  assert generate(1).metrics['steps'] > 2 * (24 + MOST), 'the ring holds 24 + 20'
  assert generate(3).metrics['steps'] > 24 + MOST


def test_the_order_of_prompts_does_not_matter():
  order = [3, 0, 4, 2, 1]
  rollout = generate(3, [PROMPTS[i] for i in order], prompt_ids=order)
  assert tokens(rollout) == [tokens(usual())[i] for i in order]


def test_completions_of_a_group_are_the_first_of_a_larger_one():
  rollout = generate(group=5)
  assert [row[:GROUP] for row in tokens(rollout)] == tokens(usual())
  for row in tokens(rollout):
    assert len({tuple(c) for c in row}) > 1


def test_steps_between_two_looks_do_not_matter():
  assert tokens(generate(dispatch=7)) == tokens(usual())


def test_seed_and_prompt_id_matter():
  assert tokens(generate(seed=4)) != tokens(usual())
  assert tokens(generate(prompt_ids=[5, 6, 7, 8, 9])) != tokens(usual())


def test_greedy_completions_of_a_group_are_all_alike():
  for row in tokens(generate(3, sampling=Sampling())):
    assert len({tuple(c) for c in row}) == 1


def test_log_probs_are_those_of_the_trainer_s_forward():
  """kinds.apply and head.token_logprobs over the whole sequence, in float32."""
  rows, labels, weights, segments = whole_rows(usual())
  expected = logprobs(TINY, params(), rows, labels, weights, tokens_at(segments))
  np.testing.assert_allclose(scores(usual()), expected[weights > 0], atol=1e-5)
  for c in (c for row in usual().completions for c in row):
    assert c.logprobs.dtype == np.float32 and c.logprobs.shape == (len(c.tokens),)


@pytest.mark.parametrize(
  'sampling', [Sampling(0.6), Sampling(0.6, top_k=5), Sampling(1, top_p=0.7)]
)
def test_temperature_and_truncation_in_log_probs(sampling):
  """float64 arithmetic on the full forward's logits: the ratio to either is 1 within 1e-5."""
  rollout = generate(sampling=sampling)
  rows, labels, weights, segments = whole_rows(rollout)
  z = np.float64(logits(TINY, params(), rows, tokens_at(segments)))[weights > 0]
  log_p = special.log_softmax(z / sampling.temperature, -1)
  place = np.arange(len(z)), labels[weights > 0]
  np.testing.assert_allclose(np.exp(scores(rollout) - log_p[place]), 1, atol=1e-5)


def test_greedy_completions_of_qwen2_are_the_likeliest_tokens_of_its_full_forward():
  """Each token teacher-forced: the argmax of kinds.apply's logits over all before it."""
  params = init(QWEN2)
  own = Engine(QWEN2, jnp.float32, STOPS, 0, slots=2, tokens_per_dispatch=4)
  rollout = own.generate(params, PROMPTS, group=1, max_tokens=MOST, sampling=Sampling(), seed=0)
  rows, labels, weights, segments = whole_rows(rollout)
  z = logits(QWEN2, params, rows, tokens_at(segments))
  np.testing.assert_array_equal(z.argmax(-1)[weights > 0], labels[weights > 0])
  expected = logprobs(QWEN2, params, rows, labels, weights, tokens_at(segments))
  np.testing.assert_allclose(scores(rollout), expected[weights > 0], atol=1e-5)
  assert weights.sum() > 40


@pytest.mark.parametrize('sampling', [Sampling(), WARM])
def test_ids_that_the_tokenizer_does_not_know_are_never_drawn(sampling):
  """A third of the rows is beyond its 171; log-probs stay those of the trainer's forward."""
  some = {'group': GROUP, 'max_tokens': MOST, 'sampling': sampling, 'seed': 3}
  free = engine(8).generate(params(), PROMPTS, **some)
  assert max(t for row in tokens(free) for c in row for t in c) >= 171
  bound = Engine(TINY, jnp.float32, STOPS, 0, slots=3, tokens_per_dispatch=4, vocab_size=171)
  rollout = bound.generate(params(), PROMPTS, **some)
  assert max(t for row in tokens(rollout) for c in row for t in c) < 171
  rows, labels, weights, segments = whole_rows(rollout)
  expected = logprobs(TINY, params(), rows, labels, weights, tokens_at(segments))
  if sampling.temperature:
    np.testing.assert_allclose(scores(rollout), expected[weights > 0], atol=1e-5)
  z = np.float64(logits(TINY, params(), rows, tokens_at(segments)))[weights > 0][:, :171]
  if sampling == Sampling():
    np.testing.assert_array_equal(z.argmax(-1), labels[weights > 0])


def test_a_completion_keeps_its_stop_token_and_the_reason_of_its_end():
  for c in (c for row in usual().completions for c in row):
    assert not set(c.tokens[:-1]) & set(STOPS)
    assert c.truncated == (c.tokens[-1] not in STOPS)
    assert c.truncated <= (len(c.tokens) == MOST)
  ends = [c.truncated for row in usual().completions for c in row]
  assert 0 < sum(ends) < len(ends)
  assert usual().metrics['truncated'] == pytest.approx(np.mean(ends))


def test_max_tokens_cuts_the_same_completion():
  shorter = generate(max_tokens=[1, 3, 5, 20, 6])
  for row, whole, most in zip(tokens(shorter), tokens(usual()), [1, 3, 5, 20, 6], strict=True):
    assert row == [c[:most] for c in whole]


@pytest.mark.parametrize('slots', [2, 8])
def test_a_stop_string_ends_at_its_token_whatever_the_dispatch(slots):
  """The function is asked about every prefix, so a completion never depends on where a dispatch
  ended.
  """

  def ended(answer):
    return sum(answer) % 7 == 0

  rollout = generate(slots, ended=ended)
  for row, whole in zip(rollout.completions, tokens(usual()), strict=True):
    for c, w in zip(row, whole, strict=True):
      cut = next((n for n in range(1, len(w) + 1) if ended(w[:n])), None)
      assert c.tokens == w[:cut]
      assert c.truncated == (cut is None and w[-1] not in STOPS)


def test_a_prompt_is_prefilled_once_for_its_group():
  """Also where its group enters at several times."""
  expected = sum(len(p) - 1 for p in PROMPTS)
  for slots in (1, 2, 3, 8):
    assert generate(slots).metrics['prefill_tokens'] == expected


def test_metrics_add_up():
  metrics = usual().metrics
  count = sum(len(c) for row in tokens(usual()) for c in row)
  assert metrics['tokens'] == count
  assert metrics['tokens_per_s'] == pytest.approx(count / metrics['seconds'])
  assert metrics['slot_occupancy'] == pytest.approx(count / (8 * metrics['steps']))
  assert metrics['mean_length'] == pytest.approx(count / (len(PROMPTS) * GROUP))
  assert 0 < metrics['prefill_padding'] < 1


def test_one_program_a_bucket_over_a_hundred_ragged_batches():
  """Counted by the compiler's own events, not by the engine, which must agree."""
  fresh = Engine(TINY, jnp.float32, STOPS, 0, slots=4, tokens_per_dispatch=4)
  begun = []

  def heard(event, seconds, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      begun.append(seconds)

  chance = np.random.default_rng(0)

  def batch(longest):
    lengths = [*chance.integers(1, longest, chance.integers(1, 5)), longest]
    prompts = [chance.integers(0, 256, n).tolist() for n in lengths]
    return fresh.generate(
      params(), prompts, group=2, max_tokens=int(chance.integers(5, 9)), sampling=WARM, seed=0
    )

  longest = [7, 15, 22, 30, 3]
  params()
  jax.monitoring.register_event_duration_secs_listener(heard)
  try:
    for i in range(100):
      batch(longest[i % 5])
  finally:
    jax.monitoring.unregister_event_duration_listener(heard)
  # Prompts without their last token fill the buckets 16, 24 and 32, and so do the prompts of a
  # ring; max_tokens fills 8; prompts are read 4 at a time or singly.
  start, decode, prefill = 3, 3, 2 * 3
  enter = 2 * (1 + 2 + 3)  # with prompts of any bucket up to the ring's
  assert len(begun) == fresh.compilations <= start + decode + prefill + enter


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'prompts': []}, 'at least one token'),
    ({'prompts': [[1], []]}, 'at least one token'),
    ({'group': 0}, r'rollout\.group=0'),
    ({'max_tokens': 0}, r'max_tokens=0'),
    ({'max_tokens': [3]}, '5 prompts, but 1 max_tokens'),
    ({'prompt_ids': [1, 2]}, '2 prompt_ids'),
    ({'max_tokens': 120}, r'make 141 positions; the model was made for 128'),
  ],
)
def test_refusals(changes, message):
  with pytest.raises(ConfigError, match=message):
    generate(**changes)


def test_a_split_sequence_is_refused(use_mesh):
  use_mesh(context=2)
  with pytest.raises(ConfigError, match=r'mesh\.context=2'):
    engine(8).generate(init(TINY), PROMPTS, group=1, max_tokens=4, sampling=WARM, seed=0)


def test_an_idle_slot_reads_no_position_beyond_a_learned_table():
  """Its NaN would stay in the entries of the sequence that follows in the slot."""
  arch = dataclasses.replace(TINY, learned_positions=48, max_len=48)
  weights, prompts, most = init(arch), [ids(1, n)[0].tolist() for n in (44, 3, 5)], [4, 40, 6]

  def found(slots):
    engine = Engine(arch, jnp.float32, (), 0, slots=slots, tokens_per_dispatch=32)
    return engine.generate(weights, prompts, group=1, max_tokens=most, sampling=WARM, seed=3)

  refilled, alone = found(2), found(3)
  assert tokens(refilled) == tokens(alone)
  np.testing.assert_allclose(scores(refilled), scores(alone), atol=1e-5)
