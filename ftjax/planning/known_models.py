"""Configs of released models, by the last part of their HF name, to plan without a download.
Source: the config.json that each model is published with; the sizes agree with the published
numbers of parameters.
"""

import os
import re

from ftjax.hf import load
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files, hub

# Models of one size that were trained further have the same shape.
_VARIANT = re.compile(r'-(Instruct|Base|Reasoning|it|pt)(?=-|$)')
_LLAMA3_ROPE = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}


def _sizes(dim, layers, heads, kv_heads, ffn, vocab) -> dict:
  return {
    'hidden_size': dim,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'num_key_value_heads': kv_heads,
    'intermediate_size': ffn,
    'vocab_size': vocab,
    'hidden_act': 'silu',
  }


def _llama(dim, layers, heads, kv_heads, ffn, vocab=128256, **more) -> dict:
  return _sizes(dim, layers, heads, kv_heads, ffn, vocab) | {
    'model_type': 'llama',
    'attention_bias': False,
    'mlp_bias': False,
    'rms_norm_eps': 1e-5,
    'rope_theta': 500000.0,
    'rope_scaling': _LLAMA3_ROPE,
    'max_position_embeddings': 131072,
    'tie_word_embeddings': False,
    **more,
  }


def _qwen2(dim, layers, heads, kv_heads, ffn, vocab=151936, tied=True) -> dict:
  return _sizes(dim, layers, heads, kv_heads, ffn, vocab) | {
    'model_type': 'qwen2',
    'rms_norm_eps': 1e-6,
    'rope_theta': 1000000.0,
    # Of all instruct models; the base models of 1.5B and 7B have 131072.
    'max_position_embeddings': 32768,
    'use_sliding_window': False,
    'tie_word_embeddings': tied,
  }


def _qwen3(dim, layers, heads, ffn, tied) -> dict:
  return _sizes(dim, layers, heads, 8, ffn, 151936) | {
    'model_type': 'qwen3',
    'head_dim': 128,
    'attention_bias': False,
    'rms_norm_eps': 1e-6,
    'rope_theta': 1000000.0,
    # Of the models that chat; the base models have 32768.
    'max_position_embeddings': 40960,
    'use_sliding_window': False,
    'tie_word_embeddings': tied,
  }


def _gemma(dim, layers, heads, kv_heads, ffn, vocab, *, head_dim=256, scalar=256, window) -> dict:
  sizes = _sizes(dim, layers, heads, kv_heads, ffn, vocab)
  del sizes['hidden_act']
  return sizes | {
    'hidden_activation': 'gelu_pytorch_tanh',
    'head_dim': head_dim,
    'query_pre_attn_scalar': scalar,
    'sliding_window': window,
    'attention_bias': False,
    'rms_norm_eps': 1e-6,
    'tie_word_embeddings': True,
  }


def _gemma2(*sizes, **more) -> dict:
  return _gemma(*sizes, 256000, window=4096, **more) | {
    'model_type': 'gemma2',
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
    'rope_theta': 10000.0,
    'max_position_embeddings': 8192,
  }


def _gemma3(*sizes, small=False, **more) -> dict:
  """Returns a config of Gemma 3; those from 4B on also read images, which is left out."""
  vocab, window, longest = (262144, 512, 32768) if small else (262208, 1024, 131072)
  return _gemma(*sizes, vocab, window=window, **more) | {
    'model_type': 'gemma3_text',
    'final_logit_softcapping': None,
    'attn_logit_softcapping': None,
    'sliding_window_pattern': 6,
    'rope_theta': 1000000.0,
    'rope_local_base_freq': 10000.0,
    'rope_scaling': None if small else {'rope_type': 'linear', 'factor': 8.0},
    'max_position_embeddings': longest,
  }


def _mistral(dim, layers, ffn, vocab, theta, longest, window=None) -> dict:
  return _sizes(dim, layers, 32, 8, ffn, vocab) | {
    'model_type': 'mistral',
    'head_dim': 128,
    'rms_norm_eps': 1e-5,
    'rope_theta': theta,
    'max_position_embeddings': longest,
    'sliding_window': window,
    'tie_word_embeddings': False,
  }


def _ministral3(dim, layers, ffn, theta=1e6, tied=False) -> dict:
  """Returns a config of the text part of Ministral 3."""
  shared = _mistral(dim, layers, ffn, 131072, theta, 262144)
  return shared | {
    'model_type': 'ministral3',
    'tie_word_embeddings': tied,
    'rope_parameters': {
      'rope_type': 'yarn',
      'rope_theta': theta,
      'factor': 16.0,
      'original_max_position_embeddings': 16384,
      'beta_fast': 32.0,
      'beta_slow': 1.0,
      'mscale': 1.0,
      'mscale_all_dim': 1.0,
      'llama_4_scaling_beta': 0.1,
    },
  }


def _t5(dim, ffn, heads, layers) -> dict:
  return {
    'model_type': 't5',
    'vocab_size': 32128,
    'd_model': dim,
    'd_kv': 64,
    'd_ff': ffn,
    'num_heads': heads,
    'num_layers': layers,
    'feed_forward_proj': 'relu',
    'relative_attention_num_buckets': 32,
    'relative_attention_max_distance': 128,
    'layer_norm_epsilon': 1e-6,
    'is_encoder_decoder': True,
    'tie_word_embeddings': True,
  }


def _t5_v1_1(dim, ffn, heads, layers) -> dict:
  own = {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}
  return _t5(dim, ffn, heads, layers) | own


_MT5 = {'model_type': 'mt5', 'vocab_size': 250112}


def _gpt2(dim, layers, heads) -> dict:
  sizes = {'n_embd': dim, 'n_layer': layers, 'n_head': heads, 'vocab_size': 50257}
  return sizes | {
    'model_type': 'gpt2',
    'n_positions': 1024,
    'layer_norm_epsilon': 1e-5,
    'activation_function': 'gelu_new',
    'add_cross_attention': False,
    'reorder_and_upcast_attn': False,
    'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False,
    'tie_word_embeddings': True,
  }


def _phi3(dim, layers, heads, kv_heads, ffn, vocab, **more) -> dict:
  return _sizes(dim, layers, heads, kv_heads, ffn, vocab) | {
    'model_type': 'phi3',
    'rms_norm_eps': 1e-5,
    'partial_rotary_factor': 1.0,
    'tie_word_embeddings': False,
    **more,
  }


_SMALL = {'tie_word_embeddings': True, 'rope_scaling': _LLAMA3_ROPE | {'factor': 32.0}}
SHAPES = {
  'SmolLM2-135M': _llama(
    *(576, 30, 9, 3, 1536, 49152),
    rope_theta=100000.0,
    rope_scaling=None,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
  ),
  'Llama-3.2-1B': _llama(2048, 16, 32, 8, 8192, head_dim=64, **_SMALL),
  'Llama-3.2-3B': _llama(3072, 28, 24, 8, 8192, head_dim=128, **_SMALL),
  'Llama-3.1-8B': _llama(4096, 32, 32, 8, 14336),
  'Llama-3.1-70B': _llama(8192, 80, 64, 8, 28672),
  'Qwen2.5-0.5B': _qwen2(896, 24, 14, 2, 4864),
  'Qwen2.5-1.5B': _qwen2(1536, 28, 12, 2, 8960),
  'Qwen2.5-3B': _qwen2(2048, 36, 16, 2, 11008),
  'Qwen2.5-7B': _qwen2(3584, 28, 28, 4, 18944, vocab=152064, tied=False),
  'Qwen3-0.6B': _qwen3(1024, 28, 16, 3072, tied=True),
  'Qwen3-1.7B': _qwen3(2048, 28, 16, 6144, tied=True),
  'Qwen3-4B': _qwen3(2560, 36, 32, 9728, tied=True),
  'Qwen3-8B': _qwen3(4096, 36, 32, 12288, tied=False),
  'Qwen3-14B': _qwen3(5120, 40, 40, 17408, tied=False),
  'Qwen3-32B': _qwen3(5120, 64, 64, 25600, tied=False),
  'Qwen3.5-4B': _sizes(2560, 32, 16, 4, 9216, 248320)
  | {
    'model_type': 'qwen3_5_text',
    'attention_bias': False,
    'head_dim': 256,
    'rms_norm_eps': 1e-6,
    'full_attention_interval': 4,
    'linear_num_key_heads': 16,
    'linear_key_head_dim': 128,
    'linear_num_value_heads': 32,
    'linear_value_head_dim': 128,
    'linear_conv_kernel_dim': 4,
    'rope_parameters': {
      'rope_type': 'default',
      'rope_theta': 10000000.0,
      'partial_rotary_factor': 0.25,
    },
    'max_position_embeddings': 262144,
    'tie_word_embeddings': True,
  },
  'Qwen3-30B-A3B': _qwen3(2048, 48, 32, 6144, tied=False)
  | {
    'model_type': 'qwen3_moe',
    'num_key_value_heads': 4,
    'num_experts': 128,
    'num_experts_per_tok': 8,
    'moe_intermediate_size': 768,
    'norm_topk_prob': True,
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
    'router_aux_loss_coef': 0.001,
  },
  'Mixtral-8x7B-v0.1': _sizes(4096, 32, 32, 8, 14336, 32000)
  | {
    'model_type': 'mixtral',
    'num_local_experts': 8,
    'num_experts_per_tok': 2,
    'rms_norm_eps': 1e-5,
    'rope_theta': 1e6,
    'max_position_embeddings': 32768,
    'sliding_window': None,
    'tie_word_embeddings': False,
    'router_aux_loss_coef': 0.02,
  },
  'gemma-2-2b': _gemma2(2304, 26, 8, 4, 9216),
  'gemma-2-9b': _gemma2(3584, 42, 16, 8, 14336),
  'gemma-2-27b': _gemma2(4608, 46, 32, 16, 36864, head_dim=128, scalar=144),
  'gemma-3-270m': _gemma3(640, 18, 4, 1, 2048, small=True),
  'gemma-3-1b': _gemma3(1152, 26, 4, 1, 6912, small=True),
  'gemma-3-4b': _gemma3(2560, 34, 8, 4, 10240),
  'gemma-3-12b': _gemma3(3840, 48, 16, 8, 15360),
  'gemma-3-27b': _gemma3(5376, 62, 32, 16, 21504, head_dim=128, scalar=168),
  'Mistral-7B-v0.1': _mistral(4096, 32, 14336, 32000, 1e4, 32768, window=4096),
  'Mistral-7B-v0.3': _mistral(4096, 32, 14336, 32768, 1e6, 32768),
  'Mistral-Nemo-2407': _mistral(5120, 40, 14336, 131072, 1e6, 131072),
  'Mistral-Small-24B-2501': _mistral(5120, 40, 32768, 131072, 1e8, 32768),
  'Ministral-3-3B-2512': _ministral3(3072, 26, 9216, tied=True),
  'Ministral-3-8B-2512': _ministral3(4096, 34, 14336),
  'Ministral-3-14B-2512': _ministral3(5120, 40, 16384, theta=1e9),
  'gpt2': _gpt2(768, 12, 12),
  'gpt2-medium': _gpt2(1024, 24, 16),
  'gpt2-large': _gpt2(1280, 36, 20),
  'gpt2-xl': _gpt2(1600, 48, 25),
  'SmolLM3-3B': _sizes(2048, 36, 16, 4, 11008, 128256)
  | {
    'model_type': 'smollm3',
    'rms_norm_eps': 1e-6,
    'rope_theta': 5000000.0,
    'max_position_embeddings': 65536,
    'no_rope_layer_interval': 4,
    'use_sliding_window': False,
    'attention_bias': False,
    'mlp_bias': False,
    'tie_word_embeddings': True,
  },
  'Phi-3-mini-4k-instruct': _phi3(
    *(3072, 32, 32, 32, 8192, 32064),
    rope_theta=10000.0,
    max_position_embeddings=4096,
    sliding_window=2047,
  ),
  'phi-4': _phi3(
    *(5120, 40, 40, 10, 17920, 100352),
    rope_theta=250000.0,
    max_position_embeddings=16384,
  ),
  't5-small': _t5(512, 2048, 8, 6),
  't5-base': _t5(768, 3072, 12, 12),
  't5-large': _t5(1024, 4096, 16, 24),
  'flan-t5-small': _t5_v1_1(512, 1024, 6, 8),
  'flan-t5-base': _t5_v1_1(768, 2048, 12, 12),
  'flan-t5-large': _t5_v1_1(1024, 2816, 16, 24),
  'flan-t5-xl': _t5_v1_1(2048, 5120, 32, 24),
  'flan-t5-xxl': _t5_v1_1(4096, 10240, 64, 24),
  'mt5-small': _t5_v1_1(512, 1024, 6, 8) | _MT5,
  'mt5-base': _t5_v1_1(768, 2048, 12, 12) | _MT5,
  'mt5-large': _t5_v1_1(1024, 2816, 16, 24) | _MT5,
}


def read(path: str) -> dict:
  """Returns the config.json of a HF folder or GGUF file, else the shape of that name, else the
  config.json of the model of that name on the hub.

  Raises:
    ConfigError: none of these; says why the hub does not give it.
    DataError: a local file that cannot be read.
  """
  if files.exists(path):
    return load.read_config(path)
  name = _VARIANT.sub('', os.path.basename(path.partition('@')[0].rstrip('/')))
  if name in SHAPES:
    return SHAPES[name]
  reason = 'it does not exist'
  if hub.is_name(path):
    try:
      return load.read_config(path)
    except (ConfigError, DataError) as error:
      reason = str(error)
  raise ConfigError(
    f'model.path={path}: {reason}. No shape of this name is known either; known: '
    f'{", ".join(SHAPES)}'
  )
