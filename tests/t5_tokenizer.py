"""A small SentencePiece (Unigram) vocabulary with T5's layout, made by demo/t5_folder.py."""

import functools
import importlib.util
from pathlib import Path

from ftjax.data.tokenizer import Tokenizer

_CORPUS = (
  'Thank you for inviting me to your party last week.',
  'Merci de m avoir invité à votre fête la semaine dernière.',
  'translate English to French: The quick brown fox jumps over the lazy dog.',
  '1 + 1 = 2, 12 times 12 is 144; hello hello world world',
)


@functools.cache
def script():
  """The module demo/t5_folder.py."""
  path = Path(__file__).resolve().parents[1] / 'demo' / 't5_folder.py'
  spec = importlib.util.spec_from_file_location('t5_folder', path)
  found = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found)
  return found


@functools.cache
def files(sentinels=8):
  """{name: bytes} of a T5's folder without weights."""
  config = b'{"model_type": "t5", "is_encoder_decoder": true, "decoder_start_token_id": 0}'
  return script().vocabulary(_CORPUS, 120, sentinels) | {'config.json': config}


@functools.cache
def tokenizer(sentinels=8):
  return Tokenizer(files(sentinels), 'tiny T5')
