"""The files of rollouts in the workdir, under rollouts/: samples to be read, rows that were kept,
and the arrays that a resume between two updates on a rollout needs."""

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ftjax.cluster import processes
from ftjax.runtime.errors import DataError
from ftjax.storage import files


class RolloutFiles:
  """The files of one run; only process 0 writes.

  Args:
    workdir: of the run.
    updates: optimizer steps on a rollout.
  """

  def __init__(self, workdir: str, updates: int):
    self._folder = files.join(workdir, 'rollouts')
    self._checkpoints = files.join(workdir, 'checkpoints')
    self._updates, self._last_saved = updates, 0

  def cut(self, step: int) -> None:
    """Removes the files of rollouts that are made again after `step` (-1: a fresh start)."""
    self._last_saved = max(step, 0)
    if not processes.is_main():
      return
    files.makedirs(self._folder)
    # In a bucket a folder without files is not there.
    for name in files.listdir(self._folder) if files.exists(self._folder) else ():
      found = re.fullmatch(r'(?:kept-)?(\d+)\.(?:jsonl|npz)', name)
      if found and int(found[1]) * self._updates >= step:
        files.remove(files.join(self._folder, name))

  def saving(self, step: int) -> None:
    """A checkpoint of `step` steps is being written."""
    self._last_saved = step

  def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON rows as rollouts/<name>.jsonl; none where there are no rows."""
    if rows and processes.is_main():
      text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
      files.write_text(files.join(self._folder, f'{name}.jsonl'), text)

  def _path(self, number: int) -> str:
    return files.join(self._folder, f'{number}.npz')

  def write_arrays(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps the arrays of rollout `number` while a checkpoint lies within it."""
    if not processes.is_main():
      return
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    files.write_bytes(self._path(number), buffer.getvalue())
    self._prune(number)

  def _prune(self, number: int) -> None:
    """Drops the arrays of rollouts before `number` that no checkpoint lies within; one that is
    still being written counts.
    """
    there = files.listdir(self._checkpoints) if files.exists(self._checkpoints) else []
    steps = {self._last_saved, *(int(n) for n in there if n.isdigit())}
    needed = {s // self._updates for s in steps if s % self._updates}
    for name in files.listdir(self._folder):
      found = re.fullmatch(r'(\d+)\.npz', name)
      if found and int(found[1]) < number and int(found[1]) not in needed:
        files.remove(files.join(self._folder, name))

  def read_arrays(self, number: int, names: Collection[str]) -> dict[str, np.ndarray]:
    """Returns the arrays of these names of rollout `number`.

    Raises:
      DataError: the file is gone or damaged.
    """
    path = self._path(number)
    remedy = (
      'The checkpoint lies between two updates on that rollout. Bring the file back, or remove '
      f'this checkpoint from {self._checkpoints} to go on from an earlier one: from the start of a '
      f'rollout (steps divisible by {self._updates}) the file is made anew'
    )
    if not files.exists(path):
      raise DataError(f'{path} is missing. {remedy}')
    try:
      with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as found:
        return {name: found[name] for name in names}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, struct.error) as error:
      raise DataError(f'{path} is damaged ({type(error).__name__}: {error}). {remedy}') from error
    except NotImplementedError as error:  # a compression method that no zip file here has
      raise DataError(f'{path} is damaged ({error}). {remedy}') from error
