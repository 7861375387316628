"""Real GGUF files: perplexity against a forward pass in numpy (make_gguf_goldens.py), and the token
ids of Gemma's vocabulary against llama.cpp's.
"""

from pathlib import Path

import numpy as np
import pytest
from tiny_model import logits, tokens_at
from tokenizers import Tokenizer as Tokens

from ftjax import convert
from parity.llama_cpp import LlamaCpp
from parity.make_gguf_goldens import MODELS, logps
from parity.mixed_strings import mixed_strings
from parity.test_logits import open_model

pytestmark = pytest.mark.full

GOLDEN = Path(__file__).parent / 'golden' / 'gguf_perplexity.npz'


def file_of(name):
  if not MODELS[name].exists():
    made_by = {'smollm2': 'make assets', 'gemma3': 'make gemma'}[name]
    pytest.skip(f'{MODELS[name].name} is missing; `{made_by}` makes it')
  return MODELS[name]


@pytest.mark.parametrize('name', MODELS)
def test_perplexity(name):
  """Within 0.5 % is the bar; both compute in float32, so each token is held to 0.001 too."""
  stored = np.load(GOLDEN)
  ids, expected = stored[f'{name}_ids'], stored[f'{name}_logps']
  arch, params = open_model(file_of(name))
  found = logps(logits(arch, params, ids[None], tokens_at(np.ones((1, len(ids)))))[0], ids)
  ours, theirs = np.exp(-found.mean()), np.exp(-expected.astype(np.float64).mean())
  largest = np.abs(found - expected).max()
  print(f'{name}: perplexity {ours:.4f}, numpy {theirs:.4f}, largest difference {largest:.1e}')
  assert abs(ours / theirs - 1) < 5e-3
  assert largest < 1e-3


# Runs of what Gemma's vocabulary has tokens for, and what is a special token in it.
GEMMA_TEXTS = (
  *('x' + c * n + 'y' for c in (' ', '\n', '\t') for n in range(1, 80)),
  *('\n' * n + ' ' * n for n in range(1, 40)),
  *('<start_of_turn>user\nhi<end_of_turn>\n', '<h1>x</h1>', 'a [multimodal] b', '<unused5>'),
  *('<bos>', '[toxicity]', '\r\n\r\n', '▁ x ▁▁y', '\ufeffx', 'e\u0301', 'a\u2028b', ''),
)


@pytest.fixture(scope='module')
def gemma_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('gemma') / 'hf'
  convert.convert(str(file_of('gemma3')), str(folder), 'bfloat16')
  return folder


@pytest.mark.parametrize('written', ['by others', 'by us'])
def test_token_ids_of_gemma(gemma_folder, tmp_path, written):
  """Of the file as it is, and of what is written from the HF folder made of it."""
  file = file_of('gemma3')
  if written == 'by us':
    file = tmp_path / 'x.gguf'
    convert.convert(str(gemma_folder), str(file), 'q8_0')
  tokens = Tokens.from_file(str(gemma_folder / 'tokenizer.json'))
  texts = [*mixed_strings(500), *GEMMA_TEXTS]
  with LlamaCpp(file) as model:
    wrong = [
      (text, tokens.encode(text, add_special_tokens=False).tokens, model.tokenize(text))
      for text in texts
      if tokens.encode(text, add_special_tokens=False).ids != model.tokenize(text)
    ]
    assert tokens.encode('a b').ids == model.tokenize('a b', adds_special=True)
    assert tokens.get_vocab_size() == model.vocab_size == 262144
  assert not wrong, (len(wrong), wrong[:3])
  for text in ('naïve café 😀', '  two\n\n  lines ', 'def f(x):\n    return x'):
    assert tokens.decode(tokens.encode(text).ids) == text
