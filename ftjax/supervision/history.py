"""What supervise records of each start: a row of restarts.jsonl, a line on the terminal, and the
report when it gives up."""

import dataclasses
import datetime
import os
import shlex
import socket
from collections.abc import Sequence
from typing import Any

from ftjax.runtime.redaction import redact_text
from ftjax.supervision import exit_codes

FILE = 'restarts.jsonl'
_LONG = 60.0  # seconds after which a run may have trained
LINES = 20  # of the end of stderr, in the report


@dataclasses.dataclass(frozen=True)
class Start:
  """One start of the command that has ended.

  Attributes:
    number: from 1.
    kind: 'run', or 'preflight'.
    pid: of the process.
    code: its exit code, 128 + N for signal N.
    seconds: that it ran.
    before, after: newest finalized step when it started and ended; None: no checkpoint.
    lines: the end of its stderr.
  """

  number: int
  kind: str
  pid: int
  code: int
  seconds: float
  before: int | None
  after: int | None
  lines: Sequence[str]

  @property
  def has_progress(self) -> bool:
    """Whether a newer checkpoint was finalized."""
    return self.after is not None and (self.before is None or self.after > self.before)

  def row(self, then: str, wait: float | None) -> dict[str, Any]:
    """Returns the row of restarts.jsonl. then: what happens next; wait: seconds until the next
    start, None: there is none.
    """
    now = datetime.datetime.now(datetime.UTC)
    return {
      'time': now.isoformat(timespec='milliseconds'),
      'host': socket.gethostname(),
      'supervisor': os.getpid(),
      'attempt': self.number,
      'kind': self.kind,
      'pid': self.pid,
      'exit_code': self.code,
      'signal': exit_codes.signal_name(self.code),
      'reason': exit_codes.reason(self.code),
      'step_before': self.before,
      'step_after': self.after,
      'seconds': round(self.seconds, 3),
      'then': then,
      'wait_s': None if wait is None else round(wait, 3),
    }

  def line(self, then: str) -> str:
    """Returns the line for the terminal."""
    what = 'pre-flight' if self.kind == 'preflight' else f'start {self.number}'
    steps = '' if self.kind == 'preflight' else f'; checkpoint {_step(self.before)}'
    steps += f' -> {_step(self.after)}' if self.has_progress else ''
    return (
      f'{what} (process {self.pid}) ended after {self.seconds:.1f} s with {self.code}, '
      f'{exit_codes.reason(self.code)}{steps}; {then}'
    )


def _step(step: int | None) -> str:
  return 'none' if step is None else str(step)


def report(command: Sequence[str], starts: Sequence[Start], limit: int, log: str) -> str:
  """Returns what is printed when a command is given up.

  Args:
    command: its words.
    starts: all starts, oldest first.
    limit: starts without progress that were allowed.
    log: path of restarts.jsonl.
  """
  shown = starts[-max(limit, 10) :]
  rows = [('start', 'seconds', 'exit', 'checkpoint', 'reason')]
  rows += [
    (
      str(s.number) if s.kind == 'run' else 'pre-flight',
      f'{s.seconds:.1f}',
      str(s.code),
      f'{_step(s.before)} -> {_step(s.after)}' if s.has_progress else _step(s.after),
      exit_codes.reason(s.code),
    )
    for s in shown
  ]
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  last = starts[-1]
  lines = [
    f'gave up: {limit} starts in a row without a newer finalized checkpoint (--max_idle_starts)',
    f'command: {redact_text(shlex.join(command))}',
    '',
    *(
      '  ' + '  '.join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]])
      for row in rows
    ),
    '',
    f'The end of stderr of the last start (process {last.pid}):',
    *(f'  | {redact_text(line)[:300]}' for line in last.lines or ['(nothing)']),
    '',
    f'Look at: {exit_codes.advice(last.code)}.',
  ]
  if last.kind == 'run' and len({s.code for s in shown[-limit:]}) > 1:
    lines.append('The starts ended in different ways: see the table.')
  if last.kind == 'run' and last.seconds > _LONG:
    lines.append(
      f'It ran for {last.seconds:.0f} s: with a smaller checkpoint.every it may save in that time.'
    )
  lines.append(f'All starts: {log}')
  return '\n'.join(lines)
