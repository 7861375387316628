"""Real trainings under `ftjax.supervise`: killed and resumed, and stopped with a checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_run

from ftjax.storage import snapshots

pytestmark = pytest.mark.full


def supervised(workdir, *flags, overrides=()):
  """Starts `ftjax.supervise` with the run of tiny_run; its output goes to a file."""
  train = [sys.executable, '-m', 'ftjax.train', *tiny_run.arguments(workdir, *overrides)]
  variables = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': tiny_run.xla_flags()}
  variables = {k: v for k, v in variables.items() if k not in tiny_run.CACHE_VARIABLES}
  with open(f'{workdir}.log', 'ab') as log:
    return subprocess.Popen(
      [sys.executable, '-m', 'ftjax.supervise', '--preflight', *flags, '--', *train],
      cwd=tiny_run.ROOT,
      env=variables,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
    )


def until(process, is_time):
  end = time.monotonic() + 200
  while not is_time():
    assert process.poll() is None and time.monotonic() < end
    time.sleep(0.005)


def rows(workdir):
  return [json.loads(line) for line in (workdir / 'restarts.jsonl').read_text().splitlines()]


def training(process):
  """Process ids of the children of a supervisor."""
  return [
    int(p)
    for p in subprocess.run(
      ['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
  ]


def test_a_killed_training_resumes_to_the_same_bits(tmp_path):
  reference, workdir = tmp_path / 'reference', tmp_path / 'a run'
  code, text = tiny_run.run('train', tiny_run.arguments(reference))
  assert code == 0, text
  process = supervised(workdir)
  try:
    until(process, lambda: snapshots.steps(str(workdir)) and tiny_run.logged(workdir) >= 6)
    [child] = training(process)
    os.kill(child, signal.SIGKILL)
    assert process.wait(timeout=200) == 0, (tmp_path / 'a run.log').read_text()
  finally:
    process.kill()
  checked, killed, done = rows(workdir)
  assert (checked['kind'], checked['exit_code']) == ('preflight', 0)
  assert killed['exit_code'] == 137 and killed['signal'] == 'SIGKILL' and killed['wait_s'] == 0
  assert killed['step_after'] >= 4 and done['step_before'] == killed['step_after']
  assert done['exit_code'] == 0 and done['step_after'] == tiny_run.STEPS
  assert tiny_run.differences(workdir, reference) == []


def test_a_stopped_training_has_a_checkpoint_and_75(tmp_path):
  workdir = tmp_path / 'run'
  process = supervised(
    workdir, '--translate=75:42', overrides=('steps=100000', 'epochs=0.0', 'checkpoint.every=0')
  )
  try:
    until(process, lambda: tiny_run.logged(workdir) >= 3)
    process.terminate()
    assert process.wait(timeout=60) == 42, (tmp_path / 'run.log').read_text()
  finally:
    process.kill()
  step = snapshots.newest(str(workdir))
  assert step == tiny_run.logged(workdir) >= 3
  last = rows(workdir)[-1]
  assert (last['exit_code'], last['step_after'], last['wait_s']) == (75, step, None)
  assert last['then'] == 'was asked to stop'
