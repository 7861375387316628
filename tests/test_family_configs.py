"""config.json of Qwen3, Gemma, Mistral and Ministral, in and out: what is read, what transformers'
classes make of what is left out and of what is written, and what is refused.
"""

import copy
import dataclasses
import json

import pytest
from transformers import AutoConfig

from ftjax.data import synthetic
from ftjax.experiment.model import open_model
from ftjax.families import table
from ftjax.models.architecture import Norm
from ftjax.models.rope_spec import LinearScaling, QueryScaling, Rope, YarnScaling
from ftjax.runtime.errors import DataError

SIZES = {
  'vocab_size': 101,
  'hidden_size': 24,
  'num_hidden_layers': 7,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'intermediate_size': 40,
}
TYPES = ['qwen3', 'gemma2', 'gemma3_text', 'mistral', 'ministral', 'ministral3']
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 5e5,
  'factor': 4.0,
  'original_max_position_embeddings': 64,
  'llama_4_scaling_beta': 0.2,
}
WINDOWED = {'use_sliding_window': True, 'max_window_layers': 3}
# Changes of a config that only names its sizes.
SETTINGS = [
  ('qwen3', {'attention_bias': True, 'head_dim': 10, 'tie_word_embeddings': True}),
  ('qwen3', WINDOWED | {'sliding_window': 5}),
  ('qwen3', WINDOWED),
  ('gemma2', {'attn_logit_softcapping': None, 'final_logit_softcapping': None}),
  ('gemma2', {'query_pre_attn_scalar': 144, 'head_dim': 10, 'attention_bias': True}),
  ('gemma2', {'layer_types': ['full_attention'] * 7, 'sliding_window': None}),
  ('gemma2', {'tie_word_embeddings': False, 'hidden_activation': 'silu'}),
  ('gemma3_text', {'sliding_window_pattern': 3, 'query_pre_attn_scalar': 168}),
  ('gemma3_text', {'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}}),
  ('gemma3_text', {'rope_theta': 5e5, 'rope_local_base_freq': 1e3, 'num_hidden_layers': 2}),
  ('gemma3_text', {'final_logit_softcapping': 30.0, 'attention_bias': True}),
  ('mistral', {'sliding_window': None, 'head_dim': 10}),
  ('mistral', {'sliding_window': 9, 'rope_theta': 1e6}),
  ('ministral', {'layer_types': ['sliding_attention', 'full_attention'] * 3 + ['full_attention']}),
  ('ministral', {'sliding_window': None}),
  ('ministral3', {'rope_parameters': YARN, 'head_dim': 10}),
  ('ministral3', {'rope_parameters': {k: v for k, v in YARN.items() if k != 'rope_theta'}}),
  ('ministral3', {'sliding_window': 9, 'tie_word_embeddings': True}),
]
EVERY = pytest.mark.parametrize(('kind', 'changes'), [*((t, {}) for t in TYPES), *SETTINGS])


def config(kind, changes=()):
  return SIZES | {'model_type': kind} | dict(changes)


def by_class(content):
  """The complete config.json that transformers' class makes of one, whose objects it changes."""
  settings = copy.deepcopy(dict(content))
  return AutoConfig.for_model(settings.pop('model_type'), **settings).to_dict()


@EVERY
def test_what_is_left_out_is_what_the_class_has(kind, changes):
  content = config(kind, changes)
  assert table.architecture(by_class(content)) == table.architecture(content)


@EVERY
def test_what_is_written_is_read_back_here_and_by_the_class(kind, changes):
  arch = table.architecture(config(kind, changes))
  written = json.loads(json.dumps(table.config(arch)))
  assert table.architecture(written) == arch
  assert table.architecture(by_class(written)) == arch
  # All that the class makes of it is what it makes of the first file, but for the rope, whose keys
  # are of two versions, and what says in other words which layers have windows.
  ours, own = by_class(written), by_class(config(kind, changes))
  names = own.keys() & ours.keys() - {'architectures', 'rope_parameters', 'dtype'}
  names -= {'max_window_layers', '_sliding_window_pattern', 'sliding_window'}
  if kind == 'ministral':
    names -= {'model_type', 'layer_types', 'head_dim'}
  assert {n: ours[n] for n in names} == {n: own[n] for n in names}


def windows(arch):
  return [block.mixer.window for block in arch.layers()]


def test_qwen3():
  arch = table.architecture(config('qwen3'))
  (block,) = set(arch.layers())
  assert block.mixer.head_dim == 128 and block.mixer.qk_norm == block.norm == Norm(1e-6)
  assert not block.mixer.qkv_bias and not block.mixer.out_bias
  assert windows(table.architecture(config('qwen3', WINDOWED))) == [None] * 3 + [4096] * 4


def test_gemma2():
  """Sliding layers first, caps by default, sums of 1 and the weights in all norms."""
  arch = table.architecture(config('gemma2'))
  block = arch.layers()[0]
  assert windows(arch) == [4096, None, 4096, None, 4096, None, 4096]
  assert block.norm == arch.final_norm == Norm(1e-6, offset=1.0) and block.norm_placement == 'both'
  assert (block.mixer.soft_cap, arch.logit_soft_cap) == (50.0, 30.0)
  assert block.mixer.scale is None and block.mixer.qk_norm is None and arch.tied
  assert arch.embed_scale == 24**0.5 and block.mlp.activation == 'gelu_tanh'
  off = {'attn_logit_softcapping': None, 'query_pre_attn_scalar': 144}
  mixer = table.architecture(config('gemma2', off)).layers()[0].mixer
  assert mixer.soft_cap is None and mixer.scale == 144**-0.5


def test_gemma3():
  scaled = {'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}, 'sliding_window': 8}
  arch = table.architecture(config('gemma3_text', scaled))
  assert windows(arch) == [8] * 5 + [None, 8]
  local, full = arch.layers()[0].mixer, arch.layers()[5].mixer
  assert local.rope == Rope(10000.0) and full.rope == Rope(1000000.0, LinearScaling(8.0))
  assert local.qk_norm == arch.final_norm == Norm(1e-6, offset=1.0)
  assert local.soft_cap is None and arch.logit_soft_cap is None
  assert dataclasses.replace(local, rope=None, window=None) == dataclasses.replace(full, rope=None)


def test_mistral():
  assert windows(table.architecture(config('mistral'))) == [4096] * 7
  assert windows(table.architecture(config('mistral', {'sliding_window': None}))) == [None] * 7
  assert table.architecture(config('mistral')).layers()[0].mixer.head_dim == 4
  # transformers takes 'mistral' with layer_types as 'ministral'.
  types = {'layer_types': ['full_attention'] * 6 + ['sliding_attention']}
  found = table.architecture(config('mistral', types))
  assert found == table.architecture(config('ministral', types))
  assert windows(found) == [None] * 6 + [4096]


def test_ministral3():
  arch = table.architecture(config('ministral3'))
  (block,) = set(arch.layers())
  rule = YarnScaling(factor=16.0, original_len=16384, attention_factor=1.0)
  assert block.mixer.rope == Rope(1e6, rule, query=QueryScaling(0.1, 16384))
  assert block.mixer.head_dim == 128 and block.mixer.window is None


@pytest.mark.parametrize(
  ('kind', 'changes', 'message'),
  [
    ('qwen3', {'head_dim': None}, 'head_dim'),
    ('qwen3', {'attention_bias': 'no'}, 'attention_bias'),
    ('qwen3', {'mlp_bias': True}, 'mlp_bias=True'),
    ('qwen3', {'qk_norm_eps': 1e-3}, 'qk_norm_eps'),
    ('qwen3', {'layer_types': ['linear_attention'] * 7}, 'linear_attention'),
    ('qwen3', {**WINDOWED, 'sliding_window': None}, 'sliding_window'),
    ('qwen3', {'num_experts': 8}, 'num_experts=8'),
    ('gemma2', {'attn_logit_softcapping': 0}, 'attn_logit_softcapping=0'),
    ('gemma2', {'final_logit_softcapping': 'off'}, 'final_logit_softcapping'),
    ('gemma2', {'query_pre_attn_scalar': 0}, 'query_pre_attn_scalar=0'),
    ('gemma2', {'query_pre_attn_scalar': 12.5}, 'query_pre_attn_scalar'),
    ('gemma2', {'use_bidirectional_attention': True}, 'use_bidirectional_attention=true'),
    ('gemma2', {'hidden_act': 'silu'}, "hidden_act='silu' differs from hidden_activation"),
    ('gemma2', {'hidden_activation': 'xielu'}, "hidden_activation='xielu'"),
    ('gemma2', {'sliding_window': None}, 'sliding_window'),
    ('gemma2', {'sliding_window': 8, 'sliding_window_size': 9}, 'sliding_window_size=9'),
    ('gemma2', {'sliding_window_pattern': 3}, 'sliding_window_pattern=3'),
    ('gemma3_text', {'use_bidirectional_attention': True}, 'use_bidirectional_attention=true'),
    ('gemma3_text', {'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping=50.0'),
    ('gemma3_text', {'sliding_window_pattern': 0}, 'sliding_window_pattern=0'),
    ('gemma3_text', {'rope_parameters': {'rope_theta': 1e4}}, 'rope_parameters has rope_theta'),
    ('gemma3_text', {'num_kv_shared_layers': 3}, 'num_kv_shared_layers=3'),
    ('mistral', {'attention_bias': True}, 'attention_bias=True'),
    ('mistral', {'hidden_size': 25}, 'hidden_size=25'),
    ('mistral', {'sliding_window': -1}, 'sliding_window=-1'),
    ('mistral', {'rope_scaling': {'rope_type': 'default', 'llama_4_scaling_beta': 0.1}}, 'beta'),
    ('ministral3', {'layer_types': ['full_attention'] * 7}, 'layer_types'),
    ('ministral3', {'head_dim': None}, 'head_dim'),
    ('ministral3', {'rope_parameters': YARN | {'llama_4_scaling_beta': None}}, 'beta'),
  ],
)
def test_a_setting_that_is_not_computed_is_refused_by_name(kind, changes, message):
  with pytest.raises(DataError, match=message):
    table.architecture(config(kind, changes))


@pytest.mark.parametrize(
  ('kind', 'changes'),
  [
    # Keys of released files that say what the class does anyway.
    ('gemma2', {'hidden_act': 'gelu_pytorch_tanh', 'cache_implementation': 'hybrid'}),
    ('gemma2', {'sliding_window': 4096, 'sliding_window_size': 4096}),
    ('gemma3_text', {'_sliding_window_pattern': 6, 'use_bidirectional_attention': False}),
    ('gemma3_text', {'attn_logit_softcapping': None, 'rope_scaling': None}),
    ('qwen3', {'sliding_window': None, 'max_window_layers': 7, 'rope_scaling': None}),
    ('mistral', {'sliding_window': 4096, 'layer_types': None}),
  ],
)
def test_keys_of_released_files_that_change_nothing(kind, changes):
  assert table.architecture(config(kind, changes)) == table.architecture(config(kind))


@pytest.mark.parametrize('kind', TYPES)
def test_a_reward_model_is_of_the_class_that_transformers_has(kind):
  arch = table.architecture(config(kind))
  name = table.hf_class(arch.family, 'ForSequenceClassification')
  expected = {'gemma3': 'Gemma3Text', 'mistral': 'Mistral'}.get(arch.family)
  assert name == f'{expected or table.named(arch.family).hf_class}ForSequenceClassification'
  changes = {'architectures': [name], 'num_labels': 1}
  scored = table.architecture(config(kind, changes))
  assert scored == dataclasses.replace(arch, num_labels=1)
  names = [b.hf for b in table.of(arch).bindings(scored)]
  assert 'score.weight' in names and 'lm_head.weight' not in names


@pytest.mark.parametrize('kind', TYPES)
def test_a_random_model_needs_its_sizes_alone(kind):
  """The rest is what transformers' class has."""
  sizes = {k: v for k, v in SIZES.items() if k != 'vocab_size'} | {'model_type': kind}
  arch = open_model('', sizes, seed=0).arch
  assert arch == table.architecture(sizes | {'vocab_size': synthetic.VOCAB_SIZE})
