"""evaluation/run.py: with a small numpy language model, whose scores can be computed one by one."""

import dataclasses
import json
import math

import numpy as np
import pytest
from text_model import STOP, Says, TextModel, encode

from ftjax.data.formats import Chat
from ftjax.evaluation import result, run, shots, tasks
from ftjax.evaluation.model import Draw, Likelihood
from ftjax.evaluation.result import Result
from ftjax.evaluation.rows import Row
from ftjax.evaluation.tasks import Task
from ftjax.runtime.errors import DataError, NonFiniteError, StoppedEarly

DRAW = Draw(max_tokens=6)
CHOICES = ('yes', 'no', 'not at all')


def _task(kind, n=25):
  rng = np.random.default_rng(1)
  rows = []
  for i in range(n):
    prompt = 'x' + ''.join(rng.choice(list('abcdefgh '), rng.integers(1, 40)))
    choices = CHOICES if kind.startswith('choice') else ()
    choices = (prompt,) if kind == 'perplexity' else choices
    answers = () if kind == 'perplexity' else (choices[i % 3] if choices else '7',)
    asked = None if kind == 'perplexity' else prompt
    rows.append(Row(f'r{i}', f'f:{i}', asked, choices, answers))
  classes = tuple(sorted(CHOICES)) if kind.startswith('choice') else ()
  return Task('toy', kind, 'f', tuple(rows), 'd' * 64, classes)


def _run(task, model, draw=DRAW, examples=None):
  return run.evaluate(task, model, draw=draw, title='base', shots=examples)


def test_scores_equal_the_sum_over_the_choice_and_the_stop_token():
  task, model = _task('choice'), TextModel()
  for row, found in zip(task.rows, _run(task, model), strict=True):
    for choice, score in zip(row.choices, found.scores, strict=True):
      prompt, ids = encode(row.asked), [*encode(choice), STOP]
      logp = model.logp(prompt + ids)
      # The token at t is predicted from t - 1: from the prompt's last token on.
      expected = sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(ids))
      assert score == pytest.approx(expected, rel=1e-6)
    assert found.prediction == row.choices[int(np.argmax(found.scores))]
    assert found.right == (found.prediction == row.answer)
    assert (found.id, found.label) == (row.id, row.answer)
    assert found.tokens == sum(len(c) + 1 for c in row.choices)


@pytest.mark.parametrize('kind', ['choice', 'choice_by_prior', 'match', 'perplexity'])
def test_a_row_is_scored_as_it_is_alone(kind):
  task = _task(kind, 14)
  expected = _run(task, TextModel())
  assert len({r.prediction for r in expected}) > 1
  back = dataclasses.replace(task, rows=task.rows[::-1])
  assert _run(back, TextModel())[::-1] == expected
  alone = dataclasses.replace(task, rows=task.rows[7:8])
  assert _run(alone, TextModel()) == expected[7:8]


def test_choices_by_length_and_by_prior_equal_hand_arithmetic():
  for kind in ('choice_by_length', 'choice_by_prior'):
    task, model = _task(kind), TextModel()
    for row, found in zip(task.rows, _run(task, model), strict=True):
      logps = [model.likelihood(encode(row.asked), [*encode(c), STOP]).logp for c in row.choices]
      priors = [model.likelihood(encode('N/A'), [*encode(c), STOP]).logp for c in row.choices]
      by_length = [x / len(c) for x, c in zip(logps, row.choices, strict=True)]
      above = [x - p for x, p in zip(logps, priors, strict=True)]
      best = int(np.argmax(by_length if kind == 'choice_by_length' else above))
      assert found.prediction == row.choices[best]


def test_a_prior_keeps_the_conversation_but_its_last_turn():
  system = {'role': 'system', 'content': 'S'}
  chat = Chat((system, {'role': 'user', 'content': 'question'}))
  row = Row('1', 'f:1', chat, CHOICES, ('no',))
  task, model = dataclasses.replace(_task('choice_by_prior'), rows=(row,)), TextModel()
  asked = []
  model.score = lambda prompts, *a: asked.extend(prompts) or TextModel.score(model, prompts, *a)
  _run(task, model)
  assert [p.messages for p in asked] == [
    (system, {'role': 'user', 'content': 'question'}),
    (system, {'role': 'user', 'content': 'N/A'}),
  ]


def test_whole_texts_are_scored_from_their_first_token():
  task, model = _task('perplexity', 3), TextModel()
  for row, found in zip(task.rows, _run(task, model), strict=True):
    assert found.scores == (model.likelihood([STOP], encode(row.choices[0])).logp,)
    assert found.tokens == len(row.choices[0])


def test_rows_may_offer_different_numbers_of_choices():
  rows = [Row(f'r{i}', f'f:{i}', 'x' * (5 + i), CHOICES[: 2 + i % 2], ('no',)) for i in range(7)]
  task = Task('toy', 'choice', 'f', tuple(rows), 'd' * 64)
  assert [len(r.scores) for r in _run(task, TextModel())] == [2, 3, 2, 3, 2, 3, 2]


@pytest.mark.parametrize('logp', [math.nan, math.inf, -math.inf])
def test_a_model_with_nan_logits_is_no_evaluation(logp):
  model = TextModel()
  model.score = lambda prompts, responses, *_: [
    tuple(Likelihood(logp, 1) for _ in own) for own in responses
  ]
  with pytest.raises(NonFiniteError, match=r'f:0.*base'):
    _run(_task('choice'), model)


def test_a_number_is_found_in_a_completion():
  task = _task('math', 3)
  said = iter(['It is 7.', '#### 8', 'nothing'])
  results = _run(task, Says(lambda prompt: next(said)))
  assert [r.right for r in results] == [True, False, False]
  assert [r.response for r in results] == ['It is 7.', '#### 8', 'nothing']
  assert all(r.scores == () for r in results)


def test_generated_text_is_matched_after_normalizing():
  said = iter(['"7."', '77', ' 7 '])
  results = _run(_task('match', 3), Says(lambda prompt: next(said)))
  assert [r.right for r in results] == [True, False, True]


def test_samples_are_results_of_one_prompt():
  draw = dataclasses.replace(DRAW, samples=3, temperature=2.0)
  found = _run(_task('match', 4), TextModel(), draw)
  assert [(r.id, r.sample) for r in found] == [(f'r{i}', k) for i in range(4) for k in range(3)]
  assert len({r.response for r in found}) > 4
  assert _run(_task('match', 4), TextModel(), draw) == found
  scored = _run(_task('choice', 4), TextModel(), draw)
  assert [r.sample for r in scored] == [0] * 4, 'log-probabilities are asked for once'


def test_a_stop_during_a_function_of_the_user_is_no_error_of_it():
  def stopped(*_):
    raise StoppedEarly('SIGTERM')

  with pytest.raises(StoppedEarly):
    tasks.call(stopped, None)


def test_a_process_that_evaluates_alone_waits_for_no_other(monkeypatch):
  """The others are not in `evaluate`: a value sent to them would be taken for the next one."""

  def shared(make):
    raise AssertionError('sent to the other processes')

  monkeypatch.setattr(run.processes, 'from_main', shared)
  task = _task('reward/length(at_most=3)', 2)
  found = run.evaluate(task, Says(lambda p: 'a'), draw=DRAW, title='served', from_main=run.alone)
  assert [r.values for r in found] == [{'reward': (0.0,)}] * 2


def test_examples_stand_before_every_prompt():
  examples = shots.Shots((('one', 'A'), ('two', 'B')))
  seen = []
  _run(_task('match', 2), Says(lambda prompt: seen.append(prompt) or 'x'), examples=examples)
  assert [p[:18] for p in seen] == ['one A\n\ntwo B\n\nx' + s[15:18] for s in seen]
  assert len({p[14:] for p in seen}) == 2


def test_an_error_of_a_kind_names_the_row_and_the_completion():
  task = _task('match', 2)
  row = dataclasses.replace(task.rows[1], columns={'calls': 'rubbish'})
  task = dataclasses.replace(task, kind_name='tool_calls', rows=(task.rows[0], row))
  with pytest.raises(DataError, match=r"f:1: tool_calls: score of the completion 'x'"):
    _run(task, Says(lambda prompt: 'x'))


def test_results_survive_the_file_bitwise(tmp_path):
  base = _run(_task('choice'), TextModel())
  tuned = [dataclasses.replace(r, prediction='Ja\u2028 ✓', scores=(-0.1, -1e-30)) for r in base]
  path = str(tmp_path / 'toy.jsonl')
  result.save(path, {'base': base, 'tuned': tuned})
  assert result.load(path) == {'base': base, 'tuned': tuned}
  first = json.loads((tmp_path / 'toy.jsonl').read_text().split('\n')[0])
  assert first.keys() == {'model', *(f.name for f in dataclasses.fields(Result))}
  assert first['values']['right'] in ([0.0], [1.0])


@pytest.mark.parametrize(
  'line', ['{"model": "base"}', '[]', '3', '{"model": "base", "values": 3}', '{']
)
def test_a_broken_results_file_is_named(tmp_path, line):
  path = tmp_path / 'toy.jsonl'
  result.save(str(path), {'base': [Result('1', 'a', 'a', {'right': (1.0,)})]})
  path.write_text(path.read_text() + line + '\n')
  with pytest.raises(DataError, match=r'toy\.jsonl:2'):
    result.load(str(path))


def test_the_base_is_asked_once(tmp_path):
  task, asked = _task('choice'), []
  ids = [row.id for row in task.rows]

  def make():
    asked.append(1)
    return _run(task, TextModel())

  folder = str(tmp_path / 'cache')
  assert not run.is_cached(folder, 'k1', 'toy')
  first = run.cached(folder, 'k1', 'toy', make, ids)
  assert run.is_cached(folder, 'k1', 'toy')
  assert run.cached(folder, 'k1', 'toy', make, ids) == first and len(asked) == 1
  run.cached(folder, 'k2', 'toy', make, ids)
  assert len(asked) == 2
  with pytest.raises(DataError, match='delete it'):
    run.cached(folder, 'k1', 'toy', make, ids[:-1])


def test_the_cache_key_differs_for_everything_that_changes_a_score(monkeypatch):
  given = {'model': 'm', 'template': 't', 'settings': {'max_tokens': 8, 'compute_dtype': 'float32'}}
  key = run.cache_key('choice', 'd', **given)
  swapped = {'compute_dtype': 'float32', 'max_tokens': 8}
  assert run.cache_key('choice', 'd', **(given | {'settings': swapped})) == key
  others = [
    run.cache_key('choice', 'd', **(given | {'model': 'n'})),
    run.cache_key('choice', 'd', **(given | {'template': 'u'})),
    run.cache_key('choice', 'd', **(given | {'settings': swapped | {'max_tokens': 9}})),
    run.cache_key('choice', 'e', **given),
    run.cache_key('match', 'd', **given),
  ]
  monkeypatch.setattr(run.tasks, 'VERSION', 999)
  others.append(run.cache_key('choice', 'd', **given))
  assert len({key, *others}) == 7


def test_a_part_of_a_task_is_a_prefix_of_one_order():
  task = _task('choice')
  back = dataclasses.replace(task, rows=task.rows[::-1])
  small, large = ({r.id for r in task.first(n, 0).rows} for n in (5, 11))
  assert len(small) == 5 and small < large
  assert {r.id for r in back.first(5, 0).rows} == small
  assert {r.id for r in task.first(5, 1).rows} != small
  assert task.first(5, 0).digest != task.digest and task.first(25, 0) is task
