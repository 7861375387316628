"""runtime/redaction.py: no secret passes, and no honest config is spoilt."""

import base64
import json
import random
import string

import pytest

from ftjax.runtime.redaction import REDACTED, is_secret_name, redact, redact_text


@pytest.mark.parametrize(
  'name',
  [
    'token', 'hf_token', 'hub.token', 'HF_TOKEN', 'accessToken', 'token_value', 'secret',
    'password', 'client_secret', 'DB_PASSWORD', 'api_key', 'apiKey', 'apikey', 'WANDB_API_KEY',
    'credentials', 'upload_id',
    'aws_secret_access_key', 'private-key', 'authorization',
  ],
)  # fmt: skip
def test_secret_names(name):
  assert is_secret_name(name)
  assert redact({'a': {name: 'swordfish'}}) == {'a': {name: REDACTED}}
  assert redact({name: {'user': 'x', 'value': 1}}) == {name: REDACTED}
  assert redact({name: 12345}) == {name: REDACTED}
  assert redact({name: None}) == {name: None}


@pytest.mark.parametrize(
  'name',
  [
    'max_tokens', 'supervised_tokens', 'tokens_per_s', 'tokenizer', 'tokenizer_path', 'eos_token',
    'pad_token_id', 'bos_token', 'num_key_value_heads', 'key', 'keep', 'passes', 'secretary',
    'loss_per_token', 'rollout.max_tokens', 'tokens', 'new_token_budget', 'author',
  ],
)  # fmt: skip
def test_honest_names(name):
  assert not is_secret_name(name)
  assert redact({name: '</s>'}) == {name: '</s>'}
  assert redact({name: 128}) == {name: 128}


def _random_secrets(rng):
  letters = string.ascii_letters + string.digits
  for _ in range(200):
    yield ''.join(rng.choices(letters, k=32))
    yield rng.randbytes(20).hex()
    yield rng.randbytes(32).hex()
    yield 'hf_' + ''.join(rng.choices(string.ascii_letters, k=34))
    yield 'sk-' + ''.join(rng.choices(letters + '-_', k=40)) + 'a'


def test_random_strings_are_found_anywhere():
  for secret in _random_secrets(random.Random(0)):
    for text in (
      secret,
      f'/data/{secret}/x',
      f'--header "X: {secret}"',
      f'https://h/x?sig={secret}',
    ):
      assert secret not in redact_text(text), text


def test_userinfo_of_urls():
  assert redact_text('https://me:hunter2@host/a') == f'https://{REDACTED}@host/a'
  assert (
    redact_text('s3://key@bucket/x and ftp://a:p@ss@h')
    == f's3://{REDACTED}@bucket/x and ftp://{REDACTED}@h'
  )
  assert redact_text('gs://bucket/a@b') == 'gs://bucket/a@b'
  assert redact_text('write to me@example.org') == 'write to me@example.org'


def test_pairs_inside_a_string():
  assert redact_text('http://h/x?token=abc12345&n=5') == f'http://h/x?token={REDACTED}&n=5'
  assert redact_text('--api_key=correct-horse') == f'--api_key={REDACTED}'
  assert redact_text('Authorization: Bearer abcdefgh12').count('abcdefgh12') == 0
  assert redact_text('max_tokens=1234567') == 'max_tokens=1234567'


def test_honest_configs_pass_unchanged():
  revision = '0e9e39f249a16976918f6564b8830bc894c89659'
  config = {
    'algorithm': 'sft',
    'seed': 17,
    'model': {'path': '.cache/smollm2', 'param_dtype': 'float32', 'revision': revision},
    'other': 'meta-llama/Llama-3.1-8B-Instruct-abliterated-GGUF/Llama-3.1-8B-Instruct-Q4_K_M.gguf',
    'cached': f'/home/u/models--meta-llama--Llama-3.1-8B/snapshots/{revision}/config.json',
    'class': 'LlamaForCausalLMWithValueHead, internationalization_of_everything',
    'classes': ('AutoModelForSequenceClassification', 'MixtralForCausalLM'),
    'data': {'train': ('.cache/train.jsonl::chat@0.5', 'gs://bucket-01/a.jsonl')},
    'fingerprint': 'ab12' * 16,
    'lora': (('.*attn/(q|k|v|o)/w', 16), ('stack[0-9]+/block[0-9]+/mlp/(gate|up|down)/w', 8)),
    'prompts': [
      'What is the capital of France?',
      'Donaudampfschifffahrtskapitän: wo?',
      '1 + 1 = 2',
    ],
    'lr': 5e-5,
    'ema': None,
    'flag': True,
    'run': 'sft-2026-09-18T12:30:00-seed17-lr5e-5',
  }
  assert redact(config) == config


def test_the_result_holds_no_trace_of_a_sentinel():
  sentinel = base64.b64encode(random.Random(1).randbytes(24)).decode().replace('/', 'x')
  config = {
    'hub_token': sentinel,
    'model': {'path': f'https://user:{sentinel}@host/repo'},
    'data': (f'gs://b/{sentinel}', {'note': f'use {sentinel} here'}),
    sentinel: 1,
  }
  assert sentinel in json.dumps(config)
  assert sentinel not in json.dumps(redact(config))
