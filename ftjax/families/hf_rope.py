"""Reads and writes the rotary embedding of a HF config.json.

transformers 5 writes {rope_theta, rope_type, ...} under rope_parameters; 4 wrote rope_theta with
rope_scaling. Where a file has several of them they must mean the same: transformers 5 would take
rope_scaling, transformers 4 does not know rope_parameters.
"""

from collections.abc import Mapping
from typing import Any

from ftjax.families.hf_config import HfConfig, class_defaults, is_neutral
from ftjax.models.architecture import Rope, RopeScaling
from ftjax.runtime.errors import DataError

KEYS = frozenset(
  ('rope_theta', 'rope_scaling', 'rope_parameters', 'original_max_position_embeddings')
)
_LLAMA3 = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')


def read(c: HfConfig) -> Rope:
  """Returns the rotary embedding of all layers.

  Raises:
    DataError: two keys differ (names the keys), or a rule that is not computed here.
  """
  top = None if c.get('rope_theta') is None else c.number('rope_theta')
  found: dict[str, Rope] = {}
  for key in ('rope_parameters', 'rope_scaling'):
    if rule := c.mapping(key):
      theta = top if rule.get('rope_theta') is None else HfConfig(rule).number('rope_theta')
      theta = _class_theta(c) if theta is None else theta
      if top is not None and theta != top:
        raise DataError(
          f'config.json: rope_theta={top} and {key} has rope_theta={theta}; delete the wrong one'
        )
      found[key] = Rope(theta, _scaling(key, rule, c))
  if len(found) == 2 and found['rope_parameters'] != found['rope_scaling']:
    both = ' and '.join(f'{k}={dict(c.mapping(k))}' for k in found)
    raise DataError(
      f'config.json: {both} are two different rotary embeddings; transformers 5 takes '
      'rope_scaling. Delete the one that the model was not trained with'
    )
  if found:
    return next(iter(found.values()))
  return Rope(_class_theta(c) if top is None else top)


def _class_theta(c: HfConfig) -> float:
  """Returns the base of transformers' config class of this model_type."""
  rule = class_defaults(str(c.model_type)).get('rope_parameters') or {}
  return HfConfig({'rope_theta': rule.get('rope_theta')}).number('rope_theta')


def _scaling(key: str, rule: Mapping[str, Any], c: HfConfig) -> RopeScaling | None:
  """Returns the scaling rule under `key`; None for the plain embedding."""
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
  if other := [k for k, v in rule.items() if k not in known and not is_neutral(v)]:
    raise DataError(
      f'config.json: {key} has {other[0]}={rule[other[0]]!r}, which is not computed with '
      f'rope_type={kind!r}'
    )
  if kind == 'default':
    return None
  place = HfConfig({f'{key}.{k}': rule.get(k) for k in _LLAMA3})
  scaling = RopeScaling(
    factor=place.number(f'{key}.factor'),
    low_freq_factor=place.number(f'{key}.low_freq_factor'),
    high_freq_factor=place.number(f'{key}.high_freq_factor'),
    original_len=place.count(f'{key}.original_max_position_embeddings'),
  )
  if scaling.low_freq_factor >= scaling.high_freq_factor:
    raise DataError(
      f'config.json: {key} has low_freq_factor={scaling.low_freq_factor}, expected less than '
      f'high_freq_factor={scaling.high_freq_factor}'
    )
  top = c.get('original_max_position_embeddings')
  if top is not None and top != scaling.original_len:
    raise DataError(
      f'config.json: original_max_position_embeddings={top!r} and {key} has '
      f'{scaling.original_len}; delete the wrong one'
    )
  return scaling


def write(scaling: RopeScaling) -> dict[str, Any]:
  """Returns the value of rope_scaling."""
  return {
    'rope_type': 'llama3',
    'factor': scaling.factor,
    'low_freq_factor': scaling.low_freq_factor,
    'high_freq_factor': scaling.high_freq_factor,
    'original_max_position_embeddings': scaling.original_len,
  }
