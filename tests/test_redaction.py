"""runtime/redaction.py: secrets by name, by place in a URL and by prefix; ordinary configs pass."""

import json
import random
import string
import time

import pytest

from ftjax.runtime.redaction import REDACTED, is_secret_name, redact, redact_text


@pytest.mark.parametrize(
  'name',
  [
    'token', 'hf_token', 'hub.token', 'HF_TOKEN', 'accessToken', 'token_value', 'secret',
    'password', 'client_secret', 'DB_PASSWORD', 'api_key', 'apiKey', 'apikey', 'WANDB_API_KEY',
    'credentials', 'upload_id', 'X-Goog-Signature', 'sig',
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
    'token_classification',
    'pad_token_id', 'bos_token', 'num_key_value_heads', 'key', 'keep', 'passes', 'secretary',
    'loss_per_token', 'rollout.max_tokens', 'tokens', 'new_token_budget', 'author',
  ],
)  # fmt: skip
def test_names_of_no_secret(name):
  assert not is_secret_name(name)
  assert redact({name: '</s>'}) == {name: '</s>'}
  assert redact({name: 128}) == {name: 128}


PREFIXES = (
  *('hf_', 'sk-', 'sk-proj-', 'ghp_', 'gho_', 'github_pat_', 'glpat-', 'xoxb-', 'AKIA', 'AIza'),
  *('ya29.', 'eyJ', 'npm_', 'pypi-', 'wandb_v1_'),
)


@pytest.mark.parametrize('prefix', PREFIXES)
def test_keys_of_known_services_are_found_anywhere(prefix):
  secret = prefix + ''.join(random.Random(prefix).choices(string.ascii_letters, k=32))
  for text in (secret, f'/data/{secret}/x', f'--header "X: {secret}"', f'https://h/x?a={secret}'):
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
  assert (
    redact_text('http://h/x?X-Amz-Signature=ab12cd34') == f'http://h/x?X-Amz-Signature={REDACTED}'
  )


def test_ordinary_configs_pass_unchanged():
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


def test_the_result_holds_no_trace_of_a_secret():
  secret = 'hf_' + ''.join(random.Random(1).choices(string.ascii_letters, k=34))
  plain = 'correct-horse-battery'
  config = {
    'hub_token': plain,
    'model': {'path': f'https://user:{plain}@host/repo'},
    'data': (f'gs://b/{secret}', {'note': f'use {secret} here'}, f'https://h/x?sig={plain}'),
    secret: 1,
  }
  text = json.dumps(redact(config))
  assert secret not in text and plain not in text


def test_a_long_word_takes_no_time_that_grows_with_its_square():
  begin = time.perf_counter()
  word = 'x' * 1_000_000
  assert redact(word) == word
  assert redact(f'{word}: {word}') == f'{word}: {word}'
  assert redact(f'9_password=hunter22 éapi_key: {"k" * 9}').count('<redacted>') == 2
  assert time.perf_counter() - begin < 2
