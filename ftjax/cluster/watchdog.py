"""Ends a process that makes no progress: a process that hangs would otherwise block all others.

Every phase of a run has a limit in seconds. When it is exceeded, the stacks of all threads go to
stderr and all processes end with code 75, to be started again from the newest checkpoint."""

import contextlib
import dataclasses
import faulthandler
import logging
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from ftjax.cluster import processes
from ftjax.runtime.errors import StoppedEarly

log = logging.getLogger(__name__)

_SLOWER = 10  # times the median step, where that is longer than the limit
_KEPT = 101  # steps for the median
_STOPPED = 5.0  # seconds without a tick of this thread: the whole process was suspended


@dataclasses.dataclass
class _Phase:
  name: str
  limit: float
  since: float


class Watchdog:
  """Watches the innermost phase that is open.

  Args:
    limits: seconds by phase; 0: no limit.
    expire: called with a message when a limit is exceeded; the default does not return.
    clock: seconds, monotonic.
  """

  def __init__(
    self,
    limits: Mapping[str, float],
    expire: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._limits, self._clock = dict(limits), clock
    self._expire = expire or _end
    self._phases: list[_Phase] = []
    self._durations: dict[str, list[float]] = {}
    self._lock = threading.Lock()
    self._thread: threading.Thread | None = None  # from the first phase on

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Applies the limit of `name` to the code inside; the clock of an outer phase is paused.

    Raises:
      KeyError: a name without a limit.
    """
    phase = _Phase(name, self._limit(name), self._clock())
    with self._lock:
      self._phases.append(phase)
      if self._thread is None:
        self._thread = threading.Thread(target=self._watch, daemon=True, name='watchdog')
        self._thread.start()
    try:
      yield
    finally:
      with self._lock:
        self._phases.remove(phase)
        if self._phases:
          self._phases[-1].since = self._clock()

  def _limit(self, name: str) -> float:
    """Returns the limit of a phase in seconds; of a step at least that of compiling until two steps
    were timed.
    """
    limit = self._limits[name]
    if name == 'step' and limit and len(self._durations.get(name, ())) < 2:
      return max(limit, self._limits.get('compile', limit))
    return limit

  def beat(self) -> None:
    """Restarts the clock of the innermost phase after a step, and adapts its limit to the median
    duration.
    """
    with self._lock:
      if not self._phases:
        return
      phase, now = self._phases[-1], self._clock()
      durations = self._durations.setdefault(phase.name, [])
      durations[:] = [*durations[1 - _KEPT :], now - phase.since]
      phase.since = now
      if phase.limit:
        usual = _SLOWER * statistics.median(durations)
        phase.limit = max(self._limit(phase.name), usual)

  def overdue(self) -> str:
    """Returns a message when the innermost phase has exceeded its limit, else ''."""
    with self._lock:
      if not self._phases:
        return ''
      phase = self._phases[-1]
      seconds = self._clock() - phase.since
      if not phase.limit or seconds <= phase.limit:
        return ''
    return (
      f'no progress in phase {phase.name!r} for {seconds:.0f} s, the limit is {phase.limit:.0f} '
      f'(watchdog.{phase.name})'
    )

  def _watch(self) -> None:
    # A phase may have any limit: check often, it costs nothing.
    while True:
      before = self._clock()
      time.sleep(0.25)
      if (gap := self._clock() - before) > _STOPPED:  # Ctrl-Z, a debugger: not a hang
        with self._lock:
          for phase in self._phases:
            phase.since += gap
      if message := self.overdue():
        self._expire(message)
        return


def _end(message: str) -> None:
  # Process 0 may hang, or the process that reads stderr.
  processes.exit_within(processes.GRACE, StoppedEarly.exit_code)
  print(f'error: {message}; stacks of all threads:', file=sys.stderr, flush=True)
  with contextlib.suppress(OSError, ValueError):  # a notebook's stderr is no file
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
  processes.give_up(message)
