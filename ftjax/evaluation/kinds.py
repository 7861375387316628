"""The table of the kinds of evaluation tasks, by the name that the config gives them.

docs/evaluation.md has the columns that rows of each kind have, and its figures; docs/safety.md
those of the safety slice.
"""

import math
from collections.abc import Mapping
from typing import Any

from ftjax.evaluation import completion_kinds, function_kinds, likelihood_kinds
from ftjax.evaluation.kind import Kind
from ftjax.evaluation.safety_kinds import SAFETY_KINDS
from ftjax.runtime import named_object

KINDS: dict[str, Kind] = likelihood_kinds.KINDS | completion_kinds.KINDS | SAFETY_KINDS


def find(name: str) -> Kind:
  """Returns the kind of a name in KINDS, of 'reward/NAME' or 'judge/module:FUNCTION', or the user's
  object 'module:OBJECT'.

  Raises:
    ConfigError: there is none, or it is of another type.
  """
  if name in KINDS:
    return KINDS[name]
  if (found := function_kinds.find(name)) is not None:
    return found
  return named_object.instance('eval.tasks', name, Kind)


def values_of(found: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
  """Returns what `Kind.score` gave in the form of a Result.

  Raises:
    ValueError: a value that is no finite number, nor several of them.
  """
  if not isinstance(found, Mapping) or not found:
    raise ValueError(f'returned {found!r}; expected {{name: number}}')
  return {str(name): _numbers(name, value) for name, value in found.items()}


def _numbers(name: str, value: Any) -> tuple[float, ...]:
  try:
    numbers = tuple(map(float, value)) if isinstance(value, tuple | list) else (float(value),)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{name}: got {value!r}, expected a number or several') from error
  if isinstance(value, str) or not all(map(math.isfinite, numbers)):
    raise ValueError(f'{name}: got {value!r}, expected a number or several, all finite')
  return numbers
