"""config.json in and out: what is read, what is refused, and the counts that MFU and plans use."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from tiny_model import QWEN2, TINY, UNTIED

from ftjax.models import transformer
from ftjax.models.architecture import Architecture, RopeScaling, from_hf, to_hf
from ftjax.runtime import trees
from ftjax.runtime.errors import DataError

GOLDEN = Path(__file__).parent / 'parity' / 'golden'
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=8192)
CONFIG = {
  'model_type': 'llama',
  'vocab_size': 256,
  'hidden_size': 32,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 64,
  'rms_norm_eps': 1e-5,
  'rope_theta': 10000.0,
  'tie_word_embeddings': True,
  'max_position_embeddings': 128,
}
# What published Qwen2.5 folders have beyond Llama's keys.
QWEN = CONFIG | {
  'model_type': 'qwen2',
  'use_sliding_window': False,
  'sliding_window': 64,
  'max_window_layers': 2,
}


@pytest.mark.parametrize(
  'arch', [TINY, UNTIED, QWEN2, dataclasses.replace(TINY, rope_scaling=LLAMA3, head_dim=16)]
)
def test_out_and_in_is_the_same(arch):
  assert from_hf(json.loads(json.dumps(to_hf(arch)))) == arch


def test_a_config_is_read():
  assert from_hf(CONFIG) == TINY
  assert from_hf(QWEN) == QWEN2


@pytest.mark.parametrize(
  'changes',
  [
    {'attention_bias': None},
    {'sliding_window': None, 'layer_types': ['full_attention'] * 3},
    {'rope_theta': None, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0}},
  ],
)
def test_qwen2_as_transformers_4_and_5_write_it(changes):
  assert from_hf(QWEN | changes) == QWEN2


def test_a_config_made_for_qwen2_names_its_class_and_no_llama_flag():
  config = to_hf(QWEN2)
  assert config['architectures'] == ['Qwen2ForCausalLM'] and 'attention_bias' not in config
  assert to_hf(TINY)['architectures'] == ['LlamaForCausalLM']


@pytest.mark.parametrize(
  ('changes', 'field', 'value'),
  [
    ({'num_key_value_heads': None}, 'num_kv_heads', 4),
    ({'head_dim': 16}, 'head_dim', 16),
    ({'head_dim': None}, 'head_dim', 8),
    ({'tie_word_embeddings': False}, 'tied', False),
    ({'rope_theta': 500000}, 'rope_theta', 500000.0),
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 5.0}}, 'rope_theta', 5.0),
    ({'rope_scaling': {'type': 'default'}}, 'rope_scaling', None),
    ({'attention_bias': None, 'mlp_bias': False, 'pretraining_tp': 1}, 'num_layers', 3),
  ],
)
def test_settings(changes, field, value):
  assert getattr(from_hf(CONFIG | changes), field) == value


@pytest.mark.parametrize('key', ['rope_parameters', 'rope_scaling'])
def test_llama3_rope_under_the_keys_of_transformers_4_and_5(key):
  rule = {
    'rope_type': 'llama3',
    'rope_theta': 7.0,
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  }
  arch = from_hf(CONFIG | {key: rule})
  assert (arch.rope_scaling, arch.rope_theta) == (LLAMA3, 7.0)


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'model_type': 'mamba'}, 'mamba'),
    ({'model_type': None}, 'model_type'),
    ({'hidden_act': 'gelu'}, 'hidden_act'),
    ({'attention_bias': True}, 'attention_bias'),
    ({'mlp_bias': True}, 'mlp_bias'),
    ({'pretraining_tp': 2}, 'pretraining_tp'),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}}, 'yarn'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, 'linear'),
    ({'head_dim': 7}, 'head_dim'),
    ({'rope_theta': float('inf')}, 'rope_theta'),
    ({'num_key_value_heads': 3}, 'num_attention_heads=4'),
  ],
)
def test_what_the_decoder_does_not_compute_is_refused(changes, named):
  with pytest.raises(DataError, match=named):
    from_hf(CONFIG | changes)


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'use_sliding_window': True}, 'use_sliding_window=True'),
    ({'layer_types': ['full_attention', 'sliding_attention']}, 'sliding_attention'),
    ({'attention_bias': False}, 'attention_bias=False'),
    ({'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, 'yarn'),
    ({'model_type': 'qwen2_moe'}, 'qwen2_moe.*supported: llama, qwen2'),
    (
      {'architectures': ['Qwen2ForSequenceClassification'], 'id2label': {'0': 'a', '1': 'b'}},
      '2 labels',
    ),
  ],
)
def test_a_qwen2_that_the_decoder_does_not_compute_is_refused(changes, named):
  with pytest.raises(DataError, match=named):
    from_hf(QWEN | changes)


@pytest.mark.parametrize(
  'missing', ['vocab_size', 'hidden_size', 'num_hidden_layers', 'intermediate_size']
)
def test_a_missing_size_is_named(missing):
  with pytest.raises(DataError, match=missing):
    from_hf({k: v for k, v in CONFIG.items() if k != missing})


def test_an_incomplete_rope_rule_is_named():
  with pytest.raises(DataError, match='low_freq_factor'):
    from_hf(CONFIG | {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}})


@pytest.mark.parametrize('arch', [TINY, UNTIED, QWEN2])
def test_parameters_are_counted_as_declared(arch):
  leaves = trees.flatten(transformer.abstract(arch))
  assert arch.num_params() == sum(x.size for x in leaves.values())
  matrices = {n: x.size for n, x in leaves.items() if n.endswith('/w') and n != 'embed/w'}
  head = 0 if 'head/w' in matrices else leaves['embed/w'].size
  assert arch.matmul_params() == sum(matrices.values()) + head


def test_counts_by_hand():
  # q and o 32*32 each, k and v 32*16 each, gate, up, down 32*64 each, two norms of 32.
  layer = 2 * 1024 + 2 * 512 + 3 * 2048 + 64
  assert TINY.num_params() == 256 * 32 + 3 * layer + 32
  assert UNTIED.num_params() == TINY.num_params() + 256 * 32
  assert TINY.matmul_params() == 256 * 32 + 3 * (layer - 64)
  # 4 heads of queries, 2 of keys, 2 of values, of 8 numbers each.
  assert QWEN2.num_params() == TINY.num_params() + 3 * 8 * 8
  assert QWEN2.matmul_params() == TINY.matmul_params()


def test_layer_slots_count_along_the_stack():
  assert TINY.layer_slots() == [('stack0/block0', 0), ('stack0/block0', 1), ('stack0/block0', 2)]


def test_layer_slots_of_a_pattern_take_turns():
  class Patterned(Architecture):
    stacks = ((('local', 'full'), 2), (('full',), 1))

  slots = Patterned(**dataclasses.asdict(TINY)).layer_slots()
  assert slots == [
    ('stack0/block0', 0),
    ('stack0/block1', 0),
    ('stack0/block0', 1),
    ('stack0/block1', 1),
    ('stack1/block0', 0),
  ]


def test_architectures_are_hashable_and_can_be_static_arguments():
  assert hash(TINY) == hash(dataclasses.replace(TINY))
  assert jax.jit(lambda arch: arch.model_dim, static_argnums=0)(TINY) == 32


def test_golden_configs():
  arch = from_hf(json.loads((GOLDEN / 'llama3_rope' / 'config.json').read_text()))
  assert arch.rope_scaling == RopeScaling(4.0, 1.0, 4.0, 32)
  assert (arch.num_kv_heads, arch.tied, arch.max_len) == (1, True, 128)
