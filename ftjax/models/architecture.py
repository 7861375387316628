"""What a decoder is, in numbers: read from and written to a HF config.json.

A model is a list of stacks, `((pattern, repeats), ...)`: the pattern is a tuple of block kinds, and
a stack scans over its repeats. Llama-style models are one stack of one kind. Parameter names
follow: `stack{i}/block{j}/...`, each leaf with a leading axis L = repeats. Which HF tensor is which
parameter stands in hf/names.py."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

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


def _want(config: Mapping[str, Any], key: str, *allowed, default=None):
  value = config.get(key, default)
  if value not in allowed:
    raise DataError(
      f'config.json: {key}={value!r} is not supported here; expected one of {allowed}'
    )


def _need(config: Mapping[str, Any], key: str):
  if config.get(key) is None:
    raise DataError(f'config.json: {key} is missing or null')
  return config[key]


def from_hf(config: Mapping[str, Any]) -> Architecture:
  """Reads a HF config.json (Llama 2, 3, 3.1+, SmolLM2, Qwen2, Qwen2.5) given as a dict.

  Raises:
    DataError: another model_type, or a setting that this decoder does not compute.
  """
  family = config.get('model_type')
  if family not in _CLASSES:
    raise DataError(
      f'config.json: model_type={family!r} is not supported; supported: {", ".join(_CLASSES)}'
    )
  _check_settings(config, family)
  # transformers 5 writes {rope_theta, rope_type, ...} under rope_parameters; 4 wrote rope_theta
  # beside rope_scaling.
  rope = dict(config.get('rope_parameters') or config.get('rope_scaling') or {})
  rope_type = rope.get('rope_type', rope.get('type', 'default'))
  if rope_type == 'llama3':
    scaling = RopeScaling(
      factor=float(_need(rope, 'factor')),
      low_freq_factor=float(_need(rope, 'low_freq_factor')),
      high_freq_factor=float(_need(rope, 'high_freq_factor')),
      original_len=int(_need(rope, 'original_max_position_embeddings')),
    )
  elif rope_type == 'default':
    scaling = None
  else:
    raise DataError(
      f'config.json: rope_type={rope_type!r} is not supported; supported: default, llama3'
    )
  theta = rope.get('rope_theta', config.get('rope_theta', 10000.0))
  heads, dim = _need(config, 'num_attention_heads'), _need(config, 'hidden_size')
  head_dim = config.get('head_dim') or dim // heads
  if head_dim % 2 or not math.isfinite(theta):
    raise DataError(f'config.json: head_dim={head_dim} must be even and rope_theta={theta} finite')
  return Architecture(
    family=family,
    vocab_size=_need(config, 'vocab_size'),
    model_dim=dim,
    num_layers=_need(config, 'num_hidden_layers'),
    num_heads=heads,
    num_kv_heads=config.get('num_key_value_heads') or heads,
    head_dim=head_dim,
    ffn_dim=_need(config, 'intermediate_size'),
    norm_eps=config.get('rms_norm_eps', 1e-6),
    rope_theta=float(theta),
    rope_scaling=scaling,
    tied=bool(config.get('tie_word_embeddings', False)),
    max_len=config.get('max_position_embeddings', 2048),
    num_labels=_num_labels(config),
    qkv_bias=family == 'qwen2',
  )


def _check_settings(config: Mapping[str, Any], family: str):
  _want(config, 'hidden_act', 'silu', default='silu')
  # Llama's flag puts a bias on the output projection too. Qwen2 has no flag: its class always adds
  # biases to q, k and v alone.
  _want(config, 'attention_bias', *((True, None) if family == 'qwen2' else (False, None)))
  _want(config, 'mlp_bias', False, None)
  _want(config, 'pretraining_tp', 1, None, default=1)
  # Without it `sliding_window` and `max_window_layers` mean nothing, and published configs have
  # them.
  _want(config, 'use_sliding_window', False, None)
  for kind in config.get('layer_types') or ():
    if kind != 'full_attention':
      raise DataError(
        f'config.json: layer_types has {kind!r}, which is not supported here; expected '
        "'full_attention' in every layer"
      )


def _num_labels(config: Mapping[str, Any]) -> int:
  if not any('ForSequenceClassification' in a for a in config.get('architectures') or ()):
    return 0
  labels = len(config.get('id2label') or {}) or config.get('num_labels', 2)  # transformers' default
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
