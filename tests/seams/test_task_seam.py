"""A kind of evaluation task outside of the package, with rows and a measure of its own; and what is
wrong with one is reported early. A run with it is in test_algorithm_seam.py.
"""

import dataclasses
import json
import types

import pytest
import text_model
import toy_task

from ftjax import config
from ftjax.config import task_specs, user_code, validation
from ftjax.evaluation import comparison, function_kinds, kinds, run, tasks
from ftjax.evaluation.model import Draw
from ftjax.runtime.errors import ConfigError, DataError


def load(tmp_path, *rows, kind='toy_task:AS_LONG'):
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  [task] = tasks.load_tasks(task_specs.parse_all([f'long={kind}:{path}']))
  return task


ROWS = [{'number': i, 'question': f'say {i}', 'result': '1' * i} for i in range(1, 5)]


def evaluated(task, lengths):
  """Results of a model whose completion of 'say N' has so many letters."""
  model = text_model.Says(lambda prompt: 'x' * lengths[int(prompt.split()[-1])])
  return run.evaluate(task, model, draw=Draw(max_tokens=9), title='base')


def test_its_measure_is_reported(tmp_path):
  task = load(tmp_path, *ROWS)
  first = task.rows[0]
  assert (first.id, first.asked, first.answer) == ('1', 'say 1', '1')
  base, tuned = evaluated(task, [0, 1, 1, 1, 1]), evaluated(task, [0, 1, 2, 3, 1])
  assert [r.right for r in base] == [True, False, False, False]
  entry = comparison.compare(task, {'base': base, 'tuned': tuned})
  assert entry['kind'] == 'toy_task:AS_LONG'
  assert [m['title'] for m in entry['metrics'][:2]] == ['long enough', 'mean length']
  base, tuned = (entry['scores'][m] for m in ('base', 'tuned'))
  assert (base['right']['value'], tuned['right']['value']) == (0.25, 0.75)
  assert (base['length']['value'], tuned['length']['value']) == (1, 1.75)
  assert entry['differences'][0]['test']['name'] == 'exact McNemar'


def test_its_code_names_the_cached_results(tmp_path, monkeypatch):
  before = load(tmp_path, *ROWS).digest
  assert load(tmp_path, *ROWS).digest == before
  monkeypatch.setattr(tasks.named_object, 'fingerprint', lambda text: f'other {text}')
  assert load(tmp_path, *ROWS).digest != before


def test_its_rows_are_checked(tmp_path):
  with pytest.raises(DataError, match=r"rows.jsonl:1: '1111111111' is too long"):
    load(tmp_path, {'number': 1, 'question': 'q', 'result': '1' * 10})
  with pytest.raises(DataError, match=r"rows.jsonl:2: KeyError: 'number'"):
    load(tmp_path, ROWS[0], {'question': 'q', 'result': '1'})


def test_an_error_of_its_functions_names_the_row(tmp_path, monkeypatch):
  task = load(tmp_path, *ROWS)

  def use(**functions):
    monkeypatch.setattr(toy_task, 'AS_LONG', dataclasses.replace(toy_task.AS_LONG, **functions))

  def refused(text):
    with pytest.raises(DataError, match=rf'rows.jsonl:1: .*{text}'):
      evaluated(task, [0, 1, 1, 1, 1])

  use(score=lambda row, answer: {'right': answer.text[9]})
  refused('score of the completion .x.: IndexError')
  for value in (None, {}, True, [1], {'right': None}, {'right': 'yes'}, {'right': '1'}):
    use(score=lambda row, answer, v=value: v)
    refused('score of the completion .x.: ')
  for value in (float('nan'), float('inf'), (1, None), [[1]]):
    use(score=lambda row, answer, v=value: {'right': v})
    refused('right: got .*, expected a number or several')
  use(parse=lambda completion, prompt, row: completion.missing)
  refused('parse of the completion .x.: AttributeError')
  use(parse=lambda completion, prompt, row: 3)
  refused('parse of the completion .x.: returned 3; expected text')
  use(check=lambda row: row.missing)
  with pytest.raises(DataError, match=r'rows.jsonl:1: AttributeError'):
    load(tmp_path, *ROWS)
  use(read=lambda row: None)
  with pytest.raises(DataError, match=r'rows.jsonl:1: .*None'):
    load(tmp_path, *ROWS)


def test_an_error_of_a_kind_with_choices_names_the_row(tmp_path, monkeypatch):
  def use(**functions):
    own = dataclasses.replace(kinds.KINDS['choice'], **functions)
    monkeypatch.setattr(toy_task, 'AS_LONG', own)

  rows = [{'prompt': 'p', 'choices': ['a', 'b'], 'label': 'a'}] * 2
  for found in (None, 'a', ((), 'a'), (('a', 1), 'a'), (('a', 'b'), None)):
    use(choices=lambda row, f=found: f)
    with pytest.raises(DataError, match=r'rows.jsonl:1: '):
      load(tmp_path, *rows)
  for found in (2, 'a', None):
    use(choose=lambda row, likelihoods, priors, f=found: f)
    with pytest.raises(DataError, match=r'rows.jsonl:1: .*: choose: '):
      run.evaluate(
        load(tmp_path, *rows), text_model.TextModel(), draw=Draw(max_tokens=9), title='base'
      )


def test_a_value_that_only_some_rows_have_is_refused(tmp_path, monkeypatch):
  task = load(tmp_path, *ROWS)
  own = dataclasses.replace(
    toy_task.AS_LONG,
    score=lambda row, answer: {'right': True} | ({'length': 1} if row.id != '3' else {}),
  )
  monkeypatch.setattr(toy_task, 'AS_LONG', own)
  with pytest.raises(DataError, match=r"eval.tasks, long: the metric 'length' reads .* 'length'"):
    evaluated(task, [1] * 5)
  own = dataclasses.replace(
    own, score=lambda row, answer: {'right': True, 'length': (1.0,) * int(row.id)}
  )
  monkeypatch.setattr(toy_task, 'AS_LONG', own)
  with pytest.raises(DataError, match='as many numbers of every row'):
    evaluated(task, [1] * 5)


# Rewards and judges


def test_a_reward_is_a_task(tmp_path):
  """On rows without an answer too; all columns of the row are the reward's."""
  rows = [{'prompt': f'say {i}', 'level': i, 'answer': str(i)} for i in range(3)]
  task = load(tmp_path, *rows, kind='reward/toy_task:count_letters')
  found = evaluated(task, [4, 0, 2])
  assert [r.values for r in found] == [{'reward': (4.0,)}, {'reward': (0.0,)}, {'reward': (2.0,)}]
  entry = comparison.compare(task, {'base': found})
  assert entry['scores']['base']['reward']['value'] == 2
  task = load(tmp_path, *rows, kind='reward/length(at_most=1)')
  assert task.kind_name == 'reward/length(at_most=1)'
  short = evaluated(task, [4, 0, 2])
  assert len(short) == 3
  task = load(tmp_path, *rows, kind='reward/math')
  model = text_model.Says(lambda prompt: 'so it is 1')
  found = run.evaluate(task, model, draw=Draw(max_tokens=9), title='base')
  assert [r.values['reward'] for r in found] == [(0.0,), (1.0,), (0.0,)]


def test_a_judge_is_a_task(tmp_path):
  rows = [{'prompt': f'say {i}'} for i in range(3)]
  task = load(tmp_path, *rows, kind='judge/toy_task:prefer_short')
  results = {'base': evaluated(task, [4, 4, 4]), 'tuned': evaluated(task, [2, 4, 6])}
  found = function_kinds.judged(task.rows, task.kind, results, lambda: None)
  assert [r.values['win'] for r in found['tuned']] == [(1.0,), (0.5,), (0.0,)]


@pytest.mark.parametrize(
  ('entry', 'message'),
  [
    ('x=toy_tsk:AS_LONG:rows.jsonl', 'eval.tasks=toy_tsk:AS_LONG: cannot import toy_tsk'),
    ('x=toy_task:AS_LONGG:rows.jsonl', 'has no AS_LONGG; did you mean toy_task:AS_LONG'),
    ('x=toy_task:score:rows.jsonl', 'is a function .*; expected a ftjax.evaluation.kind.Kind'),
    ('x=toy_task:Kind:rows.jsonl', 'is a type; expected a ftjax.evaluation.kind.Kind'),
    ('x=judge/toy_task:AS_LONG:rows.jsonl', 'is a Kind; expected a function'),
    ('x=judge/toy_task:prefer_shrt:rows.jsonl', 'did you mean toy_task:prefer_short'),
    ('x=reward/toy_tsk:f:rows.jsonl', 'cannot import toy_tsk'),
    ('x=chioce:gs://bucket/x', "has the kind 'chioce'; did you mean choice.? Expected one of"),
    ('x=toy_task:rows.jsonl', "has the kind 'toy_task'; expected one of"),
    ('x=judge/toy_task:rows.jsonl', "has the kind 'judge/toy_task'; expected one of"),
  ],
)
def test_what_is_no_kind_is_refused_by_key(entry, message):
  c = config.default()
  c.model.path, c.data.train, c.steps, c.eval.tasks = 'somewhere', 'rows.jsonl', 10, (entry,)
  with pytest.raises(ConfigError, match=message):
    validation.validate(c)


@pytest.mark.parametrize(
  ('kind', 'message'),
  [
    ('reward/lenth', 'eval.tasks, reward/lenth: .*did you mean length'),
    ('reward/length(at_mst=3)', 'at_mst'),
    ('reward/length', 'expected one of them, a positive number'),
    ('reward/model', 'hand it in as a function'),
    ('reward/', 'expected'),
  ],
)
def test_a_reward_that_is_none_is_refused_before_the_run(tmp_path, kind, message):
  with pytest.raises(ConfigError, match=message):
    load(tmp_path, {'prompt': 'q'}, kind=kind)


def test_its_path_may_be_in_a_bucket():
  for kind in ('judge/m.n:f', 'reward/m:f', 'reward/format(think,answer)', 'reward/regex(a:(b))'):
    assert task_specs.parse(f'a={kind}:gs://b/x.jsonl') == ('a', kind, 'gs://b/x.jsonl')
  assert task_specs.parse('a=m.n:K:gs://b/x.jsonl') == ('a', 'm.n:K', 'gs://b/x.jsonl')
  assert task_specs.parse('a=match:b:c:d') == ('a', 'match', 'b:c:d')


def test_its_code_is_part_of_a_resume():
  c = config.default()
  c.eval.tasks = ('a=toy_task:AS_LONG:x.jsonl', 'b=match:y.jsonl')
  assert user_code.fingerprints(c).keys() == {'eval.tasks'}
  assert isinstance(toy_task, types.ModuleType)
