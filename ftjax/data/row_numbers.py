"""Numbers that a supervised row may have: the factor of its loss, and its place in a curriculum."""

import math
from collections.abc import Mapping
from typing import Any

NUMBERS = ('weight', 'difficulty')


def finite(value: Any) -> float | None:
  """Returns a finite number, also from its text as in CSV; else None."""
  if isinstance(value, bool) or not isinstance(value, int | float | str):
    return None
  try:
    number = float(value)
  except (ValueError, OverflowError):
    return None
  return number if math.isfinite(number) else None


def read(row: Mapping[str, Any]) -> tuple[float, float]:
  """Returns the `weight` of a row, 1 without one, and its `difficulty`, NaN without one.

  Raises:
    ValueError: no finite number, or a weight that is not positive.
  """
  out = []
  for key, usual in zip(NUMBERS, (1.0, math.nan), strict=True):
    value = row.get(key)
    number = usual if value in (None, '') else finite(value)
    if number is None:
      raise ValueError(f'{key!r} is {value!r}, expected a finite number')
    out.append(number)
  if out[0] <= 0:
    raise ValueError(f"'weight' is {out[0]}, expected more than 0; remove a row that is not wanted")
  return out[0], out[1]
