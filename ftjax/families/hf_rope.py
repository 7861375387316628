"""Reads and writes the rotary embeddings of a HF config.json.

transformers 5 writes {rope_theta, rope_type, ...} under rope_parameters, or such an object for each
layer type; 4 wrote rope_theta with rope_scaling. Where a file has several of them they must mean
the same: transformers 5 would take rope_scaling, transformers 4 does not know rope_parameters.
"""

from collections.abc import Mapping
from typing import Any

from ftjax.families import rope_rule
from ftjax.families.hf_config import HfConfig, is_neutral
from ftjax.families.layer_types import FULL, SLIDING
from ftjax.families.rope_rule import BETA, ORIGINAL, PARTIAL, Reading, Rule, class_rule
from ftjax.models.rope_spec import (
  DynamicScaling,
  LongScaling,
  QueryScaling,
  Rope,
  RopeScaling,
  YarnScaling,
)
from ftjax.runtime.errors import DataError

# A family with a second base for its sliding layers has one more, such as rope_local_base_freq.
KEYS = frozenset(('rope_theta', 'rope_scaling', 'rope_parameters', ORIGINAL, PARTIAL))


def read(c: HfConfig, reading: Reading = Reading()) -> Rope:  # noqa: B008 - frozen
  """Returns the rotary embedding of all layers.

  Raises:
    DataError: two keys differ (names the keys), or a rule that is not computed here.
  """
  found: dict[str, Rope] = {}
  for key in ('rope_parameters', 'rope_scaling'):
    if content := c.mapping(key):
      found[key] = _rope(Rule(key, content, c, reading))
  if len(found) == 2 and found['rope_parameters'] != found['rope_scaling']:
    both = ' and '.join(f'{k}={dict(c.mapping(k))}' for k in found)
    raise DataError(
      f'config.json: {both} are two different rotary embeddings; transformers 5 takes '
      'rope_scaling. Delete the one that the model was not trained with'
    )
  if found:
    return next(iter(found.values()))
  # The class that scales queries has a whole rule as its default (Ministral 3).
  content = class_rule(c) if reading.scaled_queries else {}
  return _rope(Rule('rope_parameters', content, c, reading))


def read_by_layer_type(
  c: HfConfig,
  local_theta: str,
  reading: Reading = Reading(),  # noqa: B008 - frozen
) -> dict[str, Rope]:
  """Returns the rotary embeddings of full and of sliding layers: {layer type: Rope}.

  rope_parameters has an object for each type. Of the old keys, rope_theta and rope_scaling are
  those of full layers, and sliding ones turn without scaling.

  Args:
    c: the config.json.
    local_theta: the old key with the base of sliding layers: 'rope_local_base_freq' (Gemma 3),
      'rope_theta' (OLMo 3); '': none.
    reading: what the family computes.

  Raises:
    DataError: as `read`.
  """
  new, old = c.mapping('rope_parameters'), c.mapping('rope_scaling')
  if other := [k for k in new if k not in (FULL, SLIDING) and not is_neutral(new[k])]:
    raise DataError(
      f'config.json: rope_parameters has {other[0]}={new[other[0]]!r}; for '
      f'model_type={c.model_type!r} it has an object for each of {FULL}, {SLIDING}'
    )
  stated = [k for k in ('rope_theta', 'rope_scaling', local_theta) if c.get(k) is not None]
  if stated and not (local_theta or new):
    raise DataError(
      f'config.json: {stated[0]} is not read for model_type={c.model_type!r}, which has '
      'rope_parameters'
    )
  out: dict[str, Rope] = {}
  for kind, theta in ((FULL, 'rope_theta'), (SLIDING, local_theta)):
    place = f'rope_parameters.{kind}'
    content = HfConfig({place: new.get(kind)}).mapping(place)
    content = content if new or stated else class_rule(c, kind)
    rule = Rule(place, content, c, reading, kind, theta)
    if kind == SLIDING and local_theta == 'rope_theta':
      _check_one_theta(rule)
    out[kind] = _rope(rule)
  if old:
    full = _rope(Rule('rope_scaling', old, c, reading, FULL))
    if new.get(FULL) and full != out[FULL]:
      raise DataError(
        f'config.json: rope_scaling={old} and rope_parameters.{FULL}={new[FULL]} are two different '
        'rotary embeddings; delete the one that the model was not trained with'
      )
    out[FULL] = full
  _check_truncates(out)
  return out


def _check_one_theta(rule: Rule) -> None:
  """Refuses a rope_theta that transformers 5 gives to full layers alone, and 4 to all."""
  top = rule.c.get('rope_theta')
  if top is not None and not rule.given('rope_theta') and top != rule.default('rope_theta'):
    raise DataError(
      f'config.json: rope_theta={top!r} is that of all layers in transformers 4, and of full '
      f'layers alone in 5; state {rule.name("rope_theta")}'
    )


def _check_truncates(ropes: Mapping[str, Rope]) -> None:
  for kind, rope in ropes.items():
    if isinstance(rope.scaling, YarnScaling) and not rope.scaling.truncate:
      raise DataError(
        f'config.json: truncate=False in the rule of {kind}: transformers 5 does not read it there '
        'and truncates; set it to true if the model was trained so'
      )


def _rope(rule: Rule) -> Rope:
  """Returns the embedding of a rule. Raises DataError for a key that it does not read."""
  kind = rope_rule.kind_of(rule.content, rule.place)
  known = (*rope_rule.KEYS_OF_ALL, *rope_rule.KEYS[kind], *rule.reading.ignored)
  known += (BETA,) if rule.reading.scaled_queries else ()
  if other := [k for k, v in rule.content.items() if k not in known and not is_neutral(v)]:
    raise DataError(
      f'config.json: {rule.place} has {other[0]}={rule.content[other[0]]!r}, which is not computed '
      f'with rope_type={kind!r}'
    )
  query = None
  if rule.reading.scaled_queries:
    query = QueryScaling(rule.number(BETA), rope_rule.original_len(rule, kind))
  return Rope(_theta(rule), rope_rule.scaling(rule, kind), _fraction(rule, kind), query)


def _theta(rule: Rule) -> float:
  key = rule.theta_key
  top = None if rule.c.get(key) is None else rule.c.number(key)
  if not rule.given('rope_theta'):
    name = key or rule.name('rope_theta')
    return HfConfig({name: rule.default('rope_theta') if top is None else top}).number(name)
  theta = rule.number('rope_theta')
  if top is not None and theta != top:
    raise DataError(
      f'config.json: {key}={top} and {rule.place} has rope_theta={theta}; delete the wrong one'
    )
  return theta


def _fraction(rule: Rule, kind: str) -> float:
  """Returns partial_rotary_factor, of the rule or beside it."""
  top = None if rule.c.get(PARTIAL) is None else rule.c.number(PARTIAL)
  own = rule.number(PARTIAL) if rule.given(PARTIAL) else None
  if top is not None and own is not None and top != own:
    raise DataError(
      f'config.json: {PARTIAL}={top} and {rule.place} has {own}; delete the wrong one'
    )
  found = top if own is None else own
  if found is None:
    partial = rule.reading.partial and kind != 'proportional'
    return float(rule.default(PARTIAL) or 1.0) if partial else 1.0
  if found != 1 and kind != 'proportional' and not rule.reading.partial:
    raise DataError(
      f'config.json: {PARTIAL}={found} is not computed with rope_type={kind!r} by '
      f'model_type={rule.c.model_type!r}, which rotates whole heads'
    )
  if found > 1:
    raise DataError(f'config.json: {PARTIAL}={found}; expected at most 1')
  return found


def write(
  rope: Rope,
  max_len: int,
  reading: Reading = Reading(),  # noqa: B008 - frozen
) -> dict[str, Any]:
  """Returns the keys of a config.json, those that transformers 4 and 5 both read.

  Args:
    rope: of all layers.
    max_len: what max_position_embeddings is.
    reading: what the family computes.
  """
  out: dict[str, Any] = {'rope_theta': rope.theta}
  if rule := _written(rope, max_len):
    out['rope_scaling'] = rule
  out |= _partial(rope, reading)
  if isinstance(rope.scaling, LongScaling):
    # transformers 4 takes it from here alone.
    out[ORIGINAL] = rope.scaling.original_len
  return out


def write_by_layer_type(
  ropes: Mapping[str, Rope],
  max_len: int,
  local_theta: str,
  reading: Reading = Reading(),  # noqa: B008 - frozen
) -> dict[str, Any]:
  """Returns the keys of a config.json with a rotary embedding for each layer type: rope_parameters
  for transformers 5, and where they can say it the old keys for transformers 4.

  Args:
    ropes: {layer type: Rope} of full and sliding layers.
    max_len: what max_position_embeddings is.
    local_theta: as in `read_by_layer_type`.
    reading: what the family computes.
  """
  _check_truncates(ropes)
  full, sliding = ropes[FULL], ropes[SLIDING]
  new = {}
  for kind, rope in ropes.items():
    rule = _with_length(rope, max_len) or {'rope_type': 'default'}
    new[kind] = {'rope_theta': rope.theta} | rule | _partial(rope, reading)
  plain = sliding == Rope(sliding.theta) and full.fraction == 1
  if not local_theta or not plain or (local_theta == 'rope_theta' and full.theta != sliding.theta):
    return {'rope_parameters': new}
  old = {'rope_theta': full.theta, local_theta: sliding.theta}
  if rule := _with_length(full, max_len):
    old['rope_scaling'] = rule
  return {'rope_parameters': new} | old


def _partial(rope: Rope, reading: Reading) -> dict[str, float]:
  # transformers' class may have another default than 1.
  return {PARTIAL: rope.fraction} if reading.partial or rope.fraction != 1 else {}


def _with_length(rope: Rope, max_len: int) -> dict[str, Any]:
  """Returns `_written` with the original length of longrope, which each layer type has its own."""
  length = {ORIGINAL: rope.scaling.original_len} if isinstance(rope.scaling, LongScaling) else {}
  return _written(rope, max_len) | length


def _written(rope: Rope, max_len: int) -> dict[str, Any]:
  """Returns the value of rope_scaling; {} for the plain embedding."""
  rule, query = rope_rule.content(rope.scaling, max_len), rope.query
  if query is None:
    return rule
  with_length = isinstance(rope.scaling, RopeScaling | DynamicScaling | YarnScaling | LongScaling)
  if with_length and rope.scaling.original_len != query.original_len:
    raise DataError(f'{rope} has two original lengths; a config.json has one {ORIGINAL}')
  return (rule or {'rope_type': 'default'}) | {ORIGINAL: query.original_len, BETA: query.beta}
