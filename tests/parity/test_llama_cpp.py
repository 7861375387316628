"""Exported GGUF files in llama.cpp itself: tokens, logits, greedy answers of a tuned SmolLM2.

A completion counts token by token under teacher forcing: llama.cpp is given the prompt and our
greedy completion, and at each position its likeliest token is compared with ours. Where all are the
same, its own greedy decoding writes the same text.
"""

import dataclasses
import json

import gguf_cases
import numpy as np
import pytest
import tiny_run
from test_gguf import write_blocks
from tiny_model import QWEN2, TINY, UNTIED, init, logits, tokens_at
from tiny_tokenizer import tiny_files
from tokenizers import Tokenizer as Tokens

from ftjax import convert
from ftjax.data.tokenizer import Tokenizer
from ftjax.hf import export, gguf_tokenizer, load
from ftjax.hf import gguf as gguf_source
from ftjax.hf.gguf import GGUFSource
from ftjax.models.rope_spec import RopeScaling
from parity.llama_cpp import LlamaCpp, dequantized
from parity.mixed_strings import mixed_strings
from parity.test_logits import SMOLLM2, complete, open_model
from parity.toy_gguf import Toy, write_toy

pytestmark = pytest.mark.full

PROMPTS = (
  'What is the capital of France?',
  'Name three colours.',
  'Is this review positive or negative?\n\nTwo hours of my life that nobody will give back to me.',
  'Is this review positive or negative?\n\nI left the cinema smiling.',
  'Write a haiku about autumn.',
  'What is 12 + 30?',
  'Translate to French: good morning',
  'Explain photosynthesis in one sentence.',
  'def fibonacci(n):',
  'List the planets of the solar system.',
  'Who wrote Romeo and Juliet?',
  'Give me a recipe for pancakes.',
  'What is the boiling point of water in °C?',
  'Why is the sky blue?',
  'Summarize: The quick brown fox jumps over the lazy dog.',
  'Tell me a joke.',
  'What does "naïve café" mean? 😀',
  'How do I sort a list in Python?',
  'What year did the second world war end?',
  'Complete: once upon a time',
)


@pytest.mark.parametrize('kind', [t for t in gguf_source.TYPES if '_' in t or t == 'MXFP4'])
def test_quantized_types_against_ggml(tmp_path, kind):
  """Random blocks, by ggml's own code; it is compiled with fused multiply-add, so not bit for bit.
  Zeros, infinities and NaN are where they are there.
  """
  stored, _ = write_blocks(tmp_path / 'x.gguf', kind, 64, 1024)
  expected = dequantized(kind, stored, 64 * 1024).reshape(64, 1024)
  got = GGUFSource(tmp_path / 'x.gguf').read('model.embed_tokens.weight')
  finite = np.isfinite(expected)
  np.testing.assert_array_equal(np.isfinite(got), finite)
  assert finite.mean() > 0.5
  # A block is scale * q - minimum: differences are measured in what is subtracted.
  size = np.nanmax(np.where(finite, np.abs(expected), 0).reshape(-1, 32), axis=1)
  error = np.where(finite, np.abs(np.where(finite, got, 0) - np.where(finite, expected, 0)), 0)
  assert (error.reshape(-1, 32).max(axis=1) <= 2e-6 * size).all()


def write_model(folder, arch, files):
  export.export(
    init(arch),
    arch,
    folder,
    source_config=None,
    tokenizer_files=files,
    dtype=np.float32,
    stop_ids=(),
  )
  return str(folder)


def rope_scaled(arch, scaling):
  return arch.with_blocks(
    lambda b: dataclasses.replace(
      b,
      mixer=dataclasses.replace(
        b.mixer, rope=dataclasses.replace(b.mixer.rope, scaling=scaling), head_dim=16
      ),
    )
  )


@pytest.mark.parametrize(
  'arch',
  [TINY, UNTIED, rope_scaled(TINY, RopeScaling(4.0, 1.0, 4.0, 32)), QWEN2],
  ids=['tied', 'untied', 'llama3_rope', 'qwen2'],
)
def test_logits_of_tiny_models(tmp_path, arch):
  """100 tokens, beyond the original context of the scaled one: of rotary order, biases, scaling."""
  arch = dataclasses.replace(arch, vocab_size=400)  # tokens of the tokenizer: 384
  folder = write_model(tmp_path / 'hf', arch, tiny_files())
  convert.convert(folder, str(tmp_path / 'x.gguf'), 'float32')
  ids = np.random.default_rng(0).integers(0, 384, (1, 100), np.int32)
  ours = logits(arch, init(arch), ids, tokens_at(np.ones_like(ids)))[0]
  with LlamaCpp(tmp_path / 'x.gguf') as model:
    got = model.logits(ids[0].tolist())
  assert np.abs(got - ours).max() <= 1e-5 * np.abs(ours).max()


@pytest.mark.parametrize('name', gguf_cases.CASES)
def test_every_family(tmp_path, name):
  """Logits of 100 tokens, longer than windows and original contexts; and its greedy continuation,
  token by token under teacher forcing. ggml computes GELU from a table in float16.
  """
  folder = gguf_cases.write_folder(tmp_path / 'hf', gguf_cases.CASES[name])
  convert.convert(folder, str(tmp_path / 'x.gguf'), 'float32')
  arch, params = open_model(tmp_path / 'x.gguf')
  ids = np.random.default_rng(0).integers(0, 384, 100).tolist()
  ids += complete(arch, params, [ids], 20)[0]
  row = np.array([ids], np.int32)
  ours = logits(arch, params, row, tokens_at(np.ones_like(row)))[0]
  with LlamaCpp(tmp_path / 'x.gguf') as model:
    got = model.logits(ids)
  error = np.abs(got - ours).max() / np.abs(ours).max()
  print(f'{name}: largest difference {error:.1e} of the largest logit')
  assert error <= (2e-3 if 'gelu' in arch.layers()[0].mlp.activation else 3e-5)
  top = got[99:-1].max(-1) - got[np.arange(99, 119), ids[100:]]
  assert (top <= 2 * error * np.abs(ours).max()).all()  # the same token, or as likely a one


def test_a_file_with_a_block_that_predicts_further_tokens(tmp_path, monkeypatch):
  """llama.cpp opens it and does not compute with that block either."""
  change = {'qwen35.block_count': 5, 'qwen35.nextn_predict_layers': 1}
  found = gguf_cases.write_changed(tmp_path, monkeypatch, 'qwen3_5', change, gguf_cases.FURTHER)
  arch, params = open_model(found)
  row = np.random.default_rng(0).integers(0, 384, (1, 100)).astype(np.int32)
  ours = logits(arch, params, row, tokens_at(np.ones_like(row)))[0]
  with LlamaCpp(found) as model:
    got = model.logits(row[0].tolist())
  assert np.abs(got - ours).max() <= 3e-5 * np.abs(ours).max()


def as_llama2(path):
  """Makes the toy's SentencePiece tokenizer one like Llama 2's: the normalizer puts in spaces, and
  every character of a token is a token.
  """
  content = json.loads(path.read_text()) | {'pre_tokenizer': None}
  replace = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
  steps = [{'type': 'Prepend', 'prepend': '▁'}, replace]
  content['normalizer'] = {'type': 'Sequence', 'normalizers': steps}
  vocab, known = content['model']['vocab'], content['model']['vocab'].keys() - {'\0'}
  content['model']['vocab'] = {t: i for t, i in vocab.items() if i < 259 or set(t) <= known}
  content['model']['merges'] = [
    pair for pair in content['model']['merges'] if set(''.join(pair)) <= known
  ]
  path.write_text(json.dumps(content))


@pytest.mark.parametrize(
  ('kind', 'pre'),
  [('llama', ''), *(('gpt2', pre) for pre in gguf_tokenizer.splittings())],
)
def test_every_kind_of_vocabulary(tmp_path, kind, pre):
  write_toy(tmp_path / 'toy.gguf', Toy(), kind, pre)
  convert.convert(str(tmp_path / 'toy.gguf'), str(tmp_path / 'hf'), None)
  if kind == 'llama':
    as_llama2(tmp_path / 'hf' / 'tokenizer.json')
  convert.convert(str(tmp_path / 'hf'), str(tmp_path / 'x.gguf'), 'bfloat16')
  tokens = Tokens.from_file(str(tmp_path / 'hf' / 'tokenizer.json'))
  with LlamaCpp(tmp_path / 'x.gguf') as model:
    wrong = [
      (text, tokens.encode(text, add_special_tokens=False).tokens, model.tokenize(text))
      for text in mixed_strings(300)
      if tokens.encode(text, add_special_tokens=False).ids != model.tokenize(text)
    ]
  assert not wrong, (len(wrong), wrong[:3])


@pytest.mark.parametrize(('pre', 'is_joined'), [('qwen2', False), ('qwen35', True)])
def test_a_combining_mark_belongs_to_its_word(tmp_path, pre, is_joined):
  """An x with an accent, of which no normalization makes one character: the first byte of the mark
  can be merged with the letter where both are of one word.
  """
  write_toy(tmp_path / 'toy.gguf', Toy(), 'gpt2', pre)
  convert.convert(str(tmp_path / 'toy.gguf'), str(tmp_path / 'hf'), None)
  path = tmp_path / 'hf' / 'tokenizer.json'
  content = json.loads(path.read_text())
  vocab, merges = content['model']['vocab'], content['model']['merges']
  joined = vocab['x\u00cc'] = vocab.pop(''.join(merges[-1]))  # nothing is merged from the last
  merges[-1] = ['x', '\u00cc']
  path.write_text(json.dumps(content))
  convert.convert(str(tmp_path / 'hf'), str(tmp_path / 'x.gguf'), None)
  ours = Tokens.from_file(str(path)).encode('x\u0301!', add_special_tokens=False).ids
  assert (joined in ours) == is_joined
  with LlamaCpp(tmp_path / 'x.gguf') as model:
    assert model.tokenize('x\u0301!') == ours


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
  """A workdir of SmolLM2-135M-Instruct, tuned for three steps."""
  if not (SMOLLM2 / 'model.safetensors').exists():
    pytest.skip('.cache/smollm2 is missing; `make assets` makes it')
  workdir = tmp_path_factory.mktemp('tuned') / 'run'
  settings = ('steps=3', 'batch_size=1', 'seq_len=128', 'optim.warmup_steps=0', 'optim.lr=3e-5')
  settings += ('checkpoint.every=3', 'eval.tasks=()', 'eval.prompts=()')
  settings += ('eval.in_loop=()', 'eval.every=0', 'eval.general=False')
  code, text = tiny_run.run(
    'train',
    ['--config=sft_sentiment', f'--workdir={workdir}', *(f'--config.{s}' for s in settings)],
    share_cache=False,
  )
  assert code == 0, text[-2000:]
  return workdir


@pytest.fixture(scope='module')
def answers(tuned):
  """(prompt ids, greedy completion ids) of 20 prompts, 32 tokens each, in float32."""
  arch, params = open_model(tuned / 'export')
  tokenizer = Tokenizer(load.tokenizer_files(tuned / 'export'))
  texts = [f'<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n' for p in PROMPTS]
  prompts = [tokenizer.encode(t) for t in texts]
  return list(zip(prompts, complete(arch, params, prompts, 32), strict=True))


@pytest.mark.parametrize('dtype', ['float32', 'q8_0'])
def test_a_tuned_model_answers_as_ours_does(tuned, answers, dtype, tmp_path):
  convert.convert(f'{tuned}@last', str(tmp_path / 'x.gguf'), dtype)
  same, gaps = [], []
  with LlamaCpp(tmp_path / 'x.gguf') as model:
    for prompt, completion in answers:
      got = model.logits(prompt + completion[:-1])[len(prompt) - 1 :]
      same += list(got.argmax(-1) == completion)
      gaps += list(got.max(-1) - got[np.arange(len(completion)), completion])
  print(f'{dtype}: {np.mean(same):.4f} of {len(same)} tokens, largest gap {max(gaps):.2e}')
  assert len(same) == 20 * 32
  if dtype == 'float32':
    assert max(gaps) < 1e-3  # equal, or tied
  else:
    assert np.mean(same) >= 0.95


def test_a_tuned_model_has_our_tokens_and_template(tuned, tmp_path):
  convert.convert(str(tuned), str(tmp_path / 'x.gguf'), 'q8_0')
  tokenizer = Tokenizer(load.tokenizer_files(tuned / 'export'))
  texts = [*mixed_strings(), *('<|im_start|>user\nx<|im_end|>\n', 'a<|endoftext|> b<|im_end|>')]
  with LlamaCpp(tmp_path / 'x.gguf') as model:
    for text in texts:
      assert model.tokenize(text) == tokenizer.encode(text), text
    assert model.template == tokenizer.template
    assert model.ends(tokenizer.eos_id) and not model.ends(tokenizer.bos_id)
    assert not model.adds_bos
