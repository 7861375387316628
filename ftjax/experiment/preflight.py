"""Checks the hosts of a run before the model loads: one table, one verdict.

`check` is the first minute of every run; `run` is `ftjax.train --preflight`, which ends after it.
"""

import collections
import dataclasses
import json
import re
import socket
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from ftjax.cluster import processes
from ftjax.cluster.watchdog import Watchdog
from ftjax.config import section
from ftjax.experiment import host_facts
from ftjax.runtime import sharding
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import CheckError, ConfigError, RunError
from ftjax.storage import files

OK, WARNING, FAILED, SKIPPED = 'ok', 'warning', 'FAILED', 'not run'
_WARN_S, _MOST_S = 1.0, 60.0  # seconds between the clocks of two hosts
_WIDTH = 100
_NAMED = ('jax', 'jaxlib', 'libtpu')  # packages with a row of their own
_SHOWN = 6  # differences of one process in a row


@dataclasses.dataclass(frozen=True)
class Row:
  """A check. is_flag: whether a failure is that of a flag or config key (exit code 2), not of the
  hosts (5).
  """

  name: str
  result: str
  text: str
  is_flag: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
  """The checks of all processes; equal on every process."""

  hosts: tuple[str, ...]
  rows: tuple[Row, ...]

  def having(self, result: str) -> list[Row]:
    return [r for r in self.rows if r.result == result]

  def verdict(self) -> str:
    """Returns one line: ready, or which checks failed."""
    names = {k: ', '.join(r.name for r in self.having(k)) for k in (WARNING, FAILED)}
    if names[FAILED]:
      return f'not started: {names[FAILED]}'
    return 'ready' + (f', with a warning: {names[WARNING]}' if names[WARNING] else '')

  def text(self) -> str:
    """Returns the table and the verdict."""
    count, machines = len(self.hosts), sorted(set(self.hosts))
    several = f'{len(machines)} hosts' if len(machines) > 1 else machines[0]
    lines = [f'Pre-flight: {count} process{"es" * (count > 1)} on {several}']
    width = max(len(r.name) for r in self.rows)
    for row in self.rows:
      head = f'  {row.name:<{width}}  {row.result:<7}  '
      lines += textwrap.wrap(
        row.text or '-',
        _WIDTH,
        initial_indent=head,
        subsequent_indent=' ' * len(head),
        break_on_hyphens=False,
      )
    return '\n'.join([*lines, f'Verdict: {self.verdict()}'])

  def enforce(self) -> None:
    """Raises CheckError where a check failed; ConfigError where only flags or keys are wrong."""
    failed = self.having(FAILED)
    if failed:
      kind = ConfigError if all(r.is_flag for r in failed) else CheckError
      raise kind(f'pre-flight: {"; ".join(f"{r.name}: {r.text}" for r in failed)}')


def run(c: ml_collections.ConfigDict, workdir: str) -> None:
  """Makes every check, and prints the table.

  Raises:
    CheckError, ConfigError: a check failed.
  """
  with Watchdog(c.watchdog.to_dict()).phase('restore'):
    report = examine(c, files.absolute(workdir), is_training=True)
  if processes.is_main():
    print(report.text(), flush=True)
  report.enforce()


def check(c: ml_collections.ConfigDict, workdir: str, is_training: bool) -> None:
  """Checks the hosts; prints the table where something is wrong, and nothing else. A single process
  has little to check, in milliseconds.

  Args:
    c: a validated config.
    workdir: absolute; made if missing.
    is_training: whether the run will write checkpoints.

  Raises:
    CheckError, ConfigError: a check failed.
  """
  if processes.is_alone():
    files.probe(workdir)
    rows = (_connection(), _disk([host_facts.disks(c, workdir, is_training)]))
    report = _report([socket.gethostname()], rows)
  else:
    report = examine(c, workdir, is_training)
  if (report.having(FAILED) or report.having(WARNING)) and processes.is_main():
    print(report.text(), file=sys.stderr, flush=True)
  report.enforce()


def examine(c: ml_collections.ConfigDict, workdir: str, is_training: bool) -> Report:
  """Returns the result of every check; all processes call it.

  Raises:
    ConfigError: the processes have different configs.
  """
  if not processes.is_alone():
    own = ('data.cache', 'data.workers', 'log.')  # may differ from host to host
    plain = {k: v for k, v in section.plain(c).items() if not k.startswith(own)}
    processes.check_same_values('the config', plain)
  facts = processes.gather(host_facts.collect(c))
  times = host_facts.clocks()
  refusals = processes.gather(_refusal(lambda: files.probe(workdir)))
  blind = []
  if not any(refusals):
    seen = processes.gather(host_facts.sees_shared_file(workdir))
    blind = [p for p, sees in enumerate(seen) if not sees]
  room = processes.gather(host_facts.disks(c, workdir, is_training) if not any(refusals) else [])
  compared = [
    *compare(facts),
    _connection(),
    devices(facts, {a: c.mesh[a] for a in sharding.AXES}, jax.device_count()),
  ]
  # Over devices of other kinds, or by other versions, it might not end.
  exchanged = Row('exchange', SKIPPED, 'because of a failure above')
  if all(r.result != FAILED for r in compared):
    wrong = host_facts.exchange()
    text = wrong or f'every process received the numbers of all {len(facts)} over the devices'
    exchanged = Row('exchange', FAILED if wrong else OK, text)
  rows = (*compared, exchanged, _workdir(workdir, refusals, blind), _disk(room), clock(times))
  return _report([f['host'] for f in facts], rows)


def _refusal(call: Callable[[], Any]) -> str:
  """Returns the message of a RunError that a call raises, '' if it raises none."""
  try:
    call()
  except RunError as error:
    return str(error)
  return ''


def _report(hosts: Sequence[str], rows: Sequence[Row]) -> Report:
  """Returns a report; <p> in the text of a row becomes the process and its host."""

  def named(text: str) -> str:
    return re.sub(r'<(\d+)>', lambda m: f'process {m[1]} ({hosts[int(m[1])]})', text)

  return Report(tuple(hosts), tuple(dataclasses.replace(r, text=named(r.text)) for r in rows))


def _usual(values: Sequence[Any]) -> Any:
  """Returns the value that most processes have; of equally many that of the lowest process."""
  keys = [json.dumps(v, sort_keys=True) for v in values]
  return values[keys.index(collections.Counter(keys).most_common(1)[0][0])]


def _same(
  name: str,
  values: Sequence[Any],
  show: Callable[[Any], str] = str,
  differ: Callable[[Any, Any], str] | None = None,
  result: str = FAILED,
) -> Row:
  """Returns the row of something that all processes must have in common.

  Args:
    name: of the row.
    values: of each process.
    show: value -> text.
    differ: (value, the usual one) -> text.
    result: where they differ.
  """
  usual = _usual(values)
  others = [(p, v) for p, v in enumerate(values) if v != usual]
  if not others:
    return Row(name, OK, show(usual))
  differ = differ or (lambda value, usual: f'{show(value)} instead of {show(usual)}')
  named = [f'<{p}>: {differ(v, usual)}' for p, v in others[:_SHOWN]]
  more = f'; and {len(others) - _SHOWN} more processes' if len(others) > _SHOWN else ''
  return Row(name, result, '; '.join(named) + more)


def compare(facts: Sequence[Mapping[str, Any]]) -> list[Row]:
  """Returns the rows of what `host_facts.collect` found on each process."""

  def column(key):
    return [f[key] for f in facts]

  def version(name):
    return [f['packages'].get(name, 'not installed') for f in facts]

  code = _same('code', column('folders'), lambda _: _code(facts), _changed('other files in'))
  if code.result == OK:
    commits = _same('code', column('commit'), lambda v: v or 'unknown', result=WARNING)
    if commits.result == WARNING:
      code = Row('code', WARNING, f'the same files, but the commits differ: {commits.text}')
  rest = [{k: v for k, v in f['packages'].items() if k not in _NAMED} for f in facts]
  named = [_same(n, version(n)) for n in _NAMED]
  return [
    code,
    _same('own modules', column('user_code'), lambda v: ', '.join(v) or 'none', _changed('other')),
    _same('python', column('python')),
    *(r for r in named if r.text != 'not installed'),
    _same('packages', rest, lambda v: f'{len(v)} packages, {digest(v)[:12]}', _changed('')),
    _same('runtime', column('runtime')),
    _same('settings', column('flags'), lambda v: f'{len(v)} set', _changed(''), WARNING),
  ]


def _code(facts: Sequence[Mapping[str, Any]]) -> str:
  commit = facts[0]['commit']
  return f'digest {facts[0]["code"][:12]}' + (f', commit {commit}' if commit else '')


def _changed(prefix: str) -> Callable[[Mapping[str, Any], Mapping[str, Any]], str]:
  """Returns a function that lists how one mapping differs from the usual one."""

  def differ(found: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    keys = [k for k in sorted({*found, *usual}) if found.get(k) != usual.get(k)]
    more = f' and {len(keys) - _SHOWN} more' if len(keys) > _SHOWN else ''
    if prefix:
      return f'{prefix} {", ".join(keys[:_SHOWN])}{more}'
    texts = [f'{k} {_value(found, k)} instead of {_value(usual, k)}' for k in keys[:_SHOWN]]
    return ', '.join(texts) + more

  return differ


def _value(values: Mapping[str, Any], key: str) -> str:
  return str(values[key])[:200] if key in values else 'missing'


def _connection() -> Row:
  wrong = host_facts.connection()
  return Row('connection', FAILED if wrong else OK, wrong or f'{processes.count()} connected')


def devices(facts: Sequence[Mapping[str, Any]], mesh: Mapping[str, int], count: int) -> Row:
  """Returns the row of the devices: of one kind, as many on every host, and as many as the mesh of
  the config takes.

  Args:
    facts: of each process.
    mesh: sizes of sharding.AXES.
    count: devices of all processes, as jax has counted them.
  """
  local = [f['devices'] for f in facts]
  for row in (
    _same('devices', [f['kinds'] for f in facts], ', '.join),
    _same('devices', local, lambda n: f'{n} devices'),
  ):
    if row.result != OK:
      return row
  if sum(local) != count:
    text = f'the processes have {sum(local)} together, and jax counts {count}'
    return Row('devices', FAILED, text)
  try:
    shape = sharding.mesh_shape(mesh, count)
  except ConfigError as error:
    return Row('devices', FAILED, str(error), is_flag=True)
  used = ', '.join(f'mesh.{a}={n}' for a, n in zip(sharding.AXES, shape, strict=True) if n > 1)
  kind = ', '.join(facts[0]['kinds'])
  return Row('devices', OK, f'{count} x {kind}, {local[0]} on each process; {used or "no mesh"}')


def _workdir(workdir: str, refusals: Sequence[str], blind: Sequence[int]) -> Row:
  refused = [f'<{p}>: {text}' for p, text in enumerate(refusals) if text]
  if refused:
    more = f'; and {len(refused) - _SHOWN} more processes' if len(refused) > _SHOWN else ''
    return Row('workdir', FAILED, '; '.join(refused[:_SHOWN]) + more, is_flag=True)
  if blind:
    text = (
      f'--workdir={workdir} is another folder on <{blind[0]}> than on process 0: all hosts need '
      'the same one, on a shared file system or gs://'
    )
    return Row('workdir', FAILED, text, is_flag=True)
  return Row('workdir', OK, f'written, listed and deleted by all: {workdir}')


def _disk(room: Sequence[Sequence[Mapping[str, Any]]]) -> Row:
  """Returns the row of free disk space; `room`: host_facts.disks of each process."""
  found = [(d['free'] - d['least'], p, d) for p, disks in enumerate(room) for d in disks]
  if not found:
    return Row('disk', SKIPPED, 'the workdir cannot be used')
  short = [x for x in found if x[0] < 0] or [x for x in found if x[2]['free'] < x[2]['usual']]
  _, p, d = min(short or found, key=lambda x: x[0])
  text = f'{_size(d["free"])} free on <{p}> at {d["path"]} ({d["what"]})'
  if not short:
    return Row('disk', OK, text)
  is_refused = d['free'] < d['least']
  needed = f'; at least {_size(d["least"])} needed'
  likely = f', and {_size(d["usual"])} with all checkpoints: lower checkpoint.keep or make room'
  return Row('disk', FAILED if is_refused else WARNING, text + needed + likely)


def _size(count: float) -> str:
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if count < 1024:
      return f'{count:.4g} {unit}'
    count /= 1024
  return f'{count:.4g} TiB'


def clock(times: Sequence[float]) -> Row:
  """Returns the row of the clocks, read on each process at one moment."""
  middle = sorted(times)[(len(times) - 1) // 2]
  off = [t - middle for t in times]
  worst = max(range(len(off)), key=lambda p: abs(off[p]))
  spread = max(times) - min(times)
  if spread <= _WARN_S:
    return Row('clock', OK, f'{spread:.3f} s apart')
  text = f'{spread:.1f} s apart: <{worst}> is {abs(off[worst]):.1f} s '
  text += 'ahead' if off[worst] > 0 else 'behind'
  return Row('clock', FAILED if spread > _MOST_S else WARNING, text + '; run a time service there')
