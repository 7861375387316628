"""Appends lines to a text file that several hosts write: on a disk under a kernel lock, in a bucket
by replacing the object on the condition that nobody else did.

For a few lines an hour. `files.LineLog` is for the file of one process.
"""

import contextlib
import fcntl
import os
import random
import socket
import time

from ftjax.storage import files, gcs

_TRIES = 5  # in a bucket; then the line goes to a file of this host alone


def append(path: str | os.PathLike, line: str) -> None:
  """Appends one line and syncs it; the folder is made if it is missing.

  In a bucket, where other hosts were quicker five times in a row, the line goes to an object with
  this host's name: NAME.HOST.jsonl for NAME.jsonl.

  Raises:
    OSError: the file cannot be written.
    ValueError: a line end inside the line.
  """
  if '\n' in line:
    raise ValueError(f'shared_log.append: one line at a time, got {line[:60]!r}')
  content = line.encode() + b'\n'
  if files.is_remote(path):
    _append_object(os.fspath(path), content)
    return
  files.makedirs(os.path.dirname(path) or '.')
  with open(path, 'ab', buffering=0) as file:
    with contextlib.suppress(OSError):  # a file system without locks: one write is whole anyway
      fcntl.flock(file, fcntl.LOCK_EX)
    file.write(content)
    os.fsync(file.fileno())


def _append_object(path: str, content: bytes) -> None:
  for attempt in range(_TRIES):
    if _replace(path, content):
      return
    time.sleep(random.uniform(0, 0.25 * 2**attempt))
  stem, dot, suffix = path.rpartition('.')
  own = f'{stem}.{socket.gethostname()}{dot}{suffix}'
  before = files.read_bytes(own) if files.exists(own) else b''
  files.write_bytes(own, before + content)


def _replace(path: str, content: bytes) -> bool:
  """Appends to the object unless another writer is quicker; returns whether it did."""
  from google.api_core.exceptions import PreconditionFailed

  place, generation, before = gcs.GcsPath(path), 0, b''
  try:
    generation = place.stat().generation
    before = place.read_bytes()
  except FileNotFoundError:
    if generation:  # replaced in between
      return False
  with gcs.as_os_errors(place):
    try:
      place.blob().upload_from_string(
        before + content, 'application/json', if_generation_match=generation
      )
    except PreconditionFailed:
      return False
  return True
