"""Runs compared from their files: which rows are the same, and what changed since."""

import json
import math

import pytest

from ftjax.evaluation import comparison, result
from ftjax.evaluation.result import Result
from ftjax.experiment import compare_runs
from ftjax.runtime.errors import DataError

N = 12


def write(path, label=lambda i: 'ab'[i % 2], count=N):
  rows = [{'prompt': f'q{i}', 'choices': ['a', 'b'], 'label': label(i)} for i in range(count)]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  monkeypatch.setattr(comparison, 'RESAMPLES', 50)
  monkeypatch.chdir(tmp_path)
  write(tmp_path / 'rows.jsonl')
  return tmp_path


def run(folder, name, right, label=lambda i: 'ab'[i % 2], digest=None, tasks=True, seed=0):
  """A workdir with the results of a task. right: i -> whether the tuned model is."""

  def results(is_right):
    return [
      Result(
        str(i + 1), label(i), label(i) if is_right(i) else '?', {'right': (float(is_right(i)),)}
      )
      for i in range(N)
    ]

  (folder / name / 'eval').mkdir(parents=True)
  entry = 't=label:rows.jsonl'
  config = {'eval.tasks': [entry] if tasks else [], 'seed': seed}
  (folder / name / 'config.json').write_text(json.dumps(config))
  models = {'base': results(lambda i: i % 2), 'tuned': results(right)}
  result.save(str(folder / name / 'eval' / 't.jsonl'), models)
  if digest:
    facts = {'kind': 'label', 'path': 'rows.jsonl', 'digest': digest, 'group': 'task'}
    summary = {'tasks': {'t': facts, 'general_texts': {**facts, 'group': 'general'}}}
    (folder / name / 'eval' / 'summary.json').write_text(json.dumps(summary))
  return name


def test_a_folder_that_is_called_base_is_not_the_base(folder):
  names = run(folder, 'base', lambda i: True), run(folder, 'tuned', lambda i: bool(i % 3))
  summary, _ = compare_runs.compare(names)
  assert summary['models'] == ['base', 'base (run)', 'tuned (run)']
  scores = summary['tasks']['t']['scores']
  assert scores['base']['accuracy']['value'] == 0.5
  assert scores['base (run)']['accuracy']['value'] == 1


def test_equal_ids_of_other_rows_are_other_rows(folder):
  run(folder, 'one', lambda i: True)
  run(folder, 'two', lambda i: True, label=lambda i: 'ba'[i % 2])
  with pytest.raises(DataError, match='two was evaluated on other rows than one'):
    compare_runs.compare(['one', 'two'])
  run(folder, 'three', lambda i: True, digest='x')
  run(folder, 'four', lambda i: True, digest='y')
  with pytest.raises(DataError, match='four was evaluated on other rows than three'):
    compare_runs.compare(['three', 'four'])


@pytest.mark.parametrize(
  'change',
  [lambda path: write(path, count=N - 1), lambda path: write(path, label=lambda i: 'ba'[i % 2])],
)
def test_a_file_that_changed_is_named(folder, change):
  runs = [run(folder, name, lambda i: True) for name in ('one', 'two')]
  change(folder / 'rows.jsonl')
  with pytest.raises(DataError, match=r'rows\.jsonl has changed since one was evaluated on it'):
    compare_runs.compare(runs)


def test_rows_that_are_not_found_name_the_folder(folder, monkeypatch):
  runs = [run(folder, name, lambda i: True) for name in ('one', 'two')]
  (folder / 'elsewhere').mkdir()
  monkeypatch.chdir(folder / 'elsewhere')
  with pytest.raises(DataError, match='start in the folder in which it was evaluated'):
    compare_runs.compare([str(folder / name) for name in runs])


def test_tasks_that_evaluate_ran_later_are_compared(folder):
  """config.json is that of the training."""
  runs = [run(folder, n, lambda i: True, digest='x', tasks=False) for n in ('one', 'two')]
  summary, _ = compare_runs.compare(runs)
  assert list(summary['tasks']) == ['t']


def test_a_figure_that_no_seed_has_is_null(folder, monkeypatch):
  runs = [run(folder, f'run{i}', lambda i: True, seed=i) for i in range(2)]
  mean = compare_runs.seeds.seed_mean

  def unknown(figure, *args, **kwargs):
    return mean(lambda weights: figure(weights) * math.nan, *args, **kwargs)

  monkeypatch.setattr(compare_runs.seeds, 'seed_mean', unknown)
  summary, _ = compare_runs.compare(runs)
  [found] = summary['tasks']['t']['seeds'].values()
  assert found['accuracy']['values'] == [None, None]
  json.dumps(summary, allow_nan=False)
