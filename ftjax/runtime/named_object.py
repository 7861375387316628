"""Objects that a user names as 'package.module:OBJECT'."""

import importlib
from typing import TypeVar

from ftjax.runtime.errors import ConfigError

T = TypeVar('T')


def load(name: str, expected: type[T], key: str) -> T:
  """Imports a module and returns one of its objects.

  Args:
    name: 'package.module:OBJECT'; the module must be importable.
    expected: class of the object.
    key: what named it, for messages: a config key.

  Raises:
    ConfigError: no such name, module or object, or an object of another class.
  """
  module, colon, attribute = name.partition(':')
  if not colon or not module or not attribute:
    raise ConfigError(f'{key}={name!r}: expected a known name, or package.module:OBJECT')
  try:
    found = vars(importlib.import_module(module))
  except ImportError as error:
    raise ConfigError(
      f'{key}={name!r}: module {module} cannot be imported ({error}); is its folder in PYTHONPATH?'
    ) from error
  if attribute not in found:
    raise ConfigError(f'{key}={name!r}: module {module} has no {attribute}')
  if not isinstance(found[attribute], expected):
    kind = type(found[attribute]).__name__
    raise ConfigError(f'{key}={name!r} is a {kind}; expected a {expected.__name__}')
  return found[attribute]
