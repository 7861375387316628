"""Examples before the prompts of a task: which are drawn, and how they stand there."""

import json
from types import SimpleNamespace

import pytest
from test_saved_model import tiny, train

from ftjax.config import keys
from ftjax.data.formats import Chat
from ftjax.evaluation import shots, tasks
from ftjax.evaluation.shots import Shots
from ftjax.experiment import few_shot
from ftjax.runtime.errors import ConfigError, DataError


def chat(*contents, roles=('user', 'assistant')):
  turns = [{'role': roles[i % 2], 'content': c} for i, c in enumerate(contents)]
  return Chat(tuple(turns))


def test_examples_of_texts_are_paragraphs():
  found = Shots((('1 + 1 =', '2'), ('Q: ', 'A'), ('x', ' y'))).before('2 + 2 =')
  assert found == '1 + 1 = 2\n\nQ: A\n\nx y\n\n2 + 2 ='


def test_examples_of_conversations_are_turns_after_the_system_message():
  system = {'role': 'system', 'content': 'S'}
  example = Chat(({'role': 'system', 'content': 'other'}, *chat('one').messages))
  asked = Chat((system, *chat('two').messages), tools=({'name': 't'},))
  found = Shots(((example, 'A'),)).before(asked)
  assert found.messages == (system, *chat('one', 'A', 'two').messages)
  assert found.tools == asked.tools


def test_texts_and_conversations_do_not_mix():
  for example, asked in (('one', chat('two')), (chat('one'), 'two')):
    with pytest.raises(DataError, match=r'eval.shots: the examples are conversations'):
      Shots(((example, 'A'),)).before(asked)


def test_few_answers_come_in_turn():
  rows = [(f'p{i}', 'yes' if i < 90 else 'no') for i in range(100)]
  found = shots.choose(rows, 6, 0)
  assert [a for _, a in found.examples] in (['yes', 'no'] * 3, ['no', 'yes'] * 3)
  assert shots.choose(rows, 6, 0) == found != shots.choose(rows, 6, 1)
  assert shots.choose(rows, 3, 0).examples == found.examples[:3], 'a prefix of one order'
  free = shots.choose([(f'p{i}', f'a{i}') for i in range(100)], 6, 0)
  assert len({a for _, a in free.examples}) == 6


def test_more_examples_than_rows():
  with pytest.raises(DataError, match=r'eval.shots=4: there are 3 rows'):
    shots.choose([('p', 'a')] * 3, 4, 0)


def write(path, *rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


@pytest.fixture
def opened(tmp_path):
  """A run on rows of text, of which one is asked too; and a task."""

  def start(**settings):
    train = [{'prompt': f'{i} + 1 =', 'completion': str(i + 1)} for i in range(20)]
    path = write(tmp_path / 'train.jsonl', *train, {'text': 'a document'})
    c = keys.default()
    c.update_from_flattened_dict({'data.train': path} | settings)
    model = SimpleNamespace(tokenizer=SimpleNamespace(template=None))
    return SimpleNamespace(config=c, workdir=str(tmp_path), model=model)

  rows = [{'prompt': f'{i} + 1 =', 'answer': str(i + 1)} for i in range(18)]
  task = tasks.load_task('sums', 'match', write(tmp_path / 'test.jsonl', *rows))
  return start, task, tmp_path


def test_examples_are_training_rows_that_are_not_asked(opened):
  start, task, _ = opened
  assert few_shot.find(start(), task) is None
  found = few_shot.find(start(**{'eval.shots': 2}), task)
  assert sorted(found.examples) == [('18 + 1 =', '19'), ('19 + 1 =', '20')]
  with pytest.raises(DataError, match=r'eval.shots=3: there are 2 rows'):
    few_shot.find(start(**{'eval.shots': 3}), task)


def test_examples_of_another_source(opened):
  start, task, folder = opened
  rows = [{'prompt': 'a', 'answers': ['b', 'c']}, {'prompt': '1 + 1 =', 'answer': 'asked'}]
  path = write(folder / 'own.jsonl', *rows)
  run = start(**{'eval.shots': 1, 'eval.shots_from': (f'sums={path}',)})
  assert few_shot.find(run, task).examples == (('a', 'b'),)
  write(folder / 'own.jsonl', {'prompt': 'a'})
  with pytest.raises(DataError, match=r'own.jsonl:1: "answer"'):
    few_shot.find(run, task)


def test_no_row_of_the_form_of_the_task(opened):
  start, _, folder = opened
  row = {'messages': [{'role': 'user', 'content': 'q'}], 'answer': 'a'}
  task = tasks.load_task('chat', 'match', write(folder / 'chat.jsonl', row))
  with pytest.raises(ConfigError, match=r"eval.shots=1: .*conversations.*'chat=PATH'"):
    few_shot.find(start(**{'eval.shots': 1}), task)


def test_whole_texts_have_no_examples(opened):
  start, _, folder = opened
  task = tasks.load_task('ppl', 'perplexity', write(folder / 'text.jsonl', {'text': 'abc'}))
  assert few_shot.find(start(**{'eval.shots': 4}), task) is None


@pytest.mark.full
def test_a_run_compares_three_models_by_all_ways_to_respond(tmp_path):
  sums = [
    {'prompt': f'{a} + {a} =', 'choices': [str(2 * a), '1'], 'label': str(2 * a)}
    for a in range(1, 7)
  ]
  said = [{'prompt': f'{a} + 1 =', 'answer': str(a + 1)} for a in range(6)]
  own = [{'prompt': f'{a} + 9 =', 'answer': str(a + 9)} for a in range(6)]
  sums, said, own = (
    write(tmp_path / f'{n}.jsonl', *rows) for n, rows in (('s', sums), ('t', said), ('o', own))
  )
  own = tuple(f'{name}={own}' for name in ('said', 'mine', 'wins'))
  text = write(tmp_path / 'text.jsonl', *({'text': f'a text {i}'} for i in range(3)))
  c = tiny('sft', **{
    'steps': 2,
    'eval.every': 0,
    'eval.max_tokens': 3,
    'eval.batch_size': 8,
    'eval.samples': 2,
    'eval.temperature': 1.0,
    'eval.shots': 2,
    'eval.shots_from': (*own, f'sums={sums}'),
    'eval.tasks': (
      f'sums=choice:{sums}',
      f'said=match:{said}',
      f'mine=reward/length(at_most=2):{said}',
      f'wins=judge/test_comparison:always_first:{said}',
      f'text=perplexity:{text}',
    ),
  })  # fmt: skip
  with pytest.raises(DataError, match=r'eval.shots=2: there are 0 rows'):
    train(c, tmp_path / 'asked')  # the rows of `sums` are asked too
  c.eval.shots_from = own
  c.eval.tasks = c.eval.tasks[1:]
  workdir = train(c, tmp_path / 'run')
  summary = json.loads((workdir / 'eval' / 'summary.json').read_text())
  models = {name: list(task['scores']) for name, task in summary['tasks'].items()}
  three = ['base', 'base_shots', 'tuned']
  assert models == {'said': three, 'mine': three, 'wins': three, 'text': ['base', 'tuned']}
  assert summary['models'] == three
  wins = summary['tasks']['wins']['scores']
  assert [wins[m]['win']['value'] for m in three] == [0.5] * 3
  assert {'pass_at_2', 'maj_at_2'} <= summary['tasks']['said']['scores']['tuned'].keys()
  assert summary['tasks']['text']['scores']['tuned']['perplexity']['value'] > 1
