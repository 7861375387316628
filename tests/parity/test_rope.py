"""Rotary embeddings of config.json against transformers (golden/rope.npz, made by
make_rope_goldens.py): frequencies of every rule, and logits of whole models beyond their original
length, read at once and token by token with a cache.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_model import logits, place, tokens_at

from ftjax.families import hf_rope
from ftjax.families import table as families
from ftjax.families.hf_config import HfConfig
from ftjax.families.rope_rule import Reading
from ftjax.hf import load
from ftjax.models import head, kinds, kv_cache, rope
from ftjax.models.rope_spec import DynamicScaling, RopeScaling
from ftjax.runtime import sharding
from parity.rope_cases import (
  BY_LAYER_TYPE,
  CASES,
  LENGTHS,
  MODELS,
  PROMPT,
  TOKENS,
  ids,
  weights,
)

GOLDEN = Path(__file__).parent / 'golden' / 'rope.npz'


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as stored:
    return dict(stored)


def head_dim(content, kind=''):
  if content['model_type'] == 'gemma4_text' and kind == 'full_attention':
    return content['global_head_dim']
  return content.get('head_dim', content['hidden_size'] // content['num_attention_heads'])


def units_apart(a, b):
  """Largest distance in units in the last place, of float32 arrays of non-negative numbers."""
  assert a.dtype == b.dtype == np.float32 and a.shape == b.shape
  return int(np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32)).max())


def bar(spec):
  """The most units that a frequency may be apart."""
  return {type(None): 2, RopeScaling: 2, DynamicScaling: 4}.get(type(spec.scaling), 1)


def attention_of(spec):
  return getattr(spec.scaling, 'attention_factor', 1.0)


@pytest.mark.parametrize('name', CASES)
def test_frequencies_are_those_of_transformers(name, golden):
  """Within one unit in the last place; two for the plain and the llama3 rule, see rope.py; and
  four where the base grows with the length.
  """
  content, reading = CASES[name]
  spec = hf_rope.read(HfConfig(content), reading)
  assert attention_of(spec) == pytest.approx(float(golden[f'{name}/attention']), rel=1e-15)
  size = head_dim(content)
  found = rope.inverse_frequencies(spec, size)
  assert units_apart(found, golden[f'{name}/1']) <= bar(spec)
  if not spec.uses_length:
    assert all(np.array_equal(golden[f'{name}/{n}'], golden[f'{name}/1']) for n in LENGTHS)
    return
  by_length = rope.frequencies_of(spec, size, jnp.asarray([LENGTHS], jnp.int32))
  for got, n in zip(np.asarray(by_length[0]), LENGTHS, strict=True):
    assert units_apart(got, golden[f'{name}/{n}']) <= bar(spec)
  assert not np.array_equal(golden[f'{name}/500'], golden[f'{name}/1'])


@pytest.mark.parametrize('name', BY_LAYER_TYPE)
def test_frequencies_of_each_layer_type_are_those_of_transformers(name, golden):
  content, local_theta = BY_LAYER_TYPE[name]
  found = hf_rope.read_by_layer_type(HfConfig(content), local_theta)
  for kind, spec in found.items():
    freq = rope.inverse_frequencies(spec, head_dim(content, kind))
    assert units_apart(freq, golden[f'{name}/{kind}']) <= bar(spec)
    expected = float(golden[f'{name}/{kind}/attention'])
    assert attention_of(spec) == pytest.approx(expected, rel=1e-15)
  full, sliding = (golden[f'{name}/{k}'] for k in ('full_attention', 'sliding_attention'))
  assert full.shape != sliding.shape or (full != sliding).any()


def open_model(name, folder):
  """A Llama with the rotary embedding of the case: what it has of its own is tested elsewhere."""
  content = MODELS[name]
  reading = Reading(partial=name == 'phi3', scaled_queries=name == 'ministral3')
  spec = hf_rope.read(HfConfig(content), reading)
  plain = {k: v for k, v in content.items() if k not in hf_rope.KEYS} | {'model_type': 'llama'}
  (folder / 'config.json').write_text(json.dumps(plain))
  save_file(weights(content), folder / 'model.safetensors')
  arch = families.architecture(plain).with_blocks(
    lambda block: dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, rope=spec))
  )
  places = sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))
  return arch, load.load_params(folder, arch, places, np.float32)


def decoded(arch, params, tokens):
  """Logits [B, T - PROMPT, V] of the tokens after the prompt, read one by one."""
  run = jax.jit(functools.partial(kinds.decode, arch, dtype=jnp.float32))
  segments, positions = np.ones((1, TOKENS), np.int32), np.arange(TOKENS, dtype=np.int32)[None]
  cache, table = kv_cache.empty(arch, 1, TOKENS, jnp.float32), kinds.head_weights(arch, params)
  parts = []
  for a, b in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, TOKENS))]:
    part = tokens_at(segments[:, a:b], positions[:, a:b])
    x, cache = run(params, place(tokens[:, a:b], 'batch', 'seq'), part, cache, np.int32(a))
    parts.append(np.asarray(head.logits(x[0], table)))
  return np.concatenate(parts[1:])[None]


@pytest.mark.parametrize('name', MODELS)
def test_logits_are_those_of_transformers(name, golden, tmp_path):
  """All at once, and with a cache, whose keys stay as they were rotated in a shorter text."""
  arch, params = open_model(name, tmp_path)
  tokens = ids().astype(np.int32)
  expected = golden[f'logits/{name}']
  got = logits(arch, params, tokens, tokens_at(np.ones_like(tokens)))
  assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
  stepwise = golden[f'decoded/{name}']
  bar = 1e-5 * np.abs(stepwise).max()
  got = decoded(arch, params, tokens)
  assert np.abs(got - stepwise).max() <= bar
  same = np.abs(stepwise - expected[:, PROMPT:]).max() <= bar
  assert same != arch.layers()[0].mixer.rope.uses_length
