"""Tasks during training: their figures, cost and rows; checkpoints chosen by them; stops and
resumes.
"""

import json
import logging
import os
import shutil
import signal
import types

import pytest
from test_saved_model import tiny, train
from text_model import Says

from ftjax.config import keys
from ftjax.evaluation import tasks
from ftjax.evaluation.model import Draw
from ftjax.experiment import in_loop
from ftjax.runtime.errors import ConfigError, StoppedEarly

# The object alone, with a model of texts


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


class Clock:
  def __init__(self, monkeypatch):
    self.now = 100.0
    monkeypatch.setattr(in_loop.time, 'monotonic', lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
  return Clock(monkeypatch)


def made(folder, kind='match', rows=None, **settings):
  rows = rows or [{'prompt': f'say {i}', 'answer': str(i)} for i in range(10)]
  c = keys.default()
  c.eval.in_loop, c.eval.in_loop_rows = ('mine',), 4
  c.update_from_flattened_dict(settings)
  found = tasks.load_task('mine', kind, write(folder / 'rows.jsonl', rows))
  run = types.SimpleNamespace(config=c)
  return in_loop.InLoop(run, (found,), Draw(max_tokens=8))


def right(prompt):
  return prompt.split()[-1]


def never():
  return False


def test_its_figures_and_its_rows(tmp_path, clock):
  asked = []
  loop = made(tmp_path)
  loop.start()
  clock.now += 10
  found = loop.measure(Says(lambda p: asked.append(p) or right(p)), False, never)
  assert found == {'mine/accuracy': 1.0, 'in_loop_s': 0.0, 'in_loop_share': 0.0}
  first, asked[:] = asked[:], []
  found = loop.measure(Says(lambda p: asked.append(p) or 'no'), False, never)
  assert found['mine/accuracy'] == 0.0
  assert len(first) == 4 and asked == first, 'the same rows at every evaluation'


def test_its_share_of_the_time(tmp_path, clock, caplog):
  caplog.set_level(logging.INFO)
  loop = made(tmp_path, **{'eval.max_share': 0.1})

  def slow(prompt):
    clock.now += 1  # 4 rows: 4 s
    return right(prompt)

  loop.start()
  made_at = []
  for step in range(1, 31):
    clock.now += 10
    if found := loop.measure(Says(slow), False, never):
      made_at.append(step)
      assert found['in_loop_s'] == 4
      assert found['in_loop_share'] == pytest.approx(4 * len(made_at) / (clock.now - 100))
  assert made_at[0] == 1, 'its cost is not known before the first'
  assert 4 * len(made_at) <= 0.1 * (clock.now - 100) < 4 * (len(made_at) + 2)
  assert caplog.text.count('eval.in_loop is left out') == 1
  assert loop.measure(Says(slow), True, never), 'the last one is always made'
  always = made(tmp_path, **{'eval.max_share': 1.0})
  always.start()
  assert all(always.measure(Says(slow), False, never) for _ in range(5))


def test_a_cancelled_one_has_no_figures_and_the_next_has_all(tmp_path, clock):
  loop = made(tmp_path)
  loop.start()
  assert loop.measure(Says(right), False, lambda: True) is None
  assert loop.measure(Says(right), False, never)['mine/accuracy'] == 1.0


def test_a_figure_that_cannot_be_computed_is_left_out(tmp_path, clock):
  rows = [{'prompt': f'say {i}', 'entities': []} for i in range(5)]
  loop = made(tmp_path, 'entities', rows)
  assert loop.measure(Says(lambda p: ''), True, never).keys() == {'in_loop_s', 'in_loop_share'}


def test_without_tasks_nothing_is_asked(tmp_path):
  loop = made(tmp_path, **{'eval.in_loop': ()})
  assert loop.measure(None, True, never) == {}


def test_a_comparison_of_two_models_is_none_of_the_loop(tmp_path):
  with pytest.raises(ConfigError, match='mine compares two models'):
    made(tmp_path, 'judge/test_comparison:prefer_short')


@pytest.mark.parametrize(
  ('metric', 'mode', 'message'),
  [
    ('eval/mine/acuracy', 'max', r"one of \['accuracy'\]"),
    ('eval/mine/accuracy', 'min', 'checkpoint.best_mode=max'),
  ],
)
def test_a_best_metric_that_it_does_not_have(tmp_path, metric, mode, message):
  settings = {'checkpoint.best_metric': metric, 'checkpoint.best_mode': mode}
  with pytest.raises(ConfigError, match=message):
    made(tmp_path, **settings)


# In a run


def settings(folder, algorithm='sft', **changes):
  sums = [
    {'prompt': f'{a} + {b} =', 'choices': [str(a + b), str(a + b + 1)], 'label': str(a + b)}
    for a in range(4)
    for b in range(4)
  ]
  said = [{'prompt': f'{a} + 1 =', 'answer': str(a + 1)} for a in range(4)]
  return tiny(algorithm, **{
    'steps': 6,
    'eval.every': 2,
    'checkpoint.every': 2,
    'eval.batch_size': 8,
    'eval.max_tokens': 4,
    'eval.tasks': (
      f'sums=choice:{write(folder / "sums.jsonl", sums)}',
      f'said=match:{write(folder / "said.jsonl", said)}',
    ),
    'eval.in_loop': ('sums', 'said'),
    'eval.in_loop_rows': 8,
    'eval.max_share': 1.0,
    'data.cache': str(folder / 'cache'),
    **changes,
  })  # fmt: skip


def evaluations(workdir):
  """{step: its figures, without what depends on the clock}."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {
    row['step']: {k: v for k, v in row.items() if k == 'loss' or '/' in k}
    for row in lines
    if row['split'] == 'eval'
  }


BEST = {'checkpoint.best_metric': 'eval/sums/accuracy', 'checkpoint.best_mode': 'max'}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('loop')
  return train(settings(folder, **BEST), folder / 'run'), folder


def test_figures_of_every_evaluation(whole):
  workdir, _ = whole
  found = evaluations(workdir)
  assert list(found) == [2, 4, 6]
  for row in found.values():
    assert 0 <= row['sums/accuracy'] <= 1 and 0 <= row['said/accuracy'] <= 1 and row['loss'] > 0
  lines = [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]
  costs = [x['in_loop_share'] for x in lines if x['split'] == 'eval']
  assert all(0 < x <= 1 for x in costs)
  events = b''.join(p.read_bytes() for p in workdir.rglob('events.out.tfevents*'))
  assert b'eval/sums/accuracy' in events and b'eval/in_loop_share' in events
  summary = json.loads((workdir / 'eval' / 'summary.json').read_text())
  assert summary['tasks']['sums']['n'] == 16, 'all rows at the end'


def test_the_best_checkpoint_is_exported(whole):
  workdir, _ = whole
  found = evaluations(workdir)
  best = max(found, key=lambda step: (found[step]['sums/accuracy'], -step))
  assert f'ftjax: step {best},' in (workdir / 'export' / 'README.md').read_text()


@pytest.mark.full
def test_resumed_it_has_the_figures_of_the_uninterrupted(whole, tmp_path):
  workdir, folder = whole
  copy = shutil.copytree(workdir, tmp_path / 'run')
  for step in (4, 6):
    shutil.rmtree(copy / 'checkpoints' / str(step), ignore_errors=True)
  train(settings(folder, **BEST), copy)
  assert evaluations(copy) == evaluations(workdir)


@pytest.mark.full
def test_a_signal_leaves_the_evaluation_to_the_resumed_run(whole, tmp_path, monkeypatch):
  """Without a best checkpoint, for which the run would wait."""
  workdir, folder = whole
  evaluate, calls = in_loop.evaluation.evaluate, []

  def interrupted(task, *args, **kwargs):
    calls.append(task.name)
    if calls == ['sums', 'said', 'sums', 'said']:  # the second evaluation has begun
      os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(task, *args, **kwargs)

  base = settings(folder)
  with monkeypatch.context() as patch:
    patch.setattr(in_loop, 'evaluation', types.SimpleNamespace(evaluate=interrupted))
    with pytest.raises(StoppedEarly, match='stopped after step 4'):
      train(base, tmp_path / 'run')
  assert list(evaluations(tmp_path / 'run')) == [2]
  train(base, tmp_path / 'run')
  assert evaluations(tmp_path / 'run') == evaluations(workdir)


@pytest.mark.full
def test_patience_counts_evaluations_without_a_better_figure(tmp_path, monkeypatch):
  """Accuracies 0.5, 0.25, 0.25: two without a better one end the run."""
  values = iter([0.5, 0.25, 0.25, 1.0])
  monkeypatch.setattr(
    in_loop.InLoop, 'measure', lambda *_: {'sums/accuracy': next(values), 'in_loop_s': 0.1}
  )
  c = settings(tmp_path, **BEST, **{'steps': 12, 'checkpoint.patience': 2})
  workdir = train(c, tmp_path / 'run')
  assert [r['sums/accuracy'] for r in evaluations(workdir).values()] == [0.5, 0.25, 0.25]
  assert 'ftjax: step 2,' in (workdir / 'export' / 'README.md').read_text()


@pytest.mark.full
def test_with_rollouts(tmp_path):
  c = settings(tmp_path, 'grpo', **BEST, **{'steps': 4})
  found = evaluations(train(c, tmp_path / 'run'))
  assert list(found) == [2, 4] and all('sums/accuracy' in row for row in found.values())
