"""Hashes JSON values, for cache names and fingerprints."""

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
  """Returns the sha256 of a JSON value, keys sorted, in hexadecimal."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
