"""Configs of released models, by the last part of their HF name, to plan without a download.
Source:
the config.json that each model is published with.
"""

import os

from ftjax.hf import load
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files, hub

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


def _gpt2(dim, layers, heads) -> dict:
  sizes = {'n_embd': dim, 'n_layer': layers, 'n_head': heads, 'vocab_size': 50257}
  return sizes | {
    'model_type': 'gpt2',
    'n_positions': 1024,
    'layer_norm_epsilon': 1e-5,
    'activation_function': 'gelu_new',
    'tie_word_embeddings': True,
  }


def _phi3(dim, layers, heads, kv_heads, ffn, vocab, **more) -> dict:
  return _sizes(dim, layers, heads, kv_heads, ffn, vocab) | {
    'model_type': 'phi3',
    'rms_norm_eps': 1e-5,
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
  name = os.path.basename(path.partition('@')[0].rstrip('/')).removesuffix('-Instruct')
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
