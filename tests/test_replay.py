"""A run is run again by its manifest alone: equal bits end with 0, and whatever was changed of it
ends with 5 and is named. Runs are processes, started as users start them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import tiny_run

from ftjax.config import saved_config, section

pytestmark = pytest.mark.usefixtures('users_programs')

STEPS = 8
SETTINGS = (
  f'steps={STEPS}',
  'batch_size=8',
  'optim.warmup_steps=2',
  'checkpoint.every=2',
  'eval.every=4',
  'eval.prompts=()',
)


def question(i):
  a, b = i % 20, i * 7 % 20
  return {'prompt': f'{a} + {b} =', 'completion': f' {a + b}'}


def write_rows(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def train(workdir, *overrides, share_cache=True):
  arguments = [f'--workdir={workdir}', *(f'--config.{s}' for s in (*SETTINGS, *overrides))]
  code, printed = tiny_run.run('train', ['--config=tiny_sft', *arguments], share_cache)
  assert code == 0, printed


def replay(run, workdir, *flags, share_cache=True):
  """(exit code, what it printed)."""
  flags = [f'--replay={run}', f'--workdir={workdir}', *flags]
  return tiny_run.run('train', flags, share_cache)


def copy_of(run, target):
  """A copy of the small files of a run, to be tampered with."""
  shutil.copytree(run, target, ignore=shutil.ignore_patterns('xla_cache', 'export', 'data_cache'))
  return target


def rows_of(run):
  return [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A finished run on a model and rows in files, in a folder whose name has a blank."""
  folder = tmp_path_factory.mktemp('a run')
  train(folder / 'first', 'steps=3', 'data.train=sums:60', 'eval.every=0', 'data.eval_fraction=0')
  shutil.copytree(folder / 'first' / 'export', folder / 'model')
  write_rows(folder / 'rows.jsonl', map(question, range(100)))
  train(
    folder / 'run',
    f'model.path={folder}/model',
    'model.random={}',
    f'data.train={folder}/rows.jsonl',
    share_cache=False,
  )
  return folder / 'run'


@pytest.fixture(scope='module')
def replayed(run, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('replayed') / 'again'
  before = {p: p.stat().st_mtime_ns for p in run.rglob('*')}
  code, printed = replay(run, workdir, share_cache=False)
  assert code == 0, printed
  assert {p: p.stat().st_mtime_ns for p in run.rglob('*')} == before
  return workdir, printed


def test_a_replay_is_bitwise_equal(run, replayed):
  workdir, printed = replayed
  assert 'equal, bitwise (8 rows of training up to step 8, 2 of evaluation)' in printed
  assert tiny_run.metrics(workdir) == tiny_run.metrics(run)
  assert not (workdir / 'export').exists()
  record = json.loads((workdir / 'replay.json').read_text())
  assert (record['verdict'], record['compared'], record['environment']) == ('equal', 'bits', {})


def test_it_uses_the_programs_of_the_run(replayed):
  printed = replayed[1]
  assert 'compiled programs of the run are used' in printed
  assert 'compile cache: 1 hits, 0 misses' in printed


def test_both_manifests_name_the_same_but_the_config(run, replayed):
  found = [json.loads((w / 'manifest.json').read_text()) for w in (run, replayed[0])]
  for manifest in found:
    for name in ('config', 'xla_flags'):  # a replay leaves tasks and trackers out of its config
      del manifest[name]
  assert found[0] == found[1]


def test_a_finished_replay_gives_its_verdict_again(run, replayed):
  code, printed = replay(run, replayed[0])
  assert code == 0 and 'equal, bitwise (8 rows' in printed


def test_a_changed_row_of_data_ends_it(run, tmp_path):
  path = run.parent / 'rows.jsonl'
  before = path.read_text()
  try:
    write_rows(path, [question(i) for i in range(99)] + [{'prompt': '1 + 1 =', 'completion': ' 3'}])
    code, printed = replay(run, tmp_path / 'again')
  finally:
    path.write_text(before)
  assert code == 5
  assert 'error: this is not the run of' in printed and f'{path.name}): other content' in printed
  assert 'model (' not in printed and 'data order' not in printed and 'code' not in printed
  assert not (tmp_path / 'again' / 'metrics.jsonl').exists()


def test_changed_weights_end_it(run, tmp_path):
  path = run.parent / 'model' / 'model.safetensors'
  before = path.read_bytes()
  try:
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    code, printed = replay(run, tmp_path / 'again')
  finally:
    path.write_bytes(before)
  assert code == 5
  assert f'model ({run.parent}/model): other content' in printed and 'data' not in printed


def test_a_changed_config_ends_it_before_jax_is_imported(run, tmp_path):
  copy = copy_of(run, tmp_path / 'copy')
  config = json.loads((copy / 'config.json').read_text())
  (copy / 'config.json').write_text(json.dumps(config | {'optim.lr': 0.001}))
  script = (
    'import sys, runpy\n'
    f'sys.argv = ["ftjax.train", "--replay={copy}", "--workdir={tmp_path}/again"]\n'
    'try:\n'
    '  runpy.run_module("ftjax.train", run_name="__main__")\n'
    'except SystemExit as error:\n'
    '  print("code", error.code, "jax" in sys.modules)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], cwd=tiny_run.ROOT, capture_output=True, text=True, check=False
  )
  assert done.stdout.strip() == 'code 5 False', done.stderr
  assert 'config.json is not the one that manifest.json has the digest of' in done.stderr
  assert 'optim.lr is 0.001, checkpoint 8 has 0.003' in done.stderr
  assert not (tmp_path / 'again').exists()


def replay_by_edited_code(run, folder, *flags):
  """A replay by a copy of the package in `folder` with one more comment: another digest, the same
  losses.
  """
  if not (folder / 'ftjax').exists():
    shutil.copytree(tiny_run.ROOT / 'ftjax', folder / 'ftjax')
    with open(folder / 'ftjax' / 'losses' / 'masked.py', 'a') as file:
      file.write('# edited\n')
  variables = {'PYTHONPATH': str(folder), 'XLA_FLAGS': tiny_run.xla_flags()}
  command = [sys.executable, '-m', 'ftjax.train', f'--replay={run}', f'--workdir={folder}/again']
  return subprocess.run(
    [*command, *flags],
    cwd=folder,
    env=os.environ | variables,
    capture_output=True,
    text=True,
    check=False,
  )


def test_edited_code_ends_it(run, tmp_path):
  done = replay_by_edited_code(run, tmp_path)
  assert done.returncode == 5, done.stderr
  assert 'code of ftjax: commit ' in done.stderr and 'files differ in losses' in done.stderr
  assert not (tmp_path / 'again' / 'metrics.jsonl').exists()


def test_an_edited_loss_is_the_first_difference(run, tmp_path):
  copy = copy_of(run, tmp_path / 'copy')
  rows = rows_of(copy)
  at = next(i for i, r in enumerate(rows) if r['split'] == 'train' and r['step'] == 5)
  was, rows[at]['loss'] = rows[at]['loss'], rows[at]['loss'] * (1 + 2**-20)
  write_rows(copy / 'metrics.jsonl', rows)
  code, printed = replay(copy, tmp_path / 'again')
  assert code == 5, printed
  assert 'differs first at step 5 (training): loss=' in printed and f'and {was!r} here' in printed
  assert '4 training rows before it are equal (bitwise)' in printed
  record = json.loads((tmp_path / 'again' / 'replay.json').read_text())
  assert (record['verdict'], record['first_difference']['step']) == ('differs', 5)


@pytest.mark.parametrize(
  ('change', 'cause'),
  [
    (
      lambda rows: [r for r in rows if (r['split'], r['step']) != ('train', 3)],
      'step 3 are missing',
    ),
    (lambda rows: [*rows, rows[0]], 'a second row of step 1, train'),
    (lambda rows: [rows[0] | {'step': 9}, *rows[1:]], 'rows of step 1 are missing'),
  ],
)
def test_edited_rows_are_found_before_training(run, tmp_path, change, cause):
  copy = copy_of(run, tmp_path / 'copy')
  write_rows(copy / 'metrics.jsonl', change(rows_of(copy)))
  code, printed = replay(copy, tmp_path / 'again')
  assert code == 5 and 'metrics.jsonl was edited or is damaged' in printed and cause in printed
  assert 'step compiled' not in printed


@pytest.mark.full
def test_a_missing_evaluation_is_a_difference(run, tmp_path):
  copy = copy_of(run, tmp_path / 'copy')
  rows = [r for r in rows_of(copy) if (r['split'], r['step']) != ('eval', 4)]
  write_rows(copy / 'metrics.jsonl', rows)
  code, printed = replay(copy, tmp_path / 'again')
  assert code == 5 and 'differs first at step 4 (evaluation): loss=nothing in the run' in printed


@pytest.mark.parametrize(
  ('name', 'change', 'code', 'cause'),
  [
    ('manifest.json', lambda text: text[:-20], 5, 'manifest.json cannot be read'),
    ('manifest.json', lambda text: '[]', 5, 'manifest.json is no JSON object'),
    ('manifest.json', lambda text: edited(text, starts='x'), 5, 'starts has another form'),
    (
      'manifest.json',
      lambda text: edited(text, code={'folders': 1}),
      5,
      'code.folders has another',
    ),
    ('config.json', lambda text: '', 5, 'config.json cannot be read'),
    ('metrics.jsonl', lambda text: '', 2, 'no row of a training step'),
  ],
)
def test_damaged_files_are_named(run, tmp_path, name, change, code, cause):
  copy = copy_of(run, tmp_path / 'copy')
  (copy / name).write_text(change((copy / name).read_text()))
  found, printed = replay(copy, tmp_path / 'again')
  assert (found, cause in printed, 'Traceback' in printed) == (code, True, False), printed


def edited(text, **changes):
  return json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(
  ('flags', 'cause'),
  [
    (['--replay=RUN', '--workdir=RUN/'], 'is the run that --replay names'),
    (['--replay=RUN', '--workdir=OTHER'], 'holds a run (config.json)'),
    (['--replay=RUN', '--workdir=NEW', '--config=tiny_sft'], 'are both given'),
    (
      ['--replay=RUN', '--workdir=NEW', '--config.steps=3'],
      'takes the config of its run unchanged',
    ),
    (['--replay=RUN', '--workdir=NEW', '--replay_despite=data'], 'expected some of code, starts'),
    (['--replay=NEW', '--workdir=NEW'], 'there is no config.json in it'),
    (['--config=tiny_sft', '--workdir=NEW', '--replay_despite=code'], 'is for --replay'),
  ],
)
def test_wrong_flags_end_with_2(run, tmp_path, flags, cause):
  places = {'RUN': str(run), 'OTHER': str(run.parent / 'first'), 'NEW': str(tmp_path / 'new')}
  for name, path in places.items():
    flags = [f.replace(f'={name}', f'={path}') for f in flags]
  code, printed = tiny_run.run('train', flags)
  assert code == 2 and cause in printed and 'Traceback' not in printed, printed
  assert not (tmp_path / 'new').exists()


def test_config_json_makes_the_config_again(run):
  values = json.loads((run / 'config.json').read_text())
  assert section.plain(saved_config.from_plain(values, 'config.json')) == values


# Longer ones


@pytest.mark.full
def test_edited_code_is_accepted_where_that_is_wanted(run, tmp_path):
  done = replay_by_edited_code(run, tmp_path, '--replay_despite=code')
  assert done.returncode == 0 and 'equal, bitwise' in done.stderr, done.stderr


@pytest.mark.full
def test_a_replay_that_differed_comes_to_the_same_end_again(run, tmp_path):
  copy = copy_of(run, tmp_path / 'copy')
  rows = rows_of(copy)
  next(r for r in rows if (r['split'], r['step']) == ('train', 5))['loss'] += 1
  write_rows(copy / 'metrics.jsonl', rows)
  assert replay(copy, tmp_path / 'again')[0] == 5
  code, again = replay(copy, tmp_path / 'again')
  assert code == 5 and 'resuming after step 4' in again and 'differs first at step 5' in again


@pytest.mark.full
def test_on_other_devices_losses_are_compared_within_a_tolerance(run, tmp_path):
  """On eight devices the sums have another order. The table of the environment names it."""
  log = tmp_path / 'log'
  flags = [f'--replay={run}', f'--workdir={tmp_path}/again']
  process = tiny_run.launch('train', flags, log, devices=8, share_cache=True)
  code, printed = process.wait(timeout=300), log.read_text()
  assert '1 x cpu, 1 process(es)' in printed and '8 x cpu, 1 process(es)' in printed
  assert 'comparing losses within 1e-06 relative, not bits' in printed
  assert code == 0 and 'equal, losses within 1e-06 relative' in printed, printed


@pytest.mark.full
def test_a_stopped_replay_goes_on_and_compares_all(run, tmp_path):
  """SIGTERM: 75, and the same command resumes; rows of the first start count."""
  again = tmp_path / 'again'
  flags = [f'--replay={run}', f'--workdir={again}']
  process = tiny_run.launch('train', flags, tmp_path / 'log', share_cache=True)
  stopped = lambda: tiny_run.logged(again) >= 2  # noqa: E731
  assert tiny_run.kill_when(process, stopped, number=signal.SIGTERM)
  assert process.returncode == 75, (tmp_path / 'log').read_text()
  assert json.loads((again / 'replay.json').read_text())['verdict'] == 'not finished'
  code, printed = replay(run, again)
  assert code == 0 and 'resuming after step' in printed, printed
  assert 'equal, bitwise (8 rows of training up to step 8, 2 of evaluation)' in printed


@pytest.mark.full
def test_a_run_that_was_killed_or_goes_on_is_compared_up_to_its_last_row(run, tmp_path):
  copy = copy_of(run, tmp_path / 'copy')
  rows = [json.dumps(r) for r in rows_of(copy) if r['step'] <= 5]
  (copy / 'metrics.jsonl').write_text('\n'.join([*rows, '{"step": 6, "spl']))
  code, printed = replay(copy, tmp_path / 'again')
  assert code == 0, printed
  assert 'replaying' in printed and '5 steps of 8' in printed
  assert '5 rows of training up to step 5, 1 of evaluation' in printed


@pytest.mark.full
def test_a_resumed_run_shows_its_starts(run, tmp_path):
  """A run that resumed as it was is replayed whole; one that resumed with another learning rate is
  refused, as no config makes it again.
  """
  rows = f'data.train={run.parent}/rows.jsonl'
  for name, change in (('same', ()), ('other', ('optim.lr=0.001',))):
    workdir = tmp_path / name
    train(workdir, rows)
    shutil.rmtree(workdir / 'checkpoints' / '8')  # as if it had been killed after step 6
    train(workdir, rows, 'log.every=1', *change)
  starts = json.loads((tmp_path / 'other' / 'manifest.json').read_text())['starts']
  assert [(s['step'], s['changed']) for s in starts] == [(0, {}), (6, {'optim.lr': 0.003})]
  code, printed = replay(tmp_path / 'same', tmp_path / 'same again')
  assert code == 0 and 'equal, bitwise (8 rows' in printed, printed
  code, printed = replay(tmp_path / 'other', tmp_path / 'other again')
  assert code == 5 and 'optim.lr was 0.003 until step 6' in printed
  flag = '--replay_despite=starts'
  code, printed = replay(tmp_path / 'other', tmp_path / 'other again', flag)
  assert code == 5 and 'differs first at step' in printed


@pytest.mark.full
@pytest.mark.parametrize('algorithm', ['grpo', 'ppo'])
def test_rollouts_are_replayed(tmp_path, algorithm):
  """With held-out prompts in one of the two."""
  settings = ['steps=4', 'eval.every=2', 'checkpoint.every=2']
  settings += ['data.eval=sums:8:10'] * (algorithm == 'grpo')
  arguments = [f'--config=tiny_{algorithm}', f'--workdir={tmp_path}/run']
  code, printed = tiny_run.run('train', [*arguments, *(f'--config.{s}' for s in settings)])
  assert code == 0, printed
  code, printed = replay(tmp_path / 'run', tmp_path / 'again')
  assert code == 0 and 'equal, bitwise (4 rows of training' in printed, printed
  assert ('4, 2 of evaluation' in printed) == (algorithm == 'grpo')


@pytest.mark.full
def test_a_run_that_ended_by_non_finite_losses_is_replayed_to_that_end(run, tmp_path):
  settings = (f'data.train={run.parent}/rows.jsonl', 'optim.lr=1e30', 'max_bad_steps=2')
  settings += ('optim.clip_norm=0', 'optim.name=sgd', 'eval.every=0')
  arguments = ['--config=tiny_sft', f'--workdir={tmp_path}/run']
  arguments += [f'--config.{s}' for s in (*SETTINGS, *settings)]
  code, printed = tiny_run.run('train', arguments)
  assert code == 4, printed
  code, printed = replay(tmp_path / 'run', tmp_path / 'again')
  assert code == 0 and 'equal, bitwise' in printed, printed
