"""Several processes on loopback: the run of one process, and what becomes of it when one of them
dies, hangs or is told to stop.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(__file__))

import tiny_run
from cluster import ROOT, STEPS, Processes, arguments, free_port, run


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """Workdir of the run in one process."""
  workdir = tmp_path_factory.mktemp('one')
  run(1, arguments(workdir), workdir / 'logs')
  return workdir


LIMIT = 25.0  # seconds without progress; programs of the evaluation are compiled within it


def check(workdir, reference):
  """Every step was trained once, on the rows of the reference, with its losses."""
  ours, theirs = tiny_run.metrics(workdir), tiny_run.metrics(reference)
  assert list(ours) == list(theirs)
  for key, row in theirs.items():
    for name in ('batch_checksum', 'supervised_tokens', 'lr', 'ok'):
      assert ours[key].get(name) == row.get(name), (key, name)
    for name in ('loss', 'grad_norm', 'perplexity'):
      if name in row:
        np.testing.assert_allclose(ours[key][name], row[name], rtol=2e-5, err_msg=f'{key} {name}')
  assert (workdir / 'export' / 'model.safetensors').exists()


def saved(workdir):
  folder = workdir / 'checkpoints'
  return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0)


@pytest.mark.parametrize('count', [2, pytest.param(4, marks=pytest.mark.full)])
def test_several_processes_train_like_one(count, one, tmp_path):
  workdir = tmp_path
  said = run(count, arguments(workdir), workdir / 'logs')
  check(workdir, one)
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  rows = [row for row in rows if row['split'] == 'train']
  assert all(0 <= row['goodput'] <= 1 for row in rows) and rows[-1]['goodput'] > 0
  assert all(0 < row['host_s_min'] <= row['host_s_max'] for row in rows[1:])
  assert {row['host_slowest'] for row in rows} <= set(range(count))
  assert said.count('process 0 of ') == 1 and 'Answers before and after' in said
  # One host logs: the others say nothing of steps, data or results.
  for log in sorted((workdir / 'logs').iterdir())[1:]:
    assert 'step compiled' not in log.read_text() and 'Answers' not in log.read_text()


@pytest.mark.full
@pytest.mark.parametrize('count', [1, 4])
def test_a_killed_run_resumes_on_another_number_of_processes(count, one, tmp_path):
  """SIGKILL to one of two: both end soon; `count` go on from the newest checkpoint."""
  with Processes(2, arguments(tmp_path), tmp_path / 'logs', flags=['--heartbeat_s=10']) as both:
    both.until(lambda: tiny_run.logged(tmp_path) >= 4 and saved(tmp_path) >= 2)
    both.all[1].kill()
    codes = both.wait(timeout=60)
    assert codes[1] == -9 and codes[0] in (75, 134, -6), f'{codes}\n{both.said()}'
  newest = saved(tmp_path)
  assert not (tmp_path / 'export').exists()
  said = run(count, arguments(tmp_path), tmp_path / 'again')
  assert f'resuming after step {newest} of {STEPS}' in said
  check(tmp_path, one)


@pytest.mark.full
def test_a_process_hangs_and_all_end_within_the_limit(one, tmp_path):
  """SIGSTOP to one of two, with limits of 25 s: 75 or 134 for both, and nothing after the newest
  checkpoint is lost.
  """
  limits = [f'watchdog.{phase}={LIMIT}' for phase in ('step', 'evaluate', 'save')]
  with Processes(2, arguments(tmp_path, *limits), tmp_path / 'logs') as both:
    both.until(lambda: tiny_run.logged(tmp_path) >= 4 and saved(tmp_path) >= 2)
    both.all[1].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    assert both.all[0].wait(timeout=60) in (75, 134, -6), both.said()
    assert time.monotonic() - begin < LIMIT + 30
    both.all[1].send_signal(signal.SIGCONT)
    assert both.all[1].wait(timeout=30) in (75, 134, -6), both.said()
    assert 'error: no progress in phase' in both.said() and 'most recent call' in both.said()
  newest = saved(tmp_path)
  said = run(2, arguments(tmp_path), tmp_path / 'again')
  assert f'resuming after step {newest} of {STEPS}' in said
  check(tmp_path, one)


@pytest.mark.full
def test_sigterm_to_one_saves_the_same_step_in_all(one, tmp_path):
  settings = arguments(tmp_path, 'checkpoint.every=0', 'eval.every=0', 'steps=2000', 'epochs=0.0')
  with Processes(2, settings, tmp_path / 'logs') as both:
    both.until(lambda: tiny_run.logged(tmp_path) >= 3)
    both.all[1].send_signal(signal.SIGTERM)
    assert both.wait(timeout=60) == [75, 75], both.said()
    told = [line for line in both.said().splitlines() if 'stopped after step' in line]
  at = saved(tmp_path)
  assert told and all(f'stopped after step {at} of 2000' in line for line in told)
  assert at == tiny_run.logged(tmp_path) < 2000
  said = run(2, [*settings, f'--config.steps={at + 2}'], tmp_path / 'again')
  assert f'resuming after step {at}' in said


def test_who_does_not_come_is_named(tmp_path):
  flags = ['--init_timeout_s=8']
  with Processes(3, arguments(tmp_path), tmp_path / 'logs', flags=flags) as three:
    three.all[2].kill()
    codes = three.wait(timeout=60)
    assert codes[:2] == [75, 75], three.said()
    assert three.said().count('missing: process 2') == 2 and 'loopback' in three.said()
  assert not (tmp_path / 'checkpoints').exists()


def test_bad_data_ends_all_with_its_code(tmp_path):
  bad = tmp_path / 'bad.jsonl'
  bad.write_text('{"text": "good"}\n{"txt": 1}\n')
  settings = arguments(tmp_path / 'run', f'data.train={bad}')
  with Processes(2, settings, tmp_path / 'logs') as both:
    assert both.wait(timeout=100) == [3, 3], both.said()
    assert 'bad.jsonl:2' in both.said()


def test_hosts_that_mean_another_run_are_refused(tmp_path):
  own = [[f'--config.data.train=sums:{rows}'] for rows in (100, 90)]
  with Processes(2, arguments(tmp_path / 'run'), tmp_path / 'logs', own=own) as both:
    assert both.wait(timeout=100) == [2, 2], both.said()
    assert "data.train='sums:100' on process 0, 'sums:90' on process 1" in both.said()


def test_a_workdir_that_is_not_shared_is_refused(tmp_path):
  own = [[f'--workdir={tmp_path / str(i)}'] for i in range(2)]
  with Processes(2, arguments(tmp_path), tmp_path / 'logs', own=own) as both:
    assert both.wait(timeout=100) == [2, 2], both.said()
    assert 'is another folder on process 1' in both.said()


OTHER_REVISION = """
from configs import tiny_sft
def get_config():
  c = tiny_sft.get_config()
  c.model.random = {}
  c.model.path = 'model'
  return c
"""


@pytest.mark.parametrize('what', [pytest.param('eval.tasks', marks=pytest.mark.full), 'model.path'])
def test_hosts_that_read_other_files_by_one_name_are_refused(what, one, tmp_path):
  """Tasks or weights on each machine's own disk, of another revision on one: each host would put
  its part into the batch, or into the model, of all.
  """
  folders = [tmp_path / str(i) for i in range(2)]
  for i, folder in enumerate(folders):
    shutil.copytree(one / 'export', folder / 'model')
    rows = [
      {'prompt': f'{n}+1=', 'answer': str(n + (i if what == 'eval.tasks' else 0))} for n in (3, 4)
    ]
    (folder / 'tasks.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    if what == 'model.path':
      weights = folder / 'model' / 'model.safetensors'
      data = bytearray(weights.read_bytes())
      data[-1] ^= i
      weights.write_bytes(data)
  (tmp_path / 'config.py').write_text(OTHER_REVISION)
  settings = arguments(tmp_path / 'run', 'eval.tasks=("sums=match:tasks.jsonl",)')
  settings[0] = f'--config={tmp_path / "config.py"}'
  with Processes(2, settings, tmp_path / 'logs', folders=folders) as both:
    assert both.wait(timeout=100) == [3, 3], both.said()
    assert f'{what}: process 0 has' in both.said()


STUCK_AFTER_ALL_AGREED = """
import sys, time
import jax
from ftjax.cluster import processes as peers
jax.distributed.initialize(
  sys.argv[1], 2, int(sys.argv[2]), cluster_detection_method='deactivate')
peers.watch()
peers._LEAVES_WITHIN = 3.0
peers.leave_together()
if sys.argv[2] == '1':
  time.sleep(300)  # a tracker that does not close
peers.end(4, 'the loss was not finite')
"""


@pytest.mark.full
def test_who_hangs_after_all_have_agreed_to_end_ends_too():
  address = f'127.0.0.1:{free_port()}'
  command = [sys.executable, '-c', STUCK_AFTER_ALL_AGREED, address]
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  both = [subprocess.Popen([*command, str(i)], env=environment) for i in range(2)]
  try:
    codes = [p.wait(timeout=90) for p in both]
  finally:
    for process in both:
      process.kill()
  assert set(codes) <= {75, 134, -6, 4}, codes
