"""Tokenizers in the metadata of GGUF files: what is written, and what llama.cpp cannot have."""

import json
import shutil
from pathlib import Path

import pytest
from test_gguf_export import fields, of_tokenizer, write_model
from tiny_model import TINY, write_folder
from tiny_tokenizer import tiny_files
from tokenizers import Tokenizer as Tokens

from ftjax import convert
from ftjax.data.tokenizer import Tokenizer
from ftjax.hf import load
from ftjax.runtime.errors import DataError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp('model') / 'hf', of_tokenizer(TINY))


@pytest.fixture
def model(folder, tmp_path):
  """A copy of a HF folder, and the path of a GGUF file to write."""
  return Path(shutil.copytree(folder, tmp_path / 'hf')), tmp_path / 'out' / 'x.gguf'


def changed(files, **changes):
  content = json.loads(files['tokenizer.json'])
  for key, change in changes.items():
    content[key] = change(content[key])
  return files | {'tokenizer.json': json.dumps(content).encode()}


def digits_in_threes(pre):
  del pre
  return {
    'type': 'Sequence',
    'pretokenizers': [
      {'type': 'Digits', 'individual_digits': False},
      {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': True, 'trim_offsets': True},
    ],
  }


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'pre_tokenizer': digits_in_threes}, r'no name for its pre-tokenizer.*"Digits".*smollm'),
    ({'pre_tokenizer': lambda p: p | {'add_prefix_space': True}}, 'no name for its pre-tokenizer'),
    ({'normalizer': lambda n: {'type': 'NFKC'}}, 'with normalizer .*NFKC'),
    ({'normalizer': lambda n: {'type': 'NFC'}}, 'with normalizer .*NFC'),
    ({'model': lambda m: m | {'ignore_merges': True}}, 'ignore_merges=True'),
    ({'model': lambda m: m | {'merges': []}}, '0 merges'),
    ({'pre_tokenizer': lambda p: None}, 'neither byte-level BPE nor SentencePiece'),
    ({'added_tokens': lambda a: [a[0] | {'lstrip': True}, *a[1:]]}, "'<|endoftext|>' has lstrip"),
    ({'added_tokens': lambda a: [*a, a[0] | {'id': 400, 'content': '<x>'}]}, 'has id 400, and the'),
  ],
)
def test_tokenizers_that_llama_cpp_cannot_have(model, change, message):
  source, target = model
  (source / 'tokenizer.json').write_bytes(changed(tiny_files(), **change)['tokenizer.json'])
  with pytest.raises(DataError, match=message):
    convert.convert(str(source), str(target), None)
  assert not target.exists()


def test_a_tokenizer_without_an_end_is_refused(model):
  source, target = model
  (source / 'tokenizer_config.json').write_text('{}')
  (source / 'generation_config.json').unlink()
  with pytest.raises(DataError, match='no eos_token ends a text'):
    convert.convert(str(source), str(target), None)


def test_a_model_without_tokenizer_merges_is_refused(tmp_path):
  with pytest.raises(DataError, match='cannot be written to a GGUF file'):
    convert.convert(write_folder(tmp_path / 'hf'), str(tmp_path / 'x.gguf'), None)


def sentencepiece(scheme='legacy', vocab=('a', 'b', 'ab', '▁ab', '▁')):
  """A SentencePiece BPE with a token for each byte."""
  tokens = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), *vocab]
  merges = [['a', 'b'], ['▁', 'ab']]
  replace = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
  prepend = {'type': 'Prepend', 'prepend': '▁'}
  content = {
    'version': '1.0',
    'added_tokens': [
      {
        'id': i,
        'content': t,
        'special': True,
        'normalized': False,
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
      }
      for i, t in enumerate(tokens[:3])
    ],
    'normalizer': {'type': 'Sequence', 'normalizers': [prepend, replace]},
    'pre_tokenizer': None,
    'post_processor': None,
    'decoder': None,
    'model': {
      'type': 'BPE',
      'vocab': {t: i for i, t in enumerate(tokens)},
      'merges': merges,
      'unk_token': '<unk>',
      'byte_fallback': True,
      'fuse_unk': True,
    },
  }
  if scheme != 'legacy':
    content['normalizer'] = None
    content['pre_tokenizer'] = {
      'type': 'Metaspace',
      'replacement': '▁',
      'prepend_scheme': scheme,
      'split': False,
    }
  config = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'}
  return {
    'tokenizer.json': json.dumps(content).encode(),
    'tokenizer_config.json': json.dumps(config).encode(),
  }


@pytest.mark.parametrize(
  ('scheme', 'prefix'), [('legacy', True), ('first', True), ('never', False)]
)
def test_a_sentencepiece_vocabulary(tmp_path, caplog, scheme, prefix):
  source = write_model(tmp_path / 'hf', of_tokenizer(TINY), sentencepiece(scheme))
  convert.convert(source, str(tmp_path / 'x.gguf'), None)
  found = fields(tmp_path / 'x.gguf')
  assert found['tokenizer.ggml.model'] == 'llama'
  assert found['tokenizer.ggml.add_space_prefix'] == prefix
  assert found['tokenizer.ggml.scores'][259:264] == [0.0, 0.0, 0.0, -1.0, 0.0]
  assert found['tokenizer.ggml.token_type'][:4] == [2, 3, 3, 6]
  assert ('llama.cpp puts one before every text' in caplog.text) == (scheme == 'first')
  old, new = (Tokenizer(load.tokenizer_files(p)) for p in (source, tmp_path / 'x.gguf'))
  for text in ('ab', 'abab ab', 'ab é<s>', 'ab<unk>', 'a b\n'):
    assert old.encode(text) == new.encode(text), text


def test_merges_that_scores_do_not_give_are_refused(tmp_path):
  files = sentencepiece(vocab=('a', 'b', 'ab', '▁ab', '▁', '▁a'))  # ▁a + b makes ▁ab too
  source = write_model(tmp_path / 'hf', of_tokenizer(TINY), files)
  with pytest.raises(DataError, match='not those of a SentencePiece vocabulary'):
    convert.convert(source, str(tmp_path / 'x.gguf'), None)


def test_characters_that_are_no_tokens_are_refused(tmp_path):
  files = sentencepiece(vocab=('c', 'b', 'ab', '▁ab', '▁', 'cb'))

  def without_a(model):
    merges = [['c', 'b'], ['▁', 'ab']]
    return model | {'merges': merges}

  source = write_model(tmp_path / 'hf', of_tokenizer(TINY), changed(files, model=without_a))
  with pytest.raises(DataError, match="the character 'a' of a merge is no token"):
    convert.convert(source, str(tmp_path / 'x.gguf'), None)


def test_a_token_of_no_text_is_unused_and_comes_back_as_none(folder, tmp_path):
  convert.convert(folder, str(tmp_path / 'x.gguf'), None)
  tokens = Tokens.from_str(load.tokenizer_files(tmp_path / 'x.gguf')['tokenizer.json'].decode())
  assert tokens.token_to_id('[PAD399]') is None and tokens.get_vocab_size() == 384
