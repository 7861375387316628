"""Token ids of GGUF vocabularies against transformers' conversion, on mixed strings (golden/)."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from ftjax.hf import gguf_tokenizer
from ftjax.hf.gguf import GGUFSource
from parity.mixed_strings import mixed_strings
from parity.toy_gguf import Toy, write_toy

GOLDEN = Path(__file__).parent / 'golden'
SMOLLM2 = Path(__file__).parents[2] / '.cache' / 'smollm2'


def unpack(file, prefix):
  stored = np.load(GOLDEN / file)
  ends = np.cumsum(stored[f'{prefix}_lengths'].astype(np.int64))
  return [part.tolist() for part in np.split(stored[f'{prefix}_ids'], ends[:-1])]


@pytest.mark.parametrize(
  ('kind', 'pre'), [('gpt2', 'gpt-2'), ('gpt2', 'qwen2'), ('gpt2', 'llama-bpe'), ('llama', '')]
)
def test_every_kind_of_vocabulary(tmp_path, kind, pre):
  write_toy(tmp_path / 'toy.gguf', Toy(), kind, pre)
  tokenizer = gguf_tokenizer.build(GGUFSource(tmp_path / 'toy.gguf'))
  expected = unpack('toy_tokenizers.npz', f'{kind}-{pre}' if pre else kind)
  assert [
    tokenizer.encode(text, add_special_tokens=False).ids for text in mixed_strings(300)
  ] == expected


@pytest.fixture(scope='module')
def smollm2():
  if not (SMOLLM2 / 'tokenizer.json').exists():
    pytest.skip('.cache/smollm2 is missing; `make assets` makes it')
  return Tokenizer.from_file(str(SMOLLM2 / 'tokenizer.json'))


def ids(tokenizer):
  return [tokenizer.encode(text, add_special_tokens=False).ids for text in mixed_strings()]


def test_smollm2_on_a_thousand_strings(smollm2):
  """transformers' conversion with the single digits that `pre = smollm` stands for put first."""
  assert ids(smollm2) == unpack('smollm2_tokenizer.npz', 'digits')


def test_smollm2_without_its_single_digits_is_what_transformers_makes(smollm2):
  """transformers 5.23 does not know `smollm` and splits as GPT-2 does; nothing else differs, on all
  1,000 strings.

  llama.cpp (llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM) splits at each number first, then as
  GPT-2 does.
  """
  expected = unpack('smollm2_tokenizer.npz', 'hf')
  assert ids(smollm2) != expected
  split = smollm2.pre_tokenizer
  smollm2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  try:
    assert ids(smollm2) == expected
  finally:
    smollm2.pre_tokenizer = split
