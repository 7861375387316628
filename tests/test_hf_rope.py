"""Rotary embeddings of config.json: written and read back, read by transformers' config classes,
and what is refused by name. Their numbers are compared with transformers' in parity/test_rope.py.
"""

import json
import random

import pytest
from parity.rope_cases import BY_LAYER_TYPE, CASES
from transformers import AutoConfig

from ftjax.families import hf_rope
from ftjax.families import table as families
from ftjax.families.hf_config import HfConfig
from ftjax.families.hf_rope import FULL, SLIDING
from ftjax.families.rope_rule import KEYS, Reading, long_attention
from ftjax.models.rope_spec import (
  DynamicScaling,
  LinearScaling,
  LongScaling,
  ProportionalScaling,
  QueryScaling,
  Rope,
  RopeScaling,
  YarnScaling,
)
from ftjax.runtime.errors import DataError

PLAIN, PARTIAL, SCALED = Reading(), Reading(partial=True), Reading(scaled_queries=True)
LOCAL = 'rope_local_base_freq'


def drawn(kind, rng):
  """(a rotary embedding of a kind, max_position_embeddings)."""
  max_len, original = rng.choice([512, 1000]), rng.choice([33, 64])
  factor = rng.choice([2.0, 3.7])
  # Of longrope also the one that follows from the lengths, which is not written.
  derived = long_attention(max_len / original, original)
  attention = rng.choice([1.0, 1.25, derived if kind == 'longrope' else 1.5])
  pairs = tuple(rng.uniform(1, 9) for _ in range(4))
  betas = rng.choice([(32.0, 1.0), (7.5, 0.25)])
  scaling = {
    'default': None,
    'linear': LinearScaling(factor),
    'dynamic': DynamicScaling(factor, max_len),
    'llama3': RopeScaling(factor, rng.choice([1.0, 0.5]), 4.0, original),
    'yarn': YarnScaling(factor, original, attention, *betas, truncate=rng.random() < 0.5),
    'longrope': LongScaling(pairs, pairs[::-1], original, attention),
    'proportional': ProportionalScaling(rng.choice([1.0, factor])),
  }[kind]
  query = rng.choice([None, QueryScaling(0.1, max_len if kind == 'dynamic' else original)])
  return Rope(rng.choice([1e4, 5e5]), scaling, rng.choice([1.0, 0.25]), query), max_len


def reading_of(rope):
  return Reading(partial=True, scaled_queries=rope.query is not None)


@pytest.mark.parametrize('kind', KEYS)
def test_what_is_written_reads_back_the_same(kind):
  rng, seen = random.Random(kind), set()
  for _ in range(40):
    rope, max_len = drawn(kind, rng)
    config = {'model_type': 'llama', 'max_position_embeddings': max_len}
    config |= json.loads(json.dumps(hf_rope.write(rope, max_len, reading_of(rope))))
    assert hf_rope.read(HfConfig(config), reading_of(rope)) == rope
    seen.add(rope)
  assert len(seen) > 4


@pytest.mark.parametrize('local', [LOCAL, 'rope_theta', ''])
@pytest.mark.parametrize('kind', KEYS)
def test_what_is_written_for_layer_types_reads_back_the_same(kind, local):
  model_type = {LOCAL: 'gemma3_text', 'rope_theta': 'olmo3', '': 'gemma4_text'}[local]
  rng = random.Random(kind)
  for plain in (True, False) * 10:
    full, max_len = drawn(kind, rng)
    sliding = Rope(full.theta if plain else 3e4) if plain else full
    ropes = {FULL: Rope(full.theta, full.scaling, full.fraction), SLIDING: sliding}
    ropes[SLIDING] = Rope(sliding.theta, sliding.scaling, sliding.fraction)
    if kind == 'yarn' and not full.scaling.truncate:
      with pytest.raises(DataError, match='truncate'):
        hf_rope.write_by_layer_type(ropes, max_len, local, PARTIAL)
      continue
    config = {'model_type': model_type, 'max_position_embeddings': max_len}
    written = hf_rope.write_by_layer_type(ropes, max_len, local, PARTIAL)
    config |= json.loads(json.dumps(written))
    assert hf_rope.read_by_layer_type(HfConfig(config), local, PARTIAL) == ropes
    assert ('rope_scaling' in written) <= (plain and bool(local))


def saved(content):
  """What transformers 5 saves of a config.json that it has read."""
  content = json.loads(json.dumps(content))
  return AutoConfig.for_model(content.pop('model_type'), **content).to_dict()


@pytest.mark.parametrize('name', [n for n in CASES if n != 'phi3_su'])
def test_transformers_saves_what_it_read(name):
  content, reading = CASES[name]
  rope = hf_rope.read(HfConfig(content), reading)
  max_len = HfConfig(content).count('max_position_embeddings', of_class=True)
  rest = {k: v for k, v in content.items() if k not in hf_rope.KEYS}
  rest |= {'max_position_embeddings': max_len}
  again = saved(rest | hf_rope.write(rope, max_len, reading))
  assert hf_rope.read(HfConfig(again), reading) == rope
  assert hf_rope.read(HfConfig(saved(content)), reading) == rope


@pytest.mark.parametrize('name', BY_LAYER_TYPE)
def test_transformers_saves_the_layer_types_that_it_read(name):
  content, local = BY_LAYER_TYPE[name]
  ropes = hf_rope.read_by_layer_type(HfConfig(content), local)
  rest = {k: v for k, v in content.items() if k not in (*hf_rope.KEYS, local)}
  again = saved(rest | hf_rope.write_by_layer_type(ropes, 128, local))
  assert hf_rope.read_by_layer_type(HfConfig(again), local) == ropes
  assert hf_rope.read_by_layer_type(HfConfig(saved(content)), local) == ropes


YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}
LONG = {'rope_type': 'longrope', 'short_factor': [1.0] * 4, 'long_factor': [2.0] * 4}
LLAMA = {'model_type': 'llama', 'max_position_embeddings': 128, 'rope_theta': 10000.0}


def read(changes, reading=PLAIN):
  return hf_rope.read(HfConfig(LLAMA | changes), reading)


def test_values_that_transformers_derives():
  """A factor from two lengths, an original length from the top level or from the longest text."""
  yarn = {'rope_type': 'yarn', 'original_max_position_embeddings': 16}
  assert read({'rope_scaling': yarn}).scaling.factor == 8.0
  beside = {'rope_scaling': {'type': 'yarn'}, 'original_max_position_embeddings': 64}
  assert read(beside).scaling == YarnScaling(2.0, 64, 0.1 * 0.6931471805599453 + 1)
  assert read({'rope_scaling': {'type': 'yarn', 'factor': 4.0}}).scaling.original_len == 128
  assert read({'rope_scaling': LONG}).scaling.attention_factor == 1.0
  assert read({'rope_scaling': YARN | {'beta_fast': None, 'mscale': 0}}).scaling == YarnScaling(
    4.0, 32, 0.1 * 1.3862943611198906 + 1
  )
  assert read({'rope_scaling': YARN | {'partial_rotary_factor': 1.0}}).fraction == 1.0
  assert read({'partial_rotary_factor': 0.5}, PARTIAL) == Rope(10000.0, fraction=0.5)


@pytest.mark.parametrize(
  ('changes', 'reading', 'named'),
  [
    ({'rope_scaling': {'rope_type': 'axial'}}, PARTIAL, 'axial.*supported: default, linear, dyn'),
    ({'rope_scaling': {'type': 'ntk', 'factor': 2}}, PARTIAL, "rope_type='ntk'"),
    ({'rope_scaling': {'rope_type': 5, 'factor': 2}}, PARTIAL, 'rope_type=5'),
    ({'rope_scaling': {'rope_type': ['yarn'], 'factor': 2}}, PARTIAL, r"rope_type=\['yarn'\]"),
    ({'rope_scaling': YARN | {'type': 'linear'}}, PARTIAL, "'yarn' and type='linear'"),
    ({'rope_scaling': {'type': 'linear'}}, PARTIAL, 'rope_scaling.factor is missing'),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 0}}, PARTIAL, 'rope_scaling.factor=0'),
    ({'rope_scaling': {'type': 'linear', 'factor': True}}, PARTIAL, 'factor=True is true or false'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2, 'alpha': 9}}, PARTIAL, "alpha=9.*'linear'"),
    ({'rope_scaling': {'type': 'linear', 'factor': 2, 'beta_fast': 9}}, PARTIAL, 'beta_fast=9'),
    ({'rope_scaling': YARN | {'low_freq_factor': 9}}, PARTIAL, 'low_freq_factor=9'),
    ({'rope_scaling': YARN | {'mrope_section': [1, 2]}}, PARTIAL, r'mrope_section=\[1, 2\]'),
    ({'rope_scaling': YARN | {'truncate': 1}}, PARTIAL, 'truncate=1 is a int'),
    (
      {'rope_scaling': YARN | {'beta_fast': 2, 'beta_slow': 3}},
      PARTIAL,
      'beta_fast=2.0, less than',
    ),
    ({'rope_scaling': YARN | {'attention_factor': -1}}, PARTIAL, 'attention_factor=-1'),
    ({'rope_scaling': YARN | {'mscale': '1'}}, PARTIAL, "mscale='1' is text"),
    ({'rope_scaling': YARN | {'llama_4_scaling_beta': 0.1}}, PARTIAL, 'llama_4_scaling_beta=0.1'),
    ({'rope_scaling': YARN}, SCALED, 'llama_4_scaling_beta is missing'),
    ({'rope_scaling': LONG | {'long_factor': None}}, PARTIAL, 'long_factor=None.*list of numbers'),
    ({'rope_scaling': LONG | {'long_factor': 2.0}}, PARTIAL, 'long_factor=2.0.*list of numbers'),
    ({'rope_scaling': LONG | {'long_factor': [1, '2']}}, PARTIAL, "long_factor='2' is text"),
    ({'rope_scaling': LONG | {'short_factor': [1, -2]}}, PARTIAL, 'short_factor=-2'),
    (
      {'rope_scaling': {'type': 'dynamic', 'factor': 2, 'original_max_position_embeddings': 64}},
      PARTIAL,
      'original_max_position_embeddings=64 is not read.*max_position_embeddings=128',
    ),
    (
      {'rope_scaling': {'type': 'dynamic', 'factor': 2}, 'original_max_position_embeddings': 64},
      PARTIAL,
      'original_max_position_embeddings=64 is not read',
    ),
    ({'rope_scaling': YARN, 'original_max_position_embeddings': 64}, PARTIAL, '=64 and rope_scal'),
    (
      {
        'model_type': 'phi3',
        'rope_scaling': LONG | {'original_max_position_embeddings': 64},
      },
      PARTIAL,
      '=4096 and rope_scaling has 64',
    ),
    ({'rope_parameters': YARN, 'rope_scaling': YARN | {'factor': 2.0}}, PARTIAL, 'two different'),
    ({'rope_parameters': YARN, 'rope_scaling': LONG}, PARTIAL, 'two different'),
    ({'partial_rotary_factor': 0.5}, PLAIN, "partial_rotary_factor=0.5.*'default'.*'llama'"),
    ({'rope_scaling': YARN | {'partial_rotary_factor': 0.5}}, PLAIN, 'whole heads'),
    ({'partial_rotary_factor': 1.5}, PARTIAL, 'partial_rotary_factor=1.5; expected at most 1'),
    ({'partial_rotary_factor': 0}, PARTIAL, 'partial_rotary_factor=0'),
    (
      {'partial_rotary_factor': 0.5, 'rope_scaling': YARN | {'partial_rotary_factor': 0.25}},
      PARTIAL,
      'partial_rotary_factor=0.5 and rope_scaling has 0.25',
    ),
    ({'rope_parameters': {FULL: YARN, SLIDING: {}}}, PARTIAL, 'full_attention='),
  ],
)
def test_what_is_not_computed_is_refused_by_name(changes, reading, named):
  with pytest.raises(DataError, match=named):
    read(changes, reading)


@pytest.mark.parametrize(
  ('changes', 'local', 'named'),
  [
    ({'rope_parameters': YARN}, LOCAL, "rope_type='yarn'.*object for each of full_attention"),
    ({'rope_parameters': {FULL: YARN, 'chunked_attention': YARN}}, LOCAL, 'chunked_attention='),
    ({'rope_parameters': {FULL: 'yarn'}}, LOCAL, "full_attention='yarn' is text"),
    ({'rope_parameters': {SLIDING: {'rope_theta': 5.0}}, LOCAL: 6.0}, LOCAL, f'{LOCAL}=6.0 and'),
    ({'rope_parameters': {FULL: {'rope_theta': 5.0}}, 'rope_theta': 6.0}, LOCAL, 'rope_theta=6.0'),
    ({'rope_parameters': {FULL: YARN}, 'rope_scaling': LONG}, LOCAL, 'two different rotary'),
    ({'rope_parameters': {FULL: YARN | {'truncate': False}}}, LOCAL, 'truncate=False'),
    ({'rope_scaling': YARN | {'truncate': False}}, LOCAL, 'truncate=False'),
    ({'rope_scaling': YARN}, '', 'rope_scaling is not read'),
    ({'rope_theta': 5.0}, '', 'rope_theta is not read'),
    ({'model_type': 'olmo3', 'rope_theta': 5.0}, 'rope_theta', 'of all layers in transformers 4'),
  ],
)
def test_what_is_not_computed_by_layer_type_is_refused_by_name(changes, local, named):
  config = {'model_type': 'gemma3_text', 'max_position_embeddings': 128} | changes
  with pytest.raises(DataError, match=named):
    hf_rope.read_by_layer_type(HfConfig(config), local)


@pytest.mark.parametrize(
  ('rope', 'named'),
  [
    (Rope(scaling=DynamicScaling(2.0, 64)), 'max_len=128'),
    (Rope(scaling=YarnScaling(2.0, 64, 1.0), query=QueryScaling(0.1, 32)), 'two original lengths'),
  ],
)
def test_what_a_config_cannot_say_is_not_written(rope, named):
  with pytest.raises(DataError, match=named):
    hf_rope.write(rope, 128)


_CONFIG = LLAMA | {
  'vocab_size': 64,
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 48,
}


@pytest.mark.parametrize('model_type', ['llama', 'qwen2'])
@pytest.mark.parametrize('kind', KEYS)
def test_llama_and_qwen2_take_every_rule(kind, model_type):
  rope, max_len = drawn(kind, random.Random(1))
  fraction = 0.5 if kind == 'proportional' else 1.0
  rope = Rope(rope.theta, rope.scaling, fraction)
  config = _CONFIG | {'model_type': model_type, 'max_position_embeddings': max_len}
  arch = families.architecture(config | hf_rope.write(rope, max_len))
  assert {b.mixer.rope for b in arch.layers()} == {rope}
  assert families.architecture(json.loads(json.dumps(families.config(arch)))) == arch


def test_factors_for_another_number_of_pairs_are_refused():
  config = _CONFIG | {'head_dim': 16, 'rope_scaling': LONG}
  with pytest.raises(DataError, match='short_factor has 4 numbers; expected 8'):
    families.architecture(config)


def test_the_fingerprint_of_plain_and_llama3_ropes_is_as_it_was():
  rule = RopeScaling(8.0, 1.0, 4.0, 8192)
  arch = families.architecture(_CONFIG)
  arch = arch.with_blocks(
    lambda b: type(b)(
      type(b.mixer)(b.mixer.num_heads, b.mixer.num_kv_heads, b.mixer.head_dim, Rope(5e5, rule)),
      b.mlp,
      b.norm,
    )
  )
  assert arch.facts()['stacks'][0][0][0]['mixer']['rope'] == {
    'class': 'Rope',
    'theta': 5e5,
    'scaling': {
      'class': 'RopeScaling',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_len': 8192,
    },
  }
