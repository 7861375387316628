"""The most frequent label beside accuracy, and models that give one answer whatever is asked."""

import pytest

from ftjax.evaluation import comparison
from ftjax.evaluation.metrics import classification
from ftjax.evaluation.result import Result
from ftjax.evaluation.rows import Row
from ftjax.evaluation.tasks import Task
from ftjax.reporting import findings, markdown, results, text_table

CLASSES = ('no', 'yes')


def _answered(labels, predictions):
  return [
    Result(str(i), label, said, {'right': (float(label == said),)}, response=said)
    for i, (label, said) in enumerate(zip(labels, predictions, strict=True))
  ]


def _summary(labels, classes=CLASSES, **predictions):
  rows = tuple(Row(str(i), f'f:{i}', 'p', classes, (a,)) for i, a in enumerate(labels))
  task = Task('boolq', 'yes_no', 'f', rows, 'd', classes)
  answered = {model: _answered(labels, said) for model, said in predictions.items()}
  return comparison.summarize([comparison.compare(task, answered)])


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
  monkeypatch.setattr(comparison, 'RESAMPLES', 50)


@pytest.fixture
def boolq():
  """Of 200 rows 121 have the label yes; one model answers no 196 times, one yes 194 times."""
  labels = ['yes'] * 121 + ['no'] * 79
  base, tuned = ['yes'] * 2 + ['no'] * 196 + ['yes'] * 2, ['yes'] * 193 + ['no'] * 6 + ['Well.']
  return _summary(labels, base=base, tuned=tuned)


def test_the_most_frequent_label_and_answer_by_hand():
  labels, said = ['a', 'b', 'b', 'c', 'b'], ['c', 'c', '?', '?', 'c']
  found = classification.most_frequent({'m': _answered(labels, said)}, ('a', 'b', 'c'))
  assert found['label'] == {'class': 'b', 'n': 3, 'share': 0.6}
  assert found['answers'] == {'m': {'class': 'c', 'n': 3, 'share': 0.6, 'label_share': 0.2}}
  found = classification.most_frequent({'m': _answered(['a', 'b'], ['?', '!'])}, ('a', 'b'))
  assert found['label']['class'] == 'a'  # the first of equally frequent ones
  none = {'class': classification.NONE, 'n': 2, 'share': 1.0, 'label_share': 0.0}
  assert found['answers']['m'] == none
  assert classification.most_frequent({'m': []}, CLASSES) is None


def test_a_model_with_one_answer_is_named_with_what_that_would_be_worth(boolq):
  task = boolq['tasks']['boolq']
  assert task['scores']['base']['accuracy']['value'] == (2 + 77) / 200
  assert task['scores']['tuned']['accuracy']['value'] == (121 + 6) / 200
  [sentence] = [n for n in findings.notices(boolq) if 'one answer' in n]
  assert sentence == (
    'Hardly more than one answer to "boolq": base answers "no" 196 times of 200, tuned answers '
    '"yes" 193 times of 200; always answering "yes" would have accuracy 0.605.'
  )


def test_reports_show_it_below_accuracy(boolq):
  lines = text_table.text(boolq).splitlines()
  at = next(i for i, line in enumerate(lines) if line.startswith('accuracy *'))
  assert lines[at + 1].split() == ['always', '"yes"', '0.605', '0.605']
  assert '| always "yes" | 0.605 | 0.605 |' in markdown.evaluation(boolq)
  [group] = results.build(boolq)['groups']
  shown = {row['metric']: row['always'] for row in group['rows']}
  assert shown.pop('accuracy') == 'always "yes": 0.605'
  assert shown and not any(shown.values())
  many = boolq | {'models': ['base', 'tuned', 'x', 'y']}  # a line per model
  assert 'always "yes"         0.605' in text_table.text(many)


@pytest.mark.parametrize(
  ('labels', 'said'),
  [
    (['yes'] * 19 + ['no'], ['yes'] * 20),  # the labels are as lopsided
    (['yes'] * 10 + ['no'] * 10, ['yes'] * 17 + ['no'] * 3),  # 85 %
    (['yes'] * 4 + ['no'] * 5, ['yes'] * 9),  # few rows
  ],
)
def test_no_finding_where_there_is_nothing_to_find(labels, said):
  assert findings.one_answer(_summary(labels, tuned=said)['tasks']['boolq']) == ''


def test_an_answer_outside_the_classes_counts_as_one():
  found = _summary(['yes', 'no'] * 10, tuned=[f'Well {i}' for i in range(20)])
  assert 'tuned answers "none of these" 20 times of 20' in findings.notices(found)[0]


def test_a_summary_without_it_is_shown(boolq):
  for missing in ({}, None, {'label': None}, {'answers': {'tuned': {'share': None}}}):
    boolq['tasks']['boolq']['most_frequent'] = missing
    assert 'always' not in text_table.text(boolq)
