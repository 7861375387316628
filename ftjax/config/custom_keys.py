"""The section `custom`: the hyperparameters of an algorithm outside of ftjax.

Its record lists them with their defaults (algorithms.Algorithm.keys)."""

import difflib

from ftjax.config import algorithms, section
from ftjax.runtime.errors import ConfigError


def complete(c: section.Section) -> None:
  """Adds the algorithm's own keys to the section `custom` of a config: those that are not set get
  their defaults, the others become of the default's type.

  Raises:
    ConfigError: a key that the algorithm does not have, or a value of another type.
  """
  known, found = algorithms.of(c).keys, c.custom.to_dict()
  for name in found:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f'; did you mean custom.{near[0]}?' if near else ''
      there = f'its keys are {", ".join(known)}' if known else 'it has none'
      raise ConfigError(f'custom.{name}: algorithm={c.algorithm} has no such key; {there}{hint}')
  if known:
    c.custom = {
      name: section.checked(f'custom.{name}', found.get(name, usual), type(usual), usual)
      for name, usual in known.items()
    }
