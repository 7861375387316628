"""Communication between the processes of a run outside of compiled steps, through jax's
coordination service.

Every function is called by all processes in the same order, and does nothing in a single-process
run. Process 0 is the main process: it writes the small files and logs. A process that ends with an
error publishes it, and the others end with the same exit code instead of waiting for it."""

import atexit
import contextlib
import faulthandler
import itertools
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from ftjax.runtime import errors
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError, DataError, RunError, StoppedEarly
from ftjax.runtime.redaction import redact

log = logging.getLogger(__name__)

T = TypeVar('T')

GRACE = 15.0  # seconds that a process which gives up has to notify the others
_LEAVES_WITHIN = 300.0  # seconds to close files and trackers once all processes agreed to end
_MAIN_WAITS = 10.0  # seconds that process 0, which hosts the service, waits for the others
_SHOWN = 10  # keys that differ between processes, in one message
_numbers = itertools.count()
_ended, _heard = 'ftjax/ended', 'ftjax/heard'
_together = threading.Event()  # all processes have agreed to end


def _service():
  """Returns jax's record of the processes; unlike jax.process_count it initializes no device."""
  from jax._src import distributed  # the service has no public API for plain values

  return distributed.global_state


def is_main() -> bool:
  """Returns whether this is the process that writes and logs."""
  return _service().process_id == 0


def count() -> int:
  """Returns the number of connected processes."""
  return 1 if _service().client is None else _service().num_processes


def is_alone() -> bool:
  """Returns whether this is a single-process run."""
  return _service().client is None or _service().num_processes == 1


def _client():
  return _service().client


def _wait_for(key: str) -> str:
  """Returns the value of a key once it is set; only the watchdog ends the wait."""
  while True:
    try:
      # In short waits: signal handlers run between two of them.
      return _client().blocking_key_value_get(key, 1000)
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise


def gather(value: Any) -> list[Any]:
  """Returns the JSON values of all processes, in the order of their ids."""
  if is_alone():
    return [value]
  key = f'ftjax/gather/{next(_numbers)}'
  _client().key_value_set(f'{key}/{_service().process_id}', json.dumps(value))
  return [json.loads(_wait_for(f'{key}/{p}')) for p in range(_service().num_processes)]


def from_main(make: Callable[[], Any]) -> Any:
  """Calls `make` in process 0 only, and returns its result (a JSON value) in every process.

  Raises:
    RunError: what `make` raised, in every process.
  """
  if is_alone():
    return make()
  key = f'ftjax/main/{next(_numbers)}'
  if is_main():
    try:
      made = {'value': make()}
    except RunError as error:
      _client().key_value_set(key, json.dumps({'error': type(error).__name__, 'text': str(error)}))
      raise
    _client().key_value_set(key, json.dumps(made))
    return made['value']
  received = json.loads(_wait_for(key))
  if 'error' in received:
    raise getattr(errors, received['error'])(f'process 0: {received["text"]}')
  return received['value']


def main_first(make: Callable[[], T]) -> T:
  """Calls `make` in process 0, then in the others, which find the files that the first call wrote.

  Raises:
    RunError: what process 0 raised, in every process.
  """
  if is_alone():
    return make()
  made = []
  from_main(lambda: made.append(make()))
  return made[0] if made else make()


def check_same(name: str, value: str) -> None:
  """Raises DataError in every process unless `value` is the same in all."""
  values = gather(value)
  others = [p for p, v in enumerate(values) if v != values[0]]
  if others:
    raise DataError(
      f'{name}: process 0 has {values[0]}, process {others[0]} has {values[others[0]]} '
      f'({len(others)} of {len(values)} differ); do all hosts see the same files?'
    )


def check_same_values(name: str, values: Mapping[str, Any]) -> None:
  """Raises ConfigError in every process unless JSON values under the same keys are the same in all.

  The message names the keys, and each value with the processes that have it. Secrets are compared
  but not shown.
  """
  own = {k: (digest(v), redact(v, k)) for k, v in values.items()}
  if found := differences(gather(own)):
    more = f' and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''
    raise ConfigError(
      f'{name} differs between the processes: {"; ".join(found[:_SHOWN])}{more}. Give every '
      'process the same command'
    )


def differences(of_processes: Sequence[Mapping[str, tuple[str, Any]]]) -> list[str]:
  """Returns a line for each key whose digests differ: 'optim.lr=1e-05 on process 0, 2e-05 on
  processes 1, 2'.

  Args:
    of_processes: for each process {key: (digest of the value, the value as it is shown)}.
  """
  lines = []
  for key in dict.fromkeys(k for values in of_processes for k in values):
    holders: dict[str, tuple[Any, list[int]]] = {}
    for process, values in enumerate(of_processes):
      code, shown = values.get(key, ('', None))
      holders.setdefault(code, (shown, []))[1].append(process)
    if len(holders) == 1:
      continue
    groups = [
      f'{_as_shown(shown) if code else "missing"} on {_named(processes)}'
      for code, (shown, processes) in holders.items()
    ]
    lines.append(f'{key}={", ".join(groups)}')
  return lines


def _as_shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 200 else f'{text[:197]}...'


def _named(processes: list[int]) -> str:
  """Returns 'process 0', 'processes 1, 2', or for many 'processes 1, 2, 3, 4 and 60 more'."""
  first = ', '.join(map(str, processes[:4]))
  more = f' and {len(processes) - 4} more' if len(processes) > 4 else ''
  return f'process{"es" if len(processes) > 1 else ""} {first}{more}'


def wait_for_all() -> None:
  """Returns when every process has called it."""
  gather(None)


def leave_together() -> None:
  """Marks an end that all processes agree on; every process calls it before it ends.

  Each process then closes its files, and `end` waits for all. A process that is not done within 5
  minutes is ended, since nothing else watches it from here on.
  """
  wait_for_all()
  _together.set()
  if not is_alone():
    exit_within(_LEAVES_WITHIN + is_main() * _MAIN_WAITS, StoppedEarly.exit_code)


def have_agreed() -> bool:
  """Returns whether all processes have called `leave_together`."""
  return _together.is_set()


def end(code: int, message: str) -> None:
  """Ends this process and all others with `code`, at once; does not return in a run of several."""
  if is_alone():
    return
  if _together.is_set():
    wait_for_all()
    _leave(code)
  try:
    end_of_this = {'code': code, 'process': _service().process_id, 'text': message}
    _client().key_value_set(_ended, json.dumps(end_of_this))
  except jax.errors.JaxRuntimeError as error:  # another was first, or the service is gone
    log.debug('%s', error)
  _leave(code)


def give_up(message: str) -> None:
  """Ends this process and all others with exit code 75, to be started again; a single process too.

  Does not return, and ends within 15 s whatever another process does.
  """
  exit_within(GRACE, StoppedEarly.exit_code)
  end(StoppedEarly.exit_code, message)
  os._exit(StoppedEarly.exit_code)  # alone


def exit_within(seconds: float, code: int) -> None:
  """Ends this process after `seconds`, whatever it is doing then; returns at once."""
  timer = threading.Timer(seconds, os._exit, (code,))
  timer.daemon = True
  timer.start()


def _leave(code: int, message: str = '') -> None:
  exit_within(2 * _MAIN_WAITS, code)  # flushing blocks while the reader of a pipe does not read
  if message:
    print(message, file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  if is_main():
    _wait_until_heard()
  else:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _client().key_value_set(f'{_heard}/{_service().process_id}', '')
  os._exit(code)  # an orderly shutdown waits for the others, which wait for this process


def _wait_until_heard() -> None:
  """Waits until all other processes are ending too; without the service they would abort, with
  another exit code. Does not wait longer than 10 s for a process that is already dead.
  """
  left, end = set(range(1, _service().num_processes)), time.monotonic() + _MAIN_WAITS
  while left and time.monotonic() < end:
    for process in tuple(left):
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # not yet
        _client().key_value_try_get(f'{_heard}/{process}')
        left.discard(process)
    time.sleep(0.1)
  time.sleep(0.5)  # the others exit just after they have set the key


def watch() -> None:
  """Ends this process when another one has published its end, and publishes uncaught errors of this
  one.
  """
  if is_alone():
    return
  # jax's runtime aborts from a thread of its own when process 0 is gone. Dumping the threads that
  # still run may crash, and would change the exit code.
  faulthandler.enable(all_threads=False)
  client, done = _client(), threading.Event()

  def listen():
    while not done.wait(0.5):
      try:
        other = json.loads(client.key_value_try_get(_ended))
      except jax.errors.JaxRuntimeError:  # no process has ended
        continue
      if other['process'] != _service().process_id and not _together.is_set():
        own = _service().process_id
        _leave(other['code'], f'process {own}: process {other["process"]} ended: {other["text"]}')

  threading.Thread(target=listen, daemon=True, name='processes').start()
  atexit.register(done.set)
  usual = sys.excepthook

  def publish(kind, error, trace):
    usual(kind, error, trace)
    text = ''.join(traceback.format_exception_only(kind, error)).strip()[:1000]
    lost = isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' not in text
    end(StoppedEarly.exit_code if lost else 1, text)

  sys.excepthook = publish
