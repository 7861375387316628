"""Tokenizer files: special tokens, stop tokens, spans, fingerprint."""

import json

import numpy as np
import pytest
from tiny_tokenizer import CHATML, tiny_files

from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

TEXTS = ['hello  world\n\n', ' Paris is é😀日本 ', '<|im_start|>user\nx<|im_end|>', '', '   ']


def test_special_tokens_and_template():
  t = Tokenizer(tiny_files())
  assert (t.bos_id, t.eos_id, t.pad_id) == (1, 2, 2)
  assert t.stop_ids == (2,) and t.special_ids == {0, 1, 2}
  assert (t.bos_token, t.eos_token, t.template) == ('<|im_start|>', '<|im_end|>', CHATML)
  assert t.prefix_ids == ()
  assert t.vocab_size == 1 + max(
    json.loads(tiny_files()['tokenizer.json'])['model']['vocab'].values()
  )


def test_round_trip_and_batches_agree():
  t = Tokenizer(tiny_files())
  for text, batch, spans in zip(TEXTS, t.encode_batch(TEXTS), t.encode_spans(TEXTS), strict=True):
    ids = t.encode(text)
    assert t.decode(ids, skip_special=False) == text
    assert batch.tolist() == spans[0].tolist() == ids
    assert batch.dtype == spans[0].dtype == np.int32
  assert t.decode(t.encode('<|im_start|>a<|im_end|>')) == 'a'


@pytest.mark.parametrize('adds_bos', [False, True])
def test_spans_tile_the_text(adds_bos):
  """Also where the post-processor would trim leading spaces off the offsets."""
  t = Tokenizer(tiny_files(adds_bos=adds_bos))
  for text, (ids, starts, ends) in zip(TEXTS, t.encode_spans(TEXTS), strict=True):
    position = 0
    for token, start, end in zip(ids, starts, ends, strict=True):
      assert start in (position, position - 1) and end >= position
      if '\N{REPLACEMENT CHARACTER}' not in (alone := t.token(token)):
        assert alone == text[start:end]
      position = end
    assert position == len(text)


def test_what_the_post_processor_adds():
  t = Tokenizer(tiny_files(adds_bos=True))
  assert t.prefix_ids == (1,)
  assert 1 not in t.encode('hello') == Tokenizer(tiny_files()).encode('hello')


def test_stop_ids_from_all_files():
  files = tiny_files() | {
    'generation_config.json': json.dumps({'eos_token_id': [2, 0]}).encode(),
    'config.json': json.dumps({'eos_token_id': 5}).encode(),
  }
  t = Tokenizer(files)
  assert t.stop_ids == (2, 0, 5)
  assert 5 in t.special_ids


def test_eos_from_generation_config_where_the_tokenizer_names_none():
  files = tiny_files()
  files['tokenizer_config.json'] = b'{}'
  bare = Tokenizer(files)
  assert (bare.bos_id, bare.eos_id, bare.pad_id, bare.stop_ids, bare.template) == (
    None,
    None,
    0,
    (),
    None,
  )
  assert Tokenizer(files | {'generation_config.json': b'{"eos_token_id": 2}'}).eos_id == 2


def test_template_file_wins_and_lists_need_a_default():
  assert Tokenizer(tiny_files() | {'chat_template.jinja': b'x'}).template == 'x'
  named = [{'name': 'default', 'template': 'd'}, {'name': 'rag', 'template': 'r'}]
  assert Tokenizer(tiny_files(named)).template == 'd'
  with pytest.raises(DataError, match="'default'"):
    Tokenizer(tiny_files(named[1:]))


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('bos_token', 7),
    ('pad_token', {'text': 'x'}),
    ('unk_token', ['x']),
    ('chat_template', 7),
    ('chat_template', [{'name': 'default'}]),
    ('chat_template', [7]),
  ],
)
def test_values_of_another_type_are_named(key, value):
  files = tiny_files()
  config = json.loads(files['tokenizer_config.json']) | {key: value}
  with pytest.raises(DataError, match=f'tokenizer_config.json: {key} is .*expected'):
    Tokenizer(files | {'tokenizer_config.json': json.dumps(config).encode()})


def test_saved_truncation_and_padding_are_ignored():
  files = tiny_files()
  model = json.loads(files['tokenizer.json'])
  model['truncation'] = {
    'max_length': 2,
    'strategy': 'LongestFirst',
    'stride': 0,
    'direction': 'Right',
  }
  model['padding'] = {'strategy': {'Fixed': 50}, 'direction': 'Right', 'pad_to_multiple_of': None,
                      'pad_id': 0, 'pad_type_id': 0, 'pad_token': '<|endoftext|>'}  # fmt: skip
  changed = Tokenizer(files | {'tokenizer.json': json.dumps(model).encode()})
  assert changed.encode('hello world again') == Tokenizer(files).encode('hello world again')


def test_fingerprint_moves_with_what_matters_only():
  files = tiny_files()
  one = Tokenizer(files).fingerprint
  assert Tokenizer(dict(reversed(files.items())), name='elsewhere').fingerprint == one
  assert Tokenizer(files | {'config.json': b'{"torch_dtype": "float32"}'}).fingerprint == one
  changed = [
    files | {'chat_template.jinja': b'x'},
    files | {'config.json': b'{"eos_token_id": 7}'},
    tiny_files(vocab_size=370),
    tiny_files(adds_bos=True),
    tiny_files(bos='<|endoftext|>'),
  ]
  prints = {Tokenizer(f).fingerprint for f in changed}
  assert len(prints) == len(changed) and one not in prints


@pytest.mark.parametrize(
  'files, message',
  [
    ({}, 'no tokenizer.json'),
    ({'tokenizer.json': b'{'}, 'not JSON'),
    ({'tokenizer.json': b'{}'}, 'no model'),
    ({'tokenizer.json': b'{"model": {"type": "BPE", "vocab": {"a": 0}}}'}, 'cannot be used'),
    (tiny_files() | {'tokenizer_config.json': b'{"eos_token": "<nope>"}'}, "'<nope>'"),
  ],
)
def test_unusable_files(files, message):
  with pytest.raises(DataError, match=message):
    Tokenizer(files, name='model/')
