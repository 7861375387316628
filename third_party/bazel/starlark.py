"""Text of BUILD files, as buildifier formats it."""

import dataclasses
from collections.abc import Iterable
from typing import Any

_INDENT = '    '


@dataclasses.dataclass(frozen=True)
class Glob:
  """glob(include, exclude = exclude) + others."""

  include: list[str]
  exclude: list[str] = dataclasses.field(default_factory=list)
  others: list[str] = dataclasses.field(default_factory=list)


class Call:
  """A rule, or another call: `rule(value, name = ..., ...)`. Arguments that are [] are left out."""

  def __init__(self, rule: str, *values: Any, **arguments: Any):
    self.rule = rule
    self.values = values
    self.arguments = {name: value for name, value in arguments.items() if value != []}

  def text(self) -> str:
    if self.rule == 'package' and len(self.arguments) == 1:
      ((name, value),) = self.arguments.items()
      return f'package({name} = {_value(value, "")})\n'
    if self.values:
      return f'{self.rule}({_value(self.values[0], "")})\n'
    lines = [f'{_INDENT}{n} = {_value(v, _INDENT)},\n' for n, v in self.arguments.items()]
    return f'{self.rule}(\n{"".join(lines)})\n'


def _value(value: Any, indent: str) -> str:
  if isinstance(value, Glob):
    return _glob(value, indent)
  if isinstance(value, list):
    return _list(value, indent)
  return f'"{value}"' if isinstance(value, str) else str(value)


def _list(items: list[str], indent: str) -> str:
  if len(items) < 2:
    return '[' + ''.join(f'"{item}"' for item in items) + ']'
  lines = ''.join(f'{indent}{_INDENT}"{item}",\n' for item in items)
  return f'[\n{lines}{indent}]'


def _glob(value: Glob, indent: str) -> str:
  include = _list(value.include, indent + _INDENT)
  text = f'glob({_list(value.include, indent)})'
  if value.exclude:
    inner = indent + _INDENT
    exclude = _list(value.exclude, inner)
    text = f'glob(\n{inner}{include},\n{inner}exclude = {exclude},\n{indent})'
  return f'{text} + {_list(value.others, indent)}' if value.others else text


def labels(found: Iterable[str], package: str) -> list[str]:
  """Returns labels as a BUILD file of `package` writes them, in buildifier's order."""
  own = f'//{package}:'
  short = {f':{label.removeprefix(own)}' if label.startswith(own) else label for label in found}
  return sorted(map(_shortest, short), key=_place)


def _shortest(label: str) -> str:
  """Returns `//a/b` for `//a/b:b`."""
  folder, _, name = label.partition(':')
  return folder if name and name == folder.rpartition('/')[2] else label


def _place(label: str) -> tuple[int, str]:
  return (0 if label.startswith(':') else 1 if label.startswith('//') else 2), label.replace(
    ':', '\x00'
  )


def file(head: str, loads: list[tuple[str, list[str]]], calls: list[Call]) -> str:
  """Returns the text of a BUILD file."""
  lines = []
  for path, names in loads:
    quoted = ', '.join(f'"{name}"' for name in names)
    lines.append(f'load("{path}", {quoted})\n')
  first = head + '\n' + (''.join(lines) + '\n' if lines else '')
  return first + '\n'.join(call.text() for call in calls)
