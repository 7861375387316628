"""Completions of encoder-decoders: their log-probabilities are the trainer's, and neither slots nor
neighbours nor meshes change one; beam search against all completions there are.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5_models
from tiny_model import TINY

from ftjax.generation.batch import Conversation
from ftjax.generation.beam_search import Beams, Writer
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.generation.scorer import Scorer
from ftjax.models.forward import Forward
from ftjax.runtime.errors import ConfigError

NAME, VOCAB, START = 't5', 67, 0
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, VOCAB, n).tolist() for n in (1, 40, 2, 17, 5)]


@functools.cache
def engine(slots=3, beams=Beams(), stops=tuple(range(0, VOCAB, 9))):  # noqa: B008 - frozen
  arch = t5_models.architecture(NAME)
  return Engine(
    arch, jnp.float32, stops, 0, slots=slots, tokens_per_dispatch=4, writer=Writer(START, beams)
  )


@pytest.mark.full
def test_log_probabilities_of_samples_are_the_trainer_s():
  """Of two completions of each prompt, in batches of three."""
  found = engine().generate(
    t5_models.params(NAME), PROMPTS, group=2, max_tokens=12, sampling=Sampling(1.0), seed=3
  )
  pairs = [(p, c) for p, row in zip(PROMPTS, found.completions, strict=True) for c in row]
  source, inside, labels, segments = np.zeros((4, len(pairs), 40), np.int32)
  for i, (prompt, c) in enumerate(pairs):
    source[i, : len(prompt)], inside[i, : len(prompt)] = prompt, 1
    labels[i, : len(c.tokens)], segments[i, : len(c.tokens)] = c.tokens, 1
  batch = t5_models.batch(source, inside, labels, segments)
  arch = t5_models.architecture(NAME)
  expected = jax.jit(Forward(arch, jnp.float32).token_logprobs)(t5_models.params(NAME), batch)
  got = np.concatenate([c.logprobs for _, c in pairs])
  np.testing.assert_allclose(got, np.asarray(expected)[segments > 0], atol=5e-5)
  assert len({tuple(c.tokens) for _, c in pairs}) > len(PROMPTS)
  assert found.metrics['prefill_tokens'] == 2 * sum(map(len, PROMPTS))
  assert {len(c.tokens) < 12 for _, c in pairs} == {True, False}


@pytest.mark.full
def test_neither_slots_nor_neighbours_change_a_completion():
  params, how = t5_models.params(NAME), {'sampling': Sampling(1.0), 'seed': 5}
  found = engine().generate(params, PROMPTS, group=1, max_tokens=12, **how).completions
  whole = engine().generate_at_once(params, PROMPTS, max_tokens=12, **how)
  assert [c.tokens for c in whole] == [row[0].tokens for row in found]
  shown = []
  alone = engine().respond(
    params,
    PROMPTS[3],
    Conversation(),
    max_tokens=12,
    prompt_id=3,
    stream=lambda tokens: shown.append(len(tokens)),
    **how,
  )
  assert alone.tokens == whole[3].tokens and shown[-1] == len(alone.tokens)


def test_a_stop_text_and_each_prompt_s_own_limit():
  params = t5_models.params(NAME)
  most = [3, 5, 1, 2, 4]
  found = engine(stops=()).generate_at_once(
    params, PROMPTS, max_tokens=most, sampling=Sampling(), seed=0
  )
  assert [len(c.tokens) for c in found] == most and all(c.truncated for c in found)
  ended = lambda tokens: len(tokens) == 2  # noqa: E731
  found = engine(stops=()).generate_at_once(
    params, PROMPTS, max_tokens=9, sampling=Sampling(), ended=ended
  )
  assert [len(c.tokens) for c in found] == [2] * 5 and not any(c.truncated for c in found)


def test_a_wide_beam_finds_the_best_of_all_completions():
  """Of three tokens of six: their scores by the full forward pass."""
  arch, params, most, stop, vocab = t5_models.architecture(NAME), t5_models.params(NAME), 3, 2, 6
  prompt, penalty = PROMPTS[3], 0.8
  made = Engine(
    *(arch, jnp.float32, (stop,), 0),
    slots=1,
    vocab_size=vocab,
    writer=Writer(START, Beams(vocab**2, penalty, 'never')),
  )
  (found,) = made.generate_at_once(params, [prompt], max_tokens=most, sampling=Sampling())
  texts = [
    t
    for n in range(1, most + 1)
    for t in itertools.product(range(vocab), repeat=n)
    if stop not in t[:-1] and (t[-1] == stop or n == most)
  ]
  labels, segments = np.zeros((2, len(texts), most), np.int32)
  for i, t in enumerate(texts):
    labels[i, : len(t)], segments[i, : len(t)] = t, 1
  source = np.tile(prompt, (len(texts), 1)).astype(np.int32)
  batch = t5_models.batch(source, np.ones_like(source), labels, segments)
  logp = np.asarray(jax.jit(Forward(arch, jnp.float32).token_logprobs)(params, batch))
  scores = (logp * segments).sum(-1) / segments.sum(-1) ** penalty
  best = int(scores.argmax())
  assert tuple(found.tokens) == texts[best]
  assert found.logprobs.sum() / len(found.tokens) ** penalty == pytest.approx(scores[best])


@pytest.mark.full
def test_a_search_depends_on_no_other_row():
  params, made = t5_models.params(NAME), engine(beams=Beams(2, 1.3), slots=4)
  how = {'max_tokens': [7, 3, 9, 5, 8], 'sampling': Sampling(), 'seed': 0}
  found = made.generate(params, PROMPTS, group=2, **how).completions
  assert all(row[0].tokens == row[1].tokens for row in found)
  whole = made.generate_at_once(params, PROMPTS, **how)
  assert [c.tokens for c in whole] == [row[0].tokens for row in found]
  assert all(len(c.tokens) <= m for c, m in zip(whole, how['max_tokens'], strict=True))


@pytest.mark.full
@pytest.mark.parametrize('beams', [Beams(), Beams(3, 0.7)])
def test_meshes_change_no_completion(beams, use_mesh):
  def tokens(arch):
    stops = tuple(range(0, VOCAB, 9))
    made = Engine(arch, jnp.float32, stops, 0, slots=8, writer=Writer(START, beams))
    params = t5_models.params(NAME, arch)
    found = made.generate_at_once(params, PROMPTS, max_tokens=9, sampling=Sampling())
    return [c.tokens for c in found]

  expected = tokens(t5_models.architecture(NAME))
  use_mesh(data=4, tensor=2)
  assert tokens(t5_models.padded(t5_models.architecture(NAME), 2)) == expected


def test_what_cannot_be_generated_is_refused():
  with pytest.raises(ConfigError, match='beam search is for encoder-decoders'):
    Engine(TINY, jnp.float32, (), 0, slots=1, writer=Writer(beams=Beams(2)))
  with pytest.raises(ConfigError, match='decoder_start_token_id'):
    Engine(t5_models.architecture(NAME), jnp.float32, (), 0, slots=1)
  with pytest.raises(ConfigError, match='early_stopping'):
    Beams(2, 1.0, 'often')


@pytest.mark.full
def test_the_score_of_a_choice_is_its_log_probability():
  """By the full forward pass; choices of different lengths after prompts of different lengths."""
  arch, params = t5_models.architecture(NAME), t5_models.params(NAME)
  choices = [[[4, 5, 6], [7]], [[8, 2], [3, 3, 3, 9]]]
  prompts = [PROMPTS[1], PROMPTS[4]]
  scorer = Scorer(arch, jnp.float32, jax.sharding.get_mesh(), START)
  found = scorer.score(params, prompts, choices)
  source, inside, labels, segments = np.zeros((4, 4, 40), np.int32)
  for i in range(4):
    prompt, choice = prompts[i // 2], choices[i // 2][i % 2]
    source[i, : len(prompt)], inside[i, : len(prompt)] = prompt, 1
    labels[i, : len(choice)], segments[i, : len(choice)] = choice, 1
  batch = t5_models.batch(source, inside, labels, segments)
  logp = np.asarray(jax.jit(Forward(arch, jnp.float32).token_logprobs)(params, batch))
  np.testing.assert_allclose(found.reshape(-1), (logp * segments).sum(-1), atol=1e-4)
