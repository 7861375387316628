"""Whether the figures of the tuned model pass the rules of `gate`.

A rule compares the figure itself. With "significantly" the 95 % interval must fulfil it: of the
difference to the base where the rule names the base, else of the figure. So 'accuracy > base
significantly' asks for an interval of the difference above 0, and 'accuracy >= base - 0.02
significantly' for one above -0.02 (non-inferiority). A figure that cannot be computed passes no
rule.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ftjax.runtime.errors import CheckError

_OPERATORS = {
  '>=': operator.ge,
  '>': operator.gt,
  '<=': operator.le,
  '<': operator.lt,
}
_OPPOSITE = {'>=': 'below', '>': 'not above', '<=': 'above', '<': 'not below'}


class Rule(Protocol):
  """What this file reads of config.gate_rules.Rule."""

  @property
  def text(self) -> str: ...
  @property
  def task(self) -> str: ...
  @property
  def metric(self) -> str: ...
  @property
  def operator(self) -> str: ...
  @property
  def factor(self) -> float: ...
  @property
  def offset(self) -> float: ...
  @property
  def is_significant(self) -> bool: ...


def check(rules: Sequence[Rule], summary: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the entry "gate" of eval/summary.json; None without rules.

  {"passed": whether all did, "checks": [{"what": a sentence, "value": the figure that was compared,
  "limit": with what, "passed"}]}; value and limit are None where they cannot be computed.

  Args:
    rules: of `gate`.
    summary: eval/summary.json, see evaluation/comparison.py.
  """
  if not rules:
    return None
  checks = [_check(rule, summary) for rule in rules]
  return {'passed': all(c['passed'] for c in checks), 'checks': checks}


def enforce(gate: Mapping[str, Any] | None, outcome: str) -> None:
  """Refuses an export.

  Args:
    gate: of `check`.
    outcome: what comes of it, for the message.

  Raises:
    CheckError: a rule is not fulfilled; names each of them with its figure.
  """
  if gate is None or gate['passed']:
    return
  failed = [c['what'] for c in gate['checks'] if not c['passed']]
  raise CheckError(
    'gate: the tuned model is refused:\n'
    + '\n'.join(f'  {sentence}' for sentence in failed)
    + f'\n{outcome} Train on, or change `gate` and run the same command again.'
  )


def _check(rule: Rule, summary: Mapping[str, Any]) -> dict[str, Any]:
  what = f'{rule.text}: '
  task = summary['tasks'].get(rule.task)
  if task is None:
    return _failed(what + f'the task {rule.task} has no results')
  form = next((m['form'] for m in task['metrics'] if m['name'] == rule.metric), 'number')
  own = _score(task, 'tuned', rule.metric)
  if own.get('value') is None:
    return _failed(what + f'{rule.metric} of the tuned model cannot be computed{_why(own)}')
  base = _score(task, 'base', rule.metric) if rule.factor else {}
  if rule.factor and base.get('value') is None:
    return _failed(what + f'{rule.metric} of the base cannot be computed{_why(base)}')
  if rule.is_significant:
    return _check_interval(rule, what, task, own, form)
  value = own['value']
  limit = rule.factor * base['value'] + rule.offset if rule.factor else rule.offset
  passed = _fulfils(rule.operator, value, limit)
  sentence = f'{what}{rule.metric} is {_shown(value, form)}'
  sentence += (
    f', {"within" if passed else _OPPOSITE[rule.operator]} the limit {_shown(limit, form)}'
  )
  if rule.factor:
    sentence += f' (base {_shown(base["value"], form)})'
  return {'what': sentence, 'value': value, 'limit': limit, 'passed': passed}


def _check_interval(
  rule: Rule, what: str, task: Mapping[str, Any], own: Mapping[str, Any], form: str
) -> dict[str, Any]:
  """Compares the end of the interval that fulfils the rule least."""
  interval, name = own, f'{rule.metric}'
  if rule.factor:
    interval, name = _difference(task, rule.metric), f'the difference of {rule.metric} to the base'
  end = 'low' if rule.operator in ('>', '>=') else 'high'
  value = interval.get(end)
  if value is None:
    return _failed(what + f'{name} has no interval{_why(interval)}')
  passed = _fulfils(rule.operator, value, rule.offset)
  sign = '+' if rule.factor else ''
  low, high = (_shown(interval[k], form, sign) for k in ('low', 'high'))
  middle = _shown(interval['value'], form, sign)
  sentence = (
    f'{what}{name} is {middle} [{low}, {high}], its {end} end '
    f'{"within" if passed else _OPPOSITE[rule.operator]} {_shown(rule.offset, form, sign)}'
  )
  return {'what': sentence, 'value': value, 'limit': rule.offset, 'passed': passed}


def _fulfils(name: str, value: float, limit: float) -> bool:
  """Returns whether value OP limit; sums of decimals count as equal within rounding."""
  if abs(value - limit) <= 1e-12 * max(1.0, abs(limit)):
    return name in ('>=', '<=')
  return bool(_OPERATORS[name](value, limit))


def _score(task: Mapping[str, Any], model: str, metric: str) -> Mapping[str, Any]:
  return task['scores'].get(model, {}).get(metric, {})


def _difference(task: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
  for found in task['differences']:
    if (found['first'], found['second']) == ('base', 'tuned'):
      return found['metrics'].get(metric, {})
  return {}


def _failed(sentence: str) -> dict[str, Any]:
  return {'what': sentence, 'value': None, 'limit': None, 'passed': False}


def _why(found: Mapping[str, Any]) -> str:
  reason = found.get('why')
  return f': {reason}' if reason else ''


def _shown(value: float | None, form: str, sign: str = '') -> str:
  if value is None:
    return 'unknown'
  digits = {'fraction': '.4f', 'points': '.2f', 'number': '.4g'}[form]
  return f'{value:{sign}{digits}}'
