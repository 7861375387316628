"""Searches: their points, successive halving, what a stop and a failure leave. The runs are of
study_trainer.py unless a test is about training itself.
"""

import json
import pathlib
import random
import signal
import time

import pytest
import study_runs
import tiny_run
from study_runs import make_config, records, run, trained

from ftjax.config import config_file, search_space
from ftjax.runtime.errors import CheckError, ConfigError
from ftjax.studies import gaussian_process, halving, points, runner

SPACE = ('optim.lr=log:1e-5:1e-1', 'batch_size=4,8,16')


def search(**settings):
  return make_config(**({'study__kind': 'random', 'study__space': SPACE} | settings))


def space_of(*texts):
  return search_space.parse_all(texts, make_config())


def test_halving_states_its_steps():
  rungs = halving.plan(9, 90, (10, 30), 3)
  assert [(r.stop_at, r.step, r.runs) for r in rungs] == [(10, 10, 9), (30, 30, 3), (0, 90, 1)]
  assert halving.total_steps(rungs) == 9 * 10 + 3 * 20 + 1 * 60
  assert [r.runs for r in halving.plan(2, 90, (10, 30), 3)] == [2, 1, 1]
  assert [r.runs for r in halving.plan(7, 90, (), 3)] == [7]


def test_the_best_go_on_and_of_equal_ones_the_first():
  orders = {'a': 2.0, 'b': 1.0, 'c': 1.0, 'd': 0.5}
  assert halving.promoted(orders, 2) == ['b', 'd']
  assert halving.promoted({'a': 1.0}, 3) == ['a']


def test_a_search_with_halving_trains_exactly_the_steps_it_states(tmp_path):
  c = search(study__trials=9, study__rungs=(10, 30), study__parallel=3)
  found = run(c, tmp_path)
  steps = trained(tmp_path)
  assert sum(map(len, steps.values())) == found['summary']['planned_steps'] == 90 + 60 + 60
  assert found['summary']['steps'] == 210
  # No step is trained twice, and each run ends at a rung.
  assert all(own == list(range(1, len(own) + 1)) for own in steps.values())
  assert sorted(map(len, steps.values())) == [10] * 6 + [30] * 2 + [90]
  # The one that trained to the end was the best at both rungs.
  last = next(name for name, own in steps.items() if len(own) == 90)
  assert found['winner'] == last
  for step in (10, 30):
    values = {n: r['outcomes'] for n, r in records(tmp_path).items()}
    at = {n: o['value'] for n, own in values.items() for o in own if o['stop_at'] == step}
    assert min(at, key=at.get) == last


def test_a_finished_study_starts_nothing(tmp_path):
  c = search(study__trials=3)
  first = run(c, tmp_path)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.glob('runs/*/*')}
  logs = {p: p.read_text() for p in tmp_path.glob('logs/*')}
  second = run(c, tmp_path)
  assert {p: p.stat().st_mtime_ns for p in tmp_path.glob('runs/*/*')} == before
  assert {p: p.read_text() for p in tmp_path.glob('logs/*')} == logs and len(logs) == 3
  assert first == second


def test_another_config_is_refused_but_another_launch_is_not(tmp_path):
  run(search(study__trials=2), tmp_path)
  with pytest.raises(ConfigError, match=r'study\.trials: 2 -> 3'):
    run(search(study__trials=3), tmp_path)
  run(search(study__trials=2, study__parallel=2), tmp_path)


def test_the_winner_is_a_config(tmp_path):
  found = run(search(study__trials=4), tmp_path)
  c = config_file.load(config_file.find(str(tmp_path / 'winner.json')))
  best = next(r for r in found['runs'] if r['run'] == found['winner'])
  assert (c.optim.lr, c.batch_size) == (best['optim.lr'], best['batch_size'])
  assert not c.study.kind and not c.study.space  # it trains one run
  values = [r['eval/loss'] for r in found['runs']]
  assert best['eval/loss'] == min(values)
  lines = (tmp_path / 'study.csv').read_text().splitlines()
  assert lines[0].startswith('run,optim.lr,batch_size,eval/loss,status') and len(lines) == 5
  rows = [json.loads(x) for x in (tmp_path / 'study.jsonl').read_text().splitlines()]
  assert rows == found['runs']


@pytest.mark.parametrize('code', [3, 4])
def test_a_failed_run_is_a_row_and_the_study_goes_on(tmp_path, monkeypatch, code):
  monkeypatch.setenv('STUDY_TRAINER_FAULT', f'exit:{code}:batch_size=8')
  c = make_config(study__kind='grid', study__space=('batch_size=4,8,16',), study__rungs=(10,))
  found = run(c, tmp_path)
  rows = {r['batch_size']: r for r in found['runs']}
  assert rows[8]['status'] == 'failed' and f'exit code {code}' in rows[8]['reason']
  assert 'told to fail' in rows[8]['reason']
  assert rows[4]['status'] == 'done' and found['winner'] == rows[4]['run']
  assert '1 of 3 runs failed' in ' '.join(found['findings'])


def test_a_study_whose_runs_all_fail_ends_with_an_error(tmp_path, monkeypatch):
  monkeypatch.setenv('STUDY_TRAINER_FAULT', 'exit:4:seed=0')
  with pytest.raises(
    CheckError, match='all 2 runs of the study failed; the first one: exit code 4'
  ):
    run(make_config(study__kind='grid', study__space=('batch_size=4,8',)), tmp_path)
  assert (tmp_path / 'study.csv').read_text().count('failed') == 2
  assert not (tmp_path / 'winner.json').exists()


def test_a_bad_config_ends_the_study(tmp_path, monkeypatch):
  monkeypatch.setenv('STUDY_TRAINER_FAULT', 'exit:2:batch_size=8')
  with pytest.raises(ConfigError, match='run 001: the trainer was told to fail'):
    run(make_config(study__kind='grid', study__space=('batch_size=4,8,16',)), tmp_path)
  assert list(trained(tmp_path)) == ['000']


def test_a_run_that_crashes_again_and_again_is_given_up(tmp_path, monkeypatch):
  monkeypatch.setenv('STUDY_TRAINER_FAULT', 'exit:134:batch_size=8')
  found = run(make_config(study__kind='grid', study__space=('batch_size=4,8',)), tmp_path)
  row = found['runs'][1]
  assert row['status'] == 'failed' and row['starts'] == 3 and 'exit code 134' in row['reason']


@pytest.mark.parametrize('kind', ['random', 'sobol', 'tpe', 'gp'])
def test_a_point_depends_on_seed_number_and_earlier_points_alone(kind):
  space = space_of('optim.lr=log:1e-5:1e-1', 'lora.rank=int:2:64', 'remat=none,full')
  taken, history = [], []
  for number in range(12):
    settings = dict(seed=5, number=number, trials=12, history=history, taken=taken)
    point, again = (points.choose(kind, space, **settings) for _ in range(2))
    assert point == again
    assert 1e-5 <= point['optim.lr'] <= 1e-1 and 2 <= point['lora.rank'] <= 64
    other = points.choose(kind, space, **(settings | {'seed': 6}))
    assert other != point
    taken.append(point)
    history.append((point, abs(point['optim.lr'] - 1e-3) if number % 5 else None))


@pytest.mark.parametrize('kind', ['tpe', 'gp'])
def test_a_guided_search_comes_nearer_than_a_random_one(kind):
  """Over four seeds, the mean of the last ten distances from the best learning rate."""
  space = space_of('optim.lr=log:1e-6:1', 'batch_size=4,8')

  def distance(point):
    lr = search_space.Dimension('x', 'log', low=1e-6, high=1.0).place(point['optim.lr'])
    return abs(lr - 0.7) + 0.2 * (point['batch_size'] == 4)

  def late(kind, seed):
    history = []
    for number in range(25):
      taken = [p for p, _ in history]
      settings = dict(seed=seed, number=number, trials=25, history=history, taken=taken)
      point = points.choose(kind, space, **settings)
      history.append((point, distance(point)))
    return sum(score for _, score in history[-10:]) / 10

  guided, plain = (sum(late(k, seed) for seed in range(4)) for k in (kind, 'random'))
  assert guided < 0.6 * plain


def test_a_gaussian_process_fits_what_it_has_seen():
  import numpy as np

  x = np.linspace(0, 1, 8)[:, None]
  y = np.sin(4 * x[:, 0])
  y = (y - y.mean()) / y.std()
  scale, noise = gaussian_process._hyperparameters(x, y)
  mean, sd = gaussian_process._predicted(x, y, x, scale, noise)
  assert np.abs(mean - y).max() < 0.15 and sd.max() < 0.3
  far = gaussian_process._predicted(x, y, np.array([[5.0]]), scale, noise)
  assert abs(far[0][0]) < 0.2 and far[1][0] > 0.8


def test_no_point_is_tried_twice(tmp_path):
  c = search(study__space=('batch_size=4,8,16',), study__trials=8)
  found = run(c, tmp_path)  # the space has three points
  assert sorted(r['batch_size'] for r in found['runs']) == [4, 8, 16]


def test_the_grid_has_every_point(tmp_path):
  c = make_config(study__kind='grid', study__space=('batch_size=4,8', 'optim.lr=1e-3,1e-2'))
  found = run(c, tmp_path)
  pairs = [(r['batch_size'], r['optim.lr']) for r in found['runs']]
  assert pairs == [(4, 1e-3), (4, 1e-2), (8, 1e-3), (8, 1e-2)]


@pytest.mark.full
def test_the_storage_of_optuna_has_the_trials(tmp_path):
  import optuna

  c = search(study__trials=6, study__rungs=(10,))
  run(c, tmp_path)
  study = optuna.load_study(study_name='ftjax', storage=f'sqlite:///{tmp_path}/optuna.db')
  states = [t.state.name for t in study.trials]
  assert states.count('COMPLETE') == 2 and states.count('PRUNED') == 4
  own = records(tmp_path)
  for trial in study.trials:
    record = own[f'{trial.number:03d}']
    assert trial.params['optim.lr'] == record['values']['optim.lr']
    assert trial.intermediate_values == {10: record['outcomes'][0]['value']}
  best = json.loads((tmp_path / 'study.json').read_text())['winner']
  assert study.best_trial.user_attrs['run'] == best
  (tmp_path / 'optuna.db').write_text('damaged')  # it is a copy: the study needs it for nothing
  run(c, tmp_path)


def kill_at_random(arguments, workdir, seed, kills, longest):
  """Starts a study, kills it after random times, and lets the last start end; its exit code."""
  rng, log = random.Random(seed), pathlib.Path(workdir).parent / 'log'
  for _ in range(kills):
    process = study_runs.start(arguments, log)
    # First until it has begun: the start of Python takes longer on a busy machine.
    count = len(list(pathlib.Path(workdir).glob('runs/*')))
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
      if len(list(pathlib.Path(workdir).glob('runs/*'))) > count or rng.random() < 0.002:
        break
      time.sleep(0.01)
    time.sleep(rng.uniform(0, longest))
    process.send_signal(signal.SIGKILL)
    process.wait()
  process = study_runs.start(arguments, log)
  return process.wait(timeout=1500), log.read_text()


def config_of(path, c):
  """Writes a config for the command line."""
  from ftjax.config import section

  path.write_text(json.dumps(section.plain(c)))
  return path


@pytest.mark.parametrize('kills', [2, pytest.param(5, marks=pytest.mark.full)])
def test_a_search_that_is_killed_ends_with_the_same_trials(tmp_path, monkeypatch, kills):
  monkeypatch.setenv('STUDY_TRAINER_SLEEP', '0.004')
  c = search(study__kind='tpe', study__trials=8, study__rungs=(20, 40), steps=60, study__parallel=2)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed with blanks'
  run(c, whole)
  arguments = [f'--config={config_of(tmp_path / "c.json", c)}', f'--workdir={killed}']
  code, text = kill_at_random(arguments, killed, seed=3, kills=kills, longest=0.5)
  assert code == 0, text
  assert records(killed) == records(whole)
  assert (killed / 'winner.json').read_text().replace(str(killed), '') == (
    whole / 'winner.json'
  ).read_text().replace(str(whole), '')
  # The runs died with the study, each resumed from its own state, and no step was trained twice.
  assert trained(killed) == trained(whole)


def test_a_study_that_is_asked_to_stop_stops_its_runs(tmp_path, monkeypatch):
  monkeypatch.setenv('STUDY_TRAINER_SLEEP', '0.05')
  c = search(study__trials=4, study__parallel=2)
  arguments = [f'--config={config_of(tmp_path / "c.json", c)}', f'--workdir={tmp_path / "s"}']
  process = study_runs.start(arguments, tmp_path / 'log')
  end = time.monotonic() + 120
  while len(trained(tmp_path / 's')) < 2 and time.monotonic() < end:
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 75, (tmp_path / 'log').read_text()
  counts = trained(tmp_path / 's')
  time.sleep(0.3)
  assert trained(tmp_path / 's') == counts  # nobody trains on


def test_two_studies_in_one_folder(tmp_path):
  c = search(study__trials=1)
  run(c, tmp_path)
  from ftjax.storage import files

  lock = files.Lock(str(tmp_path))
  try:
    with pytest.raises(ConfigError, match='in use by'):
      run(c, tmp_path)
  finally:
    lock.release()


def test_placeholders_of_a_launch_command():
  values = {
    'config_overrides': ['--config=/a b/c.json', '--config.stop_at=5'],
    'workdir': ['/a b/runs/0'],
    'name': ['0'],
    'slot': ['1'],
  }
  found = runner.fill('env GPU={slot} train {config_overrides} --workdir={workdir}', values)
  assert found == [
    *('env', 'GPU=1', 'train', '--config=/a b/c.json', '--config.stop_at=5'),
    '--workdir=/a b/runs/0',
  ]
  found = runner.fill("ssh host{slot} 'train {config_overrides} --workdir={workdir}'", values)
  assert found == [
    *('ssh', 'host1'),
    "train '--config=/a b/c.json' --config.stop_at=5 --workdir='/a b/runs/0'",
  ]
  with pytest.raises(ConfigError, match=r'study\.launch'):
    runner.fill("train '{workdir}", values)


def test_slots_are_those_of_parallel(tmp_path):
  out = tmp_path / 'slots'
  launch = f"sh -c 'echo {{slot}} {{name}} >> {out}; exec {study_runs.LAUNCH}'"
  c = search(study__trials=6, study__parallel=3, study__launch=launch)
  run(c, tmp_path / 's')
  found = [line.split() for line in out.read_text().splitlines()]
  assert {slot for slot, _ in found} == {'0', '1', '2'}
  assert sorted(name for _, name in found) == [f'{i:03d}' for i in range(6)]


def test_a_damaged_record_is_named(tmp_path):
  run(search(study__trials=1), tmp_path)
  (tmp_path / 'records' / '000.json').write_text('{')
  with pytest.raises(Exception, match=r'records/000\.json: no JSON'):
    run(search(study__trials=1), tmp_path)


@pytest.mark.full
def test_a_real_search_that_is_killed_five_times_ends_with_the_same_trials(
  tmp_path, users_programs
):
  """Real runs, bit by bit: scores are of float32 losses."""
  extra = [
    'study.trials=4',
    'steps=60',
    'study.rungs=(20,)',
    'study.kind=tpe',
    'checkpoint.every=5',
  ]
  extra = [f'--config.{x}' for x in extra]
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  arguments = ['--config=tiny_study', *extra]
  process = study_runs.start([*arguments, f'--workdir={whole}'], tmp_path / 'log_whole')
  assert process.wait(timeout=1200) == 0, (tmp_path / 'log_whole').read_text()
  code, text = kill_at_random(
    [*arguments, f'--workdir={killed}'], killed, seed=4, kills=5, longest=8.0
  )
  assert code == 0, text
  assert records(killed) == records(whole)
  for name in records(whole):
    ours, theirs = (tiny_run.metrics(w / 'runs' / name) for w in (killed, whole))
    assert ours == theirs
