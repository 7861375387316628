"""Every kind of task: a right response has the best figure; rubbish has a figure too; a row that is
rubbish is an error that names it.
"""

import json
import math
import re
import time

import numpy as np
import pytest
from text_model import Says, TextModel

from ftjax.evaluation import comparison, kinds, run, tasks
from ftjax.evaluation.kind import COMPLETE
from ftjax.evaluation.model import Draw
from ftjax.runtime.errors import DataError

PARIS = {'name': 'weather', 'arguments': {'city': 'Paris'}}
CHOICE = {'prompt': 'p', 'choices': ['good', 'bad'], 'label': 'good'}
CONSTRAINTS = [{'kind': 'max_words', 'value': 2}, {'kind': 'include', 'value': 'Seine'}]
# {kind: (a row, a completion that is right; None where log-probabilities are asked for)}
ROWS = {
  'choice': (CHOICE, None),
  'choice_by_length': (CHOICE, None),
  'choice_by_prior': (CHOICE, None),
  'preference': ({'prompt': 'p', 'chosen': 'yes', 'rejected': 'no'}, None),
  'perplexity': ({'text': 'some text'}, None),
  'answer_perplexity': ({'prompt': 'p', 'answer': 'a'}, None),
  'match': ({'prompt': 'p', 'answers': ['Paris', 'paris, France']}, '"paris, france."'),
  'math': ({'prompt': 'p', 'answer': 'six and 12\n#### 18'}, 'It is 18.'),
  'math_strict': ({'prompt': 'p', 'answer': '18'}, 'So \\boxed{18}.'),
  'label': (CHOICE, 'Good, I think.'),
  'yes_no': ({'prompt': 'p', 'answer': 'Yes'}, 'true'),
  'question': ({'prompt': 'p', 'answers': ['Goethe', 'the poet Goethe']}, 'The poet Goethe.'),
  'translation': ({'prompt': 'p', 'answer': 'the red house is small'}, 'the red house is small'),
  'translation_characters': ({'prompt': 'p', 'answer': '红色的房子'}, '红色的房子'),
  'summarization': ({'prompt': 'p', 'answer': 'It rained today.'}, 'It rained today.'),
  'summarization_unicode': ({'prompt': 'p', 'answer': 'Сегодня дождь.'}, 'Сегодня дождь.'),
  'entities': ({'prompt': 'p', 'entities': [['PER', 'Ada']]}, 'PER: Ada'),
  'instructions': ({'prompt': 'p', 'constraints': CONSTRAINTS}, 'La Seine'),
  'tool_calls': ({'prompt': 'p', 'calls': [PARIS]}, f'<tool_call>{json.dumps(PARIS)}</tool_call>'),
  'json': ({'prompt': 'p', 'json': {'a': [1]}}, '```json\n{"a": [1.0]}\n```'),
  'json_schema': ({'prompt': 'p', 'schema': {'type': 'object', 'required': ['a']}}, '{"a": 1}'),
}
COMPLETIONS = sorted(k for k, (_, right) in ROWS.items() if right is not None)

RUBBISH = (
  '',
  ' \n\t ',
  '\x00\x1b[31m\x7f',
  '\ud800 half of a pair',
  '\u202e\u2028\u0300' * 500,
  '😀' * 3000,
  'a' * 30_000,
  'a b ' * 8_000,
  '9' * 6_000,
  '1e999999999',
  '-' * 20_000,
  '[' * 20_000,
  '{"a":' * 5_000,
  '{"a": NaN, "a": Infinity}',
  '(' * 5_000 + ')' * 5_000,
  '\\boxed{' * 2_000,
  '\\frac{1}{0} ^{^{^{',
  '<think>' * 200,
  'never closed <think> 18',
  '</think>' * 200,
  '<tool_call>' * 3_000,
  '<function=f>' * 2_000,
  '[f(' * 2_000,
  'f(**{}, *[])',
  '#### ' * 2_000,
  ';:' * 5_000,
  'yes no yes no',
  'good bad',
  '`' * 10_000,
  '\n' * 20_000,
  'null',
  'true',
  '"text"',
  '[]',
  '{}',
  '[[["PER", "Ada"]]]',
  '[null, 1, ["PER"], ["PER", 3], {"type": 1}]',
  '{"PER": "Ada", "LOC": [null, 3, {"a": 1}]}',
)


def load(tmp_path, kind, *rows):
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join((r if isinstance(r, str) else json.dumps(r)) + '\n' for r in rows))
  return tasks.load_task('t', kind, str(path))


def evaluated(task, model):
  return run.evaluate(task, model, draw=Draw(max_tokens=9), title='base')


def figures(task, results):
  return {
    m.name: float(m.value(np.ones((1, len(results))), m.columns(results, task.classes))[0])
    for m in (*task.metrics, *task.details)
  }


def test_every_kind_has_a_row_here():
  from ftjax.evaluation.safety_kinds import SAFETY_KINDS

  assert ROWS.keys() == kinds.KINDS.keys() - SAFETY_KINDS.keys()
  assert {k for k in ROWS if kinds.KINDS[k].respond == COMPLETE} == set(COMPLETIONS)


@pytest.mark.parametrize('kind', COMPLETIONS)
def test_a_right_completion_has_the_best_primary_figure(tmp_path, kind):
  row, right = ROWS[kind]
  task = load(tmp_path, kind, row, row)
  best = 100.0 if task.metrics[0].form == 'points' else 1.0
  for text in (right, f'<think>\nLet me see.\n</think>\n\n{right}'):
    found = figures(task, evaluated(task, Says({'p': text})))
    assert found[task.metrics[0].name] == pytest.approx(best), text
  wrong = figures(task, evaluated(task, Says({'p': 'wrong'})))[task.metrics[0].name]
  assert not wrong > 0.5 * best


@pytest.mark.parametrize('kind', COMPLETIONS)
def test_a_thought_that_did_not_end_is_no_answer(tmp_path, kind):
  row, right = ROWS[kind]
  task = load(tmp_path, kind, row)
  for text in (f'<think>\n{right}', f'<think>\n{right}\nor'):
    found = figures(task, evaluated(task, Says({'p': text})))
    assert not found[task.metrics[0].name] > 0, text


@pytest.mark.parametrize('kind', COMPLETIONS)
def test_rubbish_has_figures(tmp_path, kind, monkeypatch):
  monkeypatch.setattr(comparison, 'RESAMPLES', 20)
  row, _ = ROWS[kind]
  task = load(tmp_path, kind, *[row | {'prompt': f'p{i}'} for i in range(len(RUBBISH))])
  begun = time.process_time()
  results = evaluated(task, Says(lambda prompt: RUBBISH[int(prompt[1:])]))
  assert time.process_time() - begun < 10
  assert len({tuple(sorted((k, len(v)) for k, v in r.values.items())) for r in results}) == 1
  assert all(math.isfinite(x) for r in results for v in r.values.values() for x in v)
  entry = comparison.compare(task, {'base': results, 'tuned': results})
  json.dumps(comparison.summarize([entry]), allow_nan=False)
  for found in entry['scores']['base'].values():
    assert found['value'] is not None or found['why']


@pytest.mark.parametrize('kind', sorted(ROWS.keys() - set(COMPLETIONS)))
def test_log_probabilities_have_figures(tmp_path, kind, monkeypatch):
  monkeypatch.setattr(comparison, 'RESAMPLES', 20)
  row, _ = ROWS[kind]
  key = 'text' if kind == 'perplexity' else 'prompt'
  odd = ('x', '\x00', '😀' * 30, 'a' * 300, '\u202e\u2028', '9')
  task = load(tmp_path, kind, *[row | {key: text} for text in odd])
  results = evaluated(task, TextModel())
  assert all(math.isfinite(x) for r in results for v in r.values.values() for x in v)
  entry = comparison.compare(task, {'base': results, 'tuned': results})
  json.dumps(comparison.summarize([entry]), allow_nan=False)


@pytest.mark.parametrize('kind', sorted(ROWS))
def test_rows_that_are_rubbish_name_their_line(tmp_path, kind):
  """Whatever stands in a column that the kind reads, loading reads it or names its line."""
  row, _ = ROWS[kind]
  values = (None, '', ' ', 3, 1.5, True, [], {}, [[]], [None], ['a', 3], {'a': None}, 'text', '[')
  refused = 0
  for key in row:
    for value in values:
      bad = json.loads(json.dumps(row)) | {key: value}
      try:
        task = load(tmp_path, kind, row, bad)
      except DataError as error:
        assert re.search(r'rows\.jsonl:2: ', str(error)), (key, value, str(error))
        assert 'Traceback' not in str(error) and 'object has no attribute' not in str(error)
        refused += 1
        continue
      model = TextModel() if ROWS[kind][1] is None else Says(lambda prompt: 'x')
      try:
        evaluated(task, model)
      except DataError as error:
        raise AssertionError(f'{key}={value!r} was read, and is no row: {error}') from error
  assert refused >= 2


@pytest.mark.parametrize('kind', sorted(ROWS))
def test_one_row_and_lines_that_are_none(tmp_path, kind, monkeypatch):
  monkeypatch.setattr(comparison, 'RESAMPLES', 20)
  row, right = ROWS[kind]
  task = load(tmp_path, kind, row)
  model = TextModel() if right is None else Says({'p': right})
  entry = comparison.compare(task, {'base': evaluated(task, model)})
  json.dumps(comparison.summarize([entry]), allow_nan=False)
  for line in ('[]', '3', '{', 'null', '{}'):
    with pytest.raises(DataError, match=r'rows\.jsonl:2: '):
      load(tmp_path, kind, row, line)
