"""Rows for encoder-decoders: ids, masks and policies by hand; packing puts every example once into
a row, with matching segments; the order is a function of the seed.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import t5_tokenizer
from tiny_tokenizer import tiny_files

from ftjax.data import encode, source_target, source_text
from ftjax.data.batches import Stream, eval_batches
from ftjax.data.encode import Encoded
from ftjax.data.formats import Bad, Chat, Completion, Text
from ftjax.data.order import Mixture, SourceSchedule
from ftjax.data.sides import Sides
from ftjax.data.sources import Spec
from ftjax.data.token_cache import Source
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

T5 = t5_tokenizer.tokenizer()
EOS, START = 1, 0


def talk(*contents):
  roles = ('user', 'assistant')
  return Chat(tuple({'role': roles[i % 2], 'content': c} for i, c in enumerate(contents)))


def test_a_row_is_prompt_end_answer_end():
  """A conversation without a template is its lines; the last message is the answer."""
  rows = [
    Completion('hello world', 'merci'),
    talk('hello', 'world', 'last week', 'merci'),
    Text('hello'),
    Completion('', 'merci'),
    Completion('hello', ' '),
    talk('hello', 'world', 'last week'),
  ]
  found = source_target.encode(rows, T5)
  merci = T5.encode('merci')
  for (example,), prompt in zip(found[:2], ('hello world', 'hello\nworld\nlast week'), strict=True):
    source = [*T5.encode(prompt), EOS]
    assert example.tokens.tolist() == [*source, *merci, EOS]
    assert example.boundary == len(source)
    assert example.supervised.tolist() == [False] * len(source) + [True] * (len(merci) + 1)
  assert 'algorithm=span_corruption' in found[2].reason
  assert found[3][0].tokens.tolist() == [EOS, *merci, EOS]
  assert 'nothing but the stop token' in found[4].reason
  assert "'user'" in found[5].reason and isinstance(found[5], Bad)


def test_prompts_of_evaluation_are_those_of_training():
  for asked in ('hello world', talk('hello')):
    ids = encode.encode_prompt(asked, T5)
    answer = Completion(asked, 'x') if isinstance(asked, str) else talk('hello', 'x')
    ((example,),) = source_target.encode([answer], T5)
    assert ids == example.tokens[: example.boundary].tolist()
  tools = Chat(({'role': 'user', 'content': 'x'},), tools=({'type': 'function'},))
  with pytest.raises(ValueError, match='needs a chat template'):
    encode.encode_prompt(tools, T5)


def test_a_chat_template_is_used_where_there_is_one():
  config = b'{"is_encoder_decoder": true, "decoder_start_token_id": 2}'
  own = Tokenizer(tiny_files() | {'config.json': config})
  assert own.start_id == 2 and T5.start_id == START
  ((example,),) = source_target.encode([talk('hello', 'world')], own)
  text = own.decode(example.tokens[: example.boundary], skip_special=False)
  assert text == '<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<|im_end|>'
  assert own.decode(example.tokens[example.boundary :], skip_special=False) == 'world<|im_end|>'


@pytest.mark.parametrize(
  ('files', 'expected'),
  [
    ({}, None),
    ({'config.json': {'is_encoder_decoder': False, 'decoder_start_token_id': 4}}, None),
    ({'config.json': {'is_encoder_decoder': True}}, 0),
    ({'config.json': {'is_encoder_decoder': True, 'pad_token_id': 3}}, 3),
    (
      {
        'config.json': {'is_encoder_decoder': True, 'decoder_start_token_id': 4},
        'generation_config.json': {'decoder_start_token_id': 5},
      },
      5,
    ),
  ],
)
def test_the_start_token_is_what_the_files_name(files, expected):
  other = {n: x for n, x in t5_tokenizer.files().items() if n != 'config.json'}
  found = Tokenizer(other | {n: json.dumps(x).encode() for n, x in files.items()})
  assert found.start_id == expected
  assert (found.fingerprint == Tokenizer(other).fingerprint) == (expected is None)


def test_sides_that_are_too_long():
  tokens = np.arange(10, 20, dtype=np.int32)  # 6 of a source, 4 of a target
  example = Encoded(tokens, np.arange(10) >= 6, False, boundary=6)
  fit = source_target.fit
  assert fit(example, 6, 4, 'error') is example
  with pytest.raises(ValueError, match=r'6 tokens for the encoder and 4 .*seq2seq\.source_len'):
    fit(example, 5, 4, 'error')
  assert fit(example, 6, 3, 'drop') is None
  left, right = (fit(example, 4, 3, f'truncate_{w}') for w in ('left', 'right'))
  assert left.tokens.tolist() == [12, 13, 14, 15, 16, 17, 18] and left.boundary == 4
  assert right.tokens.tolist() == [10, 11, 12, 15, 16, 17, 18]
  assert right.supervised.tolist() == [False] * 4 + [True] * 3


def corpus(folder, rows, **settings):
  path = Path(folder) / 'rows.jsonl'
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  usual = dict(seq_len=24, source_len=40, loss_on='assistant', on_overlength='drop')
  usual |= dict(shape='source_target', progress=False, workers=1, cache_dir=folder)
  return Source(Spec(str(path), None, None), T5, **(usual | settings)).open()


TEXT = 'thank you for inviting me to your party last week hello world fox dog'
WORDS = TEXT.split()


def rows(count=60):
  rng = np.random.default_rng(0)

  def text(most):
    return ' '.join(rng.choice(WORDS, rng.integers(1, most)))

  return [{'prompt': text(9), 'completion': text(5), 'weight': 1.0 + i % 2} for i in range(count)]


@pytest.fixture(scope='module')
def examples():
  with tempfile.TemporaryDirectory() as folder:
    yield corpus(folder, rows())


def test_every_example_is_once_in_an_epoch_on_both_sides(examples):
  """With the same segment number; the decoder reads START and the labels before; weights are the
  rows'.
  """
  sides = Sides(40, 24, START)
  lengths = sides.lengths(examples)
  for i, n in enumerate(lengths.tolist()):
    source, target = sides.pair(examples, i, 0)
    assert n == max(-(-len(source) * 24 // 40), len(target))
  schedule = SourceSchedule(lengths, 24, fingerprint=examples.fingerprint, seed=0, packed=True)
  stream = Stream(Mixture([schedule], [None]), [examples], 24, 4, sides=sides)
  seen = []
  for step in range(-(-schedule.rows_per_epoch // 4)):
    batch = stream.batch(step)
    assert batch['source_tokens'].shape == (4, 40) and batch['tokens'].shape == (4, 24)
    count = min(4, schedule.rows_per_epoch - 4 * step)
    for row in range(count):
      for segment in range(1, batch['segments'][row].max() + 1):
        own = batch['segments'][row] == segment
        read = batch['source_segments'][row] == segment
        labels, source = batch['labels'][row, own], batch['source_tokens'][row, read]
        assert batch['tokens'][row, own].tolist() == [START, *labels[:-1]]
        assert batch['positions'][row, own].tolist() == list(range(own.sum()))
        assert batch['source_positions'][row, read].tolist() == list(range(read.sum()))
        assert source[-1] == labels[-1] == EOS
        weight = set(batch['weights'][row, own].tolist())
        seen.append((*source, -1, *labels, *weight))
      padding = batch['segments'][row] == 0
      assert not batch['weights'][row, padding].any()
  wanted = [
    (*s, -1, *t, float(w))
    for (s, t), w in zip(
      (sides.pair(examples, i, 0) for i in range(len(examples))), examples.weights, strict=True
    )
  ]
  assert sorted(map(tuple, seen)) == sorted(map(tuple, wanted))
  assert schedule.rows_per_epoch < 40  # packed: 60 examples


def test_evaluation_rows_are_in_order_and_unpacked_ones_alone(examples):
  sides = Sides(40, 24, START)
  for packed in (True, False):
    found = list(eval_batches(examples, 4, 24, packed=packed, sides=sides))
    segments = np.concatenate([b['segments'] for b in found])
    assert segments.max() == 1 or packed
    labels = np.concatenate([b['labels'][b['segments'] > 0] for b in found])
    wanted = np.concatenate([sides.pair(examples, i, 0)[1] for i in range(len(examples))])
    np.testing.assert_array_equal(labels, wanted)


def test_a_selection_of_a_corpus_has_its_borders(examples):
  index = np.array([5, 2, 40])
  view = examples.view(index)
  np.testing.assert_array_equal(view.boundaries, examples.boundaries[index])


def test_a_sentencepiece_model_is_read_as_transformers_reads_it(tmp_path):
  """Without a tokenizer.json: ids are those of the sentencepiece library, and EOS ends a prompt."""
  (tmp_path / 'text').write_text('\n'.join(WORDS * 20 + ['the quick brown fox jumps'] * 9))
  sentencepiece.SentencePieceTrainer.train(
    input=str(tmp_path / 'text'),
    model_prefix=str(tmp_path / 'spiece'),
    vocab_size=60,
    hard_vocab_limit=False,
    **{'pad_id': 0, 'eos_id': 1, 'unk_id': 2, 'bos_id': -1},
    minloglevel=2,
  )
  config = {'tokenizer_class': 'T5Tokenizer', 'extra_ids': 5, 'eos_token': '</s>'}
  files = {
    'spiece.model': (tmp_path / 'spiece.model').read_bytes(),
    'tokenizer_config.json': json.dumps(config).encode(),
    'config.json': t5_tokenizer.files()['config.json'],
  }
  own = Tokenizer(files, 'spiece')
  theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / 'spiece.model'))
  for text in ('thank you for inviting me', 'the quick fox', ' hello  world '):
    assert own.encode(text) == theirs.encode(text)
    assert source_text.encode_prompt(text, own) == [*theirs.encode(text), 1]
  assert own.find('<extra_id_0>') == len(theirs) + 4
  assert own.decode(own.encode('hello world')) == 'hello world'


def test_a_tokenizer_without_an_end_is_refused():
  files = {n: x for n, x in t5_tokenizer.files().items() if n != 'tokenizer_config.json'}
  with pytest.raises(DataError, match='eos_token'):
    source_target.encode([Completion('a', 'b')], Tokenizer(files))
