"""What marks the weight files of a model, without reading them: to see whether they are those that
were read before, and whether all hosts have the same.
"""

import hashlib
import os
from pathlib import Path

from ftjax.hf import gguf_files, model_folder, weight_files
from ftjax.storage import files

_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10  # of a weight file, to distinguish revisions


def stamp(path: str | os.PathLike) -> tuple[tuple[str | int, ...], ...]:
  """Returns what changes whenever a weight file is written, replaced or moved, for each of them.

  For a local file: name, size, inode, and times of modification and of change in ns. For an object
  in a bucket: name, size and generation.
  """
  return tuple(_stamp(p) for p in _weight_files(path))


def _stamp(path: Path) -> tuple[str | int, ...]:
  stat = path.stat()
  if files.is_remote(path):
    return str(path), stat.st_size, stat.generation
  return str(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def outline(path: str | os.PathLike) -> list[tuple[str, int, str]]:
  """Returns (name, bytes, mark of the revision) of the weight files, to be compared between hosts;
  [] for no path. The mark is an object's generation, or a hash over some blocks of a local file.
  """
  if not path:
    return []
  remote = files.is_remote(path)
  return [
    (p.name, p.stat().st_size, str(p.stat().generation) if remote else _sample(p))
    for p in _weight_files(path)
  ]


def _sample(path: Path) -> str:
  """Returns the SHA-256, in hex, of evenly spaced blocks of a file, with its first and last."""
  digest, last = hashlib.sha256(), max(0, path.stat().st_size - _SAMPLE_BYTES)
  with path.open('rb') as f:
    for i in range(_SAMPLES):
      f.seek(last * i // (_SAMPLES - 1))
      digest.update(f.read(_SAMPLE_BYTES))
  return digest.hexdigest()


def _weight_files(path: str | os.PathLike) -> list[Path]:
  folder = files.as_path(model_folder.locate_any(path))
  if model_folder.is_adapter(folder):
    return [weight_files.file_inside(folder, model_folder.ADAPTER_WEIGHTS)]
  file = model_folder.gguf_file(folder)
  if file is None:
    return weight_files.weight_files(folder)
  return gguf_files.weight_files(file)
