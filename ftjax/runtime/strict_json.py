"""Reads JSON strictly: a repeated key is refused, of which other readers would keep one value."""

import json
from typing import Any


class RepeatedKey(ValueError):
  """A key that occurs twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) != len(pairs):
    names = [key for key, _ in pairs]
    raise RepeatedKey(f'the key {next(k for k in names if names.count(k) > 1)!r} occurs twice')
  return found


def loads(text: bytes | str) -> Any:
  """Returns the value of a JSON text, as `json.loads`.

  Raises:
    RepeatedKey: a key occurs twice in an object. Errors of json.loads pass through.
  """
  return json.loads(text, object_pairs_hook=_unique)


def is_json(value: Any) -> bool:
  """Returns whether a value can be written as JSON."""
  try:
    json.dumps(value)
  except (TypeError, ValueError):
    return False
  return True
