"""Names the leaves of nested dicts, and matches them against tables of regular expressions.

Parameters are nested dicts whose leaves are named by their path, `stack0/block0/attn/q/w`. These
names are a public interface: checkpoints, regex tables and documentation use them.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ftjax.runtime.errors import ConfigError


def flatten(tree: Mapping, prefix: str = '') -> dict[str, Any]:
  """Returns `{name: leaf}` of a nested dict, names joined by '/', sorted at every level."""
  leaves = {}
  for key in sorted(tree):
    value = tree[key]
    name = f'{prefix}{key}'
    if isinstance(value, Mapping):
      leaves |= flatten(value, name + '/')
    else:
      leaves[name] = value
  return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict:
  """Returns the nested dict of named leaves; the inverse of `flatten`."""
  tree: dict = {}
  for name, leaf in leaves.items():
    *folders, last = name.split('/')
    branch = tree
    for folder in folders:
      branch = branch.setdefault(folder, {})
    branch[last] = leaf
  return tree


def map_named(fn: Callable[..., Any], tree: Mapping, *rest: Mapping) -> dict:
  """Maps `fn(name, leaf, *leaves)` over nested dicts of one structure."""
  others = [flatten(r) for r in rest]
  return unflatten({n: fn(n, leaf, *(o[n] for o in others)) for n, leaf in flatten(tree).items()})


def match_table(table: Iterable[tuple[str, Any]], names: Iterable[str], key: str) -> dict[str, Any]:
  """Gives every name the value of the first regex of `table` that matches it whole.

  Args:
    table: `(regex, value)` pairs; a regex must match a name from start to end.
    names: parameter names.
    key: the config key the table came from, for messages.

  Returns:
    `{name: value}` for all names.

  Raises:
    ConfigError: no row matches a name, a row matches no name first (a misspelt regex would
      otherwise have no effect), or a regex does not parse.
  """
  rows = []
  for pattern, value in table:
    try:
      rows.append((re.compile(pattern), pattern, value))
    except re.error as e:
      raise ConfigError(f'{key}: {pattern!r} is no regular expression: {e}') from e
  names = list(names)
  used, out, missing = set(), {}, []
  for name in names:
    for regex, pattern, value in rows:
      if regex.fullmatch(name):
        out[name] = value
        used.add(pattern)
        break
    else:
      missing.append(name)
  if missing:
    raise ConfigError(
      f'{key}: no row matches {missing[:5]}{" ..." if len(missing) > 5 else ""} ({len(missing)} of '
      f'{len(names)} parameters); end the table with a row (".*", value)'
    )
  idle = [p for _, p, _ in rows if p not in used and p != '.*']
  if idle:
    raise ConfigError(f'{key}: {idle} match no parameter first; the names are like {names[:4]}')
  return out


def select(leaves: Mapping[str, Any], keep: Callable[[str], bool]) -> tuple[dict, dict]:
  """Splits a nested dict in two by leaf name: (kept, others). `merge` is the inverse."""
  flat = flatten(leaves)
  kept = {n: v for n, v in flat.items() if keep(n)}
  return unflatten(kept), unflatten({n: v for n, v in flat.items() if n not in kept})


def merge(a: Mapping, b: Mapping) -> dict:
  """Returns the union of two disjoint nested dicts. Raises ValueError where both have a leaf."""
  fa, fb = flatten(a), flatten(b)
  if both := fa.keys() & fb.keys():
    raise ValueError(f'merge: {sorted(both)[:3]} are in both trees')
  return unflatten(fa | fb)
