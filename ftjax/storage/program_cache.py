"""Removes damaged entries from the folder of compiled programs before jax reads them.

jax reads an entry, fails, compiles, and does not write the entry because the file exists: a damaged
entry would be compiled again at every start. An entry that is removed here is compiled and written
once.
"""

import hashlib
import json
import logging
import os
import zlib

from ftjax.runtime.errors import caught
from ftjax.storage import files

log = logging.getLogger(__name__)

_SUFFIX = '-cache'  # of jax's entries
_SUMS = 'sha256.json'  # {entry: sha256 hex}
_ZLIB, _ZSTD = 0x78, b'\x28\xb5\x2f\xfd'  # how the two formats begin


def check(folder: str) -> list[str]:
  """Removes damaged entries of a local folder and records the checksums of the others.

  An entry is compared with its checksum; one without (its run was killed) must decompress. Objects
  of a bucket are never partial: a gs:// folder is not read.

  Returns:
    names of the entries that were removed.
  """
  sums, damaged = _sums(folder), []
  for name in _entries(folder):
    content = files.read_bytes(files.join(folder, name))
    found = hashlib.sha256(content).hexdigest()
    if found != sums[name] if name in sums else not _decompresses(content):
      damaged.append(name)
      sums.pop(name, None)
      files.remove(files.join(folder, name))
      log.warning('%s/%s is damaged: removed, and compiled again', folder, name)
    else:
      sums[name] = found
  _record(folder, sums)
  return damaged


def record(folder: str) -> None:
  """Records the checksums of entries that have none yet, which are assumed to be undamaged."""
  sums = _sums(folder)
  for name in _entries(folder):
    if name not in sums:
      sums[name] = hashlib.sha256(files.read_bytes(files.join(folder, name))).hexdigest()
  _record(folder, sums)


def copy(source: str, target: str) -> int:
  """Copies the undamaged entries of one folder to another, where they are not yet; the source is
  only read. Both may be local or gs://.

  Returns:
    how many were copied.
  """
  names = files.listdir(source) if files.exists(source) else []
  sums, copied = _recorded(source), 0
  files.makedirs(target)
  for name in (n for n in names if n.endswith(_SUFFIX)):
    if files.exists(path := files.join(target, name)):
      continue
    content = files.read_bytes(files.join(source, name))
    found = hashlib.sha256(content).hexdigest()
    if found == sums[name] if name in sums else _decompresses(content):
      files.write_bytes(path, content)
      copied += 1
  return copied


def _entries(folder: str) -> list[str]:
  if files.is_remote(folder) or not os.path.isdir(folder):
    return []
  return sorted(name for name in os.listdir(folder) if name.endswith(_SUFFIX))


def _sums(folder: str) -> dict[str, str]:
  """Returns the recorded checksums of existing entries; none where the record is damaged."""
  known = _recorded(folder)
  return {name: known[name] for name in _entries(folder) if name in known}


def _recorded(folder: str) -> dict[str, str]:
  path = files.join(folder, _SUMS)
  if files.is_remote(folder) or not files.exists(path):
    return {}
  try:
    known = json.loads(files.read_text(path))
  except ValueError:
    return {}
  return known if isinstance(known, dict) else {}


def _record(folder: str, sums: dict[str, str]) -> None:
  """Writes the checksums of existing entries: jax may write other bytes under an old name."""
  if sums != _recorded(folder):
    files.write_text(files.join(folder, _SUMS), json.dumps(sums, indent=1) + '\n')


def _decompresses(content: bytes) -> bool:
  """Returns whether an entry decompresses."""
  if content.startswith(_ZSTD):
    decompress = _zstd()
    return decompress is None or caught(lambda: decompress(content)) is None
  if not content or content[0] != _ZLIB:
    return False
  reader = zlib.decompressobj()
  return caught(lambda: reader.decompress(content)) is None and reader.eof


def _zstd():
  """Returns the decompressor that jax uses: Python 3.14's, else that of zstandard, else None."""
  try:
    from compression import zstd
  except ImportError:
    try:
      import zstandard
    except ImportError:
      return None
    return zstandard.ZstdDecompressor().decompress
  return zstd.decompress
