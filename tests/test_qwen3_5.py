"""Qwen3.5: config.json files that are read and refused, the order of joint projections in parts
that a mesh reads, FLOPs, and which leaves optimizers take for matrices.
"""

import family_models
import numpy as np
import pytest

from ftjax.families import multimodal, table
from ftjax.hf import layout
from ftjax.models import counts, kinds
from ftjax.models.architecture import DeltaNetSpec
from ftjax.runtime.errors import DataError
from ftjax.training import optimizer

# Of the released 4B model, without what transformers' class adds.
RELEASED = {
  'architectures': ['Qwen3_5ForConditionalGeneration'],
  'image_token_id': 248056,
  'model_type': 'qwen3_5',
  'tie_word_embeddings': True,
  'vision_config': {'depth': 24, 'model_type': 'qwen3_5'},
  'text_config': {
    'attention_bias': False,
    'attention_dropout': 0.0,
    'attn_output_gate': True,
    'dtype': 'bfloat16',
    'eos_token_id': 248044,
    'full_attention_interval': 4,
    'head_dim': 256,
    'hidden_act': 'silu',
    'hidden_size': 2560,
    'intermediate_size': 9216,
    'linear_conv_kernel_dim': 4,
    'linear_key_head_dim': 128,
    'linear_num_key_heads': 16,
    'linear_num_value_heads': 32,
    'linear_value_head_dim': 128,
    'mamba_ssm_dtype': 'float32',
    'max_position_embeddings': 262144,
    'mlp_only_layers': [],
    'model_type': 'qwen3_5_text',
    'mtp_num_hidden_layers': 1,
    'mtp_use_dedicated_embeddings': False,
    'num_attention_heads': 16,
    'num_hidden_layers': 32,
    'num_key_value_heads': 4,
    'rms_norm_eps': 1e-6,
    'rope_parameters': {
      'mrope_interleaved': True,
      'mrope_section': [11, 11, 10],
      'partial_rotary_factor': 0.25,
      'rope_theta': 10000000,
      'rope_type': 'default',
    },
    'tie_word_embeddings': True,
    'use_cache': True,
    'vocab_size': 248320,
  },
}


def read(**changes):
  """The architecture of the text part with other keys."""
  text = RELEASED['text_config'] | changes
  return table.architecture(multimodal.text_config(RELEASED | {'text_config': text}, list))


def test_the_released_config():
  arch = read()
  (pattern, repeats), *more = arch.stacks
  assert (len(pattern), repeats, more) == (4, 8, [])
  assert [type(b.mixer) is DeltaNetSpec for b in pattern] == [True, True, True, False]
  assert pattern[0].mixer == DeltaNetSpec(16, 128, 32, 128, 4, 1e-6)
  full = pattern[3].mixer
  assert full.gate and full.qk_norm == pattern[3].norm and full.rope.fraction == 0.25
  assert {b.norm.offset for b in pattern} == {1.0} == {arch.final_norm.offset}
  assert counts.num_params(arch) == 4_205_751_296
  assert table.architecture(table.config(arch)) == arch


def test_layer_types_come_before_the_interval():
  kinds_of = lambda arch: [type(b.mixer) is DeltaNetSpec for b in arch.layers()]  # noqa: E731
  types = ['linear_attention', 'full_attention', 'linear_attention', 'full_attention']
  assert kinds_of(read(num_hidden_layers=4, layer_types=types)) == [True, False] * 2
  assert kinds_of(read(num_hidden_layers=4, full_attention_interval=2)) == [True, False] * 2


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'attention_bias': True}, 'attention_bias=True'),
    ({'attn_output_gate': False}, 'attn_output_gate=False'),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu'"),
    ({'mamba_ssm_dtype': 'bfloat16'}, "mamba_ssm_dtype='bfloat16'"),
    ({'linear_num_value_heads': 24}, 'linear_num_value_heads=24 is no multiple of'),
    ({'linear_conv_kernel_dim': 'four'}, "linear_conv_kernel_dim='four'"),
    ({'layer_types': ['sliding_attention'] * 32}, "layer_types has 'sliding_attention'"),
    ({'layer_types': ['linear_attention'] * 32}, "no 'full_attention' layer"),
    ({'full_attention_interval': 0}, 'full_attention_interval=0'),
    ({'linear_allow_neg_eigval': True}, 'linear_allow_neg_eigval=True'),
    ({'num_experts': 128}, 'num_experts=128'),
    ({'model_type': 'qwen3_5_moe_text'}, "model_type='qwen3_5_moe_text'"),
  ],
)
def test_a_config_that_is_refused(changes, message):
  with pytest.raises(DataError, match=message):
    read(**changes)


@pytest.mark.parametrize('kind', ['qwen3_next', 'qwen3_5_moe', 'olmo_hybrid'])
def test_relatives_are_refused_by_name(kind):
  with pytest.raises(DataError, match=f"model_type='{kind}' is not supported"):
    table.architecture(RELEASED['text_config'] | {'model_type': kind})


@pytest.mark.parametrize('name', ['in_proj_qkv', 'conv1d'])
def test_parts_of_a_joint_tensor(name):
  """What a shard reads of it is that part of the whole; heads stand together."""
  arch = family_models.architecture('qwen3_5')
  b = next(b for b in layout.bindings(arch) if name in b.hf)
  stored = np.random.default_rng(0).normal(size=b.hf_shape).astype(np.float32)

  def part(index):
    slices, _, _ = b.source_slices(index)
    return b.from_source(stored[slices].copy(), index)

  whole = part(tuple(map(slice, b.shape)))
  assert whole.shape == b.shape
  np.testing.assert_array_equal(b.to_hf(whole).reshape(b.hf_shape), stored)
  rng = np.random.default_rng(1)
  for _ in range(20):
    ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in b.shape]
    index = tuple(slice(*map(int, e)) for e in ends)
    np.testing.assert_array_equal(part(index), whole[index])
  # transformers' layout: all queries, all keys, all values.
  net = arch.layers()[0].mixer
  flat = stored.reshape(stored.shape[0], -1)
  own = np.moveaxis(whole, b.axes.index('K'), 0)[1]
  own = np.moveaxis(own, b.axes.replace('K', '').index('C'), 0).reshape(net.channels, -1)
  keys = net.num_key_heads * net.key_dim
  np.testing.assert_array_equal(np.sort(own[: net.key_dim]), np.sort(flat[net.key_dim : keys]))
  values = own[2 * net.key_dim :]
  np.testing.assert_array_equal(np.sort(values), np.sort(flat[2 * keys + len(values) :]))


def test_flops_of_a_state():
  """Each of its numbers is multiplied with the key, corrected, and multiplied with the query."""
  arch = family_models.architecture('qwen3_5')
  size = 3 * 6 * 14 * 10
  assert counts.state_size(arch) == size
  found = counts.forward_flops(arch)
  assert found.token == 2 * counts.matmul_params(arch) + 6 * size
  assert found.pair == 4 * 6 * 16, 'one full layer, whose gate attends to nothing'
  trained = counts.train_flops(arch)
  assert trained.token == 3 * found.token and trained.pair == 3 * found.pair


def test_taps_are_no_matrix():
  arch = family_models.architecture('qwen3_5')
  info = optimizer.leaves(kinds.declared(arch), arch.layer_slots())
  own = {n.rpartition('attn/')[2]: leaf.split for n, leaf in info.items() if 'stack0' in n}
  assert own['conv'] == own['a_log'] == own['dt_bias'] == own['norm'] == 0
  assert own['qkv/w'] == own['b/w'] == 1 and own['out/w'] == 2
