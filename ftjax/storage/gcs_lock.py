"""Holds a folder of a bucket for one process. An object store has no locks that the kernel lets go.

The holder makes `.lock` on the condition that no such object exists, and writes it anew every 15 s
on the condition that it is still its own. Another process that finds it takes it over when its
holder is known to be dead (same machine, no such process), or has written nothing for a minute:
clocks are not compared, the object's generation is watched. A holder that was cut off for a minute,
and finds its lock in other hands when it is back, ends: two runs must not write one folder.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable

from ftjax.runtime.errors import ConfigError
from ftjax.storage import gcs

log = logging.getLogger(__name__)

BEAT = 15.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one after which a lock is nobody's


def _machine() -> str:
  """Where process ids mean the same; '' where that cannot be told."""
  try:
    with open('/proc/sys/kernel/random/boot_id') as f:
      return f'{socket.gethostname()} {f.read().strip()} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''


def _started(process: int) -> str:
  """When a process of this machine started, in the kernel's ticks; '' where it runs no more."""
  try:
    with open(f'/proc/{process}/stat') as f:
      fields = f.read().rpartition(')')[2].split()
  except OSError:
    return ''
  return '' if fields[0] in 'ZX' else fields[19]


def _end(message: str) -> None:
  from ftjax.cluster import processes  # which imports jax; files.py is for those too who do without

  processes.give_up(message)


class Lease:
  """The lock of a folder; see the top of this file.

  Args:
    folder: gs://...
    beat, patience: seconds.
    lost: called with a message, in another thread, where another process has taken the folder; the
      usual one ends this run.

  Raises:
    ConfigError: another process holds it; names that process.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    beat: float = BEAT,
    patience: float = PATIENCE,
    lost: Callable[[str], None] = _end,
  ):
    self._lost = lost
    self._folder, self._path = folder, gcs.GcsPath(f'{os.fspath(folder).rstrip("/")}/.lock')
    self._nonce, self._beat = uuid.uuid4().hex, beat
    self._generation = self._take(0)
    if not self._generation:
      self._generation = self._take_over(patience)
    self._released = threading.Event()
    self._thread = threading.Thread(target=self._live, name='lease', daemon=True)
    self._thread.start()

  def _content(self) -> bytes:
    holder = {
      'host': socket.gethostname(),
      'process': os.getpid(),
      'started': _started(os.getpid()),
    }
    return json.dumps(holder | {'machine': _machine(), 'nonce': self._nonce}).encode()

  def _take(self, generation: int) -> int:
    """Writes the object if it is of that generation (0: not there): the new one, 0 if it is not."""
    from google.api_core.exceptions import PreconditionFailed

    with gcs.as_os_errors(self._path):
      blob = self._path.blob()
      try:
        blob.upload_from_string(self._content(), 'application/json', if_generation_match=generation)
      except PreconditionFailed:
        # Also the answer to a second try whose first one came through.
        current, holder = self._holder()
        return current if holder.get('nonce') == self._nonce else 0
      return int(blob.generation)

  def _holder(self) -> tuple[int, dict]:
    """(generation, what it says); (0, {}) where there is no lock."""
    while True:
      path, generation = gcs.GcsPath(self._path), 0
      try:
        generation = path.stat().generation
        found = json.loads(path.read_bytes())
      except FileNotFoundError:
        if generation:  # renewed in between
          continue
        return 0, {}
      except ValueError:
        found = {}
      return generation, found if isinstance(found, dict) else {}

  def _take_over(self, patience: float) -> int:
    first, holder = self._holder()
    name = f'process {holder.get("process", "?")} on {holder.get("host", "?")}'
    if first and not self._is_dead(holder):
      log.info('%s: held by %s; waiting %.0f s for a sign of life', self._path, name, patience)
      deadline = time.monotonic() + patience
      while time.monotonic() < deadline and self._holder()[0] == first:
        time.sleep(min(1.0, patience / 10))
    if (taken := self._take(first)) or (not self._holder()[0] and (taken := self._take(0))):
      if first:
        log.warning('%s: took over the lock of %s, which is gone', self._path, name)
      return taken
    raise ConfigError(
      f'--workdir={os.fspath(self._folder)} is in use by {name}; wait for it, stop it, or give '
      'another --workdir'
    )

  @staticmethod
  def _is_dead(holder: dict) -> bool:
    here = holder.get('machine') and holder['machine'] == _machine()
    return bool(here) and _started(holder.get('process', 0)) != holder.get('started')

  def _live(self) -> None:
    while not self._released.wait(self._beat):
      try:
        # Somebody may have deleted it by hand.
        generation = self._take(self._generation) or self._take(0)
      except OSError as error:
        log.warning('%s: could not be renewed: %s', self._path, error)
        continue
      if not generation:
        message = f'{self._path}: another process took this run for dead and holds the folder'
        log.error('%s', message)
        self._lost(message)
        return
      self._generation = generation

  def release(self) -> None:
    """Deletes the object if it is still ours."""
    from google.api_core.exceptions import NotFound, PreconditionFailed

    self._released.set()
    self._thread.join()
    with gcs.as_os_errors(self._path):
      try:
        self._path.blob().delete(if_generation_match=self._generation)
      except (NotFound, PreconditionFailed):
        log.warning('%s: was no longer ours', self._path)
