"""Cached log-probs of DPO's reference: computed once for every pair before the first step, by the
function that the step uses. Training then holds and computes one model.

They are in a folder next to the tokenized data, named by everything they depend on: pairs, weights,
dtypes and length. Its files hold 1024 pairs each and a checksum, so that a pass that was stopped
continues, and runs with other losses, learning rates and epochs reuse them. Rounding may differ
between meshes and batch sizes, which are not part of the name."""

import base64
import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
from tqdm import tqdm

from ftjax.algorithms import pair_metrics
from ftjax.cluster import processes
from ftjax.config.algorithms import REFERENCE_FIELDS
from ftjax.data import batches
from ftjax.data.token_cache import Corpus
from ftjax.experiment import batch_source, data, resume
from ftjax.experiment.run import Run
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import NonFiniteError
from ftjax.storage import files
from ftjax.training.prefetch import local_rows, place

log = logging.getLogger(__name__)

VERSION = 1  # raise it when the same pairs and weights would give other numbers
SHARD = 1024  # pairs of a file
_DIGEST = 32  # bytes of sha256 before the numbers


class _Shards:
  """The files of one corpus, in a folder named by `key`."""

  def __init__(self, home: str, key: str, count: int):
    self.folder, self.count, self._key = files.join(home, f'reference-{key}'), count, key
    self.starts = range(0, count, SHARD)

  def size(self, start: int) -> int:
    return min(SHARD, self.count - start)

  def _path(self, start: int) -> str:
    return files.join(self.folder, f'{start // SHARD:06d}.bin')

  def read(self, start: int) -> np.ndarray | None:
    """Returns float32[size, 2]; None where the file is missing or damaged."""
    if not files.exists(self._path(start)):
      return None
    content = files.read_bytes(self._path(start))
    checksum, content = content[:_DIGEST], content[_DIGEST:]
    if len(content) != 8 * self.size(start) or self._digest(start, content) != checksum:
      log.warning('%s is damaged and is computed again', self._path(start))
      return None
    return np.frombuffer(content, '<f4').reshape(-1, 2).astype(np.float32)

  def write(self, start: int, found: np.ndarray) -> None:
    content = found.astype('<f4').tobytes()
    files.makedirs(self.folder)
    files.write_bytes(self._path(start), self._digest(start, content) + content)

  def _digest(self, start: int, content: bytes) -> bytes:
    """Returns the checksum of numbers and position: a file that was moved counts as damaged."""
    return hashlib.sha256(f'{self._key} {start}\n'.encode() + content).digest()


class RowsWithReference(batch_source.Rows):
  """The rows of a run, each with the log-probs of its completions under the reference."""

  def prepare(self) -> None:
    """See batch_source.Source. Computes what is missing, for evaluation rows too: with only this
    model in memory.
    """
    fill(self._run, self._run.load_first)


def _from_main(read: Callable[[], np.ndarray | None]) -> np.ndarray | None:
  """Returns what process 0 reads, float32[n, 2] or None, in every process. Hosts may have folders
  of their own, and must agree on what is there.
  """

  def text() -> str | None:
    found = read()
    return None if found is None else base64.b64encode(found.astype('<f4').tobytes()).decode()

  sent = processes.from_main(text)
  return None if sent is None else np.frombuffer(base64.b64decode(sent), '<f4').reshape(-1, 2)


def fill(run: Run, load_first: Callable[[], dict]) -> None:
  """Puts REFERENCE_FIELDS into the columns of all corpora of a run; all processes call it.

  Args:
    run: of a config with dpo.reference=cache.
    load_first: returns the weights that training starts from; called where something is missing.

  Raises:
    NonFiniteError: a log-prob that is not finite.
  """
  home = data.cache_folder(run.config, run.workdir)
  measure = _Measure(run, load_first)
  weights = resume.first_fingerprint(run)
  for corpus in (*run.data.corpora, *run.data.evaluation):
    shards = _Shards(home, _key(run, corpus, weights), len(corpus))
    parts, todo = [], 0
    with tqdm(
      total=len(corpus), desc='reference', unit='pair', disable=not processes.is_main()
    ) as bar:
      for start in shards.starts:
        with run.watchdog.phase('restore'):
          part, size = _from_main(functools.partial(shards.read, start)), shards.size(start)
        if part is None:
          part, todo = np.concatenate(list(measure(corpus, start, size, bar.update))), todo + size
          if processes.is_main():
            shards.write(start, part)
        else:
          bar.update(size)
        parts.append(part)
    log.info(
      'reference of %s: %d pairs read, %d computed, in %s',
      *(corpus.name, len(corpus) - todo, todo, shards.folder),
    )
    found = np.concatenate(parts)
    corpus.columns = dict(zip(REFERENCE_FIELDS, found.T.copy(), strict=True))


def _key(run: Run, corpus: Corpus, weights: str) -> str:
  c, arch = run.config, dataclasses.asdict(run.arch.untrained())
  dtypes = (c.model.param_dtype, c.model.compute_dtype)
  return digest([VERSION, corpus.fingerprint, weights, arch, *dtypes, c.seq_len])[:32]


class _Measure:
  """Computes log-probs under the reference, which is loaded at the first call."""

  def __init__(self, run: Run, load_first: Callable[[], dict]):
    self._run, self._load_first, self._params = run, load_first, None
    forward = run.forward.untrained()

    def sides(params, batch):
      found = forward.side_logprobs(forward.find_params(params, ''), batch, (1, 2))
      return dict(zip(REFERENCE_FIELDS, found, strict=True))

    self._sides = pair_metrics.jit_measure(sides)

  def __call__(
    self, corpus: Corpus, start: int, count: int, report: Callable[[int], None]
  ) -> Iterator[np.ndarray]:
    """Yields float32[B, 2] of one micro-batch after another."""
    if self._params is None:
      self._params = self._load_first()
    c, where = self._run.config, self._run.batch_shardings(micro=False)
    size = c.batch_size // c.grad_accum
    own = local_rows(where['tokens'], (size, c.seq_len), 0)
    for first in range(start, start + count, size):
      rows = [[i] for i in range(first, min(first + size, start + count))]
      batch = batches.batch_of(corpus, rows, size, c.seq_len, own)
      with self._run.watchdog.phase('evaluate'):
        placed = place(batch, {k: where[k] for k in batch})
        sides = self._sides(self._params, placed)
        found = np.stack([np.asarray(sides[k]) for k in REFERENCE_FIELDS], 1)[: len(rows)]
      for i, values in zip(rows, found.tolist(), strict=True):
        if not all(map(math.isfinite, values)):
          raise NonFiniteError(f'{corpus.where(i[0])}: the reference gives log-probs {values}')
      report(len(rows))
      yield found
