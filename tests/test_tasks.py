"""evaluation/tasks.py: what a task file may hold, and that a bad line is named."""

import hashlib
import json
import pathlib

import pytest

from ftjax.config import keys, task_specs, validation
from ftjax.evaluation import kinds, tasks
from ftjax.evaluation.kind import Answer
from ftjax.runtime.errors import ConfigError, DataError

CHOICE = {'prompt': 'Is it good?', 'choices': ['yes', 'no'], 'label': 'no'}
MATCH = {'messages': [{'role': 'user', 'content': 'Capital of France?'}], 'answer': 'Paris'}


def _file(tmp_path, *rows):
  path = tmp_path / 'test.jsonl'
  lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
  path.write_text('\n'.join(lines) + '\n')
  return str(path)


def is_right(kind, completion, prompt, row):
  kind = kinds.KINDS[kind]
  answer = Answer(text=completion, prediction=kind.parse(completion, prompt, row), prompt=prompt)
  return kind.score(row, answer)['right']


def test_parse_spec():
  spec = 'sentiment=choice:.cache/a=b:c.jsonl'
  assert task_specs.parse(spec) == ('sentiment', 'choice', '.cache/a=b:c.jsonl')


@pytest.mark.parametrize(
  'spec', ['x', 'x=y', 'x=choice:', '=choice:a', '../x=choice:a', 'x=chioce:a', 'a b=match:c', '']
)
def test_bad_specs_name_the_config_key(spec):
  with pytest.raises(ConfigError, match=r'eval\.tasks') as e:
    task_specs.parse(spec)
  assert e.value.exit_code == 2


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'eval.in_loop': ('b',)}, r"eval\.in_loop: 'b'; expected names of eval\.tasks"),
    ({'eval.in_loop': ('arc_easy',)}, 'without those of lm-eval'),
    ({'eval.in_loop': ('a', 'a')}, 'each name once'),
    ({'eval.in_loop': ('a',), 'eval.every': 0}, r'eval\.in_loop needs eval\.every'),
    ({'eval.max_share': 0.0}, r'eval\.max_share=0\.0; expected a share'),
    ({'eval.samples': 2}, 'would give equal completions'),
    ({'eval.stop': ('',)}, r"eval\.stop: got ''"),
    ({'eval.stop': (3,)}, r'eval\.stop: got 3'),
    ({'eval.shots_from': (3,)}, r'eval\.shots_from: got 3'),
    ({'eval.shots_from': ('b=x',)}, r"eval\.shots_from: 'b=x'"),
    ({'eval.shots_from': ('a=x', 'a=y')}, 'one source of each task'),
    ({'eval.shots_from': ('a=x',), 'eval.shots': 0}, r'eval\.shots is 0'),
  ],
)
def test_keys_that_cannot_be_meant(changes, message):
  c = keys.default()
  c.model.path, c.data.train, c.steps, c.eval.every, c.eval.shots = 'x', 'rows.jsonl', 10, 2, 1
  c.eval.tasks, c.eval.in_loop = ('a=match:x', 'lm_eval:arc_easy'), ('a',)
  c.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=message):
    validation.validate(c)


def test_load_choice_rows(tmp_path):
  messages = [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'u'}]
  path = _file(
    tmp_path,
    CHOICE,
    '',
    {'id': 'b7', 'messages': messages, 'choices': ['no', 'yes'], 'label': 1, 'source': 'x'},
  )
  (task,) = tasks.load_tasks([('q', 'choice', path)])
  one, two = task.rows
  assert (one.id, one.place, one.asked, one.choices, one.answers) == (
    '1', f'{path}:1', 'Is it good?', ('yes', 'no'), ('no',),
  )  # fmt: skip
  assert (two.id, two.asked.messages, two.choices, two.answer) == (
    'b7', tuple(messages), ('no', 'yes'), 'yes',
  )  # fmt: skip
  assert (two.question, two.columns) == ('u', {'source': 'x'})
  assert task.classes == ('no', 'yes')
  assert task.digest == hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def test_rows_with_choices_of_their_own_have_no_classes(tmp_path):
  path = _file(tmp_path, CHOICE, CHOICE | {'choices': ['no', 'maybe']})
  assert tasks.load_task('q', 'choice', path).classes == ()
  assert tasks.load_task('m', 'match', _file(tmp_path, MATCH)).classes == ()


@pytest.mark.parametrize(
  ('kind', 'row', 'reason'),
  [
    ('choice', '{"prompt": ', 'Expecting value'),
    ('choice', '[1]', 'a JSON list, expected an object'),
    ('choice', CHOICE | {'label': 'perhaps'}, r"label.*\['yes', 'no'\].*'perhaps'"),
    ('choice', CHOICE | {'label': 2}, 'label'),
    ('choice', CHOICE | {'label': -1}, 'label'),
    ('choice', CHOICE | {'label': True}, 'label'),
    ('choice', {'prompt': 'x', 'choices': ['a', 'b']}, 'label.*None'),
    ('choice', CHOICE | {'choices': ['no']}, 'choices'),
    ('choice', CHOICE | {'choices': ['no', 'no']}, 'choices'),
    ('choice', CHOICE | {'choices': ['no', '']}, 'choices'),
    ('choice', CHOICE | {'choices': 'no'}, 'choices'),
    ('choice', CHOICE | {'prompt': ' '}, 'prompt.*not empty'),
    ('choice', CHOICE | {'messages': MATCH['messages']}, 'one of "messages" and "prompt"'),
    ('choice', {'choices': ['a', 'b'], 'label': 'a'}, 'neither'),
    ('choice', CHOICE | {'id': [1]}, 'id'),
    ('match', {'prompt': 'x', 'answer': 42}, 'answer.*42'),
    ('match', {'prompt': 'x'}, 'answer.*nothing'),
    ('match', MATCH | {'messages': []}, 'messages'),
    ('match', MATCH | {'messages': [{'role': 'user'}]}, r"messages\[0\]: no key 'content'"),
    ('match', MATCH | {'messages': [{'role': 'robot', 'content': 'x'}]}, 'robot'),
    ('match', MATCH | {'messages': [{'role': 'assistant', 'content': 'x'}]}, 'leave it out'),
    ('math', MATCH | {'answer': 'so it is\n#### '}, 'no answer to compare with'),
  ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, kind, row, reason):
  good = CHOICE if kind == 'choice' else MATCH
  path = _file(tmp_path, good, row)
  with pytest.raises(DataError, match=rf'test\.jsonl:2: .*{reason}') as e:
    tasks.load_task('t', kind, path)
  assert e.value.exit_code == 3


def test_several_bad_rows_are_reported_together(tmp_path):
  path = _file(tmp_path, CHOICE, *['{}'] * 8)
  with pytest.raises(DataError) as e:
    tasks.load_task('t', 'choice', path)
  message = str(e.value)
  assert [f'{path}:{i}:' in message for i in range(1, 10)] == [False] + [True] * 5 + [False] * 3
  assert '3 more' in message


def test_files_that_cannot_be_used(tmp_path):
  with pytest.raises(DataError, match=r"no such file or folder .*task 't'"):
    tasks.load_task('t', 'choice', str(tmp_path / 'none.jsonl'))
  with pytest.raises(DataError, match='no rows'):
    tasks.load_task('t', 'choice', _file(tmp_path, '', ' '))
  with pytest.raises(DataError, match=r"test\.jsonl:2: id 'a' stands on line 1"):
    tasks.load_task('t', 'choice', _file(tmp_path, CHOICE | {'id': 'a'}, CHOICE | {'id': 'a'}))
  (tmp_path / 'latin.jsonl').write_bytes(b'{"prompt": "\xe9"}\n')
  with pytest.raises(DataError, match=r'latin\.jsonl:1: not UTF-8'):
    tasks.load_task('t', 'choice', str(tmp_path / 'latin.jsonl'))
  with pytest.raises(ConfigError, match='twice'):
    task_specs.parse_all(['a=match:x', 'a=choice:y'])


@pytest.mark.parametrize(
  ('said', 'flexible', 'strict'),
  [
    ('First 6 + 12.\n#### 18', True, True),
    ('So it is \\boxed{18}.', True, True),
    ('She has 18 apples.', True, False),
    ('#### 18 and some more\n', True, False),
    ('It is 18 or 19', False, False),
    ('#### 19', False, False),
    ('', False, False),
    ('How many? #### 18?', False, False),
  ],
)
def test_math_is_graded_as_by_the_reward(tmp_path, said, flexible, strict):
  row = {'messages': [{'role': 'user', 'content': 'How many?'}], 'answer': 'Six and 12.\n#### 18'}
  path = _file(tmp_path, row)
  for kind, right in (('math', flexible), ('math_strict', strict)):
    task = tasks.load_task('t', kind, path)
    assert is_right(kind, said, '<user>How many?<assistant>', task.rows[0]) == right


def test_a_thought_that_the_prompt_opened_is_no_answer(tmp_path):
  row = {'messages': [{'role': 'user', 'content': 'How many?'}], 'answer': '18'}
  (question,) = tasks.load_task('t', 'math', _file(tmp_path, row)).rows
  prompt = '<user>How many?<assistant><think>\n'
  assert not is_right('math', 'perhaps 6 + 12 = 18', prompt, question)
  assert is_right('math', 'perhaps</think>\\boxed{18}', prompt, question)


TOOLS = [{'type': 'function', 'function': {'name': 'add'}}]


def test_rows_ask_as_rows_of_training_do(tmp_path):
  user = {'role': 'user', 'content': 'Capital of France?'}
  more = {
    'system': 'S',
    'tools': TOOLS,
    'chat_template_kwargs': {'style': 'dry'},
    'answer': 'Paris',
  }
  path = _file(
    tmp_path,
    {'messages': [user]} | more,
    {'prompt': [user]} | more | {'tools': json.dumps(TOOLS), 'source': 'x'},
    {'conversations': [{'from': 'human', 'value': user['content']}]} | more,
    {'prompt': 'Capital of France?', 'answer': 'Paris'},
  )
  *chats, plain = tasks.load_task('t', 'match', path).rows
  for row in chats:
    assert row.asked.messages == ({'role': 'system', 'content': 'S'}, user)
    assert row.asked.tools == tuple(TOOLS) and row.asked.template_kwargs == {'style': 'dry'}
  assert plain.asked == plain.question == 'Capital of France?'


def test_columns_that_are_not_read_are_listed_once(tmp_path, caplog):
  caplog.set_level('INFO')
  tasks.load_task('t', 'match', _file(tmp_path, MATCH | {'site': 'x'}, MATCH | {'level': 3}))
  assert caplog.text.count('columns not read: level, site') == 1


@pytest.mark.parametrize(
  ('row', 'reason'),
  [
    (
      MATCH | {'system': 'S', 'messages': [{'role': 'system', 'content': 's'}]},
      "the column 'system'",
    ),
    ({'prompt': 'q', 'answer': 'a', 'system': 'S'}, "'system' belongs to a conversation"),
    (MATCH | {'messages': [*MATCH['messages'], {'role': 'assistant', 'content': 'P'}]},
     '"messages" ends with the assistant'),
    (MATCH | {'tools': '['}, "'tools' is a string but not JSON"),
    ({'conversations': [{'from': 'gpt', 'value': 'a'}], 'answer': 'a'}, 'leave it out'),
  ],
)  # fmt: skip
def test_rows_that_do_not_ask_are_refused(tmp_path, row, reason):
  with pytest.raises(DataError, match=rf'test\.jsonl:1: .*{reason}'):
    tasks.load_task('t', 'match', _file(tmp_path, row))


def test_choices_in_csv_and_tasks_of_several_files(tmp_path):
  for name, label in (('a', 'no'), ('b', '1')):
    (tmp_path / f'{name}.csv').write_text(
      f'prompt,choices,label,id\nIs it?,"[""yes"", ""no""]",{label},\n'
    )
  task = tasks.load_task('t', 'choice', str(tmp_path))
  assert [(r.answer, r.id) for r in task.rows] == [('no', 'a.csv:2'), ('no', 'b.csv:2')]
  assert tasks.load_task('t', 'choice', f'{tmp_path}/*.csv').digest == task.digest
  assert tasks.load_task('t', 'choice', f'{tmp_path}/a.csv').rows[0].id == '2'
  with pytest.raises(ConfigError, match='leave the @weight out'):
    tasks.load_task('t', 'choice', f'{tmp_path}@2')
