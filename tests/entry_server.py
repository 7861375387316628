"""Starts entries as processes of their own without paying for imports each time.

A server process imports jax, flax, orbax and ftjax once and stays single-threaded Python. For every
request it forks, and the child runs `python -m ftjax.<entry>` by `runpy`, with the environment, the
folder and the log file of the request. The children are real processes: they are killed, stopped
and waited for by their pids. `tiny_run.launch` is the caller.
"""

import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Process:
  """One run of an entry, with the part of subprocess.Popen's interface that tests use."""

  def __init__(self, server: 'Server', pid: int, command: list[str]):
    self._server, self.pid, self.args, self.returncode = server, pid, command, None

  def poll(self) -> int | None:
    """Returns the exit code, negative for a signal; None while it runs."""
    if self.returncode is None:
      self._server.receive(0.0)
    return self.returncode

  def wait(self, timeout: float | None = None) -> int:
    """Waits for the end.

    Raises:
      subprocess.TimeoutExpired: it runs on after `timeout` seconds.
    """
    end = None if timeout is None else time.monotonic() + timeout
    while self.poll() is None:
      left = 1.0 if end is None else end - time.monotonic()
      if left <= 0:
        raise subprocess.TimeoutExpired(self.args, timeout)
      self._server.receive(min(left, 1.0))
    return self.returncode

  def send_signal(self, number: int) -> None:
    """Sends a signal unless the process has ended."""
    if self.poll() is None:
      with contextlib.suppress(ProcessLookupError):
        os.kill(self.pid, number)

  def kill(self) -> None:
    """Sends SIGKILL unless the process has ended."""
    self.send_signal(signal.SIGKILL)


class Server:
  """The client's side; `launch` forks a process."""

  def __init__(self):
    ours, theirs = socket.socketpair()
    self._socket, self._buffer, self._started = ours, b'', None
    self._running: dict[int, Process] = {}
    self._server = subprocess.Popen(
      [sys.executable, __file__, str(theirs.fileno())],
      cwd=ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
      pass_fds=[theirs.fileno()],
      stdin=subprocess.DEVNULL,
    )
    theirs.close()

  def launch(self, entry: str, arguments, log, environment, folder) -> Process:
    """Starts `python -m ftjax.<entry>`; stdout and stderr are appended to the file `log`."""
    pathlib.Path(log).touch()  # it is there even if the process is killed at once
    request = {
      'entry': entry,
      'arguments': [str(a) for a in arguments],
      'log': str(log),
      'environment': dict(environment),
      'folder': str(folder),
    }
    self._socket.sendall(json.dumps(request).encode() + b'\n')
    self._started = None
    while self._started is None:
      self.receive(60.0)
    process = Process(self, self._started, [entry, *request['arguments']])
    self._running[process.pid] = process
    return process

  def receive(self, seconds: float) -> None:
    """Takes the server's messages, waiting at most `seconds` for the first."""
    while select.select([self._socket], [], [], seconds)[0]:
      data = self._socket.recv(1 << 16)
      if not data:
        raise RuntimeError(f'the entry server has ended with {self._server.wait()}')
      *lines, self._buffer = (self._buffer + data).split(b'\n')
      for message in map(json.loads, lines):
        if 'started' in message:
          self._started = message['started']
        else:
          self._running.pop(message['ended']).returncode = message['code']
      seconds = 0.0


def _fork(request: dict, connection: socket.socket) -> bool:
  """Forks for a request; True in the child, which is then as a fresh interpreter would be."""
  pid = os.fork()
  if pid:
    connection.sendall(json.dumps({'started': pid}).encode() + b'\n')
    return False
  signal.set_wakeup_fd(-1)
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  connection.close()
  out = os.open(request['log'], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
  os.dup2(out, 1)
  os.dup2(out, 2)
  os.close(out)
  os.environ.clear()
  os.environ.update(request['environment'])
  os.chdir(request['folder'])
  sys.path[0] = request['folder']  # as `python -m` has it
  sys.argv = [f'ftjax.{request["entry"]}', *request['arguments']]
  import jax

  # What jax reads from the environment when it is imported.
  for name, value in jax.config.values.items():
    given = os.environ.get(name.upper())
    if name.upper() in os.environ and not name.startswith('jax_platform'):
      kind = type(value)
      jax.config.update(name, given if value is None or kind is str else kind(json.loads(given)))
    elif name == 'jax_compilation_cache_dir':
      jax.config.update(name, None)
  return True


def _serve(connection: socket.socket) -> str:
  """Answers requests until the client is gone; in a child, returns the entry to run."""
  wake, woken = os.pipe()
  os.set_blocking(wake, False)
  os.set_blocking(woken, False)
  signal.set_wakeup_fd(woken)
  signal.signal(signal.SIGCHLD, lambda *_: None)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  buffer = b''
  while True:
    ready = select.select([connection, wake], [], [])[0]
    if wake in ready:
      with contextlib.suppress(BlockingIOError):
        os.read(wake, 4096)
    with contextlib.suppress(ChildProcessError):
      while (ended := os.waitpid(-1, os.WNOHANG))[0]:
        code = os.waitstatus_to_exitcode(ended[1])
        connection.sendall(json.dumps({'ended': ended[0], 'code': code}).encode() + b'\n')
    if connection in ready:
      data = connection.recv(1 << 16)
      if not data:
        os._exit(0)
      *lines, buffer = (buffer + data).split(b'\n')
      for request in map(json.loads, lines):
        if _fork(request, connection):
          os.close(wake)
          os.close(woken)
          return request['entry']


def _import_what_entries_need() -> None:
  """Imports libraries, and of ftjax what defines no flags; no backend of jax is started."""
  import importlib

  names = ('sft', 'dpo', 'reward_model', 'grpo', 'ppo', 'best_of_n', 'online_dpo', 'distill')
  names += ('prm',)
  names += ('seq2seq', 'span_corruption')
  for name in (*(f'algorithms.{n}' for n in names), 'planning.compile'):
    importlib.import_module(f'ftjax.{name}')


if __name__ == '__main__':
  import runpy

  sys.path[0] = str(ROOT)
  _import_what_entries_need()
  runpy.run_module(
    f'ftjax.{_serve(socket.socket(fileno=int(sys.argv[1])))}', run_name='__main__', alter_sys=True
  )
