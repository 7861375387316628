"""Reads a HF config.json: typed values, the defaults of transformers' class, and which keys may be
in it.

A key of another type is an error. A key that the family does not read is one of these:

- harmless: generation settings, token ids, bookkeeping (`_HARMLESS`, `_HARMLESS_NAMES`).
- dropout: accepted; in an encoder the default of model.dropout (families/dropout.py), else reported
  by `notices`.
- unknown: accepted where its value is neutral (null, false, 0, 1, empty), which is how config
  classes write "off". Otherwise a number, `true` or a list may change the computation and is
  refused by name. So is a text or an object whose name refers to the computation
  (`_COMPUTATION`); other texts and objects are notes.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from ftjax.runtime import transformers_library
from ftjax.runtime.errors import DataError

# Keys that this file checks for every family.
_READ = {
  'model_type', 'architectures', 'id2label', 'num_labels', 'quantization_config', 'quantization',
  'compression_config',
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
# Keys that transformers reads of every family, and the one value that is computed here: of
# is_causal null and false let a token see those after it; transformers_weights names the file.
_FIXED = {'is_causal': True, 'transformers_weights': None}

# Far more layers than models have: finding out which are alike takes the square of their number.
MOST_LAYERS = 500
# The largest numbers. Arrays here have indices of 32 bits.
_MOST = {'num_hidden_layers': MOST_LAYERS, 'n_layer': MOST_LAYERS}
_MOST_OF_ALL = 2**31 - 1

_DROPOUT = re.compile(
  r'.*dropout(_(prob|rate|p))?|.*_pdrop|.*drop_rate|layer_?drop|router_jitter_noise'
)

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


@functools.cache
def class_defaults(model_type: str, **given: int) -> Mapping[str, Any]:
  """Returns the keys and defaults of transformers' config class; {} where it has no such class.

  Some defaults follow from the keys that are `given`. The first call imports transformers' config
  classes, which takes about a second and no torch.
  """
  classes = transformers_library.load('CONFIG_MAPPING').CONFIG_MAPPING
  return classes[model_type](**given).to_dict() if model_type in classes else {}


class HfConfig:
  """A config.json with typed values.

  A key that is absent or null has the `default` of the call; without one it is required. With
  `of_class` it has the default of transformers' config class of its model_type, which is imported
  only then.
  """

  def __init__(self, content: Mapping[str, Any]):
    self.content = content
    self.model_type = content.get('model_type')

  def get(self, key: str) -> Any:
    """Returns the value of a key as it is; None where it is absent."""
    return self.content.get(key)

  def _value(self, key: str, default: Any, of_class: bool, expected: str) -> Any:
    value = self.get(key)
    if value is None and of_class:
      default = class_defaults(str(self.model_type)).get(key)
    value = default if value is None else value
    if value is None:
      raise DataError(f'config.json: {key} is missing or null; expected {expected}')
    return value

  def count(
    self, key: str, default: int | None = None, *, of_class: bool = False, least: int = 1
  ) -> int:
    """Returns a whole number of at least `least`.

    Raises:
      DataError: another type or sign, too large, or absent without a default.
    """
    expected = 'a positive whole number' if least else 'a whole number from 0 on'
    value = self._value(key, default, of_class, expected)
    if not isinstance(value, int) or isinstance(value, bool):
      raise _wrong(key, value, expected)
    if value < least:
      raise DataError(f'config.json: {key}={value}; expected {expected}')
    if value > (most := _MOST.get(key, _MOST_OF_ALL)):
      raise DataError(f'config.json: {key}={value}; expected at most {most}')
    return value

  def size(self, key: str) -> int:
    """Returns a count; that of transformers' config class where the key is absent. Raises as
    `count`, also for null, which is no size.
    """
    return self.count(key, of_class=key not in self.content)

  def number(
    self, key: str, default: float | None = None, *, of_class: bool = False, or_zero: bool = False
  ) -> float:
    """Returns a positive finite number; with `or_zero` also 0. Raises as `count`."""
    expected = 'a positive number' + ' or 0' * or_zero
    value = self._value(key, default, of_class, expected)
    if not isinstance(value, int | float) or isinstance(value, bool):
      raise _wrong(key, value, expected)
    if not 0 < value < math.inf and not (or_zero and value == 0):
      raise DataError(f'config.json: {key}={value}; expected {expected}, and finite')
    return float(value)

  def flag(self, key: str, default: bool | None = None, *, of_class: bool = False) -> bool:
    """Returns true or false. Raises as `count`."""
    value = self._value(key, default, of_class, 'true or false')
    if not isinstance(value, bool):
      raise _wrong(key, value, 'true or false')
    return value

  def text(self, key: str, default: str | None = None, *, of_class: bool = False) -> Any:
    """Returns a value that is compared with known texts, whatever its type."""
    return self._value(key, default, of_class, 'a text')

  def mapping(self, key: str) -> dict[str, Any]:
    """Returns an object, {} where it is absent or null. Raises DataError for another type."""
    value = self.get(key)
    if value is not None and not isinstance(value, Mapping):
      raise _wrong(key, value, 'an object')
    return dict(value or {})


def check_unquantized(config: Mapping[str, Any]) -> None:
  """Raises DataError where a config.json declares quantized weights."""
  for key in ('quantization_config', 'quantization', 'compression_config'):
    if not (value := config.get(key)):
      continue
    method = value.get('quant_method') if isinstance(value, Mapping) else None
    method = f' (quant_method={method!r})' if method else ''
    raise DataError(
      f'config.json: {key}{method}: the weights are quantized; such weights are neither '
      'trained nor exported here. Take the folder of the unquantized model; or dequantize it once, '
      'where torch is installed: AutoModelForCausalLM.from_pretrained(SRC).dequantize()'
      f'.save_pretrained(DIR). If the weights are not quantized, delete {key}'
    )


def check_names(config: Mapping[str, Any], read: frozenset[str]) -> None:
  """Refuses keys that may change the computation and that nothing reads; see above.

  Args:
    config: a config.json.
    read: the keys that the family reads or checks.

  Raises:
    DataError: names the keys.
  """
  unknown = []
  for key, value in config.items():
    if key in _FIXED:
      unknown += [f'{key}={_short(value)}'] * (value is not _FIXED[key])
      continue
    if key in read or key in _READ or key in _HARMLESS or is_neutral(value):
      continue
    if _HARMLESS_NAMES.fullmatch(key):
      continue
    if _DROPOUT.fullmatch(key):
      dropout_rate(key, value)
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


# Of a key, by whether it is one of routers.
_NOT_APPLIED = (
  'is not applied to a decoder: set model.dropout to train with dropout',
  'is not applied: training here uses no noise of routers',
)


def dropout_rate(key: str, value: Any) -> float:
  """Returns the value of a key that is a rate of dropout.

  Raises:
    DataError: it is no number from 0 to below 1.
  """
  if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
    raise DataError(f'config.json: {key}={value!r}; expected a number from 0 to below 1')
  return float(value)


def notices(config: Mapping[str, Any], is_encoder: bool = False) -> list[str]:
  """Returns a line for each setting of an accepted config.json that is read and not applied.

  is_encoder: whether its dropout is the default of model.dropout.
  """
  found = {k: v for k, v in config.items() if _DROPOUT.fullmatch(k) and not is_neutral(v)}
  out = [
    f'config.json: {key}={value} {_NOT_APPLIED["jitter" in key]}'
    for key, value in found.items()
    if dropout_rate(key, value) > 0 and not is_encoder
  ]
  window, longest = config.get('sliding_window'), config.get('max_position_embeddings')
  if (
    config.get('model_type') == 'llama'
    and isinstance(window, int)
    and config.get('use_sliding_window') is not False
    and window < (longest or math.inf)
  ):
    out.append(
      f'config.json: sliding_window={window} is computed here; transformers computes llama without '
      "a window: for the same results there the exported folder needs model_type='mistral'"
    )
  own = config.get('auto_map')
  if isinstance(own, Mapping) and any('Model' in str(name) for name in own):
    out.append(
      f'config.json: auto_map names code of its own ({_short(dict(own))}), which is never run '
      f'here: the model is computed as model_type={config.get("model_type")!r}'
    )
  return out
