"""Pairs and judged answers: which rows are read, equal prompts whatever is cut, their batches."""

import dataclasses
import json

import numpy as np
import pytest
from test_token_cache import build, write
from tiny_tokenizer import tiny_files

from ftjax.data import encode, labeled_examples, preference_rows, sources
from ftjax.data.batches import Stream, eval_batches
from ftjax.data.encode import Encoded
from ftjax.data.formats import Chat, Completion
from ftjax.data.order import Mixture, SourceSchedule
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

U = {'role': 'user', 'content': 'Why?'}
GOOD, BAD = ({'role': 'assistant', 'content': c} for c in ('Because.', 'No.'))
CHATS = (Chat((U, GOOD), None, (False, True)), Chat((U, BAD), None, (False, True)))
TEXTS = (Completion('Why?', ' Because.'), Completion('Why?', ' No.'))
HUMAN = '\n\nHuman: Why?\n\nAssistant:'


@pytest.mark.parametrize(
  ('row', 'sides'),
  [
    ({'prompt': 'Why?', 'chosen': ' Because.', 'rejected': ' No.'}, TEXTS),
    ({'prompt': [U], 'chosen': [GOOD], 'rejected': [BAD]}, CHATS),
    ({'chosen': [U, GOOD], 'rejected': [U, BAD]}, CHATS),
    ({'chosen': f'{HUMAN} Because.', 'rejected': f'{HUMAN} No.'}, CHATS),
    (
      {
        'conversations': [{'from': 'human', 'value': 'Why?'}],
        'chosen': {'from': 'gpt', 'value': 'Because.'},
        'rejected': {'from': 'gpt', 'value': 'No.'},
      },
      CHATS,
    ),
  ],
  ids=['texts', 'messages', 'conversations', 'hh', 'sharegpt'],
)
def test_forms_of_a_pair(row, sides):
  found = preference_rows.parse(row | {'margin': 2}, 'pair', None)
  assert (found.chosen, found.rejected, found.margin) == (*sides, 2.0)
  assert preference_rows.parse(row, 'pair', 'preference').margin == 0.0


TOOLS = [{'type': 'function', 'function': {'name': 'add'}}]
ALPACA = {'instruction': 'Why?', 'input': 'Sky.'}
SKY = {'role': 'user', 'content': 'Why?\n\nSky.'}


@pytest.mark.parametrize(
  ('row', 'prompt'),
  [
    # UltraFeedback: the prompt as a text, repeated by both sides; and all of one side once more.
    ({'prompt': 'Why?', 'chosen': [U, GOOD], 'rejected': [U, BAD]}, (U,)),
    ({'prompt': ' Why?\n', 'chosen': [U, GOOD], 'rejected': [U, BAD], 'score_chosen': 8.0}, (U,)),
    ({'prompt': 'Why?', 'messages': [U, GOOD], 'chosen': [U, GOOD], 'rejected': [U, BAD]}, (U,)),
    ({'chosen': [U, GOOD], 'rejected': [U, BAD], 'messages': [U, GOOD]}, (U,)),
    (
      {'prompt': 'Why?', 'chosen': [U, BAD, SKY, GOOD], 'rejected': [U, BAD, SKY, BAD]},
      (U, BAD, SKY),
    ),
    # Messages before texts, a message, or both sides whole.
    ({'prompt': [U], 'chosen': 'Because.', 'rejected': 'No.'}, (U,)),
    ({'prompt': [U], 'chosen': GOOD, 'rejected': [BAD]}, (U,)),
    ({'prompt': [U], 'chosen': [U, GOOD], 'rejected': [U, BAD]}, (U,)),
    # LLaMA-Factory.
    (ALPACA | {'chosen': 'Because.', 'rejected': 'No.'}, (SKY,)),
    (ALPACA | {'output': ['Because.', 'No.']}, (SKY,)),
    ({'instruction': 'Why?', 'chosen': 'Because.', 'rejected': 'No.', 'input': ''}, (U,)),
    ({'messages': [U], 'chosen': GOOD, 'rejected': BAD}, (U,)),
    (
      {
        'conversations': [
          {'from': 'human', 'value': 'Why?'},
          {'from': 'function_call', 'value': '{"name": "add", "arguments": {}}'},
          {'from': 'observation', 'value': '3'},
        ],
        'chosen': {'from': 'gpt', 'value': 'Because.'},
        'rejected': {'role': 'assistant', 'content': 'No.'},
      },
      (
        U,
        {
          'role': 'assistant',
          'content': '',
          'tool_calls': [{'type': 'function', 'function': {'name': 'add', 'arguments': {}}}],
        },
        {'role': 'tool', 'content': '3'},
      ),
    ),
  ],
)
def test_pairs_as_people_have_them(row, prompt):
  found = preference_rows.parse(row | {'tools': TOOLS, 'system': 'S'}, 'pair', None)
  system = {'role': 'system', 'content': 'S'}
  assert found.chosen.messages == (system, *prompt, GOOD)
  assert found.rejected.messages == (system, *prompt, BAD)
  for side in (found.chosen, found.rejected):
    assert side.tools == tuple(TOOLS) and side.trained[-1] and not any(side.trained[:-1])


@pytest.mark.parametrize(
  ('chosen', 'rejected', 'sides'),
  [
    # As TRL's extract_prompt.
    ('The sky is blue.', 'The sky is green.', ('The sky is', ' blue.', ' green.')),
    # Never inside of a word.
    ('The sky is green.', 'The sky is grey.', ('The sky is', ' green.', ' grey.')),
    ('Q: 1+1?\nA: 2', 'Q: 1+1?\nA: 21', ('Q: 1+1?\nA:', ' 2', ' 21')),
    ('Why?\nBecause.', 'Why?\nNo.', ('Why?\n', 'Because.', 'No.')),
    ('Say yes', 'Say yes please', ('Say', ' yes', ' yes please')),
  ],
)
def test_two_texts_with_one_beginning(chosen, rejected, sides):
  found = preference_rows.parse({'chosen': chosen, 'rejected': rejected}, 'pair', None)
  prompt, good, bad = sides
  assert found.chosen == Completion(prompt, good) and found.rejected == Completion(prompt, bad)


def test_alpaca_pairs_without_a_template_take_the_published_layout():
  row = ALPACA | {'chosen': 'Because.', 'rejected': 'No.'}
  found = preference_rows.parse(row, 'pair', None, has_template=False)
  assert found.chosen.prompt == found.rejected.prompt
  assert found.chosen.prompt.endswith('### Input:\nSky.\n\n### Response:')


def test_tools_reach_the_prompts_of_every_labeled_row():
  """R1: on a template that prints them."""
  template = (
    '{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}'
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
  )
  tokenizer = Tokenizer(tiny_files(template))
  rows = {
    'pair': {'prompt': [U], 'chosen': [GOOD], 'rejected': [BAD]},
    'label': {'messages': [U, GOOD], 'label': True},
    'score': {'prompt': [U], 'completion': [GOOD], 'score': 1},
  }
  for shape, row in rows.items():
    for tools in (TOOLS, json.dumps(TOOLS)):
      ((found,),) = labeled_examples.encode(
        [preference_rows.parse(row | {'tools': tools}, shape, None)], tokenizer
      )
      for start in (0, found.boundary):
        assert tokenizer.decode(found.tokens[start:]).startswith(json.dumps(TOOLS[0]))


@pytest.mark.parametrize(
  ('row', 'shape', 'unread'),
  [
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'margin': 1, 'id': 3}, 'pair', {'id'}),
    (
      {'prompt': 'Why?', 'messages': [], 'chosen': [U, GOOD], 'rejected': [U, BAD]},
      'pair',
      {'messages'},
    ),
    (ALPACA | {'output': ['a', 'b'], 'meta': {}}, 'pair', {'meta'}),
    ({'messages': [U, GOOD], 'label': True, 'tools': [], 'prompt': 'q'}, 'label', {'prompt'}),
    ({'prompt': 'a', 'completion': 'b', 'score': 1, 'source': 'x'}, 'score', {'source'}),
  ],
)
def test_columns_that_are_not_read(row, shape, unread):
  assert preference_rows.unread(row, shape) == unread


def test_labeled_completions_in_other_forms():
  alpaca = {'instruction': 'Why?', 'output': 'No.', 'kto_tag': False}
  turns = [{'from': 'human', 'value': 'Why?'}, {'from': 'gpt', 'value': 'No.'}]
  for row in (alpaca, {'conversations': turns, 'label': 'false'}):
    found = preference_rows.parse(row, 'label', None)
    assert found.answer.messages == (U, BAD) and found.value == 0.0
  text = {'prompt': 'Why?', 'completion': ' No.', 'score': '-1.5'}  # CSV
  assert preference_rows.parse(text, 'score', None) == preference_rows.LabeledExample(
    TEXTS[1], -1.5
  )


def test_labeled_completions():
  row = {'prompt': 'Why?', 'completion': ' Because.'}
  assert preference_rows.parse(
    row | {'label': True}, 'label', None
  ) == preference_rows.LabeledExample(TEXTS[0], 1.0)
  assert preference_rows.parse(
    row | {'score': -1.5}, 'score', None
  ) == preference_rows.LabeledExample(TEXTS[0], -1.5)
  assert (
    preference_rows.parse({'messages': [U, BAD], 'label': False}, 'label', None).answer == CHATS[1]
  )


@pytest.mark.parametrize(
  ('row', 'shape', 'form', 'reason'),
  [
    ({'prompt': 'a', 'chosen': 'b'}, 'pair', None, "no key 'rejected'"),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': ' '}, 'pair', None, 'empty'),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'margin': 'x'}, 'pair', None, 'finite'),
    ({'prompt': 'a', 'chosen': [GOOD], 'rejected': 'c'}, 'pair', None, "'chosen' is list"),
    ({'chosen': [U, GOOD], 'rejected': [GOOD]}, 'pair', None, 'differ before'),
    ({'chosen': 'b', 'rejected': 'c'}, 'pair', None, 'no dialogue'),
    ({'chosen': [GOOD, U], 'rejected': [GOOD, U]}, 'pair', None, 'ends with|no assistant'),
    ({'prompt': [U], 'chosen': [GOOD, U, GOOD], 'rejected': [BAD]}, 'pair', None, '3 messages'),
    ({'prompt': 'a', 'completion': 'b', 'label': 'yes'}, 'label', None, 'expected true'),
    ({'prompt': 'a', 'completion': 'b', 'score': True}, 'score', None, 'finite number'),
    ({'prompt': 'a', 'completion': 'b', 'score': 1}, 'score', 'preference', 'gives no score'),
    ({'prompt': 'Why?', 'chosen': [BAD, GOOD], 'rejected': [BAD, BAD]}, 'pair', None, 'repeat the'),
    (
      {'question': 'q', 'chosen': 'Go a', 'rejected': 'Go b'},
      'pair',
      None,
      "the row has 'question'",
    ),
    ({'system': 'q', 'chosen': 'Go a', 'rejected': 'Go b'}, 'pair', None, "the row has 'system'"),
    (
      {'prompt': 'a', 'conversations': [], 'chosen': 'b', 'rejected': 'c'},
      'pair',
      None,
      'keep one',
    ),
    ({'prompt': 'a', 'chosen': ' b', 'rejected': None}, 'pair', None, "'rejected' is None"),
    ({'prompt': [U], 'chosen': [GOOD, U, GOOD], 'rejected': [BAD]}, 'pair', None, 'one answer'),
    ({'messages': [U, GOOD]}, 'pair', None, "one answer without label or score.* algorithm='sft'"),
    ({'prompt': 'a', 'completion': 'b', 'label': True}, 'pair', None, "with dpo.loss='kto'"),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}, 'label', None, 'the row has pairs'),
    ({'prompt': 'a', 'completion': 'b', 'score': 1}, 'label', None, "objective='scores'"),
    ({'label': True, 'text': 'a'}, 'label', None, 'expected an answer in'),
  ],
)
def test_refused_with_a_reason(row, shape, form, reason):
  with pytest.raises(ValueError, match=reason):
    preference_rows.parse(row, shape, form)


def test_the_formats_can_be_named():
  assert sources.parse_spec('a.jsonl::preference@2') == sources.Spec('a.jsonl', 'preference', 2.0)


def pair_of(prompt, chosen, rejected, **files):
  row = {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}
  (found,) = labeled_examples.encode(
    [preference_rows.parse(row, 'pair', None)], Tokenizer(tiny_files(**files))
  )
  return found


@pytest.mark.parametrize('adds_bos', [False, True])
@pytest.mark.parametrize(
  'answers', [(' yes', ' no'), ('yes', '\n\nno'), ('s', 'st'), ('\n', '\n\n!')], ids=repr
)
def test_both_sides_follow_the_ids_that_sampling_sees(answers, adds_bos):
  """Also where a token would join the end of the prompt and an answer."""
  tokenizer = Tokenizer(tiny_files(adds_bos=adds_bos))
  for prompt in ('What is thi', [U]):
    sides = answers
    if prompt == [U]:
      sides = [[{'role': 'assistant', 'content': a + '.'}] for a in answers]
    else:
      sides = [a + '.' for a in answers]
    (pair,) = pair_of(prompt, *sides, adds_bos=adds_bos)
    asked = Chat((U,), None) if prompt == [U] else prompt
    ids = encode.encode_prompt(asked, tokenizer)
    a, n = pair.boundary, len(ids)
    assert pair.tokens[:n].tolist() == pair.tokens[a : a + n].tolist() == ids
    assert not pair.supervised[:n].any() and not pair.supervised[a : a + n].any()
    assert pair.supervised[n:a].all() and pair.supervised[a + n :].all()
    for part, answer in ((pair.tokens[n:a], sides[0]), (pair.tokens[a + n :], sides[1])):
      said = answer if isinstance(answer, str) else answer[0]['content']
      assert tokenizer.decode(part) == said and part[-1] == tokenizer.eos_id


def test_encoded_chats_are_those_of_sft():
  """Where nothing straddles, a side has the tokens and the mask of the last turn in SFT."""
  tokenizer = Tokenizer(tiny_files())
  for found, example in zip(encode.encode_answers(CHATS, tokenizer), CHATS, strict=True):
    ((sft,),) = encode.encode([example], tokenizer, 'completion')
    end = np.flatnonzero(sft.supervised)[-1] + 1  # SFT keeps white space after the stop token
    assert found.tokens.tolist() == sft.tokens[:end].tolist()
    assert found.supervised.tolist() == sft.supervised[:end].tolist()


def made(prompt, chosen, rejected):
  """A pair of numbered tokens: prompts 0, 1, ..., answers from 1000 and 2000."""
  sides = [
    np.r_[np.arange(prompt), start + np.arange(n)]
    for start, n in ((1000, chosen), (2000, rejected))
  ]
  mask = [np.arange(prompt + n) >= prompt for n in (chosen, rejected)]
  return Encoded(np.concatenate(sides), np.concatenate(mask), False, 0, prompt + chosen, 0.5)


def test_whatever_is_cut_prompts_stay_equal_and_no_more_goes_than_must():
  """A thousand random pairs: (guarantee 6.14)."""
  rng = np.random.default_rng(0)
  kept = dict.fromkeys(('truncate_left', 'truncate_right'), 0)
  for _ in range(1000):
    prompt, chosen, rejected = (int(n) for n in rng.integers(1, 60, 3))
    pair, seq_len = made(prompt, chosen, rejected), int(rng.integers(4, 160))
    for policy in kept:
      found = labeled_examples.fit(pair, seq_len, policy)
      if len(pair.tokens) <= seq_len:
        assert found is pair
        continue
      assert labeled_examples.fit(pair, seq_len, 'drop') is None
      with pytest.raises(ValueError, match='together more than'):
        labeled_examples.fit(pair, seq_len, 'error')
      if found is None:
        lost = 2 * prompt + chosen + rejected - seq_len
        assert lost > 2 * (prompt - 1) if policy == 'truncate_left' else seq_len // 2 <= prompt
        continue
      kept[policy] += 1
      assert seq_len - 1 <= len(found.tokens) <= seq_len and found.value == 0.5
      a, n = found.boundary, int(found.supervised.argmax())
      sides = (found.tokens[:a], found.supervised[:a]), (found.tokens[a:], found.supervised[a:])
      assert sides[0][0][:n].tolist() == sides[1][0][:n].tolist() and n > 0
      for (tokens, mask), start, length in zip(
        sides, (1000, 2000), (chosen, rejected), strict=True
      ):
        assert (mask == (tokens >= 1000)).all() and mask.any()
        whole_answer = tokens[mask].tolist() == list(range(start, start + length))
        assert whole_answer if policy == 'truncate_left' else tokens[0] == 0
  assert min(kept.values()) > 100


@pytest.mark.parametrize(('bos', 'head', 'kept'), [(1, 1, 1), (1, 4, 4), (1, 30, 1), (0, 0, 0)])
def test_a_left_cut_keeps_the_head_of_both_sides(bos, head, kept):
  """BOS always, the system turn where it takes no more than half of a side's room."""
  pair = dataclasses.replace(made(40, 5, 8), bos=bos, head=head)
  found = labeled_examples.fit(pair, 53, 'truncate_left')
  a, prompt = found.boundary, int(found.supervised.argmax())
  for side, answer in ((found.tokens[:a], 1000), (found.tokens[a:], 2000)):
    assert side[:prompt].tolist() == [*range(kept), *range(20 + kept, 40)]
    assert side[prompt] == answer
  assert found.head == kept


def test_the_system_turn_goes_before_the_question():
  pair = dataclasses.replace(made(12, 5, 5), bos=1, head=8)
  found = labeled_examples.fit(
    pair, 34 - 2 * 4, 'truncate_left'
  )  # room for no more than four of them
  assert found.head == 1 and found.tokens[: int(found.supervised.argmax())].tolist()[0] == 0
  assert labeled_examples.fit(pair, 34 - 2 * 11, 'truncate_left') is None  # BOS is no prompt


def test_equal_sides_are_seen_also_after_a_cut():
  same = made(4, 3, 3)
  same.tokens[same.boundary :] = same.tokens[: same.boundary]
  assert labeled_examples.is_identical(same) and not labeled_examples.is_identical(made(4, 3, 3))
  longer = np.r_[same.tokens[: same.boundary], [5], same.tokens[same.boundary :], [6]]
  mask = np.r_[same.supervised[: same.boundary], True, same.supervised[same.boundary :], True]
  pair = Encoded(longer, mask, False, 0, same.boundary + 1)
  assert not labeled_examples.is_identical(pair)
  assert labeled_examples.is_identical(labeled_examples.fit(pair, 14, 'truncate_right'))


PAIRS = [
  {'prompt': f'q{i}', 'chosen': ' yes' * (1 + i % 3), 'rejected': ' no' * (1 + i % 2), 'margin': i}
  for i in range(7)
]


def stream(corpus, batch_size, seq_len):
  settings = dict(fingerprint=corpus.fingerprint, seed=0, packed=False)
  schedule = SourceSchedule(corpus.lengths, seq_len, **settings)
  return Stream(Mixture([schedule], [None]), [corpus], seq_len, batch_size)


def test_a_pair_is_a_row_of_two_segments(tmp_path):
  corpus = build(tmp_path, write(tmp_path / 'a.jsonl', PAIRS), shape='pair', seq_len=48)
  assert len(corpus) == 7 and corpus.shape == 'pair'
  trained = stream(corpus, 7, 48).batch(0)
  assert sorted(trained['values'].tolist()) == list(range(7))
  for batch in (trained, *eval_batches(corpus, 4, 48, packed=False)):
    for row in range(len(batch['tokens'])):
      segments = batch['segments'][row]
      assert set(segments.tolist()) in ({0, 1, 2}, {0})
      if not segments.any():
        assert not batch['weights'][row].any()
        continue
      example = int(batch['values'][row])
      for s, (tokens, mask) in enumerate(corpus.sides(example), 1):
        at = segments == s
        assert batch['tokens'][row][at].tolist() == tokens.tolist()
        assert batch['positions'][row][at].tolist() == list(range(len(tokens)))
        assert batch['weights'][row][at].tolist() == [*mask[1:].tolist(), 0]


@pytest.mark.parametrize('batch_size', [2, 3, 6])
def test_an_answer_is_mismatched_with_the_next_one_in_any_batch(batch_size, tmp_path):
  rows = [{'prompt': f'q{i}', 'completion': f' {"no " * i}', 'label': True} for i in range(1, 8)]
  corpus = build(tmp_path, write(tmp_path / 'a.jsonl', rows), shape='label', seq_len=96)
  found = []
  for batch in eval_batches(corpus, batch_size, 96, packed=False):
    for tokens, segments in zip(batch['tokens'], batch['segments'], strict=True):
      found += [tokens[segments == 2].tolist()] if segments.any() else []
  assert len(found) == 7
  for i, got in enumerate(found):
    (own, mask), (other, theirs) = corpus.example(i), corpus.example((i + 1) % 7)
    assert got == [*own[: mask.argmax()].tolist(), *other[theirs.argmax() :].tolist()]


def test_shape_and_value_are_part_of_what_a_corpus_is(tmp_path):
  first = build(tmp_path, write(tmp_path / 'a.jsonl', PAIRS), shape='pair')
  other = [r | {'margin': 9} for r in PAIRS]
  assert (
    build(tmp_path, write(tmp_path / 'b.jsonl', other), shape='pair').fingerprint
    != first.fingerprint
  )
  with pytest.raises(DataError, match="no key 'label'"):
    build(tmp_path, write(tmp_path / 'a.jsonl', PAIRS), shape='label')


def test_long_sides_are_counted(tmp_path):
  rows = [
    dict(PAIRS[0], chosen=' word' * n, rejected=' x' * m) for n, m in ((1, 1), (60, 1), (60, 60))
  ]
  spec = write(tmp_path / 'a.jsonl', rows)
  corpus = build(tmp_path, spec, shape='pair', seq_len=64, on_overlength='drop')
  counts = corpus.counts
  assert (len(corpus), counts.dropped, counts.chosen_over, counts.rejected_over) == (1, 2, 2, 1)
  with pytest.raises(DataError, match=r'with the chosen and .* with the rejected'):
    build(tmp_path, spec, shape='pair', seq_len=64)


def test_a_labelled_row_carries_its_prompt_with_the_answer_of_the_next(tmp_path):
  rows = [{'prompt': f'q{i}', 'completion': f' a{i}', 'label': i % 2 == 0} for i in range(4)]
  corpus = build(tmp_path, write(tmp_path / 'a.jsonl', rows), shape='label', seq_len=24)
  batch, tokenizer = stream(corpus, 4, 24).batch(0), Tokenizer(tiny_files())
  said = [
    [tokenizer.decode(batch['tokens'][i][batch['segments'][i] == s]) for s in (1, 2)]
    for i in range(4)
  ]
  for i, (own, mixed) in enumerate(said):
    prompt, answer = own.split()[0], said[(i + 1) % 4][0].split()[1]
    assert mixed == f'{prompt} {answer}'
    assert batch['values'][i] == (int(own[1]) % 2 == 0)
