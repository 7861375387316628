"""Reads JSON that a model wrote, strictly, and compiles JSON schemas for it."""

import json
import re
from typing import Any

_FENCE = re.compile(r'```[ \t]*[\w+.-]{0,20}[ \t]*\r?\n')


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  out = dict(pairs)
  if len(out) != len(pairs):
    raise ValueError('a key occurs twice')
  return out


def _no_constant(name: str) -> None:
  raise ValueError(f'{name} is not JSON')


def read_json(text: str) -> Any:
  """Parses JSON strictly by RFC 8259, without a ``` fence around the whole.

  Raises:
    ValueError: duplicate keys, NaN, Infinity, numbers too large for float64, nesting too deep.
  """
  text = text.strip()
  if (fence := _FENCE.match(text)) and text.endswith('```'):
    text = text[fence.end() : -3]
  try:
    out = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    json.dumps(out, allow_nan=False)
  except RecursionError as error:
    raise ValueError('nested too deeply') from error
  return out


def _compile_patterns(schema: Any) -> None:
  """Raises re.error for an invalid pattern in a schema; check_schema does not check patterns."""
  if isinstance(schema, list):
    for item in schema:
      _compile_patterns(item)
  elif isinstance(schema, dict):
    if isinstance(schema.get('pattern'), str):
      re.compile(schema['pattern'])
    if isinstance(schema.get('patternProperties'), dict):
      for pattern in schema['patternProperties']:
        re.compile(pattern)
    for value in schema.values():
      _compile_patterns(value)


def compile_schema(schema: Any):
  """Returns the jsonschema validator of a JSON schema; its `is_valid(value)` accesses no network.

  Its `pattern`s are Python regular expressions, which may take exponential time.

  Raises:
    ValueError: no schema, or a pattern that is no regular expression.
  """
  import jsonschema
  import referencing

  try:
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    _compile_patterns(schema)
  except jsonschema.SchemaError as error:
    raise ValueError(error.message) from error
  except (re.error, TypeError) as error:
    raise ValueError(str(error)) from error
  # An empty registry: the default one fetches a remote $ref.
  return kind(schema, registry=referencing.Registry())
