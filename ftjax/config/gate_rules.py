"""The rules of `gate`: what the tuned model's figures must fulfil before it is exported.

  TASK/METRIC OP LIMIT [significantly]

OP is >=, >, <= or <. LIMIT is a number, or the base's figure: base, base + NUMBER, base - NUMBER,
base * NUMBER. 'bbq/accuracy >= base - 0.02', 'toxic/toxic <= 0.05', 'sentiment/accuracy > base
significantly'. evaluation/gate.py has what a rule means.
"""

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from ftjax.runtime.errors import ConfigError

KEY = 'gate'
_EXAMPLE = "like 'sentiment/accuracy >= base - 0.02' or 'toxic/toxic <= 0.05'"
_NUMBER = r'[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?'
_RULE = re.compile(
  r'\s*(?P<task>[^\s/]+)/(?P<metric>[^\s/<>=]+)\s*(?P<operator>>=|<=|>|<)\s*'
  rf'(?:(?P<base>base)(?:\s*(?P<sign>[-+*])\s*(?P<margin>{_NUMBER}))?|(?P<number>{_NUMBER}))'
  r'(?P<test>\s+significantly)?\s*'
)


class Rule(NamedTuple):
  """One rule: figure OPERATOR factor * base + offset, without the base where factor is 0.

  text: as in the config. is_significant: the interval must fulfil it, and not the figure alone.
  """

  text: str
  task: str
  metric: str
  operator: str
  factor: float
  offset: float
  is_significant: bool


def parse(text: str) -> Rule:
  """Returns a rule.

  Raises:
    ConfigError: another form.
  """
  if not isinstance(text, str):
    raise ConfigError(f'{KEY}: {text!r} is not a text; expected a tuple of rules {_EXAMPLE}')
  found = _RULE.fullmatch(text)
  if not found:
    raise ConfigError(
      f'{KEY}: {text!r}; expected TASK/METRIC, one of >= > <= <, and a number or base, base + '
      f'NUMBER, base - NUMBER, base * NUMBER, with or without "significantly", {_EXAMPLE}'
    )
  number = float(found['margin'] or found['number'] or 0)
  if not math.isfinite(number):
    raise ConfigError(f'{KEY}: {text!r}: {number} is not finite')
  factor = 1.0 if found['base'] else 0.0
  if found['sign'] == '*':
    factor, offset = number, 0.0
    if factor <= 0:
      raise ConfigError(
        f'{KEY}: {text!r}; base * {number:g} is no limit: expected a factor above 0'
      )
  else:
    offset = -number if found['sign'] == '-' else number
  is_significant = found['test'] is not None
  if is_significant and factor not in (0.0, 1.0):
    raise ConfigError(
      f'{KEY}: {text!r}; "significantly" goes with base, base + NUMBER and base - NUMBER: the '
      'interval is of a difference'
    )
  return Rule(
    text.strip(),
    found['task'],
    found['metric'],
    found['operator'],
    factor,
    offset,
    is_significant,
  )


def parse_all(texts: Sequence[str]) -> tuple[Rule, ...]:
  """Returns the rules of `gate`.

  Raises:
    ConfigError: see `parse`; or a text in place of a tuple.
  """
  if isinstance(texts, str):
    raise ConfigError(f'{KEY}={texts!r} is a text; expected a tuple of rules {_EXAMPLE}')
  return tuple(parse(text) for text in texts)


def check_known(rules: Sequence[Rule], metrics: Mapping[str, Collection[str] | None]) -> None:
  """Checks the names of tasks and metrics, before anything is trained.

  Args:
    rules: of `gate`.
    metrics: {task: names of its figures}, of all tasks that will be run; None: not known yet.

  Raises:
    ConfigError: an unknown one; names the nearest.
  """
  for rule in rules:
    if rule.task not in metrics:
      raise ConfigError(
        f'{KEY}: {rule.text!r}: there is no task {rule.task!r}{_near(rule.task, metrics)}'
      )
    known = metrics[rule.task]
    if known is not None and rule.metric not in known:
      raise ConfigError(
        f'{KEY}: {rule.text!r}: the task {rule.task!r} has no figure '
        f'{rule.metric!r}{_near(rule.metric, known)}'
      )


def _near(name: str, known: Collection[str]) -> str:
  near = difflib.get_close_matches(name, known, n=1)
  if near:
    return f'; did you mean {near[0]}?'
  return f'; there are {", ".join(sorted(known))}' if known else '; eval.tasks is empty'
