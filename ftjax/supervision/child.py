"""A program that is run as a child, in a session of its own.

Its stdout and stderr pass through this process byte by byte, so that the end of stderr is known
when it fails, and a terminal or ssh connection that goes away is no error of the child. One thread
does all of this: the child is forked while no other thread could hold a lock.
"""

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from ftjax.runtime.errors import ConfigError

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_KEPT = 64 << 10  # bytes of the end of stderr
_READ = 64 << 10  # bytes that are passed on at once
_POLL = 0.1  # seconds between two looks at the child
_DRAIN = 1.0  # seconds to wait for the end of the output of a child that has ended
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_KILLED = 128 + signal.SIGKILL
_ESCAPE = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')


def open_standard_streams() -> None:
  """Opens /dev/null in place of a standard stream that is closed, before another file gets its
  number.
  """
  for number in (0, 1, 2):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def emit(number: int, data: bytes) -> bool:
  """Writes bytes to a standard stream; returns False where nobody can read them any more."""
  rest = memoryview(data)
  while rest:
    try:
      rest = rest[os.write(number, rest) :]
    except BlockingIOError:  # ssh may leave it non-blocking
      select.select([], [number], [], 1.0)
    except OSError:  # EPIPE, EIO: the terminal or the connection is gone
      return False
  return True


class _Stream:
  """Passes the output of a child on, and keeps the end of it."""

  def __init__(self, source: int, target: int):
    self.source, self._target, self._is_open = source, target, True
    self.end = bytearray()

  def forward(self) -> bool:
    """Passes on what there is; returns False at the end of the output."""
    data = os.read(self.source, _READ)
    self._is_open = self._is_open and emit(self._target, data)
    self.end += data
    del self.end[:-_KEPT]
    return bool(data)


def die_with_parent() -> Callable[[], None]:
  """Returns what a child calls before it runs its program: it is killed when this process ends
  without ending it (Linux), and stop signals reach it.
  """
  parent = os.getpid()
  control = ctypes.CDLL(None).prctl if sys.platform == 'linux' else None

  def prepare() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    if control:
      control(_PR_SET_PDEATHSIG, signal.SIGKILL)
      if os.getppid() != parent:  # it ended before the line above
        os._exit(_KILLED)

  return prepare


def _environment() -> dict[str, str]:
  """Returns the variables of a child: its output is a pipe, but may end on a terminal."""
  variables = dict(os.environ)
  with contextlib.suppress(OSError):
    variables.setdefault('COLUMNS', str(os.get_terminal_size(2).columns))
  if os.isatty(1):
    variables.setdefault('PYTHONUNBUFFERED', '1')
  return variables


class Child:
  """A running program.

  Args:
    command: words of the command line.
    extra: environment variables on top of this process's.

  Raises:
    ConfigError: the program cannot be started.
  """

  def __init__(self, command: Sequence[str], extra: Mapping[str, str] | None = None):
    self.began = time.monotonic()
    try:
      # Its own session: Ctrl-C on the terminal reaches this process alone, which forwards it.
      self._process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        preexec_fn=die_with_parent(),
        env=_environment() | dict(extra or {}),
      )
    except (OSError, ValueError) as error:
      raise ConfigError(
        f'{command[0]}: cannot be started: {getattr(error, "strerror", None) or error}; the words '
        'after -- are the command, its program first'
      ) from error
    self.pid = self._process.pid
    out, err = self._process.stdout.fileno(), self._process.stderr.fileno()
    self._stderr = _Stream(err, 2)
    self._streams = [_Stream(out, 1), self._stderr]

  def pump(self, seconds: float) -> None:
    """Passes output on for at most so many seconds, or until there is some."""
    if not self._streams:
      time.sleep(seconds)
      return
    ready = select.select([s.source for s in self._streams], [], [], seconds)[0]
    for stream in [s for s in self._streams if s.source in ready]:
      if not stream.forward():
        self._streams.remove(stream)

  def wait(self) -> int:
    """Passes output on until the child has ended; returns its exit code, 128 + N for signal N."""
    while (code := self._process.poll()) is None:
      self.pump(_POLL)
    end = time.monotonic() + _DRAIN
    while self._streams and time.monotonic() < end:
      self.pump(_POLL)
    return code if code >= 0 else 128 - code

  def signal(self, number: int) -> None:
    """Sends a signal to the child and the processes that it has started in its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self.pid, number)

  def wait_for_others(self, seconds: float) -> None:
    """Passes output on until every process of the child's group has ended, for at most so long."""
    end = time.monotonic() + seconds
    while self._has_others() and time.monotonic() < end:
      self.pump(_POLL)

  def _has_others(self) -> bool:
    try:
      os.killpg(self.pid, 0)
    except (ProcessLookupError, PermissionError):
      return False
    return True

  def close(self) -> None:
    """Closes the pipes: a process that still writes to them gets SIGPIPE."""
    self._process.stdout.close()
    self._process.stderr.close()

  def last_lines(self, count: int) -> list[str]:
    """Returns the last lines of stderr; of a progress bar its last state."""
    text = _ESCAPE.sub('', self._stderr.end.decode(errors='replace'))
    lines = [line.rstrip('\r ').rpartition('\r')[2] for line in text.split('\n')]
    return [line for line in lines if line.strip()][-count:]
