"""Where a prompt ends and its completion begins, with tokenizers that put a space before a text."""

import json

import numpy as np
import pytest
import tokenizers
from test_encode import make, runs
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ftjax.data import encode, labeled_examples, preference_rows
from ftjax.data.formats import Bad, Completion
from ftjax.data.tokenizer import Tokenizer

WORDS = ['12', '30', '▁+', '▁3', '▁12', '▁=', '42', '▁42', 'wo', 'wor', 'ld', '▁wor', '▁world']


def sentencepiece(kind):
  """A BPE of characters and WORDS; 'prepend' is Llama 2's form, the others are Metaspace's."""
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
  pieces += sorted({*'0123456789+=▁abcdefghijklmnopqrstuvwxyzé.\n'})
  merges = []
  for word in WORDS:
    for i in range(2, len(word) + 1):
      if word[:i] not in pieces:
        pieces.append(word[:i])
        merges.append((word[: i - 1], word[i - 1]))
  vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
  t = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token='<unk>', byte_fallback=True))
  if kind == 'prepend':
    t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  else:
    t.pre_tokenizer = pre_tokenizers.Metaspace('▁', prepend_scheme=kind, split=False)
  t.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  t.add_special_tokens(['<s>', '</s>'])
  config = {'bos_token': '<s>', 'eos_token': '</s>'}
  files = {'tokenizer.json': t.to_str().encode(), 'tokenizer_config.json': json.dumps(config)}
  return Tokenizer(files | {'tokenizer_config.json': json.dumps(config).encode()}, name=kind)


ROWS = [
  ('12 + 3', '0 = 42'),  # 30 is one token
  ('12 + 30', ' = 42'),
  ('12 + 30 =', ' 42'),
  ('12 + 30 = ', '42'),
  ('wor', 'ld'),
  ('a w', 'orld.\nb'),
  ('a=4', '2'),
  ('', '42 = 30'),
  ('é', 'é 😀'),
]


@pytest.mark.parametrize('kind', ['prepend', 'first', 'always'])
@pytest.mark.parametrize('prompt, answer', ROWS)
def test_a_completion_decodes_to_prompt_and_answer(kind, prompt, answer):
  t = sentencepiece(kind)
  row = Completion(prompt, answer)
  n, joint = len(t.encode(prompt)), t.encode(prompt + answer)
  apart = joint[:n] != t.encode(prompt)
  if (prompt, answer) in (ROWS[0], ROWS[5], ROWS[6]):
    assert apart
  for (found,) in (encode.encode([row], t, 'assistant')[0], encode.encode_answers([row], t)[:1]):
    assert t.decode(found.tokens) == prompt + answer
    assert found.boundary_tokens == apart
    assert found.tokens[:n].tolist() == t.encode(prompt)  # what sampling starts from
    assert found.supervised.tolist() == [i >= max(n, 1) for i in range(len(found.tokens))]
    if not apart:
      assert found.tokens.tolist() == [*joint, t.eos_id]


@pytest.mark.parametrize('kind', ['prepend', 'first', 'always'])
def test_answers_of_a_pair_share_the_ids_of_their_prompt(kind):
  t = sentencepiece(kind)
  pair = preference_rows.Pair(Completion('12 + 3', '0 = 42'), Completion('12 + 3', ' = 42'), 0.0)
  (found,) = labeled_examples.encode([pair], t)
  chosen, rejected = found[0].tokens[: found[0].boundary], found[0].tokens[found[0].boundary :]
  n = len(t.encode('12 + 3'))
  assert np.array_equal(chosen[:n], rejected[:n])
  assert (t.decode(chosen), t.decode(rejected)) == ('12 + 30 = 42', '12 + 3 = 42')
  assert found[0].boundary_tokens == 1


def test_nothing_but_the_stop_token():
  t = make(None)
  for row in (Completion('p', t.eos_token), Completion('', t.eos_token)):
    (bad,) = encode.encode([row], t, 'assistant')
    assert isinstance(bad, Bad) and 'nothing but the stop token' in bad.reason
    (bad,) = encode.encode_answers([row], t)
    assert isinstance(bad, Bad) and 'nothing but the stop token' in bad.reason
  ((found,),) = encode.encode([Completion('p', 'x')], t, 'assistant')
  assert runs(found, t) == ['x<|im_end|>']
