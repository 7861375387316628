"""evaluation/report.py: figures agree with the rows they come from, and the table can be read."""

import json

import numpy as np
import pytest
import scipy.stats

from ftjax.evaluation import report
from ftjax.evaluation.report import Answer
from ftjax.evaluation.run import Result
from ftjax.evaluation.statistics.intervals import wilson
from ftjax.evaluation.tasks import Row, Task


def _pair(n=200, base=0.7, tuned=0.9, seed=0):
  rng = np.random.default_rng(seed)
  names = ('negative', 'positive')
  rows = tuple(Row(str(i), f'f:{i}', None, 'p', names, names[rng.integers(2)]) for i in range(n))
  task = Task('sentiment', 'choice', 'f', rows, 'd', names)

  def results(share):
    out = []
    for row in rows:
      right = bool(rng.random() < share)
      said = row.answer if right else names[1 - row.label]
      out.append(Result(row.id, row.answer, said, right, (-1.0, -2.0)))
    return out

  return task, results(base), results(tuned)


def test_figures_agree_with_the_rows():
  task, base, tuned = _pair()
  got = report.compare(task, base, tuned)
  right = sum(r.right for r in base)
  assert got['n'] == 200 and got['base']['accuracy']['value'] == right / 200
  accuracy = got['base']['accuracy']
  assert (accuracy['low'], accuracy['high']) == wilson(right, 200)
  only_tuned = sum(t.right and not b.right for b, t in zip(base, tuned, strict=True))
  only_base = sum(b.right and not t.right for b, t in zip(base, tuned, strict=True))
  test = got['mcnemar']
  assert (test['only_tuned_right'], test['only_base_right']) == (only_tuned, only_base)
  expected = scipy.stats.binomtest(only_base, only_base + only_tuned, 0.5).pvalue
  assert test['p'] == pytest.approx(expected)
  for score, diff in got['difference'].items():
    assert diff['value'] == pytest.approx(
      got['tuned'][score]['value'] - got['base'][score]['value']
    )
    assert diff['low'] < diff['value'] < diff['high'] and 0 < diff['p'] <= 1
  assert got['difference']['accuracy']['value'] == pytest.approx((only_tuned - only_base) / 200)
  support = sum(row.answer == 'negative' for row in task.rows)
  assert got['base']['per_class']['negative']['support'] == support


def test_swapping_the_models_turns_the_sign_and_the_verdict():
  task, base, tuned = _pair()
  there, back = report.compare(task, base, tuned), report.compare(task, tuned, base)
  for score, diff in there['difference'].items():
    other = back['difference'][score]
    assert other['value'] == pytest.approx(-diff['value'])
    assert other['low'] == pytest.approx(-diff['high'])
    assert other['p'] == diff['p']
  assert report.verdict(there) == 'The tuned model is better than the base.'
  assert report.verdict(back) == 'The tuned model is worse than the base.'


def test_equal_models_are_not_called_different():
  task, base, _ = _pair(n=30)
  got = report.compare(task, base, base)
  assert got['mcnemar'] == {'only_base_right': 0, 'only_tuned_right': 0, 'p': 1.0}
  assert all(d == {'value': 0, 'low': 0, 'high': 0, 'p': 1} for d in got['difference'].values())
  assert 'no significant difference' in report.verdict(got)


def test_tasks_without_classes_have_accuracy_alone():
  rows = tuple(Row(str(i), f'f:{i}', None, 'p', (), str(i)) for i in range(10))
  task = Task('qa', 'match', 'f', rows, 'd', None)
  base = [Result(r.id, r.answer, 'x', False, ()) for r in rows]
  tuned = [Result(r.id, r.answer, r.answer, int(r.id) < 8, ()) for r in rows]
  got = report.compare(task, base, tuned)
  assert list(got['difference']) == ['accuracy']
  assert got['tuned']['accuracy']['value'] == 0.8 and 'per_class' not in got['tuned']
  assert 'macro' not in report.table(got)


def test_results_of_other_rows_are_refused():
  task, base, tuned = _pair(n=10)
  with pytest.raises(ValueError, match='row by row'):
    report.compare(task, base, tuned[::-1])
  with pytest.raises(ValueError, match='row by row'):
    report.compare(task, base[:-1], tuned[:-1])


def test_the_table_is_aligned_and_complete():
  got = report.compare(*_pair())
  lines = report.table(got).split('\n')
  assert lines[0] == 'sentiment: 200 examples, classes negative, positive'
  assert all(len(line) <= 100 and line.isascii() for line in lines)
  rows = [line for line in lines if line.startswith(('accuracy', 'macro'))]
  titles = ['accuracy', 'macro precision', 'macro recall', 'macro F1']
  assert [row[:16].strip() for row in rows] == titles
  assert len({len(row) for row in rows}) == 1
  for score, row in zip(('accuracy', 'precision', 'recall', 'f1'), rows, strict=True):
    for title in ('base', 'tuned'):
      part = got[title][score]
      assert f'{part["value"]:.3f} [{part["low"]:.3f}, {part["high"]:.3f}]' in row
    assert f'{got["difference"][score]["value"]:+.3f}' in row
  assert 'exact McNemar p =' in report.table(got)


def test_answers_are_wrapped_and_harmless():
  samples = [Answer('Say\nhello', 'word ' * 200, '\x1b[31mred\x07'), Answer('q', '', 'a')]
  got = report.answers(samples)
  assert '\x1b' not in got and '\x07' not in got
  assert 'base    (nothing)' in got and 'prompt  Say hello' in got
  assert all(len(line) <= 100 for line in got.split('\n'))
  assert got.count('word') < 100 and '...' in got
  whole = report.text([report.compare(*_pair(n=20))], samples)
  assert (
    whole.index('macro F1') < whole.index('Answers before and after') < whole.index('Say hello')
  )


def test_p_values_as_people_write_them():
  assert [report._p(p) for p in (1, 0.34, 0.0449, 0.00012, 3.4e-12, 0)] == [
    '1.00', '0.34', '0.0449', '0.0001', '3e-12', '0',
  ]  # fmt: skip
  # 2000 resamples tell nothing below 2 / 2001.
  assert report._p(2 / 2001, 2 / 2001) == '< 0.001' and report._p(4 / 2001, 2 / 2001) == '0.0020'


def test_the_summary_is_strict_json(tmp_path):
  got = report.compare(*_pair(n=20))
  path = tmp_path / 'summary.json'
  report.save(str(path), [got], [Answer('p', 'b', 't')])
  read = json.loads(path.read_text())
  assert read['answers'] == [{'prompt': 'p', 'base': 'b', 'tuned': 't'}]
  assert read['tasks']['sentiment']['difference'] == got['difference']
  assert read['tasks']['sentiment']['classes'] == ['negative', 'positive']
