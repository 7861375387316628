"""The one door to the files of a workdir. Local paths today; an object store needs changes here
alone.

Text is UTF-8. Whole files are replaced atomically: a reader, or a run that starts after a crash,
sees the old text or the new one, never half. Log files grow through `LineLog`, which does not
promise an append to the file system (object stores have none). Who writes what: metrics.py,
checkpoint.py, manifest.py, evaluation/run.py.
"""

import fcntl
import os
import socket
import time

from ftjax.runtime.errors import ConfigError


def is_remote(path: str | os.PathLike) -> bool:
  """True for `scheme://...`, False for a path of this machine."""
  return '://' in os.fspath(path)


def join(path: str | os.PathLike, *parts: str) -> str:
  """Joins with '/', local or remote. A part may not be absolute."""
  for part in parts:
    if part.startswith('/') or is_remote(part):
      raise ValueError(f'join: got the absolute part {part!r} under {os.fspath(path)!r}')
  return '/'.join([os.fspath(path).rstrip('/'), *parts])


def absolute(path: str | os.PathLike) -> str:
  """The same place named from the root."""
  return os.fspath(path) if is_remote(path) else os.path.abspath(path)


def _local(path: str | os.PathLike) -> str:
  path = os.fspath(path)
  if is_remote(path):
    raise ConfigError(f'{path!r}: only local paths work so far; give --workdir a local directory')
  return path


def read_bytes(path: str | os.PathLike) -> bytes:
  with open(_local(path), 'rb') as f:
    return f.read()


def read_text(path: str | os.PathLike) -> str:
  """The whole file as text, newlines as they are."""
  return read_bytes(path).decode('utf-8')


def write_text(path: str | os.PathLike, text: str) -> None:
  """Replaces the file atomically: a temporary file beside it, fsync, rename, fsync the folder."""
  path = _local(path)
  temporary = f'{path}.{socket.gethostname()}.{os.getpid()}.tmp'
  try:
    with open(temporary, 'wb') as f:
      f.write(text.encode('utf-8'))
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except BaseException:
    if os.path.exists(temporary):
      os.remove(temporary)
    raise
  folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
  try:
    os.fsync(folder)  # without it the rename itself may be lost with the power
  finally:
    os.close(folder)


def exists(path: str | os.PathLike) -> bool:
  return os.path.exists(_local(path))


def listdir(path: str | os.PathLike) -> list[str]:
  """Names in a folder, sorted."""
  return sorted(os.listdir(_local(path)))


def makedirs(path: str | os.PathLike) -> None:
  """Creates the folder and its parents; an existing one is fine."""
  os.makedirs(_local(path), exist_ok=True)


def remove(path: str | os.PathLike) -> None:
  os.remove(_local(path))


class Lock:
  """Holds a folder for this process until it ends, however it ends.

  Raises:
    ConfigError: another process holds it; names that process.
  """

  def __init__(self, folder: str | os.PathLike):
    path = join(folder, '.lock')
    self._file = open(_local(path), 'a+', encoding='utf-8')  # noqa: SIM115 (held while we live)
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      self._file.seek(0)
      holder = self._file.read().strip() or 'a process that did not say its name'
      raise ConfigError(
        f'--workdir={os.fspath(folder)} is in use by {holder}; wait for it, stop it, or give '
        'another --workdir'
      ) from error
    except OSError:
      return  # a file system without locks
    self._file.truncate(0)
    self._file.write(f'process {os.getpid()} on {socket.gethostname()}')
    self._file.flush()

  def release(self) -> None:
    self._file.close()


class LineLog:
  """A text file that grows line by line.

  A line is in the file, for every reader, when `write` returns. It survives the death of the
  process at once, and the death of the machine from `sync` on.
  """

  def __init__(self, path: str | os.PathLike):
    self._file = open(_local(path), 'ab')  # noqa: SIM115 (closed by close)

  def write(self, line: str) -> None:
    if '\n' in line:
      raise ValueError(f'LineLog.write: one line at a time, got {line[:60]!r}')
    self._file.write(line.encode('utf-8') + b'\n')
    self._file.flush()

  def sync(self) -> None:
    os.fsync(self._file.fileno())

  def close(self) -> None:
    if not self._file.closed:
      self.sync()
      self._file.close()


def probe(workdir: str | os.PathLike) -> float:
  """Creates, lists and deletes a file in `workdir`.

  A run then fails before it loads a model, and not at its first save.

  Returns:
    seconds it took.

  Raises:
    ConfigError: an operation was refused. The message names path, operation, reason and remedy.
  """
  start = time.monotonic()
  name = f'.probe.{socket.gethostname()}.{os.getpid()}'
  path = join(workdir, name)

  def attempt(operation, remedy, fn, *args):
    try:
      return fn(*args)
    except OSError as e:
      reason = e.strerror or type(e).__name__
      raise ConfigError(
        f'--workdir={os.fspath(workdir)}: cannot {operation}: {reason}. {remedy}'
      ) from e

  elsewhere = 'Choose another --workdir, or give this user the right to write there'
  attempt('create the folder', elsewhere, makedirs, workdir)
  attempt(f'create {path}', f'{elsewhere} (is the disk full? `df -h`)', write_text, path, 'probe')
  names = attempt('list the folder', 'Give this user the right to read it', listdir, workdir)
  if name not in names:
    raise ConfigError(
      f'--workdir={os.fspath(workdir)}: wrote {name}, but the listing does not show it. '
      'Checkpoints are found by listing: choose a file system that lists what was written'
    )
  attempt(f'delete {path}', 'Old checkpoints are deleted there: allow it', remove, path)
  return time.monotonic() - start
