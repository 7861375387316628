"""Reads objects of Google Cloud Storage by byte ranges and writes them whole.

An object store has no folders, no append and no rename. Callers go through files.py; gcs_lock.py
locks a folder, gcs_probe.py tests permissions. `etils.epath` would be shorter, but it commits a
half-written object when a `with open('wb')` block raises, mixes two generations of an object that
is replaced while it is read, and does not distinguish a refused permission from other errors.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib
import io
import os
import posixpath
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ftjax.runtime.errors import ConfigError, DataError
from ftjax.runtime.redaction import redact_text

SCHEME = 'gs://'
_PIECE = 8 << 20  # bytes of one range request; a large read is several at once
_BUFFER = 4 << 20  # bytes read ahead where a file is read from its beginning
_THREADS = 8
_MARKER = '/'  # consoles and gcsfs make an object 'a/b/' to show an empty folder


@functools.cache
def client() -> Any:
  """Returns the client of this process.

  Raises:
    ConfigError: the extra is not installed, or there are no credentials.
  """
  # Orbax and jax reach gs:// through gcsfs. Its listings are cached and would not show what another
  # host or tensorstore wrote; its search for zonal buckets waits a minute where gRPC is blocked.
  os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  try:
    importlib.import_module('gcsfs')
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage
  except ImportError as error:
    raise ConfigError(
      f"gs:// paths need an extra that is not installed ({error}): pip install '.[gcs]' in the "
      'checkout of ftjax'
    ) from error
  import fsspec.config

  for protocol in ('gs', 'gcs'):
    fsspec.config.conf.setdefault(protocol, {}).setdefault('use_listings_cache', False)
  try:
    return storage.Client()
  except DefaultCredentialsError as error:
    raise ConfigError(
      'gs:// paths need Google credentials and none were found; on your own machine: '
      'gcloud auth application-default login. On a VM: give it a service account'
    ) from error
  except OSError as error:
    raise ConfigError(
      'gs:// paths need a project, and none is known: export GOOGLE_CLOUD_PROJECT=YOUR_PROJECT'
    ) from error


def split(path: str | os.PathLike) -> tuple[str, str]:
  """Splits gs://bucket/a/b into ('bucket', 'a/b').

  Raises:
    ConfigError: no bucket, or an empty part, '.' or '..', which an object store takes literally.
  """
  path = os.fspath(path)
  bucket, _, key = path.removeprefix(SCHEME).partition('/')
  key = key.rstrip('/')
  if not bucket or (key and {'', '.', '..'} & set(key.split('/'))):
    raise ConfigError(f"{path!r}: expected gs://BUCKET/PATH without empty parts, '.' and '..'")
  return bucket, key


@contextlib.contextmanager
def as_os_errors(path: str | os.PathLike) -> Iterator[None]:
  """Raises Google's exceptions as those that a local file system would raise."""
  import requests
  from google.api_core import exceptions
  from google.auth.exceptions import GoogleAuthError
  from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

  name = os.fspath(path)

  def end_of(text: str) -> str:
    return redact_text(text[-300:])

  try:
    yield
  except exceptions.NotFound as error:
    raise FileNotFoundError(2, 'No such object', name) from error
  except exceptions.Forbidden as error:
    raise PermissionError(13, f'Forbidden ({end_of(error.message)})', name) from error
  except InvalidResponse as error:  # a resumable upload's own class
    kind = PermissionError if error.response.status_code == 403 else OSError
    text = f'HTTP {error.response.status_code} ({end_of(error.response.text)})'
    raise kind(13 if kind is PermissionError else 5, text, name) from error
  except (
    exceptions.GoogleAPIError,
    DataCorruption,
    requests.RequestException,
    GoogleAuthError,
  ) as error:
    raise OSError(5, f'{type(error).__name__}: {end_of(str(error))}', name) from error


class Stat(NamedTuple):
  """Size of an object in bytes, its time of writing, and its generation."""

  st_size: int
  st_mtime_ns: int
  generation: int


class GcsPath:
  """An object or a folder (a prefix) of a bucket, with the methods of pathlib.Path that ftjax uses.

  After the first look at its object a path reads that generation of it, so that several reads
  through one path are consistent.
  """

  def __init__(self, path: str | os.PathLike):
    self.bucket, self.key = split(path)
    self._stat: Stat | None = None

  def __fspath__(self) -> str:
    return f'{SCHEME}{self.bucket}/{self.key}'.rstrip('/')

  __str__ = __fspath__

  def __repr__(self) -> str:
    return f'GcsPath({os.fspath(self)!r})'

  def __hash__(self) -> int:
    return hash((self.bucket, self.key))

  def __eq__(self, other: object) -> bool:
    return isinstance(other, GcsPath) and os.fspath(self) == os.fspath(other)

  def __lt__(self, other: GcsPath) -> bool:
    return os.fspath(self) < os.fspath(other)

  def __truediv__(self, name: str) -> GcsPath:
    return GcsPath(f'{self}/{name}')

  joinpath = __truediv__

  @property
  def name(self) -> str:
    return posixpath.basename(self.key)

  @property
  def suffixes(self) -> list[str]:
    return ['.' + part for part in self.name.lstrip('.').split('.')[1:]]

  @property
  def suffix(self) -> str:
    return (self.suffixes or [''])[-1]

  @property
  def parent(self) -> GcsPath:
    return GcsPath(posixpath.dirname(os.fspath(self)))

  def with_name(self, name: str) -> GcsPath:
    return self.parent / name

  def blob(self, generation: int | None = None) -> Any:
    """Returns the client's object of that name."""
    return client().bucket(self.bucket).blob(self.key, generation=generation)

  def stat(self) -> Stat:
    """Returns size, time and generation. Raises FileNotFoundError, also for a folder."""
    if self._stat is None:
      with as_os_errors(self):
        if not self.key:
          raise FileNotFoundError(2, 'A bucket is no object', os.fspath(self))
        blob = self.blob()
        blob.reload()
      self._stat = _stat_of(blob)
    return self._stat

  def is_file(self) -> bool:
    try:
      self.stat()
    except FileNotFoundError:
      return False
    except PermissionError as error:
      raise self._unreadable(error) from error
    return True

  def is_dir(self) -> bool:
    """Returns whether objects have it as a prefix; an object store has no other folders."""
    try:
      with as_os_errors(self):
        found = client().list_blobs(self.bucket, prefix=self._prefix(), max_results=1)
        return any(True for _ in found)
    except FileNotFoundError:  # no such bucket
      return False
    except PermissionError as error:
      raise self._unreadable(error) from error

  def _unreadable(self, error: OSError) -> DataError:
    return DataError(
      f'{self}: may not be read: {error.strerror}. Give this account '
      f'roles/storage.objectViewer on gs://{self.bucket}'
    )

  def exists(self) -> bool:
    return self.is_file() or self.is_dir()

  def _prefix(self) -> str | None:
    return f'{self.key}/' if self.key else None

  def iterdir(self) -> Iterator[GcsPath]:
    """Returns objects and folders directly below, sorted. Raises FileNotFoundError for none."""
    with as_os_errors(self):
      found = client().list_blobs(self.bucket, prefix=self._prefix(), delimiter='/')
      blobs = list(found)
      prefixes = sorted(found.prefixes)
    if not blobs and not prefixes:
      raise FileNotFoundError(2, 'No object below', os.fspath(self))
    out = []
    for blob in blobs:
      if not blob.name.endswith(_MARKER):
        child = GcsPath(f'{SCHEME}{self.bucket}/{blob.name}')
        child._stat = _stat_of(blob)
        out.append(child)
    out += [GcsPath(f'{SCHEME}{self.bucket}/{prefix}') for prefix in prefixes]
    return iter(sorted(out))

  def glob(self, pattern: str) -> Iterator[GcsPath]:
    """Returns the objects and folders directly below whose names match."""
    children = self.iterdir() if self.is_dir() else iter(())
    return (p for p in children if fnmatch.fnmatchcase(p.name, pattern))

  def open(self, mode: str = 'r', buffering: int = _BUFFER, encoding='utf-8', newline=None) -> Any:
    """Opens the object.

    'rb' and 'r' read by byte ranges, with `buffering` bytes read ahead (0: none). 'wb' writes in
    pieces; the object exists once the file is closed, whole.
    """
    if mode == 'wb':
      return Writer(self)
    raw = _Reader(self)
    if mode == 'rb':
      return io.BufferedReader(raw, buffering) if buffering else raw
    return io.TextIOWrapper(io.BufferedReader(raw, buffering), encoding=encoding, newline=newline)

  def read_range(self, start: int, size: int) -> bytes:
    """Returns `size` bytes from byte `start`; fewer where the object ends. One request."""
    if size <= 0 or start >= self.stat().st_size:
      return b''
    blob = self.blob(self.stat().generation)
    with as_os_errors(self):
      # Raw: an object stored with Content-Encoding: gzip is read as it is stored.
      return blob.download_as_bytes(
        start=start, end=start + size - 1, raw_download=True, checksum=None
      )

  def read_bytes(self) -> bytes:
    """Returns the whole object; the client verifies its checksum."""
    with as_os_errors(self):
      generation = self._stat.generation if self._stat else None
      return self.blob(generation).download_as_bytes(raw_download=True)

  def read_text(self) -> str:
    return self.read_bytes().decode('utf-8')

  def write_bytes(self, content: bytes) -> None:
    """Replaces the object atomically; the server verifies the MD5."""
    with as_os_errors(self):
      self.blob().upload_from_string(content, 'application/octet-stream', checksum='md5')
    self._stat = None

  def write_text(self, text: str) -> None:
    self.write_bytes(text.encode('utf-8'))

  def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
    """Does nothing: folders exist by their objects."""

  def unlink(self) -> None:
    with as_os_errors(self):
      self.blob().delete()
    self._stat = None

  def copy_to(self, target: GcsPath) -> None:
    """Copies the object on the server; no byte passes through this machine."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    with as_os_errors(self):
      source, blob, token = self.blob(), target.blob(), ''
      while token is not None:  # large objects need several calls
        # By default it does not retry; copying twice is harmless.
        token, _, _ = blob.rewrite(source, token=token or None, retry=DEFAULT_RETRY)
    target._stat = None

  def remove_tree(self) -> None:
    """Deletes every object below this prefix."""
    with as_os_errors(self):
      for blob in list(client().list_blobs(self.bucket, prefix=self._prefix())):
        with contextlib.suppress(FileNotFoundError), as_os_errors(self):
          blob.delete()


def _stat_of(blob: Any) -> Stat:
  updated = blob.updated.timestamp() if blob.updated else 0.0
  return Stat(int(blob.size), int(updated * 1e9), int(blob.generation))


class _Reader(io.RawIOBase):
  """Reads an object by range requests, in the generation it had when it was opened."""

  def __init__(self, path: GcsPath):
    self._path, self._size, self._at = path, path.stat().st_size, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
    return self._at

  def readall(self) -> bytes:
    out = bytearray(max(0, self._size - self._at))  # io's own asks for 8 kB at a time
    self.readinto(out)
    return bytes(out)

  def readinto(self, buffer) -> int:
    view = memoryview(buffer).cast('B')
    size = max(0, min(len(view), self._size - self._at))
    starts = range(0, size, _PIECE)

    def fetch(start):
      piece = self._path.read_range(self._at + start, min(_PIECE, size - start))
      if len(piece) != min(_PIECE, size - start):
        raise OSError(5, f'got {len(piece)} bytes of a range', os.fspath(self._path))
      view[start : start + len(piece)] = piece

    if len(starts) > 1:
      with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(fetch, starts))
    elif size:
      fetch(0)
    self._at += size
    return size


class Writer:
  """A file to write once; its object exists once it is closed, and not after an error."""

  def __init__(self, path: GcsPath):
    self._path = path
    with as_os_errors(path):
      self._file = path.blob().open('wb', ignore_flush=True, checksum='md5')

  def write(self, content) -> int:
    with as_os_errors(self._path):
      return self._file.write(content)

  def flush(self) -> None:
    """Does nothing: the object does not exist before `close`."""

  def close(self) -> None:
    try:
      with as_os_errors(self._path):
        self._file.close()
    except BaseException:
      self._give_up()
      raise
    self._path._stat = None

  def _give_up(self) -> None:
    """Cancels the upload: no object is written, now or later."""
    with contextlib.suppress(Exception):
      self._file.terminate()
    # The client's file closes itself when it is collected, which uploads what it still holds.
    self._file._buffer.close()

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is None:
      self.close()
    else:
      self._give_up()


class Pace:
  """Decides when to upload again: at most every `seconds`, and for at most 1/20 of the time."""

  def __init__(self, seconds: float = 10.0):
    self._seconds, self._cost, self._last = seconds, 0.0, -1e9

  def is_due(self) -> bool:
    return time.monotonic() - self._last > max(self._seconds, 20 * self._cost)

  @contextlib.contextmanager
  def upload(self) -> Iterator[None]:
    start = time.monotonic()
    try:
      yield
    finally:
      self._last = time.monotonic()
      self._cost = self._last - start
