"""Objects of a user's own modules, named in a config by the text 'package.module:object'."""

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from types import ModuleType
from typing import Any, TypeVar

from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError

T = TypeVar('T')
_LONGEST = 300  # characters of an error that a user's module raised


def is_named(text: str) -> bool:
  """Returns whether a value of a config names an object, and not one of the built-in choices."""
  return ':' in text


def load(key: str, text: str) -> Any:
  """Returns the object named by 'package.module:object'; the object's name may have dots.

  Modules are found in the working directory, on PYTHONPATH and among the installed packages. A
  module is imported once in a process.

  Args:
    key: the config key that holds the text, for messages.
    text: the name.

  Raises:
    ConfigError: another form of text, a module that cannot be imported, or no such object in it.
  """
  module_name, _, name = text.partition(':')
  if not module_name or not all(part.isidentifier() for part in name.split('.')):
    raise ConfigError(f"{key}={text!r}; expected 'package.module:object'")
  found: Any = module(key, text)
  for part in name.split('.'):
    try:
      found = getattr(found, part)
    except AttributeError as error:
      known = [n for n in vars(sys.modules[module_name]) if not n.startswith('_')]
      near = difflib.get_close_matches(name, known, n=1)
      hint = f'; did you mean {module_name}:{near[0]}?' if near else f'; it has {sorted(known)}'
      raise ConfigError(f'{key}={text}: {module_name} has no {name}{hint}') from error
  return found


def instance(key: str, text: str, kind: type[T]) -> T:
  """Returns the object that `load` returns, which must be an instance of `kind`.

  Raises:
    ConfigError: as `load`, or an object of another class.
  """
  found = load(key, text)
  if not isinstance(found, kind):
    raise wrong(key, text, found, f'a {kind.__module__}.{kind.__qualname__}')
  return found


def module(key: str, text: str) -> ModuleType:
  """Returns the module named by 'package.module' or 'package.module:object'; see `load`.

  Raises:
    ConfigError: it cannot be imported.
  """
  name = text.partition(':')[0]
  here = os.getcwd()
  if not {'', here}.intersection(sys.path):  # a console script has its own folder there
    sys.path.append(here)
  try:
    return importlib.import_module(name)
  except (Exception, SystemExit) as error:  # a script that ends the process when it is imported
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = '' if isinstance(error, ModuleNotFoundError) else f' ({frame.filename}:{frame.lineno})'
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:_LONGEST]
    raise ConfigError(
      f'{key}={text}: cannot import {name}: {reason}{place}; it is looked for in the working '
      'directory, on PYTHONPATH and among the installed packages'
    ) from error


def takes(found: Any, number: int) -> bool:
  """Returns whether an object can be called with `number` arguments by position."""
  if not callable(found):
    return False
  try:
    inspect.signature(found).bind(*[None] * number)
  except (TypeError, ValueError):
    return False
  return True


def wrong(key: str, text: str, found: Any, expected: str) -> ConfigError:
  """Returns the error for an object of another form than `expected`."""
  what = type(found).__name__
  if inspect.isroutine(found):
    try:
      what = f'function {inspect.signature(found)}'
    except ValueError:
      what = 'function'
  return ConfigError(f'{key}={text} is a {what}; expected {expected}')


def fingerprint(text: str) -> str:
  """Returns the sha256 of the source of the module that 'package.module' or 'package.module:object'
  names. Comments and formatting do not change it; what the module imports does not count.
  """
  spec = importlib.util.find_spec(text.partition(':')[0])
  path = spec.origin if spec and spec.origin else ''
  if not path.endswith('.py'):  # an extension module
    return digest([text])
  with open(path, 'rb') as file:  # ast reads the encoding that the file declares
    return digest([text, ast.dump(ast.parse(file.read()))])
