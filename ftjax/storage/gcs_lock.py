"""Locks a folder of a bucket for one process, since an object store has no kernel locks.

The holder creates `.lock` on the condition that no such object exists, and rewrites it every 15 s
on the condition that it is still its own. Another process takes the lock over when its holder is
known to be dead (same machine, no such process) or has not rewritten it for a minute: the object's
generation is watched, so clocks are not compared. A holder that was disconnected for a minute and
finds another process's lock when it is back ends its run: two runs must not write one folder.
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

BEAT = 15.0  # seconds between two heartbeats
PATIENCE = 60.0  # seconds without a heartbeat after which a lock is free


def _machine() -> str:
  """Returns an id of this machine and its process namespace; '' where it is unknown."""
  try:
    with open('/proc/sys/kernel/random/boot_id') as f:
      return f'{socket.gethostname()} {f.read().strip()} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''


def _started(process: int) -> str:
  """Returns when a process of this machine started, in kernel ticks; '' where it has ended."""
  try:
    with open(f'/proc/{process}/stat') as f:
      fields = f.read().rpartition(')')[2].split()
  except OSError:
    return ''
  return '' if fields[0] in 'ZX' else fields[19]


def _end(message: str) -> None:
  from ftjax.cluster import processes  # which imports jax; users of files.py may do without

  processes.give_up(message)


class BucketLock:
  """The lock of a folder; see the top of this file.

  Args:
    folder: gs://...
    beat, patience: seconds.
    lost: called with a message, in another thread, where another process has taken the lock; the
      default ends this run.

  Raises:
    ConfigError: another process has the lock; the message names it.
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
    self._thread = threading.Thread(target=self._live, name='gcs lock', daemon=True)
    self._thread.start()

  def _content(self) -> bytes:
    holder = {
      'host': socket.gethostname(),
      'process': os.getpid(),
      'started': _started(os.getpid()),
    }
    return json.dumps(holder | {'machine': _machine(), 'nonce': self._nonce}).encode()

  def _take(self, generation: int) -> int:
    """Writes the object if it has that generation (0: none), and returns the new one; else 0."""
    from google.api_core.exceptions import PreconditionFailed

    with gcs.as_os_errors(self._path):
      blob = self._path.blob()
      try:
        blob.upload_from_string(self._content(), 'application/json', if_generation_match=generation)
      except PreconditionFailed:
        # Also the response to a retry whose first request succeeded.
        current, holder = self._holder()
        return current if holder.get('nonce') == self._nonce else 0
      return int(blob.generation)

  def _holder(self) -> tuple[int, dict]:
    """Returns (generation, content); (0, {}) where there is no lock."""
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
      log.info('%s: held by %s; waiting %.0f s for a heartbeat', self._path, name, patience)
      deadline = time.monotonic() + patience
      while time.monotonic() < deadline and self._holder()[0] == first:
        time.sleep(min(1.0, patience / 10))
    if (taken := self._take(first)) or (not self._holder()[0] and (taken := self._take(0))):
      if first:
        log.warning('%s: took over the lock of %s, which has ended', self._path, name)
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
        # A user may have deleted it.
        generation = self._take(self._generation) or self._take(0)
      except OSError as error:
        log.warning('%s: could not be renewed: %s', self._path, error)
        continue
      if not generation:
        message = f'{self._path}: another process took over the lock of this folder'
        log.error('%s', message)
        self._lost(message)
        return
      self._generation = generation

  def release(self) -> None:
    """Deletes the object if this process still has the lock."""
    from google.api_core.exceptions import NotFound, PreconditionFailed

    self._released.set()
    self._thread.join()
    with gcs.as_os_errors(self._path):
      try:
        self._path.blob().delete(if_generation_match=self._generation)
      except (NotFound, PreconditionFailed):
        log.warning('%s: another process had taken the lock', self._path)
