"""Machines of a fake cloud: a home folder each, on which commands run as they would by ssh.

The state is one JSON file in $FAKE_CLOUD, so that the fake programs and a test share it.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PASSED = ('FTJAX_TEST_', 'JAX_COMPILATION', 'JAX_PERSISTENT', 'XLA_FLAGS', 'NPROC', 'FAKE_')

# The image's Python: venv and pip do nothing, programs of ours run from this checkout.
_PYTHON = """#!/bin/bash
here='{bin}'
case "$1 $2" in
  '-m venv') mkdir -p "$3/bin" && ln -sf "$here/python3.13" "$3/bin/python"; exit ;;
  '-m pip') exit 0 ;;
  '-m ftjax.supervise')
    shift 2
    [[ -z $FAKE_TRAINING ]] || exec -a ftjax.supervise bash "$FAKE_TRAINING" "$@"
    words=(--backoff=0.2)
    for word in "$@"; do
      # Not every version of ftjax.train has the pre-flight.
      [[ $word == --preflight ]] && ! grep -q "'preflight'" '{root}/ftjax/train.py' && continue
      words+=("$word")
    done
    set -- -m ftjax.supervise "${{words[@]}}"
    ;;
esac
PYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}{root}" exec {python} "$@"
"""


class Cloud:
  """The fake cloud in the folder `root`."""

  def __init__(self, root):
    self.root = pathlib.Path(root)
    self._file = self.root / 'state.json'

  def make(self):
    """Makes an empty cloud with its image."""
    image = self.root / 'image'
    image.mkdir(parents=True)
    python = image / 'python3.13'
    python.write_text(_PYTHON.format(bin=image, root=ROOT, python=sys.executable))
    python.chmod(0o755)
    (image / 'python').symlink_to(python)  # of a container
    self._file.write_text('{}')
    return self

  @contextlib.contextmanager
  def state(self):
    """The state, for one change of it."""
    with (self.root / 'lock').open('w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      state = json.loads(self._file.read_text())
      yield state
      self._file.write_text(json.dumps(state, indent=1))

  def called(self, program, words):
    with (self.root / 'calls.log').open('a') as log:
      log.write(json.dumps([program, *words]) + '\n')

  def calls(self):
    log = self.root / 'calls.log'
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

  def home(self, host):
    return self.root / 'hosts' / host

  def environment(self, host, **more):
    passed = {k: v for k, v in os.environ.items() if k.startswith(PASSED)}
    gcs = json.loads(os.environ.get('FAKE_CLOUD_GCS', '{}'))
    return passed | gcs | {
      'HOME': str(self.home(host)),
      'PATH': f'{self.root}/image:/usr/bin:/bin',
      'JAX_PLATFORMS': 'cpu',
      'FTJAX_LEAST_FREE_MB': '1',
      'FTJAX_CACHE': str(self.home(host) / 'cache'),
    } | more  # fmt: skip

  def run(self, hosts, command, environments):
    """Runs a command on hosts at once; returns the first exit code that is not 0."""
    running = []
    for host, environment in zip(hosts, environments, strict=True):
      self.home(host).mkdir(parents=True, exist_ok=True)
      running.append(
        subprocess.Popen(
          ['bash', '-c', command],
          cwd=self.home(host),
          env=self.environment(host, **environment),
          stdin=subprocess.DEVNULL,
        )
      )
    return next((code for p in running if (code := p.wait())), 0)

  def copy(self, files, hosts, folder):
    for host in hosts:
      target = self.home(host) / folder
      if not target.is_dir():
        return 1
      for file in files:
        shutil.copy2(file, target)
    return 0

  def processes(self, host):
    """Process ids on a host."""
    return self._with(f'HOME={self.home(host)}')

  def _with(self, variable):
    """Ids of processes with NAME=VALUE in their environment."""
    wanted = variable.encode()
    found = []
    for entry in pathlib.Path('/proc').glob('[0-9]*'):
      with contextlib.suppress(OSError):
        if wanted in (entry / 'environ').read_bytes().split(b'\0'):
          found.append(int(entry.name))
    return found

  def power_off(self, hosts):
    """Kills all that runs on hosts, and loses their disks."""
    self.restart(hosts)
    for host in hosts:
      shutil.rmtree(self.home(host), ignore_errors=True)

  def restart(self, hosts):
    """Kills all that runs on hosts, and keeps their disks."""
    for host in hosts:
      self._kill(f'HOME={self.home(host)}')

  def _kill(self, variable):
    while found := self._with(variable):  # a zombie has no environment
      for pid in found:
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)

  def close(self):
    """Ends all that runs on its machines, and the launchers that use it."""
    self._kill(f'FAKE_CLOUD={self.root}')
