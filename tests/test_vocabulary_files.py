"""Vocabularies without a tokenizer.json give the ids that transformers gives, without torch."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from tiny_tokenizer import tiny_files

from ftjax.data import vocabulary_files
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ['Hello the world', ' a  b\n\nc\t', 'ünïcode 日本 é😀', '', 'x1234567 </s> <s>', '▁▁']
PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
  r'\s*[\r\n]+|\s+(?!\S)|\s+'
)


def sentencepiece_model(kind):
  """A SentencePiece model, trained on this repository's README."""
  made = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter((ROOT / 'README.md').read_text().splitlines()),
    model_writer=made,
    vocab_size=400,
    model_type=kind,
    byte_fallback=kind == 'bpe',
    character_coverage=0.99,
    minloglevel=2,
  )
  return made.getvalue()


def ranks():
  """A tiktoken vocabulary: all bytes and what a few merges make of them."""
  words = (b' t', b'he', b' the', b'or', b'ld', b'orld', b'in', b'\xe6\x97', b'12')
  found = {bytes([i]): i for i in range(256)}
  return found | {word: 256 + i for i, word in enumerate(words)}


def vocabulary(kind):
  config = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'}
  if kind == 'tiktoken':
    lines = (f'{base64.b64encode(k).decode()} {v}\n' for k, v in ranks().items())
    return {
      'tokenizer.model': ''.join(lines).encode(),
      'tokenizer_config.json': b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
      'config.json': b'{"model_type": "llama"}',
    }
  if kind == 'unigram':
    return {
      'spiece.model': sentencepiece_model(kind),
      'tokenizer_config.json': json.dumps(config | {'tokenizer_class': 'T5Tokenizer'}).encode(),
      'config.json': b'{"model_type": "t5"}',
    }
  return {
    'tokenizer.model': sentencepiece_model(kind),
    'tokenizer_config.json': json.dumps(config | {'tokenizer_class': 'LlamaTokenizer'}).encode(),
    'config.json': b'{"model_type": "llama"}',
  }


@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'tiktoken'])
def test_ids_are_those_of_transformers(tmp_path, kind):
  from transformers import AutoTokenizer

  files = vocabulary(kind)
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
  ours = Tokenizer(files, 'toy')
  for text in TEXTS:
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert theirs.encode(text)[: len(ours.prefix_ids)] == [*ours.prefix_ids]
    assert ours.decode(ours.encode(text)) == theirs.decode(
      theirs.encode(text, add_special_tokens=False), skip_special_tokens=True
    )
  assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
  assert ours.vocab_size == len(theirs)
  again = Tokenizer(ours.files, 'toy')
  assert again.fingerprint == ours.fingerprint, 'another process needs no conversion'
  if kind == 'tiktoken':
    own = tiktoken.Encoding('toy', pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens={})
    assert all(ours.encode(text) == own.encode(text) for text in TEXTS)


def test_special_tokens_that_no_file_names_are_those_of_the_class():
  files = vocabulary('bpe')
  del files['tokenizer_config.json']
  found = Tokenizer(files, 'toy')
  assert (found.bos_token, found.eos_token) == ('<s>', '</s>')
  assert found.special_texts['unk_token'] == '<unk>'


def test_the_error_for_a_tokenizer_that_cannot_be_converted(tmp_path):
  model = vocabulary('bpe')
  for files, words in (
    (model | {'tokenizer.model': b'nothing of the kind'}, 'cannot make one of tokenizer.model'),
    ({'tokenizer.model': b''}, 'toy: there is no tokenizer.json'),
  ):
    with pytest.raises(DataError, match=words) as refused:
      Tokenizer(files, 'toy')
    assert 'ftjax-tokenizer-' not in str(refused.value)
  with pytest.raises(DataError, match=r'no tokenizer\.json; got'):
    Tokenizer({'config.json': b'{}'}, 'toy')


def test_code_of_a_folder_is_not_run(tmp_path):
  config = {'auto_map': {'AutoTokenizer': ['mine.Tokenizer', None]}, 'tokenizer_class': 'Mine'}
  files = vocabulary('bpe') | {
    'tokenizer_config.json': json.dumps(config).encode(),
    'mine.py': f'open({str(tmp_path / "ran")!r}, "w")'.encode(),
  }
  with pytest.raises(DataError, match='cannot make one of'):
    Tokenizer(files | {'config.json': b'{"model_type": "mine"}'}, 'toy')
  assert not (tmp_path / 'ran').exists()


def test_neither_torch_nor_transformers_is_imported_without_need(tmp_path):
  """A torch that cannot be imported is installed: whoever tries fails."""
  (tmp_path / 'torch').mkdir()
  (tmp_path / 'torch' / '__init__.py').write_text('raise RuntimeError("torch was imported")')
  (tmp_path / 'torch-2.9.0.dist-info').mkdir()
  metadata = tmp_path / 'torch-2.9.0.dist-info' / 'METADATA'
  metadata.write_text('Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n')
  for name, content in (tiny_files() | {}).items():
    (tmp_path / f'tiny-{name}').write_bytes(content)
  for name, content in vocabulary('bpe').items():
    (tmp_path / f'piece-{name}').write_bytes(content)
  code = """
import pathlib, sys
from ftjax.data.tokenizer import Tokenizer
def files(kind):
  found = pathlib.Path(sys.argv[1]).glob(kind + '*')
  return {p.name.removeprefix(kind): p.read_bytes() for p in found}
Tokenizer(files('tiny-'))
print('transformers' in sys.modules)
print(Tokenizer(files('piece-')).encode('Hello') != [], 'torch' in sys.modules)
"""
  done = subprocess.run(
    [sys.executable, '-c', code, str(tmp_path)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': f'{ROOT}:{tmp_path}'},
  )
  assert done.stdout.split() == ['False', 'True', 'False'], done.stderr
  assert done.stderr == ''


def test_only_vocabularies_are_convertible():
  for name, expected in (
    ('tokenizer.model', True),
    ('spiece.model', True),
    ('qwen.tiktoken', True),
    ('vocab.json', True),
    ('tokenizer_config.json', False),
    ('chat_template.jinja', False),
  ):
    assert vocabulary_files.is_convertible({name: b''}) == expected
