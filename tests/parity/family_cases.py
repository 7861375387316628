"""A small model of each family, which transformers and ftjax both compute. Reads neither torch nor
jax: the writer of the golden numbers (make_family_goldens.py) and the tests share it.

A new family is one more case here. After that, in the parity environment (make parity),

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/make_family_goldens.py \
    tests/parity/golden CASE

writes golden/families/CASE.npz, which the tests read: test_families.py compares with transformers,
../test_family_invariants.py and ../multidevice/test_family_meshes.py hold the case to the
invariants. Weights are not stored: `draw` makes them from their names.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parity.encoder_cases import BERT, DEBERTA, DISTILBERT, MASKED, MODERNBERT, ROBERTA

FOLDER = Path(__file__).parent / 'golden' / 'families'
ROWS, PROMPTS, NEW_TOKENS = 2, 20, 8

# Scales of normalizations, and lengths of heads: all of these are vectors.
_NORM = re.compile(r'(norm|ln_\w+|layernorm|LayerNorm)\.weight$')


@dataclasses.dataclass(frozen=True)
class Case:
  """A small model.

  config: what transformers' config class takes, with its model_type. Sizes are unusual on purpose:
  head_dim is not hidden_size / heads, the heads are no power of two, the vocabulary is a multiple
  of nothing. Even numbers of kv heads and a hidden_size that 8 divides let meshes split them.
  tokens: T of the compared rows; more than a window or an original context, where the model has
  one. short: tokens of a document from which on its frequencies are others, so that its cache must
  end before or begin behind it; 0: there is no such number. norm: the number that stored norm
  weights lie around, 0 where the model adds 1 to them.
  rules: (pattern, centre, scale) of tensors that need other values; the first pattern that is found
  in a name counts. head: what transformers' class computes: '' the next token, 'masked' any token,
  or the labels of a 'sequence', 'token' or 'span'.
  """

  config: Mapping[str, Any]
  tokens: int = 48
  norm: float = 1.0
  short: int = 0
  rules: tuple[tuple[str, float, float], ...] = ()
  head: str = ''

  @property
  def vocab(self) -> int:
    """Tokens of the vocabulary."""
    return self.config['vocab_size']


def draw(case: Case, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the values of a tensor, float32[shape]: they depend on its name, its shape and the
  case's rules alone. RandomState's numbers are frozen for all versions of numpy.
  """
  centre, scale = (case.norm, 0.25) if _NORM.search(name) else (0.0, 0.25)
  for pattern, *other in case.rules:
    if re.search(pattern, name):
      centre, scale = other
      break
  x = _random(name).standard_normal(shape)
  return (centre + scale * x).astype(np.float32)


def ids(case: Case) -> np.ndarray:
  """Returns the compared rows, int32[ROWS, T], without the token of padding: RoBERTa's positions
  would pass over it.
  """
  found = _random('ids').randint(0, case.vocab, (ROWS, case.tokens)).astype(np.int32)
  pad = case.config.get('pad_token_id') if case.head else None
  return found if pad is None else np.where(found == pad, pad + 1, found).astype(np.int32)


def token_types(case: Case) -> np.ndarray | None:
  """Returns the token types of the rows, int32[ROWS, T]: 1 in the second half of a row; None for a
  model with one type or none.
  """
  if case.config.get('type_vocab_size', 0) < 2:
    return None
  return np.repeat([[0, 1]] * ROWS, case.tokens // 2, axis=1).astype(np.int32)


def factors(shape: tuple[int, ...]) -> np.ndarray:
  """Returns the numbers that the logits of labels are multiplied with, whose sum is the compared
  loss: float32[shape].
  """
  return _random('factors').standard_normal(shape).astype(np.float32)


def prompts(case: Case) -> list[list[int]]:
  """Returns PROMPTS prompts of 1 to T tokens. Their greedy continuations are NEW_TOKENS long, and
  cross no `short`: there transformers' Phi-3 computes its cache again, and ftjax keeps it.
  """
  lengths = np.linspace(1, case.tokens, PROMPTS).round().astype(int)
  crosses = (lengths <= case.short + 1) & (lengths + NEW_TOKENS >= case.short)
  lengths = np.where(crosses, case.short + 2, lengths) if case.short else lengths
  rng = _random('prompts')
  return [rng.randint(0, case.vocab, n).tolist() for n in lengths]


def _random(name: str) -> np.random.RandomState:
  return np.random.RandomState(zlib.crc32(name.encode()))


_LLAMA = {
  'model_type': 'llama',
  'vocab_size': 67,
  'hidden_size': 24,
  'intermediate_size': 40,
  'num_hidden_layers': 3,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'head_dim': 10,
  'max_position_embeddings': 64,
  'rms_norm_eps': 1e-5,
  'bos_token_id': 1,
  'eos_token_id': 2,
}

_GEMMA = _LLAMA | {
  'tie_word_embeddings': True,
  'query_pre_attn_scalar': 7,
  'sliding_window': 8,
  'pad_token_id': None,  # torch gives the row of a padding token no gradient
}

CASES = {
  'llama': Case(_LLAMA | {'tie_word_embeddings': False}),
  # 48 tokens are three times the original context: the scaled frequencies matter.
  'llama3': Case(
    _LLAMA
    | {
      'tie_word_embeddings': True,
      'num_hidden_layers': 2,
      'rope_parameters': {
        'rope_type': 'llama3',
        'rope_theta': 10000.0,
        'factor': 4.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 16,
      },
    }
  ),
  'qwen2': Case(
    _LLAMA
    | {
      'model_type': 'qwen2',
      'tie_word_embeddings': True,
      'rope_theta': 1e6,
      'rms_norm_eps': 1e-6,
    }
  ),
  'gpt2': Case(
    {
      'model_type': 'gpt2',
      'vocab_size': 67,
      'n_embd': 24,
      'n_inner': 40,
      'n_layer': 3,
      'n_head': 6,
      'n_positions': 61,
      'bos_token_id': 1,
      'eos_token_id': 2,
    }
  ),
  'qwen3': Case(
    _LLAMA
    | {
      'model_type': 'qwen3',
      'tie_word_embeddings': False,
      'head_dim': 14,
      'rope_theta': 1e6,
      'rms_norm_eps': 1e-6,
      'attention_bias': True,
      # The last two layers see 7 tokens.
      'use_sliding_window': True,
      'sliding_window': 7,
      'max_window_layers': 1,
    }
  ),
  'gemma2': Case(
    _GEMMA
    | {'model_type': 'gemma2', 'attn_logit_softcapping': 3.0, 'final_logit_softcapping': 5.0},
    norm=0.0,
  ),
  # A row holds six windows; both kinds of layers turn, the full ones by an eighth of the angle.
  'gemma3': Case(
    _GEMMA
    | {
      'model_type': 'gemma3_text',
      'sliding_window_pattern': 2,
      'query_pre_attn_scalar': 20,
      'rope_theta': 1e5,
      'rope_local_base_freq': 1e3,
      'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
    },
    norm=0.0,
  ),
  'mixtral': Case(
    _LLAMA
    | {
      'model_type': 'mixtral',
      'tie_word_embeddings': False,
      'intermediate_size': 20,
      'num_hidden_layers': 2,
      'num_local_experts': 8,
      'num_experts_per_tok': 2,
      'router_aux_loss_coef': 0.02,
      'sliding_window': 19,
    }
  ),
  # A dense layer between those with experts, and weights that are not divided by their sum.
  'qwen3_moe': Case(
    _LLAMA
    | {
      'model_type': 'qwen3_moe',
      'tie_word_embeddings': False,
      'num_hidden_layers': 4,
      'mlp_only_layers': [1],
      'moe_intermediate_size': 12,
      'num_experts': 8,
      'num_experts_per_tok': 3,
      'norm_topk_prob': False,
      'router_aux_loss_coef': 0.05,
      'rope_theta': 1e6,
    }
  ),
  # Layers 1 and 3 do not turn, and have a window.
  'smollm3': Case(
    _LLAMA
    | {
      'model_type': 'smollm3',
      'pad_token_id': None,
      'tie_word_embeddings': True,
      'num_hidden_layers': 4,
      'no_rope_layer_interval': 2,
      'mlp_bias': True,
      'use_sliding_window': True,
      'sliding_window': 9,
    }
  ),
  'olmo2': Case(
    _LLAMA | {'model_type': 'olmo2', 'pad_token_id': None, 'tie_word_embeddings': False}
  ),
  # 48 tokens are three times the original context of the full layer, and six windows of the others.
  'olmo3': Case(
    _LLAMA
    | {
      'model_type': 'olmo3',
      'pad_token_id': None,
      'tie_word_embeddings': False,
      'num_hidden_layers': 5,
      'attention_bias': True,
      'sliding_window': 8,
      'rope_theta': 1e4,
      'rope_scaling': {
        'rope_type': 'yarn',
        'factor': 4.0,
        'original_max_position_embeddings': 16,
        'beta_fast': 4.0,
      },
    }
  ),
  'granite': Case(
    _LLAMA
    | {
      'model_type': 'granite',
      'tie_word_embeddings': True,
      'mlp_bias': True,
      'embedding_multiplier': 3.7,
      'attention_multiplier': 0.21,
      'residual_multiplier': 0.43,
      'logits_scaling': 0.6,
    }
  ),
  'granitemoehybrid': Case(
    _LLAMA
    | {
      'model_type': 'granitemoehybrid',
      'tie_word_embeddings': False,
      'layer_types': ['attention'] * 3,
      'num_local_experts': 0,
      'shared_intermediate_size': 36,
      'mamba_n_heads': 1,
      'embedding_multiplier': 3.7,
      'attention_multiplier': 0.21,
      'residual_multiplier': 0.43,
      'logits_scaling': 0.6,
    }
  ),
  # A token sees 9; 6 of 10 coordinates turn.
  'phi3': Case(
    _LLAMA
    | {
      'model_type': 'phi3',
      'tie_word_embeddings': True,
      'partial_rotary_factor': 0.6,
      'sliding_window': 9,
      'pad_token_id': None,
    }
  ),
  # Transformers' check of the factors takes a head to be hidden_size / heads. 48 tokens are three
  # times the original context.
  'phi3_longrope': Case(
    _LLAMA
    | {
      'model_type': 'phi3',
      'tie_word_embeddings': False,
      'num_hidden_layers': 2,
      'hidden_size': 48,
      'head_dim': 8,
      'pad_token_id': None,
      'partial_rotary_factor': 0.75,
      'original_max_position_embeddings': 16,
      'rope_scaling': {
        'type': 'longrope',
        'short_factor': [1.0, 1.1, 1.3],
        'long_factor': [1.2, 2.5, 6.0],
      },
    },
    short=16,
  ),
  # Layers 1 and 2 see 9 tokens.
  'qwen2_window': Case(
    _LLAMA
    | {
      'model_type': 'qwen2',
      'tie_word_embeddings': False,
      'use_sliding_window': True,
      'sliding_window': 9,
      'max_window_layers': 1,
    }
  ),
  'mistral': Case(_LLAMA | {'model_type': 'mistral', 'head_dim': 14, 'sliding_window': 9}),
  'ministral': Case(
    _LLAMA
    | {
      'model_type': 'ministral',
      'num_hidden_layers': 2,
      'sliding_window': 9,
      'layer_types': ['full_attention', 'sliding_attention'],
    }
  ),
  # 48 tokens are three times the original context: the queries have three factors.
  'ministral3': Case(
    _LLAMA
    | {
      'model_type': 'ministral3',
      'tie_word_embeddings': True,
      'head_dim': 14,
      'rope_parameters': {
        'rope_type': 'yarn',
        'rope_theta': 1000.0,
        'factor': 4.0,
        'original_max_position_embeddings': 16,
        'beta_fast': 4.0,
        'beta_slow': 1.0,
        'mscale': 1.0,
        'mscale_all_dim': 1.0,
        'llama_4_scaling_beta': 0.5,
      },
    }
  ),
  # 80 tokens are more than a chunk of 64, and the states forget slowly enough to join chunks. A
  # state that is asked for a query unlike its keys returns little, which the norm divides by: eps
  # and the scales below keep that from multiplying rounding errors.
  'qwen3_5': Case(
    {
      'model_type': 'qwen3_5_text',
      'vocab_size': 67,
      'hidden_size': 24,
      'intermediate_size': 40,
      'num_hidden_layers': 4,
      'num_attention_heads': 6,
      'num_key_value_heads': 2,
      'head_dim': 16,
      'linear_num_key_heads': 2,
      'linear_key_head_dim': 14,
      'linear_num_value_heads': 6,
      'linear_value_head_dim': 10,
      'linear_conv_kernel_dim': 4,
      'max_position_embeddings': 128,
      'rms_norm_eps': 4e-2,
      'tie_word_embeddings': True,
      'rope_parameters': {
        'rope_type': 'default',
        'rope_theta': 10000.0,
        'partial_rotary_factor': 0.25,
        'mrope_section': [1, 1, 0],
        'mrope_interleaved': True,
      },
    },
    tokens=80,
    norm=0.0,
    rules=(
      (r'dt_bias$', -3.0, 1.0),
      (r'linear_attn\.norm\.weight$', 1.0, 0.25),
      (r'linear_attn\.out_proj', 0.0, 0.1),
      (r'conv1d', 0.0, 0.6),
      (r'embed_tokens', 0.0, 1.0),
    ),
  ),
}

CASES |= {name: Case(config, head='masked') for name, config in MASKED.items()}
DECODERS = tuple(n for n, case in CASES.items() if not case.head)
ENCODERS = tuple(n for n in CASES if n not in DECODERS)

_LABELS = {'id2label': {'0': 'neutral', '1': 'up', '2': 'down'}}
_WITH_LABELS = {
  'bert': BERT,
  'distilbert': DISTILBERT,
  'roberta': ROBERTA,
  'modernbert': MODERNBERT | {'classifier_pooling': 'mean', 'num_hidden_layers': 3},
  'deberta': DEBERTA | {'num_hidden_layers': 2},
  'llama': _LLAMA | {'num_hidden_layers': 2, 'pad_token_id': 0},
  'gpt2': CASES['gpt2'].config | {'n_layer': 2, 'pad_token_id': 0},
}
# Label heads: {name: case}, compared by ../test_label_heads.py.
LABELED = {
  f'{name}_{task}': Case(config | (_LABELS if task != 'span' else {}), head=task)
  for name, config in _WITH_LABELS.items()
  for task in ('sequence', 'token', 'span')
}
