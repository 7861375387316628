"""One rule of a rotary embedding, an object with a rope_type, and the scaling that it stands for.

What a rule leaves out has the value that transformers derives (modeling_rope_utils.py).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ftjax.families.hf_config import HfConfig, class_defaults
from ftjax.models.rope_spec import (
  DynamicScaling,
  LinearScaling,
  LongScaling,
  ProportionalScaling,
  RopeScaling,
  Scaling,
  YarnScaling,
)
from ftjax.runtime.errors import DataError

ORIGINAL, PARTIAL = 'original_max_position_embeddings', 'partial_rotary_factor'
BETA = 'llama_4_scaling_beta'
# rope_type -> the keys that its rule reads, beside those of all rules.
KEYS: dict[str, tuple[str, ...]] = {
  'default': (),
  'linear': ('factor',),
  'dynamic': ('factor',),
  'llama3': ('factor', 'low_freq_factor', 'high_freq_factor'),
  'yarn': (
    *('factor', 'attention_factor', 'beta_fast', 'beta_slow'),
    *('mscale', 'mscale_all_dim', 'truncate'),
  ),
  'longrope': ('short_factor', 'long_factor', 'factor', 'attention_factor'),
  'proportional': ('factor',),
}
KEYS_OF_ALL = ('rope_type', 'type', 'rope_theta', ORIGINAL, PARTIAL)
_BETA_FAST, _BETA_SLOW = 32.0, 1.0
_BASE_THETA = 10000.0  # RotaryEmbeddingConfigMixin.default_theta
_OLD_NAMES = {'su': 'longrope'}  # of the first Phi-3 files


@dataclasses.dataclass(frozen=True)
class Reading:
  """What a family's attention computes beyond the frequencies.

  partial: it rotates the first partial_rotary_factor of the head. scaled_queries: it multiplies
  queries by a factor from llama_4_scaling_beta. ignored: keys of a rule that change nothing.
  """

  partial: bool = False
  scaled_queries: bool = False
  ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rule:
  """An object with a rope_type.

  place: names it in messages. c: the config.json around it. layer_type: whose rule it is; '': that
  of all layers. theta_key: top-level key with the base, which the rule may repeat; '': none.
  """

  place: str
  content: Mapping[str, Any]
  c: HfConfig
  reading: Reading
  layer_type: str = ''
  theta_key: str = 'rope_theta'

  def name(self, key: str) -> str:
    return f'{self.place}.{key}'

  def given(self, key: str) -> bool:
    return self.content.get(key) is not None

  def number(self, key: str, default: float | None = None) -> float:
    return HfConfig({self.name(key): self.content.get(key)}).number(self.name(key), default)

  def optional(self, key: str) -> float | None:
    """Returns a number; None where it is absent, null or 0, which transformers takes alike."""
    value = self.content.get(key)
    return None if value is None or (value == 0 and value is not False) else self.number(key)

  def numbers(self, key: str) -> tuple[float, ...]:
    found = self.content.get(key)
    if not isinstance(found, list | tuple) or not found:
      raise DataError(f'config.json: {self.name(key)}={found!r}; expected a list of numbers')
    name = f'an entry of {self.name(key)}'
    return tuple(HfConfig({name: x}).number(name) for x in found)

  def max_len(self) -> int:
    return self.c.count('max_position_embeddings', of_class=True)

  def default(self, key: str) -> Any:
    """Returns the default of transformers' class for a key of the rule; None where it has none."""
    if key == 'rope_theta' and self.reading.scaled_queries:
      return _BASE_THETA  # that of Ministral 3's own rule is for files without a rule
    return class_rule(self.c, self.layer_type).get(key)


def class_rule(c: HfConfig, kind: str = '') -> Mapping[str, Any]:
  """Returns the rope_parameters of transformers' config class of this model_type, or those of one
  layer type.
  """
  rule = class_defaults(str(c.model_type)).get('rope_parameters') or {}
  return (rule.get(kind) or {}) if kind else rule


def kind_of(content: Mapping[str, Any], place: str = 'rope_parameters') -> str:
  """Returns the rope_type of a rule."""
  given = {k: content[k] for k in ('rope_type', 'type') if content.get(k) is not None}
  if len(set(map(str, given.values()))) > 1:
    raise DataError(
      f'config.json: {place} has rope_type={content["rope_type"]!r} and type={content["type"]!r}'
    )
  kind = next(iter(given.values()), 'default')
  kind = _OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind
  if not isinstance(kind, str) or kind not in KEYS:
    raise DataError(
      f'config.json: {place} has rope_type={kind!r}, which is not supported; supported: '
      f'{", ".join(KEYS)}'
    )
  return kind


def original_len(rule: Rule, kind: str) -> int:
  """Returns original_max_position_embeddings, of the rule or beside it; else the length that the
  model is made for.
  """
  top, own = rule.c.get(ORIGINAL), rule.content.get(ORIGINAL)
  if top is None and kind == 'longrope':
    # Phi-3's class has a default, which transformers prefers to the rule's own number.
    top = class_defaults(str(rule.c.model_type)).get(ORIGINAL)
  if top is not None and own is not None and top != own:
    raise DataError(
      f'config.json: {ORIGINAL}={top!r} and {rule.place} has {own!r}; delete the wrong one'
    )
  name = rule.name(ORIGINAL)
  return HfConfig({name: top if own is None else own}).count(name, rule.max_len())


def scaling(rule: Rule, kind: str) -> Scaling | None:
  if kind == 'linear':
    return LinearScaling(rule.number('factor'))
  if kind == 'dynamic':
    original = original_len(rule, kind)
    if original != rule.max_len():
      raise DataError(
        f'config.json: {ORIGINAL}={original} is not read with rope_type={kind!r}: transformers '
        f'scales beyond max_position_embeddings={rule.max_len()}; set both alike'
      )
    return DynamicScaling(rule.number('factor'), original)
  if kind == 'llama3':
    return _llama3(rule)
  if kind == 'yarn':
    return _yarn(rule)
  if kind == 'longrope':
    return _longrope(rule)
  return ProportionalScaling(rule.number('factor', 1.0)) if kind == 'proportional' else None


def _llama3(rule: Rule) -> RopeScaling:
  scaling = RopeScaling(
    factor=rule.number('factor'),
    low_freq_factor=rule.number('low_freq_factor'),
    high_freq_factor=rule.number('high_freq_factor'),
    original_len=original_len(rule, 'llama3'),
  )
  if scaling.low_freq_factor >= scaling.high_freq_factor:
    raise DataError(
      f'config.json: {rule.place} has low_freq_factor={scaling.low_freq_factor}, expected less '
      f'than high_freq_factor={scaling.high_freq_factor}'
    )
  return scaling


def _yarn(rule: Rule) -> YarnScaling:
  original = original_len(rule, 'yarn')
  factor = rule.number('factor', rule.max_len() / original)
  fast, slow = rule.optional('beta_fast') or _BETA_FAST, rule.optional('beta_slow') or _BETA_SLOW
  if fast < slow:
    raise DataError(f'config.json: {rule.place} has beta_fast={fast}, less than beta_slow={slow}')
  truncate = HfConfig({rule.name('truncate'): rule.content.get('truncate')})
  return YarnScaling(
    factor=factor,
    original_len=original,
    attention_factor=_yarn_attention(rule, factor),
    beta_fast=fast,
    beta_slow=slow,
    truncate=truncate.flag(rule.name('truncate'), True),
  )


def _yarn_attention(rule: Rule, factor: float) -> float:
  """Returns attention_factor, or what follows from DeepSeek's two mscale numbers."""
  if rule.given('attention_factor'):
    return rule.number('attention_factor')
  up, down = rule.optional('mscale'), rule.optional('mscale_all_dim')
  if up and down:
    return _yarn_magnitude(factor, up) / _yarn_magnitude(factor, down)
  return _yarn_magnitude(factor, 1.0)


def _yarn_magnitude(factor: float, mscale: float) -> float:
  """Equation 22 of Peng et al. 2023, where mscale is 1."""
  return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(rule: Rule) -> LongScaling:
  original = original_len(rule, 'longrope')
  factor = rule.number('factor', rule.max_len() / original)
  attention = rule.number('attention_factor', long_attention(factor, original))
  return LongScaling(rule.numbers('short_factor'), rule.numbers('long_factor'), original, attention)


def long_attention(factor: float, original: int) -> float:
  """Returns the attention factor of a longrope rule that states none (Ding et al. 2024)."""
  return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def content(scaling: Scaling | None, max_len: int) -> dict[str, Any]:
  if scaling is None:
    return {}
  if isinstance(scaling, LinearScaling):
    return {'rope_type': 'linear', 'factor': scaling.factor}
  if isinstance(scaling, DynamicScaling):
    if scaling.original_len != max_len:
      raise DataError(f'{scaling}: a config.json has it where it equals {max_len=}')
    return {'rope_type': 'dynamic', 'factor': scaling.factor}
  if isinstance(scaling, ProportionalScaling):
    return {'rope_type': 'proportional', 'factor': scaling.factor}
  if isinstance(scaling, RopeScaling):
    return {
      'rope_type': 'llama3',
      'factor': scaling.factor,
      'low_freq_factor': scaling.low_freq_factor,
      'high_freq_factor': scaling.high_freq_factor,
      ORIGINAL: scaling.original_len,
    }
  if isinstance(scaling, YarnScaling):
    out = {'rope_type': 'yarn', 'factor': scaling.factor, ORIGINAL: scaling.original_len}
    stated = {
      'attention_factor': (scaling.attention_factor, _yarn_magnitude(scaling.factor, 1.0)),
      'beta_fast': (scaling.beta_fast, _BETA_FAST),
      'beta_slow': (scaling.beta_slow, _BETA_SLOW),
      'truncate': (scaling.truncate, True),
    }
    return out | {key: value for key, (value, default) in stated.items() if value != default}
  factors = {
    'short_factor': list(scaling.short_factors),
    'long_factor': list(scaling.long_factors),
  }
  derived = long_attention(max_len / scaling.original_len, scaling.original_len)
  if scaling.attention_factor == derived:
    return {'type': 'longrope'} | factors  # transformers 4's Phi-3 takes these three keys alone
  more = {ORIGINAL: scaling.original_len, 'attention_factor': scaling.attention_factor}
  return {'rope_type': 'longrope'} | factors | more
