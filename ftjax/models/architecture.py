"""What a decoder is, in numbers: read from and written to a HF config.json.

A model is a list of stacks, `((pattern, repeats), ...)`: the pattern is a tuple of block kinds, and
a stack scans over its repeats. Llama-style models are one stack of one kind. Parameter names
follow: `stack{i}/block{j}/...`, each leaf with a leading axis L = repeats. Which HF tensor is which
parameter stands in hf/layout.py."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ftjax.models import config_keys as keys
from ftjax.runtime.errors import DataError

# model_type of config.json: what transformers' classes of that family begin with.
_CLASSES = {'llama': 'Llama', 'qwen2': 'Qwen2'}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """The `llama3` rule: long wavelengths slowed by `factor`, short ones kept, a ramp between."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_len: int


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Sizes and constants of a decoder. Axis letters: D model, N heads, K kv heads, H head, F ffn, V
  vocab.
  """

  family: str
  vocab_size: int
  model_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  ffn_dim: int
  norm_eps: float
  rope_theta: float
  rope_scaling: RopeScaling | None
  tied: bool
  max_len: int
  num_labels: int = 0  # 1: a reward model, which has a score in place of the vocabulary's head
  qkv_bias: bool = False  # whether the projections to queries, keys and values add a bias

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise DataError(
        f'config.json: num_attention_heads={self.num_heads} is no multiple of {self.num_kv_heads=}'
      )

  @property
  def stacks(self) -> tuple[tuple[tuple[str, ...], int], ...]:
    """((pattern of block kinds, repeats), ...)."""
    return ((('full',), self.num_layers),)

  def layer_slots(self) -> list[tuple[str, int]]:
    """Where layer l lives: (`stack{i}/block{j}`, index along that leaf's L axis)."""
    slots = []
    for i, (pattern, repeats) in enumerate(self.stacks):
      slots += [(f'stack{i}/block{j}', r) for r in range(repeats) for j in range(len(pattern))]
    return slots

  def num_params(self) -> int:
    """Parameters in all, a tied head counted once."""
    d, h = self.model_dim, self.head_dim
    layer = 2 * d + d * h * (2 * self.num_heads + 2 * self.num_kv_heads) + 3 * d * self.ffn_dim
    if self.qkv_bias:
      layer += h * (self.num_heads + 2 * self.num_kv_heads)
    tables = 1 if self.tied or self.num_labels else 2
    return self.vocab_size * d * tables + (1 + self.num_labels) * d + self.num_layers * layer

  def matmul_params(self) -> int:
    """Parameters that a token is multiplied with: blocks and head, without norms, biases and the
    embedding look-up.
    """
    d, h = self.model_dim, self.head_dim
    layer = d * h * (2 * self.num_heads + 2 * self.num_kv_heads) + 3 * d * self.ffn_dim
    return (self.num_labels or self.vocab_size) * d + self.num_layers * layer


def from_hf(config: Mapping[str, Any]) -> Architecture:
  """Reads a HF config.json (Llama 2, 3, 3.1+, SmolLM2, Qwen2, Qwen2.5) given as a dict.

  Keys that are absent or null have the default of the family's class in transformers; see
  config_keys.py, also for the keys that may stand there.

  Raises:
    DataError: another model_type, a value of another type, or a setting that this decoder does not
      compute.
  """
  family = config.get('model_type')
  if family not in _CLASSES:
    raise DataError(
      f'config.json: model_type={family!r} is not supported; supported: {", ".join(_CLASSES)}'
    )
  keys.check_unquantized(config)
  keys.check_names(config)
  defaults = keys.DEFAULTS[family]
  _check_settings(config, family)
  theta, scaling = _rope(config, defaults['rope_theta'])
  heads, dim = keys.count(config, 'num_attention_heads'), keys.count(config, 'hidden_size')
  if config.get('head_dim') is None and dim % heads:
    raise DataError(
      f'config.json: hidden_size={dim} is no multiple of num_attention_heads={heads}, and head_dim '
      'is not given'
    )
  head_dim = keys.count(config, 'head_dim', dim // heads)
  if head_dim % 2:
    raise DataError(f'config.json: head_dim={head_dim} must be even')
  return Architecture(
    family=family,
    vocab_size=keys.count(config, 'vocab_size'),
    model_dim=dim,
    num_layers=keys.count(config, 'num_hidden_layers'),
    num_heads=heads,
    num_kv_heads=keys.count(config, 'num_key_value_heads', heads),
    head_dim=head_dim,
    ffn_dim=keys.count(config, 'intermediate_size'),
    norm_eps=keys.number(config, 'rms_norm_eps', defaults['rms_norm_eps']),
    rope_theta=theta,
    rope_scaling=scaling,
    tied=keys.flag(config, 'tie_word_embeddings', defaults['tie_word_embeddings']),
    max_len=keys.count(config, 'max_position_embeddings', defaults['max_position_embeddings']),
    num_labels=_num_labels(config),
    qkv_bias=family == 'qwen2',
  )


def _check_settings(config: Mapping[str, Any], family: str):
  defaults = keys.DEFAULTS[family]
  act = defaults['hidden_act'] if config.get('hidden_act') is None else config['hidden_act']
  if act not in ('silu', 'swish'):  # two names of one function in transformers
    raise DataError(f"config.json: hidden_act={act!r} is not supported; expected 'silu'")
  # Llama's attention_bias puts a bias on the output projection too. Qwen2 has no such key: its
  # class always adds biases to q, k and v alone.
  for key in ('attention_bias', 'mlp_bias', 'use_sliding_window'):
    if (value := keys.flag(config, key, defaults[key])) != defaults[key]:
      raise DataError(
        f'config.json: {key}={value!r} is not supported for model_type={family!r}; expected '
        f'{defaults[key]!r}'
      )
  if config.get('sliding_window') is not None:
    window = keys.count(config, 'sliding_window')
    # Qwen2's class reads it only with use_sliding_window, and published configs have it. Llama's
    # class has no such key: whoever put it there may mean a window.
    longest = keys.count(config, 'max_position_embeddings', defaults['max_position_embeddings'])
    if family != 'qwen2' and 'use_sliding_window' not in config and window < longest:
      raise DataError(
        f'config.json: sliding_window={window} is not supported for model_type={family!r}: every '
        'layer attends to all positions. If the model was trained so, delete the key'
      )
  _check_layer_types(config)


def _check_layer_types(config: Mapping[str, Any]):
  types = config.get('layer_types')
  if types is None:
    return
  if not isinstance(types, list):
    raise DataError(f"config.json: layer_types={types!r}; expected a list of 'full_attention'")
  for kind in types:
    if kind != 'full_attention':
      raise DataError(
        f'config.json: layer_types has {kind!r}, which is not supported here; expected '
        "'full_attention' in every layer"
      )
  layers = keys.count(config, 'num_hidden_layers')
  if len(types) != layers:
    raise DataError(
      f'config.json: layer_types has {len(types)} entries and num_hidden_layers={layers}'
    )


_LLAMA3 = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')


def _rope(config: Mapping[str, Any], default: float) -> tuple[float, RopeScaling | None]:
  """(theta, scaling) of a config.json.

  transformers 5 writes {rope_theta, rope_type, ...} under rope_parameters; 4 wrote rope_theta
  beside rope_scaling. Where a file has several of them they must mean the same: transformers 5
  would take rope_scaling, transformers 4 does not know rope_parameters.

  Raises:
    DataError: they differ (names the keys), or a rule that is not computed here.
  """
  beside = config.get('rope_theta')
  beside = beside if beside is None else keys.number(config, 'rope_theta')
  found: dict[str, tuple[float, RopeScaling | None]] = {}
  for key in ('rope_parameters', 'rope_scaling'):
    if rule := keys.mapping(config, key):
      theta = keys.number(rule, 'rope_theta', beside or default)
      if beside is not None and theta != beside:
        raise DataError(
          f'config.json: rope_theta={beside} and {key} has rope_theta={theta}; delete the wrong one'
        )
      found[key] = theta, _scaling(key, rule, config)
  if len(found) == 2 and found['rope_parameters'] != found['rope_scaling']:
    both = ' and '.join(f'{k}={dict(config[k])}' for k in found)
    raise DataError(
      f'config.json: {both} are two different rotary embeddings; transformers 5 takes '
      'rope_scaling. Delete the one that the model was not trained with'
    )
  return next(iter(found.values()), (beside or default, None))


def _scaling(key: str, rule: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling | None:
  """The scaling rule under rope_parameters or rope_scaling; None for the plain embedding."""
  kinds = {rule[k] for k in ('rope_type', 'type') if isinstance(rule.get(k), str)}
  if len(kinds) > 1:
    raise DataError(
      f'config.json: {key} has rope_type={rule["rope_type"]!r} and type={rule["type"]!r}'
    )
  kind = next(iter(kinds), 'default')
  if kind not in ('default', 'llama3'):
    raise DataError(
      f'config.json: {key} has rope_type={kind!r}, which is not supported; supported: default, '
      'llama3'
    )
  known = ('rope_type', 'type', 'rope_theta', 'original_max_position_embeddings')
  known += _LLAMA3 if kind == 'llama3' else ()
  if other := [k for k, v in rule.items() if k not in known and not keys.is_neutral(v)]:
    raise DataError(
      f'config.json: {key} has {other[0]}={rule[other[0]]!r}, which is not computed with '
      f'rope_type={kind!r}'
    )
  if kind == 'default':
    return None
  place = {f'{key}.{k}': rule.get(k) for k in _LLAMA3}
  scaling = RopeScaling(
    factor=keys.number(place, f'{key}.factor'),
    low_freq_factor=keys.number(place, f'{key}.low_freq_factor'),
    high_freq_factor=keys.number(place, f'{key}.high_freq_factor'),
    original_len=keys.count(place, f'{key}.original_max_position_embeddings'),
  )
  if scaling.low_freq_factor >= scaling.high_freq_factor:
    raise DataError(
      f'config.json: {key} has low_freq_factor={scaling.low_freq_factor}, expected less than '
      f'high_freq_factor={scaling.high_freq_factor}'
    )
  top = config.get('original_max_position_embeddings')
  if top is not None and top != scaling.original_len:
    raise DataError(
      f'config.json: original_max_position_embeddings={top!r} and {key} has '
      f'{scaling.original_len}; delete the wrong one'
    )
  return scaling


def _num_labels(config: Mapping[str, Any]) -> int:
  classes = config.get('architectures') or []
  if not isinstance(classes, list) or not all(isinstance(a, str) for a in classes):
    raise DataError(f'config.json: architectures={classes!r}; expected a list of class names')
  if not any('ForSequenceClassification' in a for a in classes):
    return 0
  named = len(keys.mapping(config, 'id2label'))
  labels = keys.count(config, 'num_labels', named or 2)  # transformers' default
  if named and named != labels:
    raise DataError(f'config.json: num_labels={labels} and id2label has {named} entries')
  if labels != 1:
    raise DataError(
      f'config.json: a classifier of {labels} labels; only reward models, of 1, are read'
    )
  return labels


def hf_class(family: str, task: str) -> str:
  """transformers' class of a family for `ForCausalLM` or `ForSequenceClassification`."""
  return _CLASSES[family] + task


def to_hf(arch: Architecture) -> dict[str, Any]:
  """A HF config.json for an architecture that came from elsewhere (GGUF, or made on the spot)."""
  config = {
    'architectures': [hf_class(arch.family, 'ForCausalLM')],
    'model_type': arch.family,
    'vocab_size': arch.vocab_size,
    'hidden_size': arch.model_dim,
    'num_hidden_layers': arch.num_layers,
    'num_attention_heads': arch.num_heads,
    'num_key_value_heads': arch.num_kv_heads,
    'head_dim': arch.head_dim,
    'intermediate_size': arch.ffn_dim,
    'rms_norm_eps': arch.norm_eps,
    'rope_theta': arch.rope_theta,
    'hidden_act': 'silu',
    'tie_word_embeddings': arch.tied,
    'max_position_embeddings': arch.max_len,
    'initializer_range': 0.02,
  }
  if arch.family == 'qwen2':
    config['use_sliding_window'] = False
  else:
    config |= {'attention_bias': False, 'mlp_bias': False}
  if s := arch.rope_scaling:
    config['rope_scaling'] = {
      'rope_type': 'llama3',
      'factor': s.factor,
      'low_freq_factor': s.low_freq_factor,
      'high_freq_factor': s.high_freq_factor,
      'original_max_position_embeddings': s.original_len,
    }
  return config
