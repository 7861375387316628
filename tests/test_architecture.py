"""config.json in and out: what is read, what is refused, and the counts that MFU and plans use."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest
from tiny_model import QWEN2, TINY, UNTIED, with_mixer
from transformers import AutoConfig

from ftjax.families import table as families
from ftjax.families.hf_config import notices
from ftjax.models import counts, kinds
from ftjax.models.architecture import Norm
from ftjax.models.rope_spec import Rope, RopeScaling
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


def facts(arch):
  """{name: value} of an architecture whose layers are all alike."""
  (block,) = set(arch.layers())
  mixer = block.mixer
  assert block.norm == arch.final_norm
  return {
    'num_heads': mixer.num_heads,
    'num_kv_heads': mixer.num_kv_heads,
    'head_dim': mixer.head_dim,
    'rope_theta': mixer.rope.theta,
    'rope_scaling': mixer.rope.scaling,
    'qkv_bias': mixer.qkv_bias,
    'norm_eps': block.norm.eps,
    'num_layers': arch.num_layers,
    'tied': arch.tied,
    'max_len': arch.max_len,
    'num_labels': arch.num_labels,
  }


@pytest.mark.parametrize(
  'arch', [TINY, UNTIED, QWEN2, with_mixer(TINY, rope=Rope(scaling=LLAMA3), head_dim=16)]
)
def test_out_and_in_is_the_same(arch):
  assert families.architecture(json.loads(json.dumps(families.config(arch)))) == arch


def test_a_config_is_read():
  assert families.architecture(CONFIG) == TINY
  assert families.architecture(QWEN) == QWEN2


@pytest.mark.parametrize(
  'changes',
  [
    {'attention_bias': None},
    {'sliding_window': None, 'layer_types': ['full_attention'] * 3},
    {'rope_theta': None, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0}},
  ],
)
def test_qwen2_as_transformers_4_and_5_write_it(changes):
  assert families.architecture(QWEN | changes) == QWEN2


@pytest.mark.parametrize(
  ('config', 'windows'),
  [
    (QWEN | {'use_sliding_window': True}, [None, None, 64]),
    (QWEN | {'use_sliding_window': True, 'max_window_layers': 0}, [64, 64, 64]),
    (
      QWEN | {'layer_types': ['sliding_attention', 'full_attention', 'sliding_attention']},
      [64, None, 64],
    ),
    (CONFIG | {'sliding_window': 64}, [64, 64, 64]),
    (CONFIG | {'sliding_window': 64, 'use_sliding_window': False}, [None, None, None]),
    (
      CONFIG
      | {
        'sliding_window': 64,
        'layer_types': ['full_attention', 'sliding_attention', 'sliding_attention'],
      },
      [None, 64, 64],
    ),
  ],
)
def test_windows_are_read_and_written(config, windows):
  arch = families.architecture(config)
  assert [block.mixer.window for block in arch.layers()] == windows
  assert families.architecture(families.config(arch)) == arch


def test_a_window_of_llama_is_a_notice():
  """transformers' class has none: a user should know that it computes something else."""
  assert not notices(CONFIG | {'sliding_window': 4096})
  (line,) = notices(CONFIG | {'sliding_window': 64})
  assert 'sliding_window=64' in line and 'transformers' in line


def test_a_config_made_for_qwen2_names_its_class_and_no_llama_flag():
  config = families.config(QWEN2)
  assert config['architectures'] == ['Qwen2ForCausalLM'] and 'attention_bias' not in config
  assert families.config(TINY)['architectures'] == ['LlamaForCausalLM']


@pytest.mark.parametrize(
  ('changes', 'field', 'value'),
  [
    ({'num_key_value_heads': None}, 'num_kv_heads', 4),
    ({'head_dim': 16}, 'head_dim', 16),
    ({'attention_bias': True}, 'qkv_bias', True),
    ({'hidden_act': 'gelu'}, 'num_layers', 3),
    ({'head_dim': None}, 'head_dim', 8),
    ({'tie_word_embeddings': False}, 'tied', False),
    ({'rope_theta': 500000}, 'rope_theta', 500000.0),
    ({'rope_theta': None, 'rope_parameters': {'rope_theta': 5.0}}, 'rope_theta', 5.0),
    ({'rope_scaling': {'type': 'default'}}, 'rope_scaling', None),
    ({'attention_bias': None, 'mlp_bias': False, 'pretraining_tp': 2}, 'num_layers', 3),
  ],
)
def test_settings(changes, field, value):
  assert facts(families.architecture(CONFIG | changes))[field] == value


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
  arch = families.architecture(CONFIG | {key: rule, 'rope_theta': None})
  assert arch.layers()[0].mixer.rope == Rope(7.0, LLAMA3)


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'model_type': 'mamba'}, 'mamba'),
    ({'model_type': None}, 'model_type'),
    ({'hidden_act': 'xielu'}, 'hidden_act'),
    ({'rope_scaling': {'rope_type': 'axial', 'factor': 2.0}}, 'axial.*longrope, proportional'),
    ({'head_dim': 7}, 'head_dim'),
    ({'rope_theta': float('inf')}, 'rope_theta'),
    ({'num_key_value_heads': 3}, 'num_attention_heads=4'),
  ],
)
def test_what_the_decoder_does_not_compute_is_refused(changes, named):
  with pytest.raises(DataError, match=named):
    families.architecture(CONFIG | changes)


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'use_sliding_window': True, 'sliding_window': None}, 'sliding_window'),
    ({'layer_types': ['full_attention', 'chunked_attention']}, 'chunked_attention'),
    ({'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types has 2 entries'),
    ({'attention_bias': False}, 'attention_bias=False'),
    ({'rope_scaling': {'type': 'mrope', 'factor': 4.0}}, 'mrope.*longrope, proportional'),
    ({'model_type': 'qwen2_moe'}, 'qwen2_moe.*supported: llama, qwen2'),
    (
      {'architectures': ['Qwen2ForSequenceClassification'], 'id2label': {'0': 'a', '2': 'b'}},
      'id2label',
    ),
  ],
)
def test_a_qwen2_that_the_decoder_does_not_compute_is_refused(changes, named):
  with pytest.raises(DataError, match=named):
    families.architecture(QWEN | changes)


@pytest.mark.parametrize('config', [CONFIG, QWEN], ids=['llama', 'qwen2'])
@pytest.mark.parametrize(
  ('key', 'field'),
  [
    ('vocab_size', 'vocab_size'),
    ('hidden_size', 'model_dim'),
    ('num_hidden_layers', 'num_layers'),
    ('intermediate_size', 'ffn_dim'),
    ('num_attention_heads', 'num_heads'),
    ('num_key_value_heads', 'num_kv_heads'),
  ],
)
def test_a_missing_size_is_the_one_of_transformers_class(config, key, field):
  config = config | {'hidden_size': 512, 'num_attention_heads': 64, 'head_dim': 8}
  without = {k: v for k, v in config.items() if k != key}
  arch = families.architecture(without)
  block = arch.layers()[0]
  found = next(getattr(x, field) for x in (arch, block.mixer, block.mlp) if hasattr(x, field))
  expected = AutoConfig.for_model(**without)
  assert found == getattr(expected, key)


def test_an_incomplete_rope_rule_is_named():
  with pytest.raises(DataError, match='low_freq_factor'):
    families.architecture(CONFIG | {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}})


RULE = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    # transformers 5 saved the first, a user added the second
    (
      {
        'rope_theta': None,
        'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000},
        'rope_scaling': RULE | {'factor': 8, 'original_max_position_embeddings': 16},
      },
      'rope_parameters=.*rope_scaling=.*two different',
    ),
    ({'rope_parameters': RULE, 'rope_scaling': {'type': 'default'}}, 'two different'),
    ({'rope_parameters': RULE, 'rope_scaling': RULE | {'factor': 4.0}}, 'two different'),
    (
      {
        'rope_theta': None,
        'rope_parameters': {'rope_theta': 5e5, 'rope_type': 'default'},
        'rope_scaling': {'type': 'default'},  # whose theta is then the default, 10000
      },
      'two different',
    ),
    ({'rope_parameters': {'rope_theta': 5e5}}, 'rope_theta=10000.0 and rope_parameters has'),
    ({'rope_scaling': RULE | {'rope_theta': 5e5}}, 'rope_theta=10000.0 and rope_scaling has'),
    ({'rope_scaling': RULE | {'type': 'yarn'}}, "rope_type='llama3' and type='yarn'"),
    ({'rope_scaling': {'rope_type': 'default', 'factor': 8.0}}, 'factor=8.0'),
    ({'rope_parameters': RULE | {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor=0.5'),
    ({'rope_scaling': RULE, 'original_max_position_embeddings': 64}, '=64 and rope_scaling has'),
    ({'rope_scaling': RULE | {'high_freq_factor': 1.0}}, 'high_freq_factor=1.0'),
    ({'rope_scaling': RULE | {'factor': '8'}}, r"rope_scaling.factor='8' is text"),
    ({'rope_scaling': 'llama3'}, "rope_scaling='llama3' is text"),
    ({'rope_parameters': {'full_attention': RULE}}, 'full_attention='),
  ],
)
def test_two_rotary_embeddings_are_refused_by_name(changes, named):
  with pytest.raises(DataError, match=named):
    families.architecture(CONFIG | changes)


@pytest.mark.parametrize(
  'changes',
  [
    {'rope_parameters': RULE | {'rope_theta': 10000.0}, 'rope_scaling': RULE},
    {'rope_theta': None, 'rope_parameters': RULE, 'rope_scaling': RULE | {'rope_theta': 10000}},
    {'rope_scaling': RULE | {'type': 'llama3'}, 'rope_parameters': {}},
    {'rope_scaling': RULE, 'rope_parameters': None, 'original_max_position_embeddings': 8192},
  ],
)
def test_equal_rotary_embeddings_under_two_keys_are_one(changes):
  arch = families.architecture(CONFIG | changes)
  assert arch.layers()[0].mixer.rope == Rope(10000.0, LLAMA3)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('quantization_config', {'quant_method': 'gptq', 'bits': 4}),
    ('quantization_config', {'quant_method': 'bitsandbytes', 'load_in_4bit': True}),
    ('quantization_config', {'quant_method': 'fp8'}),
    ('quantization', {'group_size': 64, 'bits': 4}),
    ('compression_config', {'format': 'pack-quantized'}),
  ],
)
@pytest.mark.parametrize('config', [CONFIG, QWEN], ids=['llama', 'qwen2'])
def test_quantized_weights_are_refused_with_what_to_do(config, key, value):
  with pytest.raises(DataError, match=rf'{key}.*quantized.*dequantize'):
    families.architecture(config | {key: value})
  assert families.architecture(config | {key: None}) == families.architecture(config)


# The defaults of LlamaConfig and Qwen2Config in transformers 5.
@pytest.mark.parametrize(
  ('key', 'field', 'llama', 'qwen2'),
  [
    ('rms_norm_eps', 'norm_eps', 1e-6, 1e-6),
    ('rope_theta', 'rope_theta', 10000.0, 10000.0),
    ('max_position_embeddings', 'max_len', 2048, 32768),
    ('num_key_value_heads', 'num_kv_heads', 4, 4),
    ('head_dim', 'head_dim', 8, 8),
    ('tie_word_embeddings', 'tied', False, False),
    ('hidden_act', 'num_layers', 3, 3),
    ('attention_bias', 'qkv_bias', False, True),
    ('mlp_bias', 'num_layers', 3, 3),
    ('layer_types', 'num_layers', 3, 3),
    ('sliding_window', 'num_layers', 3, 3),
    ('use_sliding_window', 'num_layers', 3, 3),
    ('pretraining_tp', 'num_layers', 3, 3),
    ('rope_scaling', 'rope_scaling', None, None),
    ('attention_dropout', 'num_layers', 3, 3),
    ('architectures', 'num_labels', 0, 0),
  ],
)
def test_a_null_key_has_the_default_of_its_family(key, field, llama, qwen2):
  without = {k: v for k, v in CONFIG.items() if k != key}
  assert facts(families.architecture(CONFIG | {key: None}))[field] == llama
  assert families.architecture(CONFIG | {key: None}) == families.architecture(without)
  assert facts(families.architecture(QWEN | {key: None}))[field] == qwen2


@pytest.mark.parametrize('key', ['vocab_size', 'hidden_size', 'num_attention_heads'])
def test_a_size_that_is_null_is_named(key):
  with pytest.raises(DataError, match=f'{key} is missing or null'):
    families.architecture(CONFIG | {key: None})


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('rope_theta', '10000'),
    ('rope_theta', -1.0),
    ('rope_theta', float('nan')),
    ('rms_norm_eps', '1e-5'),
    ('rms_norm_eps', True),
    ('max_position_embeddings', 128.0),
    ('max_position_embeddings', 0),
    ('hidden_size', '32'),
    ('num_hidden_layers', [3]),
    ('num_key_value_heads', -2),
    ('head_dim', 8.5),
    ('tie_word_embeddings', 'false'),
    ('tie_word_embeddings', 1),
    ('mlp_bias', 'no'),
    ('hidden_act', 3),
    ('layer_types', 'full_attention'),
    ('layer_types', ['full_attention']),
    ('sliding_window', 'wide'),
    ('architectures', 'LlamaForCausalLM'),
    ('attention_dropout', '0.5'),
    ('attention_dropout', 1.5),
    ('rope_parameters', [1]),
  ],
)
def test_a_value_of_another_type_is_named(key, value):
  with pytest.raises(DataError, match=rf'config\.json: {key}\b'):
    families.architecture(CONFIG | {key: value})


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('attn_logit_softcapping', 50.0),
    ('partial_rotary_factor', 0.5),
    ('embedding_multiplier', 12),
    ('logit_scale', 0.0625),
    ('qk_norm', True),
    ('no_rope_layers', [1, 0, 1]),
    ('hidden_activation', 'gelu_pytorch_tanh'),
    ('norm_type', 'layernorm'),
    ('layer_norm_eps', 1e-5),
    ('moe', {'experts': 8}),
    ('pruned_heads', {'0': [1]}),
  ],
)
def test_an_unknown_key_that_may_change_the_computation_is_refused_by_name(key, value):
  with pytest.raises(DataError, match=key):
    families.architecture(CONFIG | {key: value})


@pytest.mark.parametrize(
  'more',
  [
    {'attn_logit_softcapping': None, 'partial_rotary_factor': 1.0, 'qk_norm': False},
    {'logit_scale': 1, 'moe': {}, 'no_rope_layers': [], 'norm_type': ''},
    {'rope_interleaved': False, 'is_llama_config': True, 'transformers.js_config': {'a': 1}},
    {'_name_or_path': 'x', 'unsloth_fixed': True, 'unsloth_version': '2025.1', 'my_note': 'hello'},
    {'bos_token_id': 1, 'eos_token_id': [2, 3], 'use_cache': True, 'temperature': 0.6},
    {'sliding_window': 4096, 'max_window_layers': 28, 'use_sliding_window': False},
    {'sliding_window': 128, 'initializer_range': 0.02, 'dtype': 'bfloat16'},
  ],
)
def test_keys_that_change_nothing_are_accepted(more):
  assert families.architecture(CONFIG | more) == TINY


@pytest.mark.parametrize(
  ('more', 'lines'),
  [
    ({'attention_dropout': 0.5}, ['attention_dropout=0.5 is not applied']),
    ({'hidden_dropout_prob': 0.1, 'resid_pdrop': 0.2}, ['hidden_dropout_prob=0.1', 'resid_pdrop']),
    ({'attention_dropout': 0.0, 'classifier_dropout': None}, []),
    ({'auto_map': {'AutoModelForCausalLM': 'own.Own'}}, ['auto_map.*own.Own']),
    ({'auto_map': {'AutoTokenizer': 'own.Own'}}, []),
  ],
)
def test_what_is_read_but_not_applied_is_reported(more, lines):
  assert families.architecture(CONFIG | more) == TINY
  found = notices(CONFIG | more)
  assert len(found) == len(lines)
  for line, wanted in zip(found, lines, strict=True):
    assert re.search(wanted, line)


@pytest.mark.parametrize('arch', [TINY, UNTIED, QWEN2])
def test_parameters_are_counted_as_declared(arch):
  leaves = trees.flatten(kinds.abstract(arch))
  assert counts.num_params(arch) == sum(x.size for x in leaves.values())
  matrices = {n: x.size for n, x in leaves.items() if n.endswith('/w') and n != 'embed/w'}
  head = 0 if 'head/w' in matrices else leaves['embed/w'].size
  assert counts.matmul_params(arch) == sum(matrices.values()) + head


def test_counts_by_hand():
  # q and o 32*32 each, k and v 32*16 each, gate, up, down 32*64 each, two norms of 32.
  layer = 2 * 1024 + 2 * 512 + 3 * 2048 + 64
  assert counts.num_params(TINY) == 256 * 32 + 3 * layer + 32
  assert counts.num_params(UNTIED) == counts.num_params(TINY) + 256 * 32
  assert counts.matmul_params(TINY) == 256 * 32 + 3 * (layer - 64)
  # 4 heads of queries, 2 of keys, 2 of values, of 8 numbers each.
  assert counts.num_params(QWEN2) == counts.num_params(TINY) + 3 * 8 * 8
  assert counts.matmul_params(QWEN2) == counts.matmul_params(TINY)


def test_layer_slots_count_along_the_stack():
  assert TINY.layer_slots() == [('stack0/block0', 0), ('stack0/block0', 1), ('stack0/block0', 2)]


def test_layer_slots_of_a_pattern_take_turns():
  (full,) = set(TINY.layers())
  local = dataclasses.replace(full, norm=Norm(1e-3))
  arch = dataclasses.replace(TINY, stacks=(((local, full), 2), ((full,), 1)))
  assert arch.layers() == [local, full, local, full, full] and arch.num_layers == 5
  assert arch.layer_slots() == [
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
  arch = families.architecture(json.loads((GOLDEN / 'llama3_rope' / 'config.json').read_text()))
  mixer = arch.layers()[0].mixer
  assert mixer.rope.scaling == RopeScaling(4.0, 1.0, 4.0, 32)
  assert (mixer.num_kv_heads, arch.tied, arch.max_len) == (1, True, 128)
