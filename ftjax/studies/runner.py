"""Runs the runs of a study: each a process of its own, some at a time, started again after a crash.

Exit codes are those of ftjax.train: after 3, 4 and 5 a run has failed, and the study continues; 2
ends the study; after every other code the run is started again, as ftjax.supervise does.
"""

import contextlib
import dataclasses
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from ftjax.config.search_space import Point
from ftjax.reporting.figures import duration, number, one_line
from ftjax.runtime.errors import ConfigError, StoppedEarly
from ftjax.storage import files, snapshots
from ftjax.studies.folder import Folder, Outcome, Record
from ftjax.studies.metric import StudyMetric
from ftjax.supervision import child, exit_codes

log = logging.getLogger(__name__)

_POLL = 0.05  # seconds between two looks at the runs
_GRACE = 120.0  # seconds for the runs to save when the study is stopped
_MAX_IDLE_STARTS = 3  # in a row without a newer checkpoint
_BAD_CONFIG = ConfigError.exit_code
_LONGEST_REASON = 300  # characters
_LOG_END = 4000  # bytes of a log that are searched for the reason of a failure


@dataclasses.dataclass(frozen=True)
class Job:
  """A run, or its part up to a step.

  Attributes:
    name: of the run.
    values: config keys that it changes.
    stop_at: step after which it ends; 0: its last one.
  """

  name: str
  values: Point
  stop_at: int = 0


@dataclasses.dataclass
class _Running:
  """A started process.

  Attributes:
    before: newest checkpoint when it was started; None: there was none.
    idle: starts in a row without a newer one.
  """

  job: Job
  slot: int
  process: subprocess.Popen
  began: float
  before: int | None
  starts: int
  idle: int
  spent: float


class Runner:
  """Starts runs, waits for them and records their ends.

  Args:
    folder: of the study.
    metric: that is read when a run ends.
    launch: command of one run, see study.launch; '': ftjax.train on this machine.
    parallel: runs at a time.
    shares_base: whether all runs evaluate the same base model on the same tasks.
  """

  def __init__(
    self, folder: Folder, metric: StudyMetric, launch: str, parallel: int, shares_base: bool = True
  ):
    self._folder, self._metric = folder, metric
    self._launch, self._parallel, self._shares_base = launch, parallel, shares_base

  def run(self, jobs: Sequence[Job], note: Callable[[Record], None] = lambda record: None) -> None:
    """Runs the jobs that have no result yet, in order.

    Args:
      jobs: of different runs, whose configs are written.
      note: called with the record of each run that ends.

    Raises:
      ConfigError: a run ended with exit code 2.
    """
    waiting = [
      job for job in jobs if self._folder.record(job.name, job.values).at(job.stop_at) is None
    ]
    total, running, idle = len(jobs), [], list(range(self._parallel))
    done = total - len(waiting)
    try:
      while waiting or running:
        while waiting and idle:
          running.append(self._start(waiting.pop(0), idle.pop(0)))
        for run in [r for r in running if r.process.poll() is not None]:
          running.remove(run)
          again = self._ended(run)
          if again is not None:
            running.append(again)
            continue
          idle = sorted([*idle, run.slot])
          done += 1
          record = self._folder.record(run.job.name, run.job.values)
          log.info('%s (%d of %d)', self._line(record), done, total)
          note(record)
        time.sleep(_POLL)
    finally:
      _stop(running)

  def _line(self, record: Record) -> str:
    last = record.last
    assert last is not None
    keys = ' '.join(f'{k}={_shown(v)}' for k, v in record.values.items())
    part = f' after step {last.stop_at}' if last.stop_at else ''
    value = f'{self._metric.name} {number(last.value, self._metric.form)}'
    what = f'failed: {last.reason}' if last.value is None else f'{value}{part}'
    return f'{record.name}: {keys}: {what}; {duration(last.seconds)}'

  def _start(self, job: Job, slot: int, after: _Running | None = None) -> _Running:
    workdir = self._folder.run(job.name)
    if self._shares_base and not files.exists(workdir):
      _copy_results(self._folder.join('base'), files.join(workdir, 'eval', 'base'))
    command = self.command(job, slot)
    with open(self._log(job.name), 'ab') as output:
      output.write(f'$ {shlex.join(command)}\n'.encode())
      output.flush()
      try:
        process = subprocess.Popen(
          command,
          stdin=subprocess.DEVNULL,
          stdout=output,
          stderr=subprocess.STDOUT,
          start_new_session=True,  # Ctrl-C reaches the study alone, which forwards it
          preexec_fn=child.die_with_parent(),
        )
      except OSError as error:
        raise ConfigError(
          f'study.launch: {command[0]} cannot be started: {error.strerror or error}'
        ) from error
    starts, idle, spent = (after.starts, after.idle, after.spent) if after else (0, 0, 0.0)
    before = snapshots.newest(workdir)
    return _Running(job, slot, process, time.monotonic(), before, starts + 1, idle, spent)

  def _log(self, name: str) -> str:
    path = self._folder.log(name)
    if files.is_remote(path):  # the output of a process needs a file
      return os.devnull
    return path

  def command(self, job: Job, slot: int) -> list[str]:
    """Returns the command line of a job."""
    flags = [f'--config={self._folder.config(job.name)}']
    flags += [f'--config.stop_at={job.stop_at}'] if job.stop_at else []
    values = {'workdir': [self._folder.run(job.name)], 'name': [job.name], 'slot': [str(slot)]}
    if not self._launch:
      return [sys.executable, '-m', 'ftjax.train', *flags, f'--workdir={values["workdir"][0]}']
    return fill(self._launch, values | {'config_overrides': flags})

  def _ended(self, run: _Running) -> _Running | None:
    """Records the end of a process; returns the next start of the same run where one follows."""
    code = run.process.returncode
    code = code if code >= 0 else 128 - code
    run.spent += time.monotonic() - run.began
    job, workdir = run.job, self._folder.run(run.job.name)
    if code == _BAD_CONFIG:
      raise ConfigError(f'run {job.name}: {self._reason(job.name) or exit_codes.reason(code)}')
    if not exit_codes.is_final(code):
      newest = snapshots.newest(workdir)
      has_progress = newest is not None and (run.before is None or newest > run.before)
      run.idle = 0 if has_progress else run.idle + 1
      if run.idle < _MAX_IDLE_STARTS:
        log.warning(
          'run %s ended with %d, %s; it is started again', job.name, code, exit_codes.reason(code)
        )
        return self._start(job, run.slot, run)
    value = self._metric.read(workdir, job.stop_at) if code == 0 else None
    reason = ''
    if code:
      reason = f'exit code {code}, {exit_codes.reason(code)}'
      reason += f': {text}' if (text := self._reason(job.name)) else ''
    elif value is None:
      reason = f'{self._metric.name} was not measured, or is no finite number'
    record = self._folder.record(job.name, job.values)
    outcome = Outcome(job.stop_at, code, value, reason, round(run.spent, 1), run.starts)
    self._folder.save(dataclasses.replace(record, outcomes=(*record.outcomes, outcome)))
    if code == 0 and self._shares_base:
      _copy_results(files.join(workdir, 'eval', 'base'), self._folder.join('base'))
    return None

  def _reason(self, name: str) -> str:
    """Returns the error that a run printed last, else its last line; '' where there is none."""
    path = self._log(name)
    if path == os.devnull:
      return ''
    with open(path, 'rb') as file:
      file.seek(max(0, os.path.getsize(path) - _LOG_END))
      lines = file.read().decode(errors='replace').splitlines()
    own = next((i for i in range(len(lines) - 1, -1, -1) if lines[i].startswith('$ ')), -1)
    lines = [line.strip() for line in lines[own + 1 :] if line.strip()]
    found = [line for line in lines if line.startswith('error: ')] or lines
    return one_line(found[-1].removeprefix('error: '), _LONGEST_REASON) if found else ''


def _shown(value) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def fill(template: str, values: Mapping[str, Sequence[str]]) -> list[str]:
  """Returns the words of a command with its placeholders replaced.

  A word that is one placeholder becomes its words. Inside of a longer word, such as the quoted
  command of ssh or `sh -c`, they are quoted for a shell.

  Raises:
    ConfigError: quotes that do not match.
  """
  try:
    words = shlex.split(template)
  except ValueError as error:
    raise ConfigError(f'study.launch={template!r}: {error}') from error
  out: list[str] = []
  for word in words:
    if word.startswith('{') and (own := values.get(word[1:-1])) and word.endswith('}'):
      out += own
      continue
    is_script = any(c.isspace() for c in word)

    def text(found: re.Match, is_script=is_script) -> str:
      own = values[found[1]]
      return shlex.join(own) if is_script or len(own) > 1 else own[0]

    out.append(re.sub(rf'\{{({"|".join(values)})\}}', text, word))
  return out


def _copy_results(source: str, target: str) -> None:
  """Copies stored results of the base model; their names are hashes of all they depend on."""
  if not files.exists(source):
    return
  files.makedirs(target)
  for name in files.listdir(source):
    if not files.exists(path := files.join(target, name)):
      files.write_bytes(path, files.read_bytes(files.join(source, name)))


def _stop(running: Sequence[_Running]) -> None:
  """Ends processes that are left: they save, and go on at the next start of the study."""
  left = [run for run in running if run.process.poll() is None]
  if not left:
    return
  log.info('stopping %d runs; each saves its state first', len(left))
  _signal(left, signal.SIGTERM)
  end = time.monotonic() + _GRACE
  while time.monotonic() < end and any(run.process.poll() is None for run in left):
    try:
      time.sleep(_POLL)
    except (KeyboardInterrupt, StoppedEarly):  # asked twice
      break
  _signal([run for run in left if run.process.poll() is None], signal.SIGKILL)
  for run in left:
    run.process.wait()


def _signal(running: Sequence[_Running], number: int) -> None:
  for run in running:
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(run.process.pid, number)
