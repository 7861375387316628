"""evaluation/run.py: with a small numpy language model, whose scores can be computed one by one."""

import dataclasses

import numpy as np
import pytest

from ftjax.evaluation import run
from ftjax.evaluation.run import Functions, Result
from ftjax.evaluation.tasks import Row, Task
from ftjax.runtime.errors import DataError, NonFiniteError

VOCAB, STOP = 30, 1


def _log_softmax(x):
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


class Toy:
  """A causal model that sees everything before: logits = (discounted sum of embeddings) @ head."""

  def __init__(self):
    rng = np.random.default_rng(0)
    self.embed = rng.normal(size=(VOCAB, 8))
    self.where = rng.normal(size=(512, 8))
    self.head = rng.normal(size=(8, VOCAB))
    self.shapes = []

  def logp(self, tokens, positions):
    """[T] -> [T, V]."""
    x = self.embed[tokens] + self.where[positions]
    state = np.zeros(8)
    out = []
    for row in x:
      state = 0.7 * state + row
      out.append(_log_softmax(state @ self.head))
    return np.array(out)

  def score(self, prompts, choices):
    self.shapes.append((len(prompts), len(choices[0])))
    out = []
    for prompt, row in zip(prompts, choices, strict=True):
      out.append([])
      for ids in row:
        logp = self.logp(np.array(prompt + ids), np.arange(len(prompt + ids)))
        out[-1].append(sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(ids)))
    return np.array(out)

  def generate(self, prompts, max_tokens):
    self.shapes.append(len(prompts))
    outputs = []
    for prompt in prompts:
      ids = list(prompt)
      while len(ids) < len(prompt) + max_tokens:
        token = int(self.logp(np.array(ids), np.arange(len(ids)))[-1].argmax())
        if token == STOP:
          break
        ids.append(token)
      outputs.append(ids[len(prompt) :])
    return outputs


def _encode(text):
  return [2 + ord(c) % (VOCAB - 2) for c in text]


def _functions(toy, **other):
  return Functions(
    **{
      'encode_prompt': lambda row: _encode(row.prompt),
      'encode_choice': lambda row, choice: [*_encode(choice), STOP],
      'score': toy.score,
      'generate': toy.generate,
      'decode': lambda ids: ' '.join(map(str, ids)),
      'prompt_text': lambda ids: ' '.join(map(str, ids)),
      **other,
    }
  )


def _task(kind, n=25):
  rng = np.random.default_rng(1)
  rows = []
  for i in range(n):
    prompt = 'x' + ''.join(rng.choice(list('abcdefgh '), rng.integers(1, 120)))
    choices = ('yes', 'no', 'not at all') if kind == 'choice' else ()
    answer = choices[i % 3] if choices else '7'
    rows.append(Row(f'r{i}', f'f:{i}', None, prompt, choices, answer))
  return Task('toy', kind, 'f', tuple(rows), 'd' * 64, tuple(sorted(rows[0].choices)) or None)


def _run(task, toy, batch_size=4, **other):
  options = {'max_len': 256, 'max_tokens': 6, 'title': 'base'}
  return run.evaluate(task, _functions(toy, **other), batch_size=batch_size, **options)


def test_scores_equal_the_sum_over_the_choice_and_the_stop_token():
  task, toy = _task('choice'), Toy()
  for row, result in zip(task.rows, _run(task, toy), strict=True):
    for choice, score in zip(row.choices, result.scores, strict=True):
      prompt, ids = _encode(row.prompt), [*_encode(choice), STOP]
      logp = toy.logp(np.array(prompt + ids), np.arange(len(prompt + ids)))
      # The token at t is predicted from t - 1: from the prompt's last token on.
      expected = sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(ids))
      assert score == pytest.approx(expected, rel=1e-6)
    assert result.prediction == row.choices[int(np.argmax(result.scores))]
    assert result.right == (result.prediction == row.answer)
    assert (result.id, result.label) == (row.id, row.answer)


@pytest.mark.parametrize('kind', ['choice', 'match'])
def test_batch_size_and_order_do_not_matter(kind):
  task = _task(kind, 14)
  expected = _run(task, Toy(), batch_size=1)
  assert len({r.prediction for r in expected}) > 1
  for batch_size in (3, 4, 16, 64):
    assert _run(task, Toy(), batch_size) == expected
  back = dataclasses.replace(task, rows=task.rows[::-1])
  assert _run(back, Toy())[::-1] == expected
  alone = dataclasses.replace(task, rows=task.rows[7:8])
  assert _run(alone, Toy()) == expected[7:8]


def test_shapes_are_few():
  toy = Toy()
  _run(_task('choice'), toy, batch_size=8)
  assert toy.shapes == [(8, 3)] * 4  # 25 rows of 3 choices
  toy = Toy()
  _run(_task('match'), toy, batch_size=8)
  assert toy.shapes == [8] * 4  # 25 rows


def test_rows_may_offer_different_numbers_of_choices():
  rows = [
    Row(f'r{i}', f'f:{i}', None, 'x' * (5 + i), ('yes', 'no', 'maybe')[: 2 + i % 2], 'no')
    for i in range(7)
  ]
  toy = Toy()
  results = _run(Task('toy', 'choice', 'f', tuple(rows), 'd' * 64, None), toy, batch_size=4)
  assert [len(r.scores) for r in results] == [2, 3, 2, 3, 2, 3, 2]
  assert sorted(toy.shapes) == [(4, 2), (4, 3)]


def test_a_row_of_exactly_the_limit_fits_and_one_token_more_does_not():
  row = Row('1', 'f:1', None, 'x' * 60, ('yes', 'no'), 'no')
  task = Task('t', 'choice', 'f', (row,), 'd', ('no', 'yes'))
  length = 60 + len('yes') + 1
  functions = _functions(Toy())
  options = {'batch_size': 2, 'max_tokens': 4, 'title': 'base'}
  run.evaluate(task, functions, max_len=length, **options)
  with pytest.raises(DataError, match=r'f:1: 64 tokens.*63'):
    run.evaluate(task, functions, max_len=length - 1, **options)
  match = dataclasses.replace(task, kind='match')
  run.evaluate(match, functions, max_len=64, **options)
  with pytest.raises(DataError, match='f:1'):
    run.evaluate(match, functions, max_len=63, **options)


def test_an_empty_prompt_is_refused():
  with pytest.raises(DataError, match='no tokens'):
    _run(_task('choice', 2), Toy(), encode_prompt=lambda row: [])


def test_a_model_with_nan_logits_is_no_evaluation():
  def broken(prompts, choices):
    return np.full((len(prompts), len(choices[0])), np.nan, np.float32)

  with pytest.raises(NonFiniteError, match=r'f:0.*base'):
    _run(_task('choice'), Toy(), score=broken)


def test_a_number_is_found_in_a_completion():
  task = _task('math', 3)
  said = iter(['It is 7.', '#### 8', 'nothing'])
  results = _run(task, Toy(), decode=lambda _: next(said), batch_size=1)
  assert sorted(r.right for r in results) == [False, False, True]
  assert all(r.scores == () for r in results)


def test_generated_text_is_matched_after_normalizing():
  task = _task('match', 3)
  said = {6: '"7."', 7: '77', 8: ' 7 '}
  prompts = iter([6, 7, 8])
  results = _run(
    task,
    Toy(),
    encode_prompt=lambda row: [5] * next(prompts),
    generate=lambda prompts, _: [[len(p)] for p in prompts],
    decode=lambda ids: said[ids[0]],
  )
  assert [r.right for r in results] == [True, False, True]
  assert [r.prediction for r in results] == ['"7."', '77', '7']


def test_results_survive_the_file_bitwise(tmp_path):
  task = _task('choice')
  base = _run(task, Toy())
  tuned = [dataclasses.replace(r, prediction='Ja\u2028 ✓', scores=(-0.1, -1e-30)) for r in base]
  path = str(tmp_path / 'toy.jsonl')
  run.save(path, {'base': base, 'tuned': tuned})
  assert run.load(path) == {'base': base, 'tuned': tuned}
  first = (tmp_path / 'toy.jsonl').read_text().split('\n')[0]
  for key in ('model', 'id', 'label', 'prediction', 'right', 'scores'):
    assert f'"{key}"' in first


def test_a_broken_results_file_is_named(tmp_path):
  path = tmp_path / 'toy.jsonl'
  run.save(str(path), {'base': [Result('1', 'a', 'a', True, (0.0,))]})
  path.write_text(path.read_text() + '{"model": "base"}\n')
  with pytest.raises(DataError, match=r'toy\.jsonl:2'):
    run.load(str(path))


def test_the_base_is_asked_once(tmp_path):
  task, asked = _task('choice'), []

  def make():
    asked.append(1)
    return _run(task, Toy())

  folder = str(tmp_path / 'cache')
  first, was_there = run.cached(folder, 'k1', task, make)
  assert not was_there
  second, was_there = run.cached(folder, 'k1', task, make)
  assert was_there and second == first and len(asked) == 1
  run.cached(folder, 'k2', task, make)
  assert len(asked) == 2
  other = dataclasses.replace(task, rows=task.rows[:-1])
  with pytest.raises(DataError, match='delete it'):
    run.cached(folder, 'k1', other, make)


def test_the_cache_key_differs_for_everything_that_changes_a_score(monkeypatch):
  task = _task('choice')
  given = {'model': 'm', 'template': 't', 'settings': {'max_tokens': 8, 'compute_dtype': 'float32'}}
  key = run.cache_key(task, **given)
  swapped = {'compute_dtype': 'float32', 'max_tokens': 8}
  assert run.cache_key(task, **(given | {'settings': swapped})) == key
  renamed = dataclasses.replace(task, name='other', path='elsewhere')
  assert run.cache_key(renamed, **given) == key
  others = [
    run.cache_key(task, **(given | {'model': 'n'})),
    run.cache_key(task, **(given | {'template': 'u'})),
    run.cache_key(task, **(given | {'settings': swapped | {'max_tokens': 9}})),
    run.cache_key(dataclasses.replace(task, digest='e' * 64), **given),
    run.cache_key(dataclasses.replace(task, kind='match'), **given),
  ]
  monkeypatch.setattr(run.tasks, 'VERSION', 999)
  others.append(run.cache_key(task, **given))
  assert len({key, *others}) == 7
