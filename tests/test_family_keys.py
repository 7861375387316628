"""config.json of GPT-2, SmolLM3, OLMo 2 and 3, Granite and Phi-3: what a file leaves out, what each
key says, what is refused.
"""

import dataclasses

import family_models
import numpy as np
import pytest

from ftjax.config import keys, section
from ftjax.experiment.model import open_model, random_config
from ftjax.families import hf_config, table
from ftjax.hf import load, safetensors
from ftjax.hf.tensor_source import TensorInfo
from ftjax.models import counts
from ftjax.models.architecture import MlpSpec
from ftjax.models.rope_spec import LongScaling, YarnScaling
from ftjax.planning import known_models
from ftjax.runtime.errors import DataError

SIZES = {
  'hidden_size': 32,
  'num_hidden_layers': 5,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 48,
  'vocab_size': 70,
}
GPT2 = {'n_embd': 32, 'n_layer': 5, 'n_head': 4, 'vocab_size': 70}
DENSE = {'num_local_experts': 0, 'mamba_n_heads': 1, 'layer_types': ['full_attention'] * 5}
SMALL = {
  'gpt2': GPT2,
  'smollm3': SIZES,
  'olmo2': SIZES,
  'olmo3': SIZES,
  'granite': SIZES,
  'granitemoehybrid': SIZES | DENSE,
  'phi3': SIZES,
}


def read(kind, **changes):
  return table.architecture({'model_type': kind} | SMALL[kind] | changes)


@pytest.mark.parametrize('kind', SMALL)
def test_what_a_file_leaves_out_is_the_default_of_transformers_class(kind):
  """And the complete config of the class is read, and what is written means the same."""
  plain = {k: v for k, v in SMALL[kind].items() if not isinstance(v, list)}
  complete = dict(hf_config.class_defaults(kind, **plain)) | SMALL[kind]
  found = read(kind)
  assert table.architecture({'model_type': kind} | complete) == found
  assert table.architecture(table.config(found)) == found


CHANGES = {
  'gpt2 scales': ('gpt2', {'scale_attn_weights': False, 'scale_attn_by_inverse_layer_idx': True}),
  'gpt2 scale': ('gpt2', {'scale_attn_by_inverse_layer_idx': True}),
  'gpt2 mlp': ('gpt2', {'n_inner': 40, 'activation_function': 'relu'}),
  'gpt2 untied': ('gpt2', {'tie_word_embeddings': False, 'layer_norm_epsilon': 1e-3}),
  'smollm3 list': ('smollm3', {'no_rope_layers': [1, 0, 0, 1, 1]}),
  'smollm3 none': ('smollm3', {'no_rope_layer_interval': 1}),
  'smollm3 window': ('smollm3', {'use_sliding_window': True, 'sliding_window': 8}),
  'olmo2 bias': ('olmo2', {'attention_bias': True, 'rope_theta': 5e5}),
  'olmo3 windows': ('olmo3', {'sliding_window': 8, 'layer_types': ['sliding_attention'] * 5}),
  'olmo3 full': ('olmo3', {'layer_types': ['full_attention'] * 5}),
  'granite': ('granite', {'logits_scaling': 49.0, 'embedding_multiplier': 12, 'mlp_bias': True}),
  'granite 2': ('granite', {'attention_multiplier': 0.015625, 'residual_multiplier': 0.22}),
  'granitemoehybrid': ('granitemoehybrid', {'position_embedding_type': 'rope'}),
  'phi3': ('phi3', {'sliding_window': 2047, 'partial_rotary_factor': 0.75}),
}


@pytest.mark.parametrize('case', CHANGES)
def test_each_key_is_read_and_written(case):
  kind, changes = CHANGES[case]
  found = read(kind, **changes)
  assert found != read(kind)
  assert table.architecture(table.config(found)) == found


REFUSED = {
  'gpt2 n_ctx': ('gpt2', {'n_ctx': 8}, 'n_positions=1024 and n_ctx=8 differ'),
  'gpt2 cross': ('gpt2', {'add_cross_attention': True}, 'add_cross_attention=True'),
  'gpt2 activation': ('gpt2', {'activation_function': 'tanh'}, "activation_function='tanh'"),
  'gpt2 heads': ('gpt2', {'n_head': 5}, 'n_embd=32 is no multiple of n_head=5'),
  'gpt2 text': ('gpt2', {'n_positions': '64'}, "n_positions='64'"),
  'gpt2 llama': ('gpt2', {'rope_theta': 1e4}, 'rope_theta'),
  'smollm3 short': ('smollm3', {'no_rope_layers': [1, 0]}, 'no_rope_layers'),
  'smollm3 number': ('smollm3', {'no_rope_layers': [1, 0, 2, 1, 1]}, 'no_rope_layers'),
  'smollm3 interval': ('smollm3', {'no_rope_layer_interval': 0}, 'no_rope_layer_interval=0'),
  'smollm3 types': (
    'smollm3',
    {'layer_types': ['sliding_attention'] * 5, 'sliding_window': 8},
    'use_sliding_window=false',
  ),
  'olmo2 clip': ('olmo2', {'clip_qkv': 8.0}, 'clip_qkv'),
  'olmo2 window': ('olmo2', {'sliding_window': 8}, 'sliding_window'),
  'olmo3 window': ('olmo3', {'sliding_window': None}, 'sliding_window'),
  'olmo3 types': ('olmo3', {'layer_types': ['chunked_attention'] * 5}, 'chunked_attention'),
  'olmo': ('olmo2', {'model_type': 'olmo'}, "model_type='olmo' is not supported"),
  'granite zero': ('granite', {'logits_scaling': 0}, 'logits_scaling=0'),
  'experts': ('granitemoehybrid', {'num_local_experts': 8}, 'num_local_experts=8'),
  'mamba': ('granitemoehybrid', {'layer_types': ['mamba'] * 5}, 'Mamba layers'),
  'no types': ('granitemoehybrid', {'layer_types': None}, 'layers_block_type=None'),
  'learned': (
    'granitemoehybrid',
    {'position_embedding_type': 'learned'},
    "position_embedding_type='learned'",
  ),
  'phi3 yarn': ('phi3', {'rope_scaling': {'type': 'yarn', 'factor': 2.0}}, 'expected rope_type'),
  'phi3 head': ('phi3', {'lm_head_bias': True}, 'lm_head_bias=True'),
  'phi3 factors': (
    'phi3',
    {'rope_scaling': {'type': 'longrope', 'short_factor': [1.0], 'long_factor': [1.0] * 4}},
    'short_factor has 1 numbers; expected 4',
  ),
  # What transformers reads of every family.
  'causal': ('olmo2', {'is_causal': False}, 'is_causal=False'),
  'causal gpt2': ('gpt2', {'is_causal': None}, 'is_causal=None'),
  'weights': ('olmo2', {'transformers_weights': 'b.safetensors'}, 'transformers_weights='),
  'list': ('olmo2', {'hidden_act': ['silu']}, 'hidden_act=.*not supported'),
  'layers': ('olmo2', {'num_hidden_layers': 10**9}, 'num_hidden_layers=1000000000; .*at most 500'),
  'large': ('olmo3', {'sliding_window': 2**31}, 'sliding_window=2147483648; expected at most'),
  'kv heads': ('granite', {'num_key_value_heads': 3}, 'no multiple of num_key_value_heads=3'),
  'phi': ('phi3', {'model_type': 'phi'}, "model_type='phi' is not supported"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_not_computed_is_refused_by_name(case):
  kind, changes, message = REFUSED[case]
  with pytest.raises(DataError, match=message):
    read(kind, **changes)


def test_layers_are_what_the_keys_say():
  """Which layers turn, have a window or a scale: the numbers of transformers' code."""

  def of(kind, field, **changes):
    return [getattr(b.mixer, field) for b in read(kind, **changes).layers()]

  assert [r is None for r in of('smollm3', 'rope')] == [False, False, False, True, False]
  window = {'use_sliding_window': True, 'sliding_window': 8}
  assert of('smollm3', 'window', **window) == [None, None, None, 8, None]
  assert of('olmo3', 'window') == [4096, 4096, 4096, None, 4096]
  yarn = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 512}
  turns = of('olmo3', 'rope', rope_scaling=yarn, rope_theta=5e5)
  assert [isinstance(r.scaling, YarnScaling) for r in turns] == [False, False, False, True, False]
  scaled = of('gpt2', 'scale', scale_attn_by_inverse_layer_idx=True)
  assert scaled == [None, *(8**-0.5 / n for n in (2, 3, 4, 5))]
  assert (
    isinstance(read('gpt2').layers()[0].mlp, MlpSpec) and read('gpt2').learned_positions == 1024
  )
  assert of('phi3', 'window', sliding_window=2047) == [2047] * 5
  # Released files have windows beyond their positions.
  assert read('phi3', sliding_window=262144) == read('phi3')


def test_an_olmo3_without_windows_is_written_as_transformers_reads_it():
  """Its model makes the mask of a window in any case, of the class's size where none is stated."""
  written = table.config(read('olmo3', layer_types=['full_attention'] * 5))
  assert (dict(hf_config.class_defaults('olmo3')) | written)['sliding_window'] == 4096


def test_a_phi_4_mini_reads_its_factors():
  found = read(
    'phi3',
    num_attention_heads=2,
    max_position_embeddings=131072,
    original_max_position_embeddings=4096,
    partial_rotary_factor=0.75,
    rope_scaling={'type': 'longrope', 'short_factor': [1.0] * 6, 'long_factor': [2.0] * 6},
  )
  rope = found.layers()[0].mixer.rope
  assert isinstance(rope.scaling, LongScaling) and rope.fraction == 0.75
  assert table.architecture(table.config(found)) == found


# Parameters, as the models' pages count them.
RELEASED = {
  'gpt2': 124_439_808,
  'gpt2-medium': 354_823_168,
  'gpt2-large': 774_030_080,
  'gpt2-xl': 1_557_611_200,
  'SmolLM3-3B': 3_075_098_624,
  'Phi-3-mini-4k-instruct': 3_821_079_552,
  'phi-4': 14_659_507_200,
}


@pytest.mark.parametrize('name', RELEASED)
def test_released_sizes_have_the_known_numbers_of_parameters(name):
  arch = table.architecture(known_models.read(name))
  assert counts.num_params(arch) == RELEASED[name]


def test_counts_leave_out_look_ups_of_positions():
  arch = read('gpt2')
  biases = 5 * (3 * 32 + 32 + 128 + 32)
  norms = (5 * 2 + 1) * 2 * 32
  inside = counts.num_params(arch) - biases - norms
  assert counts.matmul_params(arch) == inside - 1024 * 32


@pytest.mark.parametrize('prefix', ['', 'transformer.'])
def test_files_of_gpt2_with_and_without_prefix_masks_and_head(tmp_path, prefix):
  """As OpenAI's files and those of transformers name the tensors; either has unused masks."""
  arch, shapes = family_models.architecture('gpt2'), family_models.shapes('gpt2')
  names = {n.removeprefix('transformer.'): n for n in shapes}
  values = {
    f'{prefix}{n}': family_models.tensor('gpt2', full, shapes[full]) for n, full in names.items()
  }
  values[f'{prefix}h.0.attn.bias'] = np.ones((1, 1, 61, 61), np.float32)
  values[f'{prefix}h.1.attn.masked_bias'] = np.ones((1,), np.float32)
  values['lm_head.weight'] = values[f'{prefix}wte.weight']
  infos = {n: TensorInfo(x.shape, x.dtype) for n, x in values.items()}
  safetensors.write_folder(tmp_path, infos, values.__getitem__)
  source = load.open_model_source(tmp_path, arch)
  load.check_tensors(source, arch)
  name = 'transformer.h.2.mlp.c_fc.bias'
  np.testing.assert_array_equal(source.read(name), values[f'{prefix}h.2.mlp.c_fc.bias'])


def test_files_of_gpt2_with_a_tensor_twice_are_refused(tmp_path):
  arch, shapes = family_models.architecture('gpt2'), family_models.shapes('gpt2')
  values = {n: family_models.tensor('gpt2', n, s) for n, s in shapes.items()}
  values['wpe.weight'] = values['transformer.wpe.weight']
  infos = {n: TensorInfo(x.shape, x.dtype) for n, x in values.items()}
  safetensors.write_folder(tmp_path, infos, values.__getitem__)
  with pytest.raises(DataError, match=r'no parameter takes wpe\.weight'):
    load.check_tensors(load.open_model_source(tmp_path, arch), arch)


@pytest.mark.parametrize('kind', SMALL)
def test_a_random_model_has_no_padding_id_beyond_its_vocabulary(kind):
  """transformers' embedding refuses one."""
  found = random_config({'model_type': kind} | SMALL[kind] | {'vocab_size': 259})
  pad = (dict(hf_config.class_defaults(kind)) | found).get('pad_token_id')
  assert pad is None or pad < 259
  assert dataclasses.is_dataclass(table.architecture(found))


def test_model_random_of_a_config_takes_the_keys_of_gpt2():
  c = keys.default()
  c.model.random = {'model_type': 'gpt2', 'n_embd': 32, 'n_layer': 2, 'n_head': 4}
  c.model.random.n_positions = 64
  model = open_model('', c.model.random.to_dict(), 0)
  assert (model.arch.family, model.arch.max_len) == ('gpt2', 64)
  assert section.random_required('gpt2') == ('n_embd', 'n_layer', 'n_head')
