"""Loads a config file: runs it, calls its get_config(), and reports what is wrong with it in one
line, FILE:LINE: reason, of the user's own code.
"""

import difflib
import inspect
import linecache
import os
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from typing import Any

import ml_collections

from ftjax.config import keys, saved_config
from ftjax.config import section as config_section
from ftjax.runtime.errors import ConfigError
from ftjax.storage import locations

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_LONGEST = 300  # characters of an error that Python or a user's code raised


def load(path: str) -> config_section.Section:
  """Returns the config that the file at `path` makes, locked.

  The file can import modules of its own folder.

  Of a .json file, such as config.json of a workdir, its values are taken.

  Raises:
    ConfigError: anything that is wrong with the file; begins with FILE:LINE of the user's code.
  """
  if path.endswith('.json'):
    return saved_config.load(path)
  folder = os.path.dirname(os.path.abspath(path))
  sys.path.append(folder)
  try:
    names = _guarded(path, lambda: runpy.run_path(path))
    make = names.get('get_config')
    _check_function(path, make, names)
    made = _guarded(path, make)
    c = _checked(path, make, made)
  finally:
    sys.path.remove(folder)
  return c.lock()


def _guarded(path: str, call: Callable[[], Any]) -> Any:
  """Returns the result of `call`, which runs a user's code; raises its errors as ConfigErrors."""
  try:
    return call()
  except SystemExit as error:
    raise ConfigError(
      f'{_place(path, error)}: it calls sys.exit({error.code!r}); a config only returns values'
    ) from error
  except Exception as error:
    raise ConfigError(f'{_place(path, error)}: {_reason(error)}') from error


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
  """Returns the frames of the user's code, the innermost last."""
  frames = traceback.extract_tb(error.__traceback__)
  return [f for f in frames if not config_section.is_library_code(f.filename)]


def _place(path: str, error: BaseException) -> str:
  """Returns FILE:LINE of the innermost line of the user's code."""
  if isinstance(error, SyntaxError) and os.path.isfile(error.filename or ''):
    return f'{error.filename}:{error.lineno or 1}'
  own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
  if frames := _frames(error) or own:
    return f'{frames[-1].filename}:{frames[-1].lineno}'
  return f'{path}:1'


def _reason(error: Exception) -> str:
  if isinstance(error, config_section.NoSuchKey):
    return _no_such_key(error)
  if isinstance(error, ConfigError):
    return str(error)
  if isinstance(error, SyntaxError | ValueError) and 'null bytes' in str(error):
    return 'this is no text; expected a Python file with get_config()'
  if isinstance(error, SyntaxError):
    text = f', in `{error.text.strip()}`' if error.text else ''
    return f'{type(error).__name__}: {error.msg}{text}'
  text = ' '.join(str(error).split())
  if isinstance(error, KeyError) and error.args:
    text = ' '.join(str(error.args[0]).split())
  return f'{type(error).__name__}: {text[:_LONGEST]}'.rstrip(': ')


def _no_such_key(error: config_section.NoSuchKey) -> str:
  """Returns the error for the whole name in the source, such as optimizer.lr, of which Python only
  reached `optimizer`.
  """
  frames = _frames(error)
  line = linecache.getline(frames[-1].filename, frames[-1].lineno) if frames else ''
  found = re.search(rf'\b{re.escape(error.key)}((?:\.\w+)+)\s*=[^=]', line)
  return str(config_section.NoSuchKey(error.key + found[1], keys.default()) if found else error)


def _check_function(path: str, make: Any, names: dict[str, Any]) -> None:
  """Raises ConfigError where `get_config` is missing, is no function, or wants arguments."""
  if make is None:
    functions = {
      n: f.__code__.co_firstlineno
      for n, f in names.items()
      if inspect.isfunction(f) and f.__code__.co_filename == path
    }
    near = difflib.get_close_matches('get_config', functions, n=1, cutoff=0.5)
    place = f'{path}:{functions[near[0]]}' if near else f'{path}:1'
    remedy = f'rename {near[0]}()' if near else 'define it, and let it return a config'
    raise ConfigError(f'{place}: there is no get_config() in this file; {remedy}')
  if not callable(make):
    raise ConfigError(
      f'{path}:1: get_config is of the type {type(make).__name__}; expected a function'
    )
  needed = [
    p.name
    for p in inspect.signature(make).parameters.values()
    if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
  ]
  if needed:
    raise ConfigError(
      f'{_defined(path, make)}: get_config({", ".join(needed)}) is called without arguments: '
      'remove them, or give them defaults'
    )


def _defined(path: str, make: Callable) -> str:
  """Returns FILE:LINE where a function begins."""
  code = getattr(inspect.unwrap(make), '__code__', None)
  return f'{code.co_filename}:{code.co_firstlineno}' if code else f'{path}:1'


def _checked(path: str, make: Callable, made: Any) -> config_section.Section:
  """Returns the result of get_config as a Section, after checking that it has every key and no
  other, each of its type.
  """
  place = _defined(path, make)
  if made is None:
    raise ConfigError(f'{place}: get_config() returns None; end it with `return c`')
  if not isinstance(made, ml_collections.ConfigDict):
    raise ConfigError(
      f'{place}: get_config() returns a {type(made).__name__}; expected what config.default() '
      'made, with keys changed'
    )
  usual = keys.default()
  if not isinstance(made, config_section.Section):  # made by other means: its values count
    try:
      usual.update(made.to_dict())
    except ConfigError as error:
      raise ConfigError(f'{place}: {error}') from error
    return usual
  if made.root() is not made:
    raise ConfigError(f'{place}: get_config() returns a section of the config; return all of it')
  values, known = config_section.flat(made), config_section.flat(usual)
  places = made.places()
  for key in [*values, *known]:
    if key.startswith('custom.'):  # the keys of the algorithm, which is not known yet
      continue
    at = places.get(key) or place
    if key not in known:
      raise ConfigError(f'{at}: {config_section.NoSuchKey(key, usual)}')
    if key not in values:
      raise ConfigError(f'{at}: {key} was deleted; expected a value like {known[key]!r}')
    if key != 'model.random':
      _same_type(at, key, values[key], usual)
  return made


def _same_type(place: str, key: str, value: Any, usual: config_section.Section) -> None:
  """Raises ConfigError where a value came in past the checks of its assignment."""
  section, _, name = key.rpartition('.')
  kind = (usual[section] if section else usual).get_type(name)
  try:
    config_section.checked(key, value, kind, usual[key])
  except ConfigError as error:
    raise ConfigError(f'{place}: {error}') from error


def shipped() -> list[str]:
  """Returns the names of the configs that come with ftjax."""
  return sorted({p.stem for f in _folders() if f.is_dir() for p in f.glob('*.py')})


def _folders() -> list[pathlib.Path]:
  """Returns the folders of shipped configs: inside the installed package, and next to it in a
  checkout.
  """
  return [_PACKAGE / 'configs', _PACKAGE.parent / 'configs']


def find(name: str) -> str:
  """Returns the path of a config: an existing path, else the shipped configs/NAME.py.

  Raises:
    ConfigError: neither exists, or it is no Python file; names the nearest shipped configs, or
      all of them where none is near.
  """
  path = pathlib.Path(os.path.expanduser(name))
  if path.is_file():
    if path.suffix not in ('', '.py', '.json'):
      raise ConfigError(
        f'--config={name}: a config is a Python file with get_config(), or the config.json of a '
        f'run; got a {path.suffix} file'
      )
    return str(path)
  for folder in _folders():
    inside = folder / (name if name.endswith('.py') else name + '.py')
    if '/' not in name and inside.is_file():
      return str(inside)
  if path.is_dir():
    inside = sorted(p.name for p in path.glob('*.py'))
    example = f', such as {path}/{inside[0]}' if inside else ''
    raise ConfigError(f'--config={name} is a folder; give a Python file with get_config(){example}')
  near = difflib.get_close_matches(path.stem, shipped(), n=3)
  if '/' in name:
    hint = f' (--help lists them){locations.nearest(path)}'
  elif near:
    hint = f' (--help lists them); did you mean {" or ".join(near)}?'
  else:
    hint = f'; shipped: {", ".join(shipped())}{locations.nearest(path)}'
  raise ConfigError(f'--config={name}: no such file, and no shipped config of this name{hint}')
