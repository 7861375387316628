"""Rows with the same group are one cluster of the statistics."""

import dataclasses
import json

import pytest

from ftjax.evaluation import comparison, rows, tasks
from ftjax.evaluation.result import Result
from ftjax.evaluation.rows import Row
from ftjax.evaluation.statistics import intervals
from ftjax.evaluation.tasks import Task
from ftjax.reporting import results, text_table
from ftjax.runtime.errors import DataError


def _task(groups):
  own = tuple(Row(str(i), f'f:{i}', 'p', (), ('x',), group=g) for i, g in enumerate(groups))
  return Task('t', 'match', 'f', own, 'd')


def _results(task, right, samples=1):
  return [
    Result(row.id, 'x', 'x', {'right': (float(ok),)}, sample=s)
    for row, ok in zip(task.rows, right, strict=True)
    for s in range(samples)
  ]


def _compare(groups, base, tuned):
  task = _task(groups)
  return comparison.compare(task, {'base': _results(task, base), 'tuned': _results(task, tuned)})


def test_numbers_of_clusters():
  found = rows.clusters(_task(['a', '', 'b', '1', 'a', '']).rows)
  assert found == {'0': 0, '1': 1, '2': 2, '3': 3, '4': 0, '5': 4}  # the group 1 is not the row 1


def test_rows_that_repeat_each_other_prove_nothing_more():
  """Four texts with 25 questions each, of which all answers of a text are right or wrong."""
  groups = [name for name in 'abcd' for _ in range(25)]
  base = [name == 'a' for name in groups]
  apart, grouped = (_compare(g, base, [True] * 100) for g in ([''] * 100, groups))
  assert (apart['groups'], grouped['groups'], grouped['prompts']) == (None, 4, 100)
  there, here = (found['differences'][0] for found in (apart, grouped))
  assert there['test']['name'] == 'exact McNemar' and there['outcome'] == 'better'
  # Of the 2^4 ways to swap the models within texts, four differ by 0.75 in size: text a is tied.
  assert here['test']['name'] == 'permutation' and here['test']['p'] == 4 / 16
  assert here['outcome'] == 'undecided' and here['rows_needed'] > 100
  one, other = (found['scores']['base']['accuracy'] for found in (apart, grouped))
  assert one['value'] == other['value'] == 0.25
  expected = intervals.proportion(base, groups, comparison.LEVEL)
  assert (other['low'], other['high']) == (expected.low, expected.high)
  assert other['high'] - other['low'] > 3 * (one['high'] - one['low'])
  assert 'in 4 groups' in text_table.table(grouped, ['base', 'tuned'])
  summary = comparison.summarize([grouped])
  assert results.build(summary)['tasks'][0]['n'] == '100 examples, in 4 groups'


def test_groups_of_one_row_change_nothing(monkeypatch):
  monkeypatch.setattr(comparison, 'RESAMPLES', 100)
  base, tuned = [i % 3 == 0 for i in range(30)], [i % 4 > 0 for i in range(30)]
  named = _compare([f'g{i}' for i in range(30)], base, tuned)
  assert named == _compare([''] * 30, base, tuned)


def test_samples_of_grouped_rows(monkeypatch):
  monkeypatch.setattr(comparison, 'RESAMPLES', 100)
  task = _task(['a', 'a', 'b', '', '', ''])
  own = _results(task, [1, 1, 0, 1, 0, 1], samples=2)
  own = {'base': own, 'tuned': [dataclasses.replace(r, values={'right': (1.0,)}) for r in own]}
  got = comparison.compare(task, own)
  assert (got['n'], got['prompts'], got['groups'], got['samples']) == (12, 6, 5, 2)
  assert got['scores']['base']['accuracy']['value'] == pytest.approx(4 / 6)


def test_a_group_is_read_from_the_row(tmp_path):
  path = tmp_path / 'rows.jsonl'

  def load(*groups):
    lines = [{'prompt': 'p', 'answer': 'x', 'group': g} for g in groups]
    path.write_text('\n'.join(map(json.dumps, lines)))
    return tasks.load_task('t', 'match', str(path))

  assert [row.group for row in load('a', 7, None).rows] == ['a', '7', '']
  for wrong in ('', ' ', True, 1.5, ['a']):
    with pytest.raises(DataError, match=r'rows\.jsonl:2: "group": expected text'):
      load('a', wrong)
