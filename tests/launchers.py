"""Launchers, run as a user runs them: dry, or against the fake cloud."""

import contextlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAKE = ROOT / 'tests' / 'fake_cloud'
sys.path.insert(0, str(FAKE))

import machines  # noqa: E402 # beside the programs that import it

SECRETS = ('HF_TOKEN', 'WANDB_API_KEY')


def start(launcher, *words, env=None, **more):
  """Starts launch/<launcher> with words."""
  clean = {k: v for k, v in os.environ.items() if k not in SECRETS}
  return subprocess.Popen(
    ['bash', str(ROOT / 'launch' / launcher), *words],
    env=clean | (env or {}),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **more,
  )


def run(launcher, *words, env=None, timeout=120, **more):
  """(exit code, stdout, stderr) of a launcher."""
  process = start(launcher, *words, env=env, **more)
  out, err = process.communicate(timeout=timeout)
  return process.returncode, out, err


def dry(launcher, *words, **more):
  """What a dry run prints."""
  code, out, err = run(launcher, '--dry-run', *words, **more)
  assert code == 0, err
  return out


class FakeCloud(machines.Cloud):
  """With programs on PATH, and a wheel and a lock that the fake machines do not read."""

  def make(self):
    super().make()
    programs = self.root / 'bin'
    programs.mkdir()
    for name in ('gcloud', 'kubectl', 'ssh', 'scp'):
      file = programs / name
      words = shlex.join([sys.executable, f'{FAKE}/programs.py', name])
      file.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
      file.chmod(0o755)
    (self.root / 'ftjax-0-py3-none-any.whl').write_text('a wheel')
    (self.root / 'tpu.txt').write_text('numpy==2.0 --hash=sha256:00\n')
    return self

  @property
  def install(self):
    return [f'--wheel={self.root}/ftjax-0-py3-none-any.whl', f'--lock={self.root}/tpu.txt']

  def env(self, **more):
    path = f'{self.root}/bin:{os.environ["PATH"]}'
    return {'FAKE_CLOUD': str(self.root), 'PATH': path} | more

  def of(self, *words):
    """Calls that hold all these words."""
    return [c for c in self.calls() if all(w in c for w in words)]

  def has(self, kind, name):
    with self.state() as state:
      return any(key.startswith(f'{kind}/{name}/') for key in state)

  def lose(self, kind, name, state, hosts):
    """The cloud takes machines back."""
    self.power_off(hosts)
    with self.state() as all_of_it:
      for key, row in all_of_it.items():
        if key.split('/')[1] == name and key.split('/')[0] in (kind, 'tpu-vm'):
          row['lost'] = state if key.startswith(kind) else 'PREEMPTED'


def until(is_time, process=None, timeout=120):
  """Waits for a moment; fails when the launcher ends before it."""
  end = time.monotonic() + timeout
  while not is_time():
    if process is not None and process.poll() is not None:
      raise AssertionError(f'ended with {process.returncode}: {process.stderr.read()}')
    assert time.monotonic() < end, 'the moment did not come'
    time.sleep(0.05)


def lines(path):
  """Objects of a file of JSON lines, [] without it."""
  with contextlib.suppress(FileNotFoundError):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
  return []
