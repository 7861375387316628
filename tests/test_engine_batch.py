"""Completions of prompts that begin together: against the full forward, whatever the batch and the
padding; streams; conversations that read only what is new.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY, UNTIED, ids, init, logits, tokens_at

from ftjax.generation import batch
from ftjax.generation.batch import Conversation
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.runtime.errors import ConfigError

# One engine for most tests: its programs are compiled once for a batch size.
PROMPTS = [
  ids(1, n, seed=n)[0].tolist() for n in (5, 1, 12, 3)
]  # all in one bucket, so that alone and together run over the same padding or another
NEW = 24
GREEDY, WARM = Sampling(), Sampling(1.0)


@pytest.fixture(scope='module')
def params():
  return init(TINY)


def make(arch=TINY, stops=(), **settings):
  """An engine without slots to speak of: they do not limit prompts that begin together."""
  return Engine(arch, jnp.float32, stops, 0, slots=1, **settings)


def generate(own, params, prompts, most, sampling, **settings):
  """Completions without their stop tokens."""
  found = own.generate_at_once(params, prompts, max_tokens=most, sampling=sampling, **settings)
  return [c.before_stop(own.stop_ids) for c in found]


@pytest.fixture(scope='module')
def plain():
  return make()


@pytest.fixture(scope='module')
def greedy(plain, params):
  return generate(plain, params, PROMPTS, NEW, GREEDY)


@pytest.fixture(scope='module')
def warm(plain, params):
  return generate(plain, params, PROMPTS, NEW, WARM, seed=3, prompt_ids=[10, 11, 12, 13])


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
    assert generate(plain, params, [PROMPTS[b]], NEW, GREEDY) == [greedy[b]]
    alone = generate(plain, params, [PROMPTS[b]], NEW, WARM, seed=3, prompt_ids=[10 + b])
    assert alone == [warm[b]]


def test_in_another_order(plain, params, greedy, warm):
  order = [3, 1, 0, 2]
  prompts = [PROMPTS[b] for b in order]
  assert generate(plain, params, prompts, NEW, GREEDY) == [greedy[b] for b in order]
  turned = generate(plain, params, prompts, NEW, WARM, seed=3, prompt_ids=[10 + b for b in order])
  assert turned == [warm[b] for b in order]


def test_next_to_a_longer_prompt(plain, params, warm):
  """Which pads the others to a wider bucket: their keys count from the prompt, not the padding."""
  prompts = [*PROMPTS[:3], ids(1, 40, seed=9)[0].tolist()]
  answers = generate(plain, params, prompts, NEW, WARM, seed=3, prompt_ids=[10, 11, 12, 13])
  assert answers[:3] == warm[:3]


def test_keys_are_of_seed_row_and_position(plain, params, warm):
  assert generate(plain, params, PROMPTS, NEW, WARM, seed=4, prompt_ids=[10, 11, 12, 13]) != warm
  same = generate(plain, params, [PROMPTS[0]] * 4, NEW, WARM, seed=3, prompt_ids=[10, 10, 11, 12])
  assert same[0] == same[1] == warm[0]
  assert len({tuple(a) for a in same}) == 3
  default = generate(plain, params, [PROMPTS[0]] * 4, NEW, WARM, seed=3)
  assert len({tuple(a) for a in default}) == 4
  assert len(set(warm[0])) > NEW // 2, 'one key for all positions draws like tokens'


@pytest.mark.parametrize('most', [1, 17, 18])
def test_max_tokens_cuts_the_same_answer(plain, params, greedy, most):
  assert generate(plain, params, PROMPTS, most, GREEDY) == [a[:most] for a in greedy]


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
  sampled = generate(make(stops=stops), params, PROMPTS, 3 * NEW, GREEDY)
  for got, want in zip(sampled, expected, strict=True):
    assert got[:NEW] == want
    assert (len(got) > NEW) == (len(want) == NEW)


def test_stop_strings_end_at_their_token(plain, params, greedy):
  """`ended` is asked for every token; a row it ends gets no more tokens, the others all."""
  mark, seen = greedy[0][6], []

  def ended(answer):
    seen.append(list(answer))
    return mark in answer

  answers = generate(plain, params, PROMPTS, NEW, GREEDY, ended=ended)
  for answer, whole in zip(answers, greedy, strict=True):
    assert answer == whole[: whole.index(mark) + 1 if mark in whole else NEW]
  assert len(answers[0]) < NEW == max(map(len, answers))
  assert all(any(g[: len(a)] == a for g in greedy) for a in seen)


@pytest.mark.parametrize('sampling', [GREEDY, WARM])
def test_as_from_the_queue(plain, params, sampling):
  """The other way of the engine, which copies the caches of prompts into slots."""
  together = plain.generate_at_once(params, PROMPTS, max_tokens=[3, 24, 9, 1], sampling=sampling)
  queue = plain.generate(
    params, PROMPTS, group=1, max_tokens=[3, 24, 9, 1], sampling=sampling, seed=0
  )
  for a, (b,) in zip(together, queue.completions, strict=True):
    assert a.tokens == b.tokens and a.truncated and b.truncated
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_answers_hold_no_ids_beyond_the_tokenizer_s(params, greedy):
  assert max(max(a) for a in greedy) >= 171
  bound = make(vocab_size=171)
  for sampling in (GREEDY, WARM):
    assert max(max(a) for a in generate(bound, params, PROMPTS, NEW, sampling)) < 171


def test_an_untied_head_is_used():
  params = init(UNTIED)
  answer = generate(make(UNTIED), params, [PROMPTS[2]], 1, GREEDY)
  tokens = np.array([PROMPTS[2]], np.int32)
  assert answer[0][0] == logits(UNTIED, params, tokens, tokens_at(np.ones((1, 12))))[0, -1].argmax()


@pytest.mark.parametrize('prompts', [[], [[1, 2], []]])
def test_empty_prompts_are_refused(plain, params, prompts):
  with pytest.raises(ConfigError, match='at least one token'):
    generate(plain, params, prompts, 4, GREEDY)


def test_a_split_sequence_is_refused(use_mesh):
  use_mesh(context=2)
  with pytest.raises(ConfigError, match=r'mesh\.context=2'):
    generate(make(), init(TINY), PROMPTS, 4, GREEDY)


# Conversations: each prompt continues the one before with its completion.

TURNS = [PROMPTS[2], [7, 8, 9], [3], [1, 2] * 9]


@pytest.fixture(scope='module')
def own():
  """Of a conversation; about one token in 13 ends a completion."""
  return make(stops=tuple(range(0, 256, 13)))


def say(own, params, prompt, number, conversation, **settings):
  some = {'max_tokens': 8, 'sampling': WARM, 'prompt_id': number} | settings
  return own.respond(params, prompt, conversation, **some).tokens


def talk(own, params, turns=TURNS, conversation=None):
  """[(prompt, tokens)]; without a conversation every prompt is read whole."""
  prompt, out = [], []
  for i, turn in enumerate(turns):
    prompt = [*prompt, *turn]
    found = say(own, params, prompt, i, conversation or Conversation())
    out.append((prompt, found))
    prompt = [*prompt, *found]
  return out


@pytest.fixture(scope='module')
def read_whole(own, params):
  return talk(own, params)


def test_a_turn_is_the_completion_of_its_prompt(own, params, read_whole):
  prompts, expected = zip(*read_whole, strict=True)
  found = own.generate_at_once(params, prompts, max_tokens=8, sampling=WARM)
  assert [c.tokens for c in found] == [*expected]


def test_tokens_are_streamed_as_they_come(own, params, read_whole):
  """The first comes alone, after the prompt was read; then a few at a time, and soon more."""
  for i, (prompt, expected) in enumerate(read_whole):
    shown = []
    say(own, params, prompt, i, Conversation(), stream=lambda t, s=shown: s.append([*t]))
    assert [len(t) for t in shown[:2]] == [1, min(5, len(expected))][: len(expected)]
    assert shown == [expected[: len(t)] for t in shown] and shown[-1] == expected


def test_a_conversation_is_as_if_read_whole(own, params, read_whole):
  assert {len(tokens) == 8 for _, tokens in read_whole} == {False, True}, 'cut and stopped'
  conversation = Conversation()
  assert talk(own, params, conversation=conversation) == read_whole
  # Again, after another conversation that it shares no token or only some with.
  for turns in ([PROMPTS[0]], [PROMPTS[2][:7], PROMPTS[2][2:]]):
    talk(own, params, turns, conversation)
    assert talk(own, params, conversation=conversation) == read_whole


def test_a_turn_reads_only_what_is_new(own, params, monkeypatch):
  conversation, sizes = Conversation(), []
  read = own._programs.read

  def spy(params, cache, unread, *a, **k):
    sizes.append((int(np.asarray(unread.where.segments).sum()), cache is not None))
    return read(params, cache, unread, *a, **k)

  monkeypatch.setattr(own._programs, 'read', spy)
  talk(own, params, conversation=conversation)
  # The last token of a completion was drawn, but not read.
  assert sizes == [(len(TURNS[0]), False)] + [(1 + len(t), True) for t in TURNS[1:]]
  talk(own, params, [PROMPTS[0]], conversation)
  assert sizes[-1] == (len(PROMPTS[0]), False)


def test_a_conversation_outgrows_its_cache(own, params, read_whole, monkeypatch):
  """Then all of it is read into a larger one."""
  monkeypatch.setattr(batch, '_LEAST_CAPACITY', 64)
  conversation, sizes = Conversation(), []
  for i, (prompt, expected) in enumerate(read_whole):
    assert say(own, params, prompt, i, conversation) == expected
    sizes.append(conversation.cache.tokens.segments.shape[1])
    assert conversation.tokens == [*prompt, *expected[:-1]]
  assert sizes[0] == 64 and sizes[-1] == 96


def test_a_new_conversation_leaves_a_cache_that_is_far_too_large(own, params, monkeypatch):
  """Also where it begins with the same tokens: every step would read what the old one wrote."""
  monkeypatch.setattr(batch, '_LEAST_CAPACITY', 32)
  conversation = Conversation()
  long, short = [*PROMPTS[2], *ids(1, 60, seed=1)[0].tolist()], PROMPTS[2][:3]
  say(own, params, long, 0, conversation)
  before = conversation.cache.tokens.segments.shape[1]
  found = say(own, params, short, 0, conversation)
  assert conversation.cache.tokens.segments.shape[1] < before / 2
  assert found == say(own, params, short, 0, Conversation())


def test_a_long_conversation_compiles_nothing_new(own, params, read_whole):
  """Ten turns of growing length: the programs are those of the first two."""
  turns = [ids(1, n, seed=n)[0].tolist() for n in (9, 4, 2, 6, 3, 5, 1, 2, 4, 3)]
  talk(own, params, turns[:2], Conversation())
  before = own.compilations
  talk(own, params, turns, Conversation())
  assert own.compilations == before


def test_an_interrupted_turn_leaves_no_cache(own, params, read_whole):
  def interrupt(_):
    raise KeyboardInterrupt

  conversation = Conversation()
  talk(own, params, TURNS[:1], conversation)
  assert conversation.cache is not None
  with pytest.raises(KeyboardInterrupt):
    say(own, params, read_whole[1][0], 1, conversation, stream=interrupt)
  assert conversation.cache is None
  assert talk(own, params, TURNS[:2], conversation) == read_whole[:2]
