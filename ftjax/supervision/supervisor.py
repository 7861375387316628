"""Runs a command, and runs it again after a crash or a preemption until it is done, or until
several starts in a row made no progress.

Progress is a newer finalized checkpoint in the workdir. Nothing here imports jax: it works where
jax is broken, and takes no memory and no device from the child."""

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence

from ftjax.cluster import preemption
from ftjax.runtime.errors import CheckError, ConfigError, RunError
from ftjax.storage import files, shared_log, snapshots
from ftjax.supervision import exit_codes, history
from ftjax.supervision.child import STOPS, Child, emit
from ftjax.supervision.history import Start

PREFLIGHT = '--preflight'  # of ftjax.train: checks the hosts, and ends
_LONGEST_WAIT = 300.0  # seconds between two starts
_REPEATS = 1.0  # seconds in which a second stop signal is the first one, sent twice
_OTHERS_END = 300.0  # seconds that the processes of a stopped command have to end
_TICK = 0.1  # seconds
_TERMINATED = 128 + signal.SIGTERM


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to run.

  Attributes:
    command: its words.
    workdir: where its checkpoints are.
    max_idle_starts: starts in a row without a newer checkpoint after which it is given up.
    backoff: seconds before the start after the first one without progress; doubles.
    preflight: whether the command runs with --preflight first.
  """

  command: tuple[str, ...]
  workdir: str
  max_idle_starts: int = 3
  backoff: float = 10.0
  preflight: bool = False


def find_workdir(command: Sequence[str]) -> str:
  """Returns the value of the last --workdir among the words of a command, '' if there is none."""
  found = ''
  for i, word in enumerate(command):
    name, equals, value = word.partition('=')
    if name in ('--workdir', '-workdir'):
      found = value if equals else (command[i + 1] if i + 1 < len(command) else '')
  return os.path.expanduser(found)


def wait_before(idle: int, backoff: float) -> float:
  """Returns the seconds to wait after `idle` starts in a row without progress."""
  return min(backoff * 2 ** (idle - 1), max(_LONGEST_WAIT, backoff)) if idle else 0.0


class Supervisor:
  """Runs a command to its end; `run` is called once."""

  def __init__(self, settings: Settings):
    self._settings = settings
    self._log = files.join(settings.workdir, history.FILE)
    self._starts: list[Start] = []
    self._child: Child | None = None
    self._stopped_at: float | None = None  # when the first stop signal came

  def run(self) -> int:
    """Returns the exit code of the last start; 5, with a report on stderr, when the command is
    given up: an outer supervisor does not start again on it.

    Raises:
      ConfigError: the command cannot be started.
    """
    with self._signals():
      return self._run()

  def _run(self) -> int:
    s, idle = self._settings, 0
    is_checking = s.preflight
    while True:
      start = self._start('preflight' if is_checking else 'run')
      if start is None:
        return self._starts[-1].code if self._starts else _TERMINATED
      if self._stopped_at is not None:
        self._record(start, 'was asked to stop', None)
        return start.code
      if is_checking and start.code == 0:
        self._record(start, 'starting', 0.0)
        is_checking, idle = False, 0
        continue
      if exit_codes.is_final(start.code):
        self._record(start, 'not starting again', None)
        return start.code
      idle = 0 if start.has_progress else idle + 1
      if idle >= s.max_idle_starts:
        self._record(start, 'giving up', None)
        self._print(history.report(s.command, self._starts, s.max_idle_starts, self._log))
        return CheckError.exit_code
      if (host := preemption.server()) and preemption.is_preempted(host):
        self._record(start, 'this machine is being preempted, so not starting again on it', None)
        return start.code
      wait = wait_before(idle, s.backoff)
      then = f'starting again in {wait:g} s' if wait else 'starting again now'
      self._record(start, then, wait)
      if not self._sleep(wait):
        self._print('was asked to stop')
        return start.code

  def _start(self, kind: str) -> Start | None:
    """Runs the command to its end; None where it was asked to stop before."""
    s = self._settings
    before = self._newest()
    words = [*s.command, PREFLIGHT] if kind == 'preflight' else s.command
    # A stop signal between fork and assignment would reach nobody.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
      if self._stopped_at is None:
        self._child = Child(words)
    finally:
      signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    if (child := self._child) is None:
      return None
    code = child.wait()
    if self._stopped_at is not None:
      child.wait_for_others(_OTHERS_END)  # a shell ends before the run that it has started
    elif not exit_codes.is_final(code):
      child.signal(signal.SIGKILL)  # what is left may hold the workdir's lock or a device
    child.close()
    self._child = None
    number = 1 + sum(old.kind == 'run' for old in self._starts)
    seconds = time.monotonic() - child.began
    lines = child.last_lines(history.LINES)
    start = Start(number, kind, child.pid, code, seconds, before, self._newest(), lines)
    self._starts.append(start)
    return start

  def _newest(self) -> int | None:
    """Returns the newest finalized step; the last known one where it cannot be listed now."""
    try:
      return snapshots.newest(self._settings.workdir)
    except (OSError, RunError) as error:
      known = self._starts[-1].after if self._starts else None
      self._print(f'{self._settings.workdir}: cannot be listed ({error}); counts as no progress')
      return known

  def _record(self, start: Start, then: str, wait: float | None) -> None:
    """Prints how a start ended, and appends it to restarts.jsonl; a fault of that costs nothing."""
    self._print(start.line(then))
    is_known = not exit_codes.is_final(start.code) or start.code == 0
    try:
      if is_known or files.exists(self._settings.workdir):  # none is made for a mistyped command
        shared_log.append(self._log, json.dumps(start.row(then, wait)))
    except (OSError, RunError) as error:
      self._print(f'{self._log}: cannot be written ({error})')

  def _print(self, text: str) -> None:
    emit(2, f'{time.strftime("%H:%M:%S")} supervise: {text}\n'.encode())

  def _sleep(self, seconds: float) -> bool:
    """Waits; returns False as soon as it was asked to stop."""
    end = time.monotonic() + seconds
    while self._stopped_at is None and (left := end - time.monotonic()) > 0:
      time.sleep(min(_TICK, left))
    return self._stopped_at is None

  @contextlib.contextmanager
  def _signals(self) -> Iterator[None]:
    """Handles stop signals, but those that this process was started to ignore (nohup, a job in the
    background of a shell).
    """
    ignored = [n for n in STOPS if signal.getsignal(n) is signal.SIG_IGN]
    handled = [n for n in STOPS if n not in ignored or n == signal.SIGTERM]
    old = {n: signal.signal(n, self._stop) for n in handled}
    try:
      yield
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)

  def _stop(self, number: int, frame: object) -> None:
    """Forwards the first stop signal to the child, and kills it at the second."""
    del frame
    name, now = signal.Signals(number).name, time.monotonic()
    if self._stopped_at is None:
      self._stopped_at = now
      self._print(f'{name}: stopping' + (' the command' if self._child else ''))
      if self._child:
        # A run saves at SIGTERM and SIGINT, and would die of SIGHUP.
        self._child.signal(signal.SIGTERM if number == signal.SIGHUP else number)
    elif self._child and now - self._stopped_at > _REPEATS:
      self._print(f'{name} again: killing the command')
      self._child.signal(signal.SIGKILL)


def supervise(settings: Settings) -> int:
  """Runs a command under supervision; returns its last exit code, see `Supervisor.run`.

  Raises:
    ConfigError: no command, no workdir in it, or it cannot be started.
  """
  if not settings.command:
    raise ConfigError(
      'there is no command; write it after --, as: python -m ftjax.supervise -- python -m '
      'ftjax.train --config=FILE --workdir=DIR'
    )
  if not settings.workdir:
    raise ConfigError(
      'the command has no --workdir, where its checkpoints would be; give --workdir=DIR before --'
    )
  return Supervisor(settings).run()
