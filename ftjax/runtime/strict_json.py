"""JSON that keeps all it is given: a key that stands twice is refused, of which readers would keep
one value."""

import json
from typing import Any


class RepeatedKey(ValueError):
  """A key that stands twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) != len(pairs):
    names = [key for key, _ in pairs]
    raise RepeatedKey(f'the key {next(k for k in names if names.count(k) > 1)!r} stands twice')
  return found


def loads(text: bytes | str) -> Any:
  """Returns the value of a JSON text, as `json.loads`.

  Raises:
    RepeatedKey: a key stands twice in an object. And what json.loads raises.
  """
  return json.loads(text, object_pairs_hook=_unique)


def is_json(value: Any) -> bool:
  """Returns whether a value can be written as JSON."""
  try:
    json.dumps(value)
  except (TypeError, ValueError):
    return False
  return True
