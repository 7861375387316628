"""Reads the config of a run back from its config.json, to run it again."""

import json
from collections.abc import Mapping
from typing import Any

from ftjax.config import custom_keys, keys, section
from ftjax.runtime.errors import ConfigError
from ftjax.runtime.redaction import REDACTED
from ftjax.storage import files

_RANDOM, _CUSTOM = 'model.random', 'custom.'


def load(path: str) -> section.Section:
  """Returns the config of a file that holds {dotted key: JSON value}, locked.

  Raises:
    ConfigError: it is no such file; see `from_plain`.
  """
  try:
    values = json.loads(files.read_text(path))
  except ValueError as error:  # also of the encoding
    raise ConfigError(f'--config={path}: no JSON ({error})') from error
  if not isinstance(values, dict):
    raise ConfigError(f'--config={path}: expected {{"optim.lr": 1e-5, ...}}, as config.json has it')
  return from_plain(values, path).lock()


def from_plain(values: Mapping[str, Any], name: str) -> section.Section:
  """Returns the config of which `section.plain` made these values.

  Args:
    values: {dotted key: JSON value}. Keys that are missing keep their defaults.
    name: of the file, for messages.

  Raises:
    ConfigError: a key that does not exist, a value of another type, or one that was a secret and
      was replaced when it was written.
  """
  if hidden := [k for k, v in values.items() if REDACTED in str(v)]:
    raise ConfigError(
      f'{name}: {hidden[0]} held a secret, which was not written down; such a run cannot be '
      'started from its config.json'
    )
  c = keys.default()
  # Those of `custom` last: their types are in the module of the algorithm.
  for key in sorted(values, key=lambda k: k.startswith(_CUSTOM)):
    try:
      if key.startswith(_CUSTOM):
        custom_keys.complete(c)
      assign(c, key, values[key])
    except ConfigError as error:
      raise ConfigError(f'{name}: {error}') from error
  c.places().clear()  # no line of a user's file set them
  return c


def assign(c: section.Section, key: str, value: Any) -> None:
  """Sets a dotted key to its value from JSON. Raises ConfigError as the config does."""
  above, _, name = key.rpartition('.')
  place = c[above] if above else c
  place[name] = value if key == _RANDOM else _with_tuples(value)


def _with_tuples(value: Any) -> Any:
  """Returns a JSON value with its lists as tuples, which configs have in their place."""
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
