"""What a comparison of two models comes to: an outcome and a sentence."""

from collections.abc import Mapping
from typing import Any

_TITLES = {'base_shots': 'base + examples'}

ALPHA = 0.05  # a test with a smaller p value decides


def decide(
  difference: Mapping[str, Any], metric: Mapping[str, Any], prompts: int
) -> dict[str, str]:
  """Returns {outcome, verdict} of a comparison by its test: 'better', 'worse' or 'undecided'.

  Args:
    difference: of two models, as `compare` makes it.
    metric: the primary one, {name, title, better, form}.
    prompts: of the task.
  """
  test, found = difference['test'], difference['metrics'][metric['name']]
  first, second = (_TITLES.get(difference[k], difference[k]) for k in ('first', 'second'))
  p = test.get('p_holm', test['p'])
  if found['value'] is None or p is None:
    return {
      'outcome': 'undecided',
      'verdict': f'{metric["title"]} of {first} and {second} cannot be compared.',
    }
  if p >= ALPHA:
    text = (
      f'These {prompts:,} examples show no significant difference in {metric["title"]} between '
      f'{first} and {second}'
    )
    smallest = difference['smallest_difference']
    if smallest is not None:
      text += (
        f'; a difference of {shown(smallest, metric["form"])} would show in four of five cases'
      )
    if difference['rows_needed']:
      text += f'. For one as large as seen, some {_round(difference["rows_needed"]):,} would do'
    return {'outcome': 'undecided', 'verdict': text + '.'}
  is_up = found['value'] > 0
  if not metric['better']:
    text = f'{second} has a {"higher" if is_up else "lower"} {metric["title"]} than {first}.'
    return {'outcome': 'undecided', 'verdict': text}
  outcome = 'better' if is_up == (metric['better'] == 'higher') else 'worse'
  change = shown(found['value'], metric['form'], signed=True)
  text = f'{second} is {outcome} than {first}: {metric["title"]} {change}'
  if found['low'] is not None:
    low, high = (shown(found[k], metric['form'], signed=True) for k in ('low', 'high'))
    text += f' [{low}, {high}]'
  return {'outcome': outcome, 'verdict': text + '.'}


def shown(value: float, form: str, *, signed: bool = False) -> str:
  """Returns a figure as text: of three decimals, of one for points."""
  digits = {'fraction': '.3f', 'points': '.1f', 'number': '.4g'}[form]
  return f'{value:{"+" if signed else ""}{digits}}'


def _round(rows: int) -> int:
  """Returns a number of rows with two digits that count, rounded up."""
  unit = 10 ** max(0, len(str(rows)) - 2)
  return -(-rows // unit) * unit
