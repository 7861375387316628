"""The keys of a HF config.json: typed reading, the defaults of the family, and which keys may stand
there.

A key that is absent or null has the default of the family's config class in transformers. A key of
another type is an error. Every other key is one of these:

- harmless: generation settings, token ids, bookkeeping (`_HARMLESS`, `_HARMLESS_NAMES`).
- dropout: accepted, and reported by `notices`, because training here applies none.
- unknown: accepted where its value is neutral (null, false, 0, 1, empty), which is how config
  classes write "off". Otherwise a number, `true` or a list may change the computation and is
  refused by name. So is a text or an object whose name refers to the computation
  (`_COMPUTATION`); other texts and objects are notes.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from ftjax.runtime.errors import DataError

# Of LlamaConfig and Qwen2Config in transformers 5. rope_theta: `default_theta` of its rope code.
DEFAULTS: dict[str, dict[str, Any]] = {
  'llama': {
    'hidden_act': 'silu',
    'rms_norm_eps': 1e-6,
    'rope_theta': 10000.0,
    'max_position_embeddings': 2048,
    'tie_word_embeddings': False,
    'attention_bias': False,
    'mlp_bias': False,
    'use_sliding_window': False,
  },
  'qwen2': {
    'hidden_act': 'silu',
    'rms_norm_eps': 1e-6,
    'rope_theta': 10000.0,
    'max_position_embeddings': 32768,
    'tie_word_embeddings': False,
    'attention_bias': True,  # no key of its class, which always adds biases to q, k and v
    'mlp_bias': False,
    'use_sliding_window': False,
  },
}

# Read or checked by architecture.py.
_READ = {
  'model_type', 'architectures', 'id2label', 'num_labels', 'vocab_size', 'hidden_size',
  'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'head_dim',
  'intermediate_size', 'rms_norm_eps', 'rope_theta', 'rope_scaling', 'rope_parameters',
  'tie_word_embeddings', 'max_position_embeddings', 'hidden_act', 'attention_bias', 'mlp_bias',
  'use_sliding_window', 'sliding_window', 'layer_types', 'original_max_position_embeddings',
  'quantization_config', 'quantization', 'compression_config',
}  # fmt: skip

# They change no logit of these families: what transformers' base class writes, token ids,
# generation, initialization, and `pretraining_tp`, which splits a product and gives the same one.
_HARMLESS = {
  'max_window_layers', 'pretraining_tp', 'use_cache', 'initializer_range', 'torch_dtype', 'dtype',
  'transformers_version', 'auto_map', 'is_llama_config', 'bos_token_id', 'eos_token_id',
  'pad_token_id', 'sep_token_id', 'unk_token_id', 'decoder_start_token_id', 'tokenizer_class',
  'prefix', 'label2id', 'problem_type', 'task_specific_params', 'finetuning_task', 'return_dict',
  'output_hidden_states', 'output_attentions', 'output_scores', 'return_dict_in_generate',
  'output_past', 'gradient_checkpointing', 'torchscript', 'use_bfloat16', 'tf_legacy_loss',
  'chunk_size_feed_forward', 'tie_encoder_decoder', 'is_decoder',
  'use_return_dict', 'max_length', 'min_length', 'max_new_tokens', 'min_new_tokens',
  'model_max_length', 'max_seq_len', 'max_sequence_length', 'do_sample', 'early_stopping',
  'num_beams', 'num_beam_groups', 'diversity_penalty', 'temperature', 'top_k', 'top_p',
  'typical_p', 'repetition_penalty', 'length_penalty', 'no_repeat_ngram_size',
  'encoder_no_repeat_ngram_size', 'bad_words_ids', 'num_return_sequences', 'forced_bos_token_id',
  'forced_eos_token_id', 'remove_invalid_values', 'exponential_decay_length_penalty',
  'suppress_tokens', 'begin_suppress_tokens', 'attn_implementation', 'use_flash_attn',
  'use_flash_attention', 'use_flash_attention_2',
}  # fmt: skip
_HARMLESS_NAMES = re.compile(r'_.*|.*version|unsloth.*|transformers[._].*|.*_token_id')

_DROPOUT = re.compile(r'.*dropout(_(prob|rate|p))?|.*_pdrop|.*drop_rate|layer_?drop')

_COMPUTATION = re.compile(
  r'act(ivation)?|hidden_act.*|attn|attention|rope|rotary|position|pos|norm|mlp|ffn|mask|window'
  r'|quant.*|bits|compress.*|moe|expert.*|router|vision|audio|text_config|encoder|adapter|lora|peft'
  r'|embed.*|heads?|pruned|logits?|softcap.*|scal(e|ing)|mixer|ssm|layers?|residual'
)


def is_neutral(value: Any) -> bool:
  """Whether a value means "off" in a config class: null, false, 0, 1, or empty."""
  return value is None or value is False or (value is not True and value in (0, 1, '', [], {}))


def _kind(value: Any) -> str:
  names = {
    str: 'text',
    bool: 'true or false',
    list: 'a list',
    dict: 'an object',
    type(None): 'null',
  }
  return names.get(type(value), f'a {type(value).__name__}')


def _wrong(key: str, value: Any, expected: str) -> DataError:
  return DataError(f'config.json: {key}={value!r} is {_kind(value)}; expected {expected}')


def count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
  """Returns a positive whole number; `default` where it is absent or null.

  Raises:
    DataError: another type or sign, or absent without a default.
  """
  value = config.get(key)
  value = default if value is None else value
  if value is None:
    raise DataError(f'config.json: {key} is missing or null; expected a positive whole number')
  if not isinstance(value, int) or isinstance(value, bool):
    raise _wrong(key, value, 'a positive whole number')
  if value < 1:
    raise DataError(f'config.json: {key}={value}; expected a positive whole number')
  return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
  """Returns a positive finite number; `default` where it is absent or null. Raises as `count`."""
  value = config.get(key)
  value = default if value is None else value
  if value is None:
    raise DataError(f'config.json: {key} is missing or null; expected a positive number')
  if not isinstance(value, int | float) or isinstance(value, bool):
    raise _wrong(key, value, 'a positive number')
  if not 0 < value < math.inf:
    raise DataError(f'config.json: {key}={value}; expected a positive finite number')
  return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
  """Returns true or false; `default` where it is absent or null. Raises DataError for others."""
  value = config.get(key)
  value = default if value is None else value
  if not isinstance(value, bool):
    raise _wrong(key, value, 'true or false')
  return value


def mapping(config: Mapping[str, Any], key: str) -> dict[str, Any]:
  """Returns an object, {} where it is absent or null. Raises DataError for another type."""
  value = config.get(key)
  if value is not None and not isinstance(value, Mapping):
    raise _wrong(key, value, 'an object')
  return dict(value or {})


def check_unquantized(config: Mapping[str, Any]) -> None:
  """Raises DataError where a config.json says that the weights are quantized."""
  for key in ('quantization_config', 'quantization', 'compression_config'):
    if not (value := config.get(key)):
      continue
    method = value.get('quant_method') if isinstance(value, Mapping) else None
    method = f' (quant_method={method!r})' if method else ''
    raise DataError(
      f'config.json: {key}{method} says that the weights are quantized; such weights are neither '
      'trained nor exported here. Take the folder of the unquantized model; or dequantize it once, '
      'where torch is installed: AutoModelForCausalLM.from_pretrained(SRC).dequantize()'
      f'.save_pretrained(DIR). If the weights are not quantized, delete {key}'
    )


def check_names(config: Mapping[str, Any]) -> None:
  """Refuses keys that may change the computation and that nothing here reads. See above.

  Raises:
    DataError: names the keys.
  """
  unknown = []
  for key, value in config.items():
    if key in _READ or key in _HARMLESS or _HARMLESS_NAMES.fullmatch(key) or is_neutral(value):
      continue
    if _DROPOUT.fullmatch(key):
      _dropout(key, value)
      continue
    words = re.split(r'[_.\- ]', key)
    note = isinstance(value, str | Mapping) and not any(map(_COMPUTATION.fullmatch, words))
    if not note:
      unknown.append(f'{key}={_short(value)}')
  if unknown:
    more = f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''
    raise DataError(
      f'config.json: {", ".join(unknown[:5])}{more}: not known here, and it may change what the '
      'model computes. If it does not, delete it from config.json; if it does, this model is not '
      'supported'
    )


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


def _dropout(key: str, value: Any) -> float:
  if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
    raise DataError(f'config.json: {key}={value!r}; expected a number from 0 to below 1')
  return float(value)


def notices(config: Mapping[str, Any]) -> list[str]:
  """Returns what a user should know of a config.json that is accepted, a line each."""
  found = {k: v for k, v in config.items() if _DROPOUT.fullmatch(k) and not is_neutral(v)}
  out = [
    f'config.json: {key}={value} is not applied: training here uses no dropout'
    for key, value in found.items()
    if _dropout(key, value) > 0
  ]
  own = config.get('auto_map')
  if isinstance(own, Mapping) and any('Model' in str(name) for name in own):
    out.append(
      f'config.json: auto_map names code of its own ({_short(dict(own))}), which is never run '
      f'here: the model is computed as model_type={config.get("model_type")!r}'
    )
  return out
