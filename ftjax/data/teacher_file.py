"""The files of a teacher's likeliest tokens: for every supervised position of a corpus the ids of
its k likeliest tokens, their log-probs, and the log-prob of any other token.

A folder holds a folder for each corpus, named by the corpus's fingerprint: `facts.json` with all
that the numbers depend on, a file for every 256 examples, and `meta.json`, written last, with the
checksums of all. A file begins with the sha256 of key and content; then follow float32[n, k + 1]
and int32[n, k], little-endian, of the n predicted tokens of its examples. So a folder that was
begun is continued, and a damaged file is found before it is trained on."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.data.token_cache import Corpus
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files

VERSION = 1  # raise it when the same files would mean something else
SHARD = 256  # examples of a file
_DIGEST = 32  # bytes of sha256 before the numbers
_FACTS, _META = 'facts.json', 'meta.json'


@dataclasses.dataclass(frozen=True)
class Facts:
  """What the numbers of a corpus depend on.

  Attributes:
    data: fingerprint of the corpus.
    tokenizer: fingerprint of its tokenizer.
    teacher: path or hub id of the teacher, as the config gave it.
    weights: fingerprint of the teacher's weights.
    temperature: of its distribution.
    top_k: tokens of each position.
    vocab: rows of the vocabulary.
    compute_dtype: of the teacher's forward pass.
  """

  data: str
  tokenizer: str
  teacher: str
  weights: str
  temperature: float
  top_k: int
  vocab: int
  compute_dtype: str


def predicted(corpus: Corpus) -> np.ndarray:
  """Returns how many tokens of each example are predicted, int64[examples]."""
  return np.array(
    [np.count_nonzero(corpus.example(i)[1][1:]) for i in range(len(corpus))], np.int64
  )


def folder_of(home: str, corpus: Corpus) -> str:
  """Returns the folder of a corpus."""
  return files.join(home, f'tokens-{corpus.fingerprint[:32]}')


class _Shards:
  """The files of one corpus; `folder` is local or in a bucket."""

  def __init__(self, folder: str, facts: Facts, counts: np.ndarray):
    self.folder, self.facts, self.key = folder, facts, digest(dataclasses.asdict(facts))
    self.ends = np.concatenate([[0], np.cumsum(counts)])
    self.starts = range(0, len(counts), SHARD)

  def stop(self, start: int) -> int:
    """Returns the example after the last one of the file that begins with example `start`."""
    return min(start + SHARD, len(self.ends) - 1)

  def tokens(self, start: int) -> int:
    """Returns the predicted tokens of a file."""
    return int(self.ends[self.stop(start)] - self.ends[start])

  def path(self, start: int) -> str:
    return files.join(self.folder, f'{start // SHARD:06d}.bin')

  def size(self, start: int) -> int:
    """Returns the bytes of a file."""
    return _DIGEST + 4 * self.tokens(start) * (2 * self.facts.top_k + 1)

  def checksum(self, start: int, *parts: Any) -> bytes:
    """Returns the sha256 of numbers and position: a file that was moved counts as damaged."""
    found = hashlib.sha256(f'{self.key} {start}\n'.encode())
    for part in parts:
      found.update(part)
    return found.digest()


class Writer:
  """Writes the files of one corpus, or continues them.

  Args:
    home: the folder of all corpora.
    corpus: what is read.
    facts: what the numbers depend on.

  Raises:
    ConfigError: the folder holds the numbers of another teacher, or of other settings.
  """

  def __init__(self, home: str, corpus: Corpus, facts: Facts):
    self._shards = _Shards(folder_of(home, corpus), facts, predicted(corpus))
    self.starts, self.stop, self.tokens = (
      self._shards.starts,
      self._shards.stop,
      self._shards.tokens,
    )
    self.folder = self._shards.folder

  def begin(self) -> None:
    """Writes the facts, or compares them with those of the files that are there."""
    place = files.join(self.folder, _FACTS)
    own = dataclasses.asdict(self._shards.facts) | {'version': VERSION}
    if files.exists(place):
      found = _json(place)
      if other := [f'{k}: {found.get(k)!r}, now {own[k]!r}' for k in own if found.get(k) != own[k]]:
        raise ConfigError(
          f'{self.folder} was begun with other settings ({"; ".join(other)}): undo that, name '
          'another folder in distill.file, or delete this one'
        )
      return
    files.makedirs(self.folder)
    files.write_text(place, json.dumps(own, indent=1))

  def is_whole(self, start: int) -> bool:
    """Returns whether the file that begins with example `start` is there and undamaged."""
    place = self._shards.path(start)
    if not files.exists(place):
      return False
    content = files.read_bytes(place)
    is_right = len(content) == self._shards.size(start)
    return is_right and content[:_DIGEST] == self._shards.checksum(start, content[_DIGEST:])

  def write(self, start: int, ids: np.ndarray, logp: np.ndarray) -> None:
    """Writes a file.

    Args:
      start: its first example.
      ids: int32[n, k], of the predicted tokens of its examples in order.
      logp: float32[n, k + 1], the last of any other token.
    """
    parts = [np.ascontiguousarray(a, t).tobytes() for a, t in ((logp, '<f4'), (ids, '<i4'))]
    content = b''.join((self._shards.checksum(start, *parts), *parts))
    files.write_bytes(self._shards.path(start), content)

  def finish(self) -> None:
    """Writes the checksums of all files, which marks the folder as complete."""
    sums = [files.read_bytes(self._shards.path(s))[:_DIGEST].hex() for s in self.starts]
    meta = {'facts': dataclasses.asdict(self._shards.facts), 'files': sums}
    files.write_text(files.join(self.folder, _META), json.dumps(meta, indent=1))


class TopTokens:
  """The likeliest tokens of a corpus's supervised positions, read by memmap.

  Attributes:
    facts: what they depend on.
    fingerprint: sha256 of facts and content.
  """

  def __init__(self, home: str, corpus: Corpus):
    """Opens the files of a corpus and compares their checksums.

    Raises:
      DataError: files are missing, unfinished or damaged.
    """
    folder = folder_of(home, corpus)
    if not files.exists(files.join(folder, _META)):
      begun = 'is not finished' if files.exists(files.join(folder, _FACTS)) else 'is not there'
      raise DataError(
        f"{folder} {begun}: the teacher's likeliest tokens of {corpus.name}. Run python -m "
        'ftjax.teacher with this config (its data, seed, seq_len and tokenizer) and the teacher '
        'in distill.teacher'
      )
    local = _local(folder)
    meta = _json(local / _META)
    try:
      self.facts = Facts(**meta['facts'])
    except (TypeError, KeyError) as error:
      raise DataError(
        f'{folder}/{_META}: {error}; delete the folder, and write it again'
      ) from error
    self._shards = _Shards(str(local), self.facts, predicted(corpus))
    self.fingerprint = digest(meta)
    self._parts = [
      self._open(s, name) for s, name in zip(self._shards.starts, meta['files'], strict=True)
    ]

  def _open(self, start: int, checksum: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (log-probs float32[n, k + 1], ids int32[n, k]) of a file, in memory when read."""
    shards, place = self._shards, Path(self._shards.path(start))
    if not place.is_file() or place.stat().st_size != shards.size(start):
      raise DataError(_damaged(place))
    n, k = shards.tokens(start), self.facts.top_k
    if not n:
      return np.zeros((0, k + 1), np.float32), np.zeros((0, k), np.int32)
    content = np.memmap(place, np.uint8, mode='r')
    if {
      content[:_DIGEST].tobytes().hex(),
      shards.checksum(start, content[_DIGEST:].data).hex(),
    } != {checksum}:
      raise DataError(_damaged(place))
    middle = _DIGEST + 4 * n * (k + 1)
    logp, ids = np.asarray(content[_DIGEST:middle]), np.asarray(content[middle:])
    return logp.view('<f4').reshape(n, k + 1), ids.view('<i4').reshape(n, k)

  def empty(self, batch_size: int, seq_len: int) -> dict[str, np.ndarray]:
    """See token_cache.TopTokens."""
    shape, k = (batch_size, seq_len), self.facts.top_k
    return {
      'teacher_ids': np.zeros((*shape, k), np.int32),
      'teacher_logp': np.zeros((*shape, k + 1), np.float32),
    }

  def read(self, i: int) -> dict[str, np.ndarray]:
    """See token_cache.TopTokens."""
    start = i // SHARD * SHARD
    logp, ids = self._parts[start // SHARD]
    first, last = (self._shards.ends[i : i + 2] - self._shards.ends[start]).tolist()
    return {'teacher_ids': ids[first:last], 'teacher_logp': logp[first:last]}


def _json(place: str | os.PathLike) -> dict[str, Any]:
  try:
    return json.loads(files.read_text(place))
  except ValueError as error:
    raise DataError(f'{place}: {error}; delete its folder, and write it again') from error


def _damaged(place: Path) -> str:
  return f'{place} is missing or damaged: run ftjax.teacher again, which writes what is not whole'


def _local(folder: str) -> Path:
  """Returns the folder, or a copy of one in a bucket on this machine."""
  local = files.local_mirror(folder)
  if not files.is_remote(folder):
    return local
  wanted = files.read_bytes(files.join(folder, _META))
  if not (local / _META).is_file() or (local / _META).read_bytes() != wanted:
    local.mkdir(parents=True, exist_ok=True)
    files.fetch_folder(folder, local, _META)
  return local
