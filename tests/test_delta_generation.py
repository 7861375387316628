"""The engine with a model that keeps states: slots that are refilled, prompts, conversations.
States hold all tokens that were read, so any that leaks or is lost changes what follows.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from test_delta_net import HYBRID
from tiny_model import ids, init, logprobs, tokens_at

from ftjax.generation.batch import Conversation
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling

# Two buckets of length, and a prompt of one token, of which nothing is prefilled.
PROMPTS = [ids(1, n, seed=n)[0].tolist() for n in (5, 1, 12, 3, 21)]
GROUP, MOST = 2, 12
STOPS = tuple(range(0, 256, 13))
WARM = Sampling(1.0)


@functools.cache
def params():
  return init(HYBRID)


@functools.cache
def engine(slots):
  return Engine(HYBRID, jnp.float32, STOPS, 0, slots=slots, tokens_per_dispatch=4)


@functools.cache
def rollout(slots):
  return engine(slots).generate(
    params(), PROMPTS, group=GROUP, max_tokens=MOST, sampling=WARM, seed=3
  )


def tokens(found):
  return [[c.tokens for c in row] for row in found.completions]


@pytest.mark.full
def test_a_refilled_slot_begins_with_its_prompt_s_states():
  """Log-probabilities are those of the trainer's forward over each whole sequence, and the number
  of slots does not matter.
  """
  found = rollout(3)
  assert tokens(found) == tokens(rollout(10))
  assert len({len(c) for row in tokens(found) for c in row}) > 3
  arrays = np.zeros((4, len(PROMPTS) * GROUP, 36), np.int32)
  pairs = [(p, c) for p, row in zip(PROMPTS, found.completions, strict=True) for c in row]
  for i, (prompt, c) in enumerate(pairs):
    whole = prompt + c.tokens
    arrays[0, i, : len(whole)], arrays[1, i, : len(whole) - 1] = whole, whole[1:]
    arrays[2, i, len(prompt) - 1 : len(whole) - 1], arrays[3, i, : len(whole)] = 1, 1
  rows, labels, weights, segments = arrays
  expected = logprobs(HYBRID, params(), rows, labels, weights, tokens_at(segments))
  got = np.concatenate([c.logprobs for _, c in pairs])
  np.testing.assert_allclose(got, expected[weights > 0], atol=5e-5)


@pytest.mark.full
def test_prompts_that_begin_together_are_as_from_the_queue():
  together = engine(3).generate_at_once(params(), PROMPTS, max_tokens=MOST, sampling=WARM, seed=3)
  assert [c.tokens for c in together] == [row[0] for row in tokens(rollout(3))]


TURNS = [PROMPTS[2], [7, 8, 9], [3], [1, 2] * 9]


def talk(turns=TURNS, conversation=None, **settings):
  """[(prompt, tokens)]; without a conversation every prompt is read whole."""
  prompt, out = [], []
  for i, turn in enumerate(turns):
    prompt = [*prompt, *turn]
    found = engine(3).respond(
      *(params(), prompt, conversation or Conversation()),
      **{'max_tokens': 8, 'sampling': WARM, 'prompt_id': i} | settings,
    )
    out.append((prompt, found.tokens))
    prompt = [*prompt, *found.tokens]
  return out


@pytest.fixture
def reads(monkeypatch):
  """Tokens that each turn reads."""
  sizes, read = [], engine(3)._programs.read

  def spy(params, cache, unread, *a, **k):
    sizes.append(int(np.asarray(unread.where.segments).sum()))
    return read(params, cache, unread, *a, **k)

  monkeypatch.setattr(engine(3)._programs, 'read', spy)
  return sizes


@pytest.mark.full
def test_a_conversation_is_as_if_read_whole(reads):
  expected = talk()
  del reads[:]
  conversation = Conversation()
  assert talk(conversation=conversation) == expected
  assert reads == [len(TURNS[0]), *(1 + len(t) for t in TURNS[1:])], 'only what is new'


def test_a_conversation_that_is_cut_back_is_read_anew(reads):
  """No token can be taken out of a state: the same prompt, a part of it, another second turn."""
  conversation = Conversation()
  for turns in (TURNS[:1], [TURNS[0][:5]], [TURNS[0], [99]]):
    talk(TURNS[:2], conversation)
    del reads[:]
    assert talk(turns, conversation) == talk(turns)
    assert reads[0] == len(turns[0])


def test_what_was_read_behind_a_stop_string_is_no_part_of_the_states(reads):
  """The engine looks for stop strings between dispatches, of four tokens here."""
  most = {'max_tokens': 8, 'ended': lambda tokens: len(tokens) == 3}
  expected = talk(TURNS[:2], **most)
  assert len(expected[0][1]) == 3
  del reads[:]
  assert talk(TURNS[:2], Conversation(), **most) == expected
  assert reads == [len(TURNS[0]), len(TURNS[0]) + 3 + len(TURNS[1])]
