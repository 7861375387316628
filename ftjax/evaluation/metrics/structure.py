"""Scores completions that must be JSON: valid, equal to a gold value, accepted by a schema."""

import functools
import json
from typing import Any

from ftjax.evaluation.metric import proportion
from ftjax.evaluation.metrics.packages import need
from ftjax.grading.json_text import compile_schema, read_json

VALID = proportion('json_valid', 'valid JSON')
EQUAL = proportion('json_equal', 'JSON equal')
ACCEPTED = proportion('schema_valid', 'JSON by schema')


def json_equal(one: Any, other: Any) -> bool:
  """Returns whether two values are the same JSON: 1 equals 1.0 but not true; the order of keys
  means nothing, that of items does."""
  if isinstance(one, bool) or isinstance(other, bool):
    return one is other
  if isinstance(one, dict) and isinstance(other, dict):
    return one.keys() == other.keys() and all(json_equal(one[k], other[k]) for k in one)
  if isinstance(one, list) and isinstance(other, list):
    return len(one) == len(other) and all(map(json_equal, one, other))
  return one == other


def json_values(text: str, gold: Any) -> dict[str, tuple[float, ...]]:
  """Returns {'json_valid': (0 or 1,), 'json_equal': (0 or 1,)} of a completion.

  The completion is JSON as a whole, or within one ``` fence; duplicate keys, NaN and Infinity are
  no JSON (RFC 8259).

  Args:
    gold: the right value, parsed.
  """
  try:
    found = read_json(text)
  except ValueError:
    return {'json_valid': (0.0,), 'json_equal': (0.0,)}
  return {'json_valid': (1.0,), 'json_equal': (float(json_equal(found, gold)),)}


@functools.lru_cache(maxsize=256)
def _validator(schema: str):
  need('jsonschema', 'the metric schema_valid', 'rewards')
  return compile_schema(json.loads(schema))


def check_schema(schema: Any) -> None:
  """Raises ValueError for a value that is no JSON schema or whose $ref has no target in it.

  Raises:
    ConfigError: jsonschema is not installed.
  """
  if not isinstance(schema, (dict, bool)):
    raise ValueError(f'schema: expected an object, got {schema!r}')
  _is_accepted(schema, None)


def _is_accepted(schema: Any, value: Any) -> bool:
  validator = _validator(json.dumps(schema, sort_keys=True))
  import referencing.exceptions

  try:
    return validator.is_valid(value)
  except referencing.exceptions.Unresolvable as error:
    raise ValueError(f'schema: its $ref {error.ref!r} has no target in it') from error


def schema_values(text: str, schema: Any) -> dict[str, tuple[float, ...]]:
  """Returns {'json_valid': (0 or 1,), 'schema_valid': (0 or 1,)} of a completion, see
  `json_values`.

  Raises:
    ConfigError: jsonschema is not installed.
    ValueError: see `check_schema`.
  """
  try:
    found = read_json(text)
  except ValueError:
    return {'json_valid': (0.0,), 'schema_valid': (0.0,)}
  return {'json_valid': (1.0,), 'schema_valid': (float(_is_accepted(schema, found)),)}
