"""A kind of evaluation task outside of the package, with rows and a measure of its own; and what is
wrong with one is reported early. A run with it is in test_algorithm_seam.py.
"""

import dataclasses
import json
import types

import pytest
import toy_task

from ftjax import config
from ftjax.config import task_specs, user_code, validation
from ftjax.evaluation import report, run, tasks
from ftjax.runtime.errors import ConfigError, DataError


def load(tmp_path, *rows, kind='toy_task:AS_LONG'):
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  [task] = tasks.load_tasks(task_specs.parse_all([f'long={kind}:{path}']))
  return task


ROWS = [{'number': i, 'question': f'say {i}', 'result': '1' * i} for i in range(1, 5)]


def evaluated(task, texts):
  model = run.Functions(
    encode_prompt=lambda row: [int(row.id)],
    encode_choice=None,
    score=None,
    generate=lambda prompts, most: [p * texts[p[0]] for p in prompts],
    decode=lambda ids: 'x' * len(ids),
    prompt_text=lambda ids: 'prompt',
  )
  return run.evaluate(task, model, batch_size=2, max_len=99, max_tokens=9, title='base')


def test_its_measure_is_reported(tmp_path):
  task = load(tmp_path, *ROWS)
  first = task.rows[0]
  assert (first.id, first.prompt, first.answer) == ('1', 'say 1', '1')
  base, tuned = evaluated(task, [0, 1, 1, 1, 1]), evaluated(task, [0, 1, 2, 3, 1])
  assert [r.right for r in base] == [True, False, False, False]
  summary = report.compare(task, base, tuned)
  assert summary['kind'] == 'toy_task:AS_LONG'
  assert summary['base']['accuracy']['value'] == 0.25
  assert summary['tuned']['accuracy']['value'] == 0.75


def test_its_code_names_the_cached_results(tmp_path, monkeypatch):
  name = dict(model='m', template='t', settings={})
  before = run.cache_key(load(tmp_path, *ROWS), **name)
  assert run.cache_key(load(tmp_path, *ROWS), **name) == before
  monkeypatch.setattr(tasks.named_object, 'fingerprint', lambda text: f'other {text}')
  assert run.cache_key(load(tmp_path, *ROWS), **name) != before


def test_its_rows_are_checked(tmp_path):
  with pytest.raises(DataError, match=r"rows.jsonl:1: '1111111111' is too long"):
    load(tmp_path, {'number': 1, 'question': 'q', 'result': '1' * 10})
  with pytest.raises(DataError, match=r"rows.jsonl:2: KeyError: 'number'"):
    load(tmp_path, ROWS[0], {'question': 'q', 'result': '1'})


def test_an_error_of_its_functions_names_the_row(tmp_path, monkeypatch):
  task = load(tmp_path, *ROWS)

  def use(**functions):
    monkeypatch.setattr(toy_task, 'AS_LONG', dataclasses.replace(toy_task.AS_LONG, **functions))

  use(is_right=lambda completion, prompt, answer: completion[9] == answer)
  with pytest.raises(DataError, match=r'rows.jsonl:1: .*: is_right of .*: IndexError'):
    evaluated(task, [0, 1, 1, 1, 1])
  use(is_right=lambda completion, prompt, answer: None)
  with pytest.raises(DataError, match=r'is_right of .*: returned None; expected True or False'):
    evaluated(task, [0, 1, 1, 1, 1])
  use(check_answer=lambda answer: answer.missing)
  with pytest.raises(DataError, match=r'rows.jsonl:1: AttributeError'):
    load(tmp_path, *ROWS)


@pytest.mark.parametrize(
  ('entry', 'told'),
  [
    ('x=toy_tsk:AS_LONG:rows.jsonl', 'eval.tasks=toy_tsk:AS_LONG: cannot import toy_tsk'),
    ('x=toy_task:AS_LONGG:rows.jsonl', 'has no AS_LONGG; did you mean toy_task:AS_LONG'),
    ('x=toy_task:is_right:rows.jsonl', 'is a function .*; expected a ftjax.evaluation.tasks.Kind'),
    ('x=toy_task:Kind:rows.jsonl', 'is a type; expected a ftjax.evaluation.tasks.Kind'),
    ('x=chioce:gs://bucket/x', "has the kind 'chioce', expected one of"),
    ('x=toy_task:rows.jsonl', "has the kind 'toy_task', expected one of"),
  ],
)
def test_what_is_no_kind_is_refused_by_key(entry, told):
  c = config.default()
  c.model.path, c.data.train, c.steps, c.eval.tasks = 'somewhere', 'rows.jsonl', 10, (entry,)
  with pytest.raises(ConfigError, match=told):
    validation.validate(c)


def test_its_path_may_be_in_a_bucket():
  assert task_specs.parse('a=m.n:K:gs://b/x.jsonl') == ('a', 'm.n:K', 'gs://b/x.jsonl')
  assert task_specs.parse('a=match:b:c:d') == ('a', 'match', 'b:c:d')


def test_its_code_is_part_of_a_resume():
  c = config.default()
  c.eval.tasks = ('a=toy_task:AS_LONG:x.jsonl', 'b=match:y.jsonl')
  assert user_code.fingerprints(c).keys() == {'eval.tasks'}
  assert isinstance(toy_task, types.ModuleType)
