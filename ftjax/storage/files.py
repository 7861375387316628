"""Reads and writes files: local paths, and objects of Google Cloud Storage as gs://BUCKET/PATH.

All other modules reach files through this one. Text is UTF-8. Whole files are replaced atomically:
a reader, or a run that starts after a crash, sees the old text or the new one, never half. Log
files grow through `LineLog`, since object stores have no append. Files that must be local (memory
maps, TensorBoard) go through `local_mirror` and `Staged`. docs/gcs.md lists what differs on gs://.
"""

import fcntl
import logging
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

from ftjax.runtime.errors import ConfigError
from ftjax.storage import gcs, gcs_lock, gcs_probe, locations

log = logging.getLogger(__name__)


def is_remote(path: str | os.PathLike) -> bool:
  """Returns True for `scheme://...`, False for a local path."""
  return '://' in os.fspath(path)


def join(path: str | os.PathLike, *parts: str) -> str:
  """Joins parts of a local or remote path with '/'. Raises ValueError for an absolute part."""
  for part in parts:
    if part.startswith('/') or is_remote(part):
      raise ValueError(f'join: got the absolute part {part!r} under {os.fspath(path)!r}')
  return '/'.join([os.fspath(path).rstrip('/'), *parts])


def absolute(path: str | os.PathLike) -> str:
  """Returns the absolute path."""
  return os.fspath(path) if is_remote(path) else os.path.abspath(path)


def _is_gcs(path: str | os.PathLike) -> bool:
  """Returns whether a path is in a bucket. Raises ConfigError for other schemes and gs:/BUCKET."""
  text = os.fspath(path)
  if not is_remote(text):
    if text.startswith(gcs.SCHEME[:4]):  # what pathlib makes of gs://
      locations.check('path', text)
    return False
  if not text.startswith(gcs.SCHEME):
    locations.check('path', text)
    raise ConfigError(f'{text!r}: only local paths and gs:// work; copy it to one of them')
  return True


def as_path(path: str | os.PathLike) -> Path:
  """Returns a pathlib.Path, or for gs:// a gcs.GcsPath, which has the methods that ftjax uses.

  (Path itself would turn gs://bucket into gs:/bucket, a local folder.)
  """
  return gcs.GcsPath(path) if _is_gcs(path) else Path(path)  # type: ignore[return-value]


def read_bytes(path: str | os.PathLike) -> bytes:
  """Returns the whole file."""
  if _is_gcs(path):
    return gcs.GcsPath(path).read_bytes()
  with open(path, 'rb') as f:
    return f.read()


def read_text(path: str | os.PathLike) -> str:
  """Returns the whole file as text, without newline translation."""
  return read_bytes(path).decode('utf-8')


def write_text(path: str | os.PathLike, text: str) -> None:
  """Replaces the file atomically by a text, as `write_bytes`."""
  write_bytes(path, text.encode('utf-8'))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
  """Replaces the file atomically: a temporary file in its folder, fsync, rename, fsync the folder.

  Writing an object is atomic anyway.
  """
  if _is_gcs(path):
    gcs.GcsPath(path).write_bytes(content)
    return
  path = os.fspath(path)
  temporary = f'{path}.{socket.gethostname()}.{os.getpid()}.tmp'
  try:
    with open(temporary, 'wb') as f:
      f.write(content)
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except BaseException:
    if os.path.exists(temporary):
      os.remove(temporary)
    raise
  _sync_folder(os.path.dirname(path) or '.')  # else a power failure may undo the rename


def _sync_folder(path: str | os.PathLike) -> None:
  number = os.open(path, os.O_RDONLY)
  try:
    os.fsync(number)
  finally:
    os.close(number)


def sync_tree(path: str | os.PathLike) -> None:
  """Syncs all files below a folder, the folders and its own name to disk; nothing on gs://."""
  if _is_gcs(path):
    return
  for folder, _, names in os.walk(path):
    for name in names:
      with open(os.path.join(folder, name), 'rb') as f:
        os.fsync(f.fileno())
    _sync_folder(folder)
  _sync_folder(os.path.dirname(os.fspath(path)) or '.')


def exists(path: str | os.PathLike) -> bool:
  """Returns whether a file or folder exists; in a bucket a folder exists if it is not empty."""
  return gcs.GcsPath(path).exists() if _is_gcs(path) else os.path.exists(path)


def listdir(path: str | os.PathLike) -> list[str]:
  """Returns the names in a folder, sorted."""
  if _is_gcs(path):
    return [p.name for p in gcs.GcsPath(path).iterdir()]
  return sorted(os.listdir(path))


def makedirs(path: str | os.PathLike) -> None:
  """Creates the folder and its parents where they do not exist; does nothing in a bucket."""
  if not _is_gcs(path):
    os.makedirs(path, exist_ok=True)


def remove(path: str | os.PathLike) -> None:
  """Deletes a file or an object."""
  if _is_gcs(path):
    gcs.GcsPath(path).unlink()
  else:
    os.remove(path)


def remove_tree(path: str | os.PathLike) -> None:
  """Deletes a folder with its content."""
  if _is_gcs(path):
    gcs.GcsPath(path).remove_tree()
  else:
    shutil.rmtree(path)


def to_disk(file) -> None:
  """Syncs an open file of `as_path(...).open('wb')` to disk; objects are safe once closed."""
  file.flush()
  if isinstance(file, gcs.Writer):
    return
  os.fsync(file.fileno())


def local_mirror(folder: str | os.PathLike) -> Path:
  """Returns the folder itself, or for gs:// a local folder in its place, kept between runs.

  It is under $FTJAX_CACHE, else $XDG_CACHE_HOME/ftjax, else ~/.cache/ftjax.
  """
  if not _is_gcs(folder):
    return Path(folder)
  home = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
  bucket, key = gcs.split(folder)
  return Path(os.environ.get('FTJAX_CACHE') or os.path.join(home, 'ftjax'), 'gs', bucket, key)


def fetch_folder(remote: str | os.PathLike, target: Path, mark: str) -> bool:
  """Downloads the files directly in `remote` into the folder `target`.

  Returns:
    False, without a download, where `remote` is local or lacks the file `mark`, which `put_folder`
    writes last.
  """
  if not _is_gcs(remote) or not (gcs.GcsPath(remote) / mark).is_file():
    return False
  for path in gcs.GcsPath(remote).iterdir():
    if path.is_file():
      with path.open('rb', buffering=0) as source, open(target / path.name, 'wb') as out:
        while block := source.read(32 << 20):
          out.write(block)
  return True


def put_folder(source: Path, remote: str | os.PathLike, mark: str) -> None:
  """Uploads the files directly in `source`, `mark` last.

  Does nothing where `mark` exists already or `remote` is local.
  """
  if not _is_gcs(remote) or (gcs.GcsPath(remote) / mark).is_file():
    return
  for path in sorted(source.iterdir(), key=lambda p: (p.name == mark, p.name)):
    with path.open('rb') as file, (gcs.GcsPath(remote) / path.name).open('wb') as out:
      shutil.copyfileobj(file, out, 8 << 20)


class Lock:
  """Locks a folder for this process until the process ends; for buckets see gcs_lock.py.

  Raises:
    ConfigError: another process has the lock; the message names it.
  """

  def __init__(self, folder: str | os.PathLike):
    self._held = gcs_lock.BucketLock(folder) if _is_gcs(folder) else _KernelLock(folder)

  def release(self) -> None:
    self._held.release()


class _KernelLock:
  def __init__(self, folder: str | os.PathLike):
    path = join(folder, '.lock')
    self._file = open(path, 'a+', encoding='utf-8')  # noqa: SIM115 (held until the process ends)
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      self._file.seek(0)
      holder = self._file.read().strip() or 'an unnamed process'
      raise ConfigError(
        f'--workdir={os.fspath(folder)} is in use by {holder}; wait for it, stop it, or give '
        'another --workdir'
      ) from error
    except OSError as error:
      log.warning('%s: the file system has no locks (%s): start no second run there', path, error)
      return
    self._file.truncate(0)
    self._file.write(f'process {os.getpid()} on {socket.gethostname()}')
    self._file.flush()

  def release(self) -> None:
    self._file.close()


class LineLog:
  """A text file that grows line by line.

  Every reader sees a line when `write` returns. The line survives a crash of the process from then
  on, and a crash of the machine after `sync`.

  In a bucket the whole text is kept in memory and uploaded as one object: at `sync` and `close`,
  and in between at the intervals of `gcs.Pace`. Other readers see a line, and it survives a crash
  of the process, after the next upload.
  """

  def __init__(self, path: str | os.PathLike):
    self._log = _ObjectLog(gcs.GcsPath(path)) if _is_gcs(path) else _FileLog(path)

  def write(self, line: str) -> None:
    if '\n' in line:
      raise ValueError(f'LineLog.write: one line at a time, got {line[:60]!r}')
    self._log.write(line.encode('utf-8') + b'\n')

  def sync(self) -> None:
    self._log.sync()

  def close(self) -> None:
    self._log.close()


class _FileLog:
  def __init__(self, path: str | os.PathLike):
    self._file = open(path, 'ab')  # noqa: SIM115 (closed by close)

  def write(self, line: bytes) -> None:
    self._file.write(line)
    self._file.flush()

  def sync(self) -> None:
    os.fsync(self._file.fileno())

  def close(self) -> None:
    if not self._file.closed:
      self.sync()
      self._file.close()


class _ObjectLog:
  def __init__(self, path: gcs.GcsPath):
    self._path, self._pace, self._is_new = path, gcs.Pace(), False
    try:
      self._text = bytearray(path.read_bytes())
    except FileNotFoundError:
      self._text = bytearray()

  def write(self, line: bytes) -> None:
    self._text += line
    self._is_new = True
    if self._pace.is_due():
      try:
        self.sync()
      except OSError as error:  # the next upload has these lines too
        log.warning('%s: upload failed, tried again later: %s', self._path, error)

  def sync(self) -> None:
    if self._is_new:
      with self._pace.upload():
        self._path.write_bytes(bytes(self._text))
      self._is_new = False

  close = sync


class Staged:
  """A folder for libraries that write local files only; `push` uploads them to gs://.

  Attributes:
    folder: the folder to write to: the path itself, or for gs:// a temporary folder.
    is_remote: whether the path is on gs://; if not, `push` does nothing.
  """

  def __init__(self, path: str | os.PathLike):
    self.is_remote = _is_gcs(path)
    self._target = as_path(path)
    self.folder = tempfile.mkdtemp(prefix='ftjax-') if self.is_remote else os.fspath(path)
    self._pace, self._sizes = gcs.Pace(), {}

  def is_due(self) -> bool:
    """Returns whether it is time to push; never for a local folder."""
    return self.is_remote and self._pace.is_due()

  def push(self) -> None:
    """Uploads the files that grew, each as one object."""
    if not self.is_remote:
      return
    with self._pace.upload():
      for path in sorted(p for p in Path(self.folder).rglob('*') if p.is_file()):
        name = path.relative_to(self.folder).as_posix()
        content = path.read_bytes()
        if self._sizes.get(name) != len(content):
          self._target.joinpath(name).write_bytes(content)
          self._sizes[name] = len(content)

  def close(self) -> None:
    """Removes the temporary folder; changes since the last `push` are lost."""
    if self.is_remote:
      shutil.rmtree(self.folder, ignore_errors=True)


def probe(workdir: str | os.PathLike) -> float:
  """Creates, lists and deletes a file in `workdir`; for buckets see gcs_probe.py.

  So a run without these rights fails before it loads a model, not at its first checkpoint.

  Returns:
    the seconds it took.

  Raises:
    ConfigError: an operation was refused. The message names path, operation, reason and remedy.
  """
  start = time.monotonic()
  if _is_gcs(workdir):
    gcs_probe.probe(workdir)
    return time.monotonic() - start
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
