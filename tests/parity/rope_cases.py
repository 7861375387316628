"""Rotary embeddings of all kinds as config.json has them: what make_rope_goldens.py gives
transformers and the tests give ftjax. Neither library is imported here.
"""

import numpy as np

from ftjax.families.rope_rule import Reading

# Lengths at which the frequencies are computed; the rules that depend on it change at 16 or 32.
LENGTHS = (1, 16, 17, 32, 33, 40, 500)

_SIZES = {'hidden_size': 64, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'vocab_size': 64}
_LLAMA = _SIZES | {'model_type': 'llama', 'head_dim': 24, 'max_position_embeddings': 128}
_SHORT, _LONG = [1.0, 1.1, 1.25, 1.5], [1.0, 2.5, 7.0, 12.75]
_YARN = {'rope_type': 'yarn', 'factor': 8.0, 'original_max_position_embeddings': 16}
_LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
_PHI3 = _SIZES | {
  'model_type': 'phi3',
  'head_dim': 16,
  'partial_rotary_factor': 0.5,
  'max_position_embeddings': 128,
  'original_max_position_embeddings': 32,
  'pad_token_id': 0,
}
_LAYERS = {'num_hidden_layers': 2, 'layer_types': ['sliding_attention', 'full_attention']}
_GEMMA3 = _SIZES | _LAYERS | {'model_type': 'gemma3_text', 'head_dim': 24}
_OLMO3 = _SIZES | _LAYERS | {'model_type': 'olmo3'}
_GEMMA4 = _SIZES | _LAYERS | {'model_type': 'gemma4_text', 'head_dim': 16, 'global_head_dim': 40}
_MINISTRAL = _SIZES | {'model_type': 'ministral3', 'head_dim': 24}
_QWEN35 = _SIZES | {'model_type': 'qwen3_5_text', 'head_dim': 32, 'rope_theta': 1e7}

PARTIAL = Reading(partial=True)
# transformers' class puts a length into the rule that nothing reads.
SCALED = Reading(scaled_queries=True, ignored=('max_position_embeddings',))
# name -> (config.json, what the family computes).
CASES: dict[str, tuple[dict, Reading]] = {
  'default': (_LLAMA, Reading()),
  'default_5': (_LLAMA | {'rope_parameters': {'rope_theta': 5e5}}, Reading()),
  'linear': (
    _LLAMA | {'rope_scaling': {'type': 'linear', 'factor': 3}, 'rope_theta': 5e5},
    Reading(),
  ),
  'dynamic': (
    _LLAMA | {'rope_scaling': {'type': 'dynamic', 'factor': 2.5}, 'max_position_embeddings': 32},
    Reading(),
  ),
  'llama3': (_LLAMA | {'rope_parameters': _LLAMA3 | {'rope_theta': 7e4}}, Reading()),
  'yarn': (_LLAMA | {'rope_scaling': _YARN}, Reading()),
  'yarn_of_a_short_model': (_LLAMA | {'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, Reading()),
  'yarn_ratio': (_LLAMA | {'rope_scaling': _YARN | {'factor': None}}, Reading()),
  'yarn_betas': (
    _LLAMA | {'rope_parameters': _YARN | {'beta_fast': 4, 'beta_slow': 0.5, 'truncate': False}},
    Reading(),
  ),
  'yarn_attention': (_LLAMA | {'rope_scaling': _YARN | {'attention_factor': 1.5}}, Reading()),
  'yarn_mscale': (
    _LLAMA | {'rope_scaling': _YARN | {'mscale': 0.707, 'mscale_all_dim': 0.4}},
    Reading(),
  ),
  'yarn_one_mscale': (_LLAMA | {'rope_scaling': _YARN | {'mscale': 0.707}}, Reading()),
  'longrope': (
    _LLAMA
    | {
      'head_dim': 8,
      'rope_parameters': {
        'rope_type': 'longrope',
        'short_factor': _SHORT,
        'long_factor': _LONG,
        'factor': 6.0,
        'original_max_position_embeddings': 16,
      },
    },
    Reading(),
  ),
  'phi3': (
    _PHI3 | {'rope_scaling': {'type': 'longrope', 'short_factor': _SHORT, 'long_factor': _LONG}},
    PARTIAL,
  ),
  'phi3_su': (
    _PHI3
    | {
      'rope_scaling': {
        'type': 'su',
        'short_factor': _SHORT,
        'long_factor': _LONG,
        'original_max_position_embeddings': 32,
      }
    },
    PARTIAL,
  ),
  'phi3_plain': (_PHI3, PARTIAL),
  'proportional': (
    _LLAMA
    | {
      'rope_parameters': {
        'rope_type': 'proportional',
        'rope_theta': 1e6,
        'partial_rotary_factor': 0.35,
        'factor': 2.0,
      }
    },
    Reading(),
  ),
  'qwen3_5': (_QWEN35, PARTIAL),
  'qwen3_5_whole': (_QWEN35 | {'rope_parameters': {'partial_rotary_factor': 1.0}}, PARTIAL),
  'ministral3': (_MINISTRAL, SCALED),
}
# The same with a rotary embedding for each layer type -> (config.json, old key of sliding layers).
BY_LAYER_TYPE: dict[str, tuple[dict, str]] = {
  'gemma3': (_GEMMA3, 'rope_local_base_freq'),
  'gemma3_old': (
    _GEMMA3
    | {
      'rope_theta': 5e5,
      'rope_local_base_freq': 2e4,
      'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
    },
    'rope_local_base_freq',
  ),
  'gemma3_new': (
    _GEMMA3
    | {
      'rope_parameters': {
        'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 3e4},
      }
    },
    'rope_local_base_freq',
  ),
  'olmo3_old': (_OLMO3 | {'rope_theta': 500000, 'rope_scaling': _YARN}, 'rope_theta'),
  'olmo3_new': (
    _OLMO3
    | {
      'rope_parameters': {
        'full_attention': _YARN | {'rope_theta': 5e4},
        'sliding_attention': {'rope_theta': 5e4},
      }
    },
    'rope_theta',
  ),
  'gemma4': (_GEMMA4, ''),
}

# Of whole models: name -> config.json. Their weights are `weights(name)`.
_MODEL = {
  'num_hidden_layers': 2,
  'intermediate_size': 32,
  'hidden_size': 32,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'vocab_size': 64,
  'tie_word_embeddings': True,
  'pad_token_id': 0,
  'rms_norm_eps': 1e-5,
}
MODELS: dict[str, dict] = {
  'dynamic': CASES['dynamic'][0] | _MODEL | {'head_dim': 8},
  'phi3': CASES['phi3'][0] | _MODEL | {'hidden_size': 64},
  'ministral3': _MODEL
  | {
    'model_type': 'ministral3',
    'head_dim': 8,
    'rope_parameters': _YARN | {'rope_theta': 1e5, 'llama_4_scaling_beta': 0.3},
  },
  'proportional': CASES['proportional'][0] | _MODEL | {'head_dim': 8},
}
TOKENS, PROMPT = 48, 20  # of each text, and of the part that is read at once in decoding


def ids() -> np.ndarray:
  """The text, int64[1, T]."""
  return np.random.default_rng(0).integers(1, 64, (1, TOKENS))


def weights(config: dict) -> dict[str, np.ndarray]:
  """Random weights of a Llama under the names of its files."""
  rng, d, f = np.random.default_rng(1), config['hidden_size'], config['intermediate_size']
  q, k = (config[f'num_{n}_heads'] * config['head_dim'] for n in ('attention', 'key_value'))
  shapes = {'model.embed_tokens.weight': (config['vocab_size'], d), 'model.norm.weight': (d,)}
  for i in range(config['num_hidden_layers']):
    layer = f'model.layers.{i}.'
    shapes |= {f'{layer}self_attn.{n}_proj.weight': (s, d) for n, s in (('q', q), ('k', k))}
    shapes |= {
      f'{layer}self_attn.v_proj.weight': (k, d),
      f'{layer}self_attn.o_proj.weight': (d, q),
      f'{layer}mlp.gate_proj.weight': (f, d),
      f'{layer}mlp.up_proj.weight': (f, d),
      f'{layer}mlp.down_proj.weight': (d, f),
      f'{layer}input_layernorm.weight': (d,),
      f'{layer}post_attention_layernorm.weight': (d,),
    }
  return {
    n: (rng.normal(size=s) * 0.25 + ('norm' in n)).astype(np.float32) for n, s in shapes.items()
  }
