"""A small model of each family that llama.cpp computes, and settings that it does not compute."""

import json

import numpy as np
from parity import family_cases
from tiny_tokenizer import tiny_files

from ftjax import convert
from ftjax.families import table
from ftjax.hf import export, gguf_writer, layout
from ftjax.hf.tensor_source import TensorInfo

VOCAB = 400  # rows of the embeddings; the tokenizer has 384 tokens

_LLAMA = {
  'model_type': 'llama',
  'vocab_size': VOCAB,
  'hidden_size': 48,
  'intermediate_size': 80,
  'num_hidden_layers': 3,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'head_dim': 12,
  'max_position_embeddings': 128,
  'rms_norm_eps': 1e-5,
  'rope_theta': 1e4,
  'tie_word_embeddings': False,
  'hidden_act': 'silu',
}
_SQUARE = _LLAMA | {'head_dim': 8}
_GEMMA = {k: v for k, v in _LLAMA.items() if k != 'hidden_act'} | {
  'hidden_activation': 'gelu_pytorch_tanh',
  'tie_word_embeddings': True,
  'query_pre_attn_scalar': 12,
  'sliding_window': 17,
}
_YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}
_EXPERTS = {'num_local_experts': 5, 'num_experts_per_tok': 2}

_QWEN3_5 = {k: v for k, v in _LLAMA.items() if k not in ('rope_theta', 'hidden_act')} | {
  'model_type': 'qwen3_5_text',
  'num_hidden_layers': 4,
  'head_dim': 24,
  'linear_num_key_heads': 2,
  'linear_key_head_dim': 16,
  'linear_num_value_heads': 2,
  'linear_value_head_dim': 16,
  'linear_conv_kernel_dim': 4,
  'tie_word_embeddings': True,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 0.5},
}
_GRANITE4 = _LLAMA | {
  'model_type': 'granitemoehybrid',
  'layer_types': ['attention'] * 3,
  'num_local_experts': 0,
  'num_experts_per_tok': 0,
  'shared_intermediate_size': 36,
  'position_embedding_type': 'rope',
  'tie_word_embeddings': True,
  'embedding_multiplier': 3.7,
  'attention_multiplier': 0.21,
  'residual_multiplier': 0.43,
  'logits_scaling': 0.6,
}

# The rows that are compared are 100 tokens long: more than each window and original context.
CASES = {
  'llama': _LLAMA | {'attention_bias': True, 'mlp_bias': True},
  'llama_linear': _LLAMA | {'rope_scaling': {'rope_type': 'linear', 'factor': 3.0}},
  'llama_yarn': _LLAMA | {'rope_scaling': _YARN},
  'qwen2': _SQUARE | {'model_type': 'qwen2', 'tie_word_embeddings': True, 'rope_scaling': _YARN},
  'qwen3': _LLAMA | {'model_type': 'qwen3', 'rope_theta': 1e6, 'head_dim': 20},
  'qwen3_yarn': _LLAMA
  | {
    'model_type': 'qwen3',
    'tie_word_embeddings': True,
    'rope_scaling': _YARN | {'beta_fast': 8.0, 'beta_slow': 0.5},
  },
  'mistral': _LLAMA | {'model_type': 'mistral', 'sliding_window': None},
  'ministral3': _LLAMA
  | {
    'model_type': 'ministral3',
    'sliding_window': None,
    'rope_parameters': _YARN
    | {'rope_theta': 1e4, 'mscale': 1.0, 'mscale_all_dim': 1.0, 'llama_4_scaling_beta': 0.7},
  },
  'gemma2': _GEMMA
  | {
    'model_type': 'gemma2',
    'attn_logit_softcapping': 3.0,
    'final_logit_softcapping': 5.0,
    'num_hidden_layers': 4,
  },
  'gemma3': _GEMMA
  | {
    'model_type': 'gemma3_text',
    'num_hidden_layers': 7,
    'rope_theta': 1e6,
    'rope_local_base_freq': 1e4,
    'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
  },
  # A pattern, a base and a cap of its own.
  'gemma3_pattern': _GEMMA
  | {
    'model_type': 'gemma3_text',
    'num_hidden_layers': 4,
    'sliding_window_pattern': 2,
    'rope_theta': 1e5,
    'rope_local_base_freq': 1e3,
    'final_logit_softcapping': 4.0,
  },
  'mixtral': _LLAMA | {'model_type': 'mixtral', 'sliding_window': None} | _EXPERTS,
  'qwen3_moe': _LLAMA
  | {'model_type': 'qwen3_moe', 'moe_intermediate_size': 24, 'norm_topk_prob': True}
  | _EXPERTS,
  'phi3': _SQUARE
  | {
    'model_type': 'phi3',
    'hidden_size': 96,
    'head_dim': 16,
    'partial_rotary_factor': 0.75,
    'tie_word_embeddings': True,
    'original_max_position_embeddings': 128,
    'sliding_window': None,
  },
  'phi3_longrope': _SQUARE
  | {
    'model_type': 'phi3',
    'hidden_size': 96,
    'head_dim': 16,
    'partial_rotary_factor': 0.75,
    'original_max_position_embeddings': 32,
    'sliding_window': None,
    'rope_scaling': {
      'type': 'longrope',
      'short_factor': [1.0, 1.1, 1.3, 1.4, 1.7, 2.0],
      'long_factor': [1.2, 2.5, 6.0, 7.0, 9.0, 12.0],
    },
  },
  'olmo2': _SQUARE | {'model_type': 'olmo2'},
  'olmo3': {k: v for k, v in _SQUARE.items() if k != 'rope_theta'}
  | {
    'model_type': 'olmo3',
    'num_hidden_layers': 5,
    'sliding_window': 17,
    'rope_parameters': {
      'full_attention': {'rope_theta': 1e4} | _YARN,
      'sliding_attention': {'rope_theta': 1e4, 'rope_type': 'default'},
    },
  },
  'granite': _LLAMA
  | {
    'model_type': 'granite',
    'tie_word_embeddings': True,
    'mlp_bias': True,
    'embedding_multiplier': 3.7,
    'attention_multiplier': 0.21,
    'residual_multiplier': 0.43,
    'logits_scaling': 0.6,
  },
  # As many values as keys; in groups of three, with a pattern of its own.
  'qwen3_5': _QWEN3_5,
  'qwen3_5_groups': _QWEN3_5
  | {
    'linear_num_value_heads': 6,
    'num_hidden_layers': 5,
    'tie_word_embeddings': False,
    'layer_types': [
      *('linear_attention', 'full_attention', 'linear_attention', 'linear_attention'),
      'full_attention',
    ],
  },
  'granite4': _GRANITE4,
  'smollm3': _LLAMA
  | {'model_type': 'smollm3', 'num_hidden_layers': 5, 'no_rope_layer_interval': 4},
  'gpt2': {
    'model_type': 'gpt2',
    'vocab_size': VOCAB,
    'n_embd': 48,
    'n_inner': 80,
    'n_layer': 3,
    'n_head': 6,
    'n_positions': 128,
    'activation_function': 'gelu_new',
    'tie_word_embeddings': True,
  },
}

# {reason: (case, what is changed, part of the message)}.
REFUSED = {
  'llama window': (
    *('llama', {'sliding_window': 17}),
    r'layer 0\.mixer\.window=17 would be None',
  ),
  'llama dynamic': (
    *('llama', {'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}}),
    'DynamicScaling.* has no form in GGUF',
  ),
  'yarn attention': (
    *('llama', {'rope_scaling': _YARN | {'attention_factor': 1.5}}),
    r'scaling\.attention_factor=1\.5 would be 1\.13',
  ),
  'yarn truncate': ('qwen2', {'rope_scaling': _YARN | {'truncate': False}}, 'truncate=False'),
  'mistral window': ('mistral', {'sliding_window': 17}, r'mixer\.window=17 would be None'),
  'qwen3 bias': ('qwen3', {'attention_bias': True}, r'mixer\.qkv_bias=True would be False'),
  'qwen3 window': (
    *('qwen3', {'use_sliding_window': True, 'sliding_window': 9, 'max_window_layers': 1}),
    r'layer 1\.mixer\.window=9 would be None',
  ),
  'qwen3 llama3': (
    'qwen3',
    {
      'rope_scaling': {
        'rope_type': 'llama3',
        'factor': 4.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 32,
      }
    },
    "not applied by llama.cpp for the architecture 'qwen3'",
  ),
  'gemma2 scale': ('gemma2', {'query_pre_attn_scalar': 7}, r'mixer\.scale=0\.37\d* would be None'),
  'gemma2 no cap': (
    *('gemma2', {'attn_logit_softcapping': None}),
    r'mixer\.soft_cap=None would be 50\.0',
  ),
  'gemma2 untied': ('gemma2', {'tie_word_embeddings': False}, 'tie_word_embeddings=False is not'),
  'gemma3 layers': (
    'gemma3_pattern',
    {
      'layer_types': ['full_attention', 'sliding_attention', 'sliding_attention', 'full_attention'],
    },
    r'layer \d\.mixer\.window=',
  ),
  'mixtral window': ('mixtral', {'sliding_window': 17}, r'mixer\.window=17 would be None'),
  'qwen3_moe weights': (
    *('qwen3_moe', {'norm_topk_prob': False}),
    r'mlp\.renormalize=False would be True',
  ),
  'qwen3_moe dense': (
    *('qwen3_moe', {'mlp_only_layers': [1]}),
    r"layer 1\.mlp='GatedMlpSpec' would be 'MoeSpec'",
  ),
  'phi3 window': ('phi3', {'sliding_window': 9}, r'mixer\.window=9 would be None'),
  'olmo2 tied': ('olmo2', {'tie_word_embeddings': True}, 'tie_word_embeddings=True is not'),
  'qwen2 width': ('qwen2', {'head_dim': 12}, '6 heads of 12 are 72 wide and the model 48'),
  'olmo2 width': ('olmo2', {'head_dim': 12}, '6 heads of 12 are 72 wide and the model 48'),
  'smollm3 rope': (
    *('smollm3', {'no_rope_layer_interval': 2}),
    r"layer 1\.mixer\.rope=None would be 'Rope'",
  ),
  'qwen3_5 sizes': (
    *('qwen3_5', {'linear_value_head_dim': 12}),
    r'qwen35\.ssm\.inner_size=24; llama.cpp requires that values are as wide as keys',
  ),
  'granite4 no rope': (
    *('granite4', {'position_embedding_type': None}),
    r"layer 0\.mixer\.rope=None would be 'Rope'",
  ),
  'gpt2 scale': (
    *('gpt2', {'scale_attn_by_inverse_layer_idx': True}),
    r'layer 1\.mixer\.scale=.* would be None',
  ),
  'gpt2 activation': ('gpt2', {'activation_function': 'relu'}, "activation='relu' would be"),
}


# Of a block of `qwen3_5` that predicts the token after the next.
FURTHER = {
  f'blk.4.{name}': shape
  for name, shape in {
    'attn_norm.weight': (48,),
    'post_attention_norm.weight': (48,),
    'attn_q.weight': (2 * 6 * 24, 48),
    'attn_k.weight': (2 * 24, 48),
    'attn_v.weight': (2 * 24, 48),
    'attn_output.weight': (48, 6 * 24),
    'attn_q_norm.weight': (24,),
    'attn_k_norm.weight': (24,),
    'ffn_gate.weight': (80, 48),
    'ffn_up.weight': (80, 48),
    'ffn_down.weight': (48, 80),
    'nextn.eh_proj.weight': (48, 2 * 48),
    'nextn.enorm.weight': (48,),
    'nextn.hnorm.weight': (48,),
    'nextn.shared_head_norm.weight': (48,),
  }.items()
}


def write_changed(tmp_path, monkeypatch, name, change, more=()):
  """Writes the GGUF file of a case with other metadata, None for none, and with further tensors of
  ones, {name: shape}; returns it.
  """
  real, more = gguf_writer.write, dict(more)

  def write(file, metadata, tensors, parts):
    extra = [gguf_writer.Tensor(n, shape, 'F32') for n, shape in more.items()]
    metadata = {k: v for k, v in (metadata | change).items() if v is not None}

    def all_parts(n):
      return iter([np.ones(more[n], np.float32)]) if n in more else parts(n)

    real(file, metadata, [*tensors, *extra], all_parts)

  monkeypatch.setattr(gguf_writer, 'write', write)
  source = write_folder(tmp_path / 'hf', CASES[name])
  convert.convert(source, str(tmp_path / 'x.gguf'), None)
  return tmp_path / 'x.gguf'


def architecture(config):
  return table.architecture(config)


def is_centred(config):
  """Whether norm weights are stored around 0."""
  return config['model_type'].startswith(('gemma', 'qwen3_5'))


def write_folder(folder, config):
  """Writes a HF folder with weights that depend on the names of the tensors alone."""
  arch, norm = table.architecture(config), 0.0 if is_centred(config) else 1.0
  rules = (
    (r'dt_bias$', -3.0, 1.0),
    (r'linear_attn\.norm\.weight$', 1.0, 0.25),
    (r'conv1d', 0.0, 0.6),
  )
  case = family_cases.Case(config, norm=norm, rules=rules)
  shapes = {name: b[0].hf_shape for name, b in layout.by_tensor(arch).items()}
  tensors = {name: TensorInfo(shape, np.dtype(np.float32)) for name, shape in shapes.items()}
  files = tiny_files() | {'config.json': json.dumps(table.config(arch)).encode()}
  export.write_model(
    folder, tensors, lambda name: family_cases.draw(case, name, shapes[name]), files
  )
  return str(folder)
