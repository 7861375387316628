"""Tokenized sources on disk: built once, keyed by everything that could change a token, read by
memmap.

A cache folder is made beside its final name and renamed when it is whole, so that whatever carries
the name is complete, also when several processes build at once: the first one wins, the others use
its folder. What a killed process had finished of it is used by the next one (corpus_builder.py). A
cache in a bucket has a mirror on each machine, which is what is read: a machine without it
downloads what another one built, or builds it and uploads it. `schedule.py` orders the examples,
`batches.py` reads them.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.data import encode, sources
from ftjax.data import row_counts as counts_lib
from ftjax.data.blocks import Policy
from ftjax.data.corpus_builder import DTYPES, Build, Writer
from ftjax.data.row_counts import Counts
from ftjax.data.sources import Spec
from ftjax.data.tokenize_pool import Gone
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files

log = logging.getLogger(__name__)

SCHEMA = 4  # raise it when the same rows would give other tokens, masks or files
_MARK = 'meta.json'  # written last: a folder with it is whole
_BUILDING = 'building-'  # begins the names of folders that are no caches yet
_ABANDONED = 24 * 3600  # seconds
_TRANSFERS = 8  # files at once


class Corpus:
  """Tokenized examples, or some of them; cheap to make and to pass on.

  Attributes:
    name: of the source, for messages.
    lengths: int32[n], tokens of each example.
    shape: what an example is: 'text', or one of judged.SHAPES.
    tokens, supervised: tokens of all examples, and those supervised.
    counts: of the whole source, as built.
    fingerprint: sha256 hex of the examples in order.
    columns: float32[n] by name, numbers that whoever opened it puts beside the examples; batches
      take them along.
  """

  def __init__(
    self, folder: Path, name: str, file_names: list[str], index: np.ndarray | None = None
  ):
    """Opens a finished cache folder; `index` int64[n] picks examples.

    Raises:
      DataError: the folder's files do not fit together.
    """
    self._folder, self._file_names, self._index = folder, file_names, index
    self.name, self.columns = name, {}
    try:
      meta = json.loads((folder / 'meta.json').read_text())
    except (OSError, ValueError) as error:
      raise DataError(
        f'{folder}: its meta.json cannot be read ({error}); delete the folder'
      ) from error
    self.counts, self.shape = Counts(**meta['counts']), meta['shape']
    arrays = {}
    for part, dtype in DTYPES.items():
      path = folder / f'{part}.bin'
      if not path.is_file() or path.stat().st_size != meta['bytes'][part]:
        raise DataError(
          f'{path}: missing or cut short; delete the folder {folder}, it is made anew'
        )
      # As a plain array over the same pages: slicing a memmap object costs ten times as much.
      arrays[part] = np.asarray(np.memmap(path, dtype, mode='r'))
    self._tokens, self._supervised = arrays['tokens'], arrays['supervised']
    self._offsets, self._places = arrays['offsets'], arrays['places'].reshape(-1, 2)
    self._boundaries, self._values = arrays['boundaries'], arrays['values']
    lengths, supervised = np.diff(self._offsets).astype(np.int32), arrays['supervised_lengths']
    self.fingerprint = meta['fingerprint']
    if index is not None:
      lengths, supervised = lengths[index], supervised[index]
      picked = hashlib.sha256(index.astype('<i8').tobytes()).hexdigest()
      self.fingerprint = hashlib.sha256(f'{self.fingerprint} {picked}'.encode()).hexdigest()
    self.lengths = lengths
    self.tokens = int(lengths.sum(dtype=np.int64))
    self.supervised = int(supervised.sum(dtype=np.int64))

  def __len__(self) -> int:
    return len(self.lengths)

  def _at(self, i: int) -> int:
    return i if self._index is None else int(self._index[i])

  def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Example i: (tokens int32[n], supervised bool[n])."""
    start, end = self._offsets[self._at(i) : self._at(i) + 2]
    return self._tokens[start:end], self._supervised[start:end].view(bool)

  def sides(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Example i as what attends only to itself: both sides of a pair, else the example."""
    tokens, supervised = self.example(i)
    boundary = int(self._boundaries[self._at(i)])
    if not boundary:
      return [(tokens, supervised)]
    return [
      (tokens[:boundary], supervised[:boundary]),
      (tokens[boundary:], supervised[boundary:]),
    ]

  def value(self, i: int) -> float:
    """Margin, label or score of example i."""
    return float(self._values[self._at(i)])

  def where(self, i: int) -> str:
    """The row that example i came from: 'file.jsonl:17'."""
    file, line = self._places[self._at(i)]
    return f'{self._file_names[file]}:{line}'

  def row_of(self, i: int) -> tuple[int, int]:
    """(file number, line) of example i; examples of one row have the same."""
    file, line = self._places[self._at(i)]
    return int(file), int(line)

  def notes(self) -> list[str]:
    """Rows of the whole source that were left out or changed, one text for each kind."""
    return counts_lib.notes(self.name, self.counts, self._file_names)

  def view(self, index: np.ndarray) -> 'Corpus':
    """Some of the examples, given by their numbers int[n], in that order."""
    index = np.asarray(index, np.int64)
    index = index if self._index is None else self._index[index]
    return Corpus(self._folder, self.name, self._file_names, index)


ON_BAD_ROW = ('error', 'drop')


def _check_settings(loss_on: str, on_overlength: str, on_bad_row: str, seq_len: int) -> None:
  encode.check_loss_on(loss_on)
  for key, value, allowed in (
    ('on_overlength', on_overlength, encode.ON_OVERLENGTH),
    ('on_bad_row', on_bad_row, ON_BAD_ROW),
  ):
    if value not in allowed:
      raise ConfigError(f'data.{key}={value!r}; expected one of {list(allowed)}')
  if seq_len < 2:
    raise ConfigError(f'seq_len={seq_len}; expected at least 2')


def cache_key(spec: Spec, tokenizer: Tokenizer, policy: Policy) -> str:
  """Hex name of the tokens of these settings: content, tokenizer, template, policy, schema."""
  facts = {
    'schema': SCHEMA,
    'content': sources.fingerprint(spec),
    'tokenizer': tokenizer.fingerprint,
  } | dataclasses.asdict(policy)
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _build(build: Build, writer: Writer) -> None:
  """Fills the writer's folder."""
  build.merge(writer)
  writer.finish(SCHEMA)


@dataclasses.dataclass(frozen=True)
class Source:
  """A source and what its tokens depend on; they are made once and then read.

  Attributes:
    spec: the source; its weight does not matter here.
    tokenizer: with its template.
    cache_dir: folder of all caches, made if missing; may be gs://.
    seq_len: most tokens of an example.
    loss_on: see `encode.encode`.
    on_overlength: 'error', 'drop', 'truncate_left' (keeps the end) or 'truncate_right'.
    on_bad_row: 'error', or 'drop': rows that cannot be used are left out, counted and listed.
    on_unrendered: 'error', or 'warn': rows with content that the template does not show are kept
      and counted.
    shape: what the rows must be: 'text', or one of judged.SHAPES, which ignore `loss_on`.
    workers: processes that tokenize; 0: one for each core. They change no byte of the result.
    progress: show a bar while tokenizing.
  """

  spec: Spec
  tokenizer: Tokenizer
  cache_dir: str | Path
  seq_len: int
  loss_on: str
  on_overlength: str
  progress: bool
  on_bad_row: str = 'error'
  on_unrendered: str = 'error'
  shape: str = 'text'
  workers: int = 0

  def policy(self) -> Policy:
    """What the tokens of a row depend on.

    Raises:
      ConfigError: an unknown policy.
    """
    _check_settings(self.loss_on, self.on_overlength, self.on_bad_row, self.seq_len)
    return Policy(
      *(self.spec.format, self.seq_len, self.loss_on, self.on_overlength),
      *(self.on_unrendered, self.shape),
    )

  def _folders(self) -> tuple[Path, Build]:
    """Where the finished tokens lie, and how they are built."""
    policy = self.policy()
    root = files.local_mirror(self.cache_dir)
    key = cache_key(self.spec, self.tokenizer, policy)
    # Blocks are the same whether bad rows are left out or not: they outlive a run that meets some.
    blocks = root / f'{_BUILDING}{key}'
    drop_bad = self.on_bad_row == 'drop'
    if drop_bad:
      key = hashlib.sha256(f'{key} drop'.encode()).hexdigest()[:32]
    settings = (drop_bad, blocks, self.workers, self.progress)
    return root / key, Build(self.spec, self.tokenizer, policy, *settings)

  def open(self) -> Corpus:
    """Tokenizes the source, or opens what an earlier run tokenized.

    Raises:
      ConfigError: an unknown policy. DataError: rows that cannot be used (reasons with their count
      and first places), nothing left to train on, or a mask that covers nothing or everything.
    """
    folder, build = self._folders()
    remote = files.join(self.cache_dir, folder.name)
    while not folder.is_dir():
      _prepare(folder.parent, build.folder)
      with contextlib.suppress(Gone):  # another process was first, or found bad rows: look again
        _make(folder, build, self.cache_dir)
    corpus = Corpus(folder, self.spec.path, sources.source_names(self.spec))
    try:
      files.put_folder(folder, remote, _MARK)
    except (OSError, DataError) as error:  # the tokens are here all the same
      log.warning('%s: tokens were not uploaded for other machines: %s', remote, error)
    return corpus

  def tokenize_share(self, number: int, count: int) -> None:
    """Tokenizes part `number` of `count` of a large source into a cache folder, or bucket, that
    several hosts share; `open` in the process of part 0 then puts the parts together. Nothing where
    the tokens are there.
    """
    folder, build = self._folders()
    if folder.is_dir() or files.exists(files.join(self.cache_dir, folder.name, _MARK)):
      return
    _prepare(folder.parent, build.folder)
    with contextlib.suppress(Gone):
      names = build.share(number, count)
      if number and files.is_remote(self.cache_dir):
        _copy_blocks(names, build.folder, files.join(self.cache_dir, build.folder.name))


def build_or_open(spec: Spec, tokenizer: Tokenizer, **settings: Any) -> Corpus:
  """Returns `Source(spec, tokenizer, **settings).open()`."""
  return Source(spec, tokenizer, **settings).open()


def _prepare(root: Path, blocks: Path) -> None:
  root.mkdir(parents=True, exist_ok=True)
  _sweep(root, blocks)


def _copy_blocks(names: list[str], source: Any, target: str) -> None:
  """Copies blocks between a bucket and this machine; one that is lost is tokenized once more."""

  def copy(name: str) -> None:
    files.write_bytes(files.join(target, name), files.read_bytes(files.join(source, name)))

  try:
    with concurrent.futures.ThreadPoolExecutor(_TRANSFERS) as pool:
      list(pool.map(copy, names))
  except (OSError, DataError) as error:
    log.warning('%s: blocks of tokens were not copied to %s: %s', source, target, error)


def _make(folder: Path, build: Build, cache_dir: str | Path) -> None:
  """Downloads a cache folder, or builds it, and gives it its name."""
  remote = files.join(cache_dir, folder.name)
  shared = files.join(cache_dir, build.folder.name)  # blocks of other hosts
  scratch = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=folder.parent))
  scratch.chmod(0o755)  # a cache may be shared; mkdtemp's folders are private
  try:
    if not files.fetch_folder(remote, scratch, _MARK):
      if files.is_remote(shared) and files.exists(shared):
        build.folder.mkdir(exist_ok=True)
        _copy_blocks(files.listdir(shared), shared, os.fspath(build.folder))
      with contextlib.closing(Writer(scratch, build.policy.shape)) as writer:
        _build(build, writer)
    try:
      os.rename(scratch, folder)
    except OSError:
      if not folder.is_dir():  # else another process was first, with the same content
        raise
    shutil.rmtree(build.folder, ignore_errors=True)
    if files.is_remote(shared) and files.exists(shared):
      files.remove_tree(shared)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def head(source: Source, rows: int) -> Corpus:
  """Tokenizes the first rows of a source alone, into `cache_dir` (not in a bucket), for a look.

  Raises:
    as `Source.open`.
  """
  folder = Path(source.cache_dir) / f'head-{secrets.token_hex(8)}'
  folder.mkdir(parents=True)
  settings = (source.on_bad_row == 'drop', folder / 'blocks', 1, False, rows)
  build = Build(source.spec, source.tokenizer, source.policy(), *settings)
  with contextlib.closing(Writer(folder, source.shape)) as writer:
    _build(build, writer)
  return Corpus(folder, source.spec.path, sources.source_names(source.spec))


def _sweep(root: Path, own: Path) -> None:
  """Removes what nobody has written to for a day, as a killed process was building it; but not
  `own`, where this build goes on.
  """
  for folder in root.glob(f'{_BUILDING}*'):
    if folder == own:
      continue
    try:
      touched = max(p.stat().st_mtime for p in (folder, *folder.iterdir()))
    except OSError:  # another process is at it
      continue
    if time.time() - touched > _ABANDONED:
      shutil.rmtree(folder, ignore_errors=True)


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
  """Divides a corpus into (train, eval) by a hash of content.

  A row's side is decided by its first example's tokens and mask: equal contents land on one side,
  all examples of a row stay together, and neither the order of rows nor other rows matter.

  Args:
    corpus: to divide.
    fraction: expected share of rows on the eval side, between 0 and 1.
    seed: another seed is another division.

  Raises:
    ConfigError: a fraction outside (0, 1). DataError: one side is empty.
  """
  if not 0 < fraction < 1:
    raise ConfigError(f'split: fraction={fraction}; expected a number between 0 and 1')
  is_eval = np.zeros(len(corpus), bool)
  key, row, side = seed.to_bytes(16, 'little', signed=True), None, False
  for i in range(len(corpus)):
    if corpus.row_of(i) != row:
      row = corpus.row_of(i)
      tokens, supervised = corpus.example(i)
      digest = hashlib.blake2b(tokens.tobytes(), digest_size=8, key=key)
      digest.update(supervised.tobytes())
      side = int.from_bytes(digest.digest(), 'little') < fraction * 2.0**64
    is_eval[i] = side
  if is_eval.all() or not is_eval.any():
    raise DataError(
      f'{corpus.name}: fraction {fraction} of {len(corpus)} examples leaves one side of the '
      'train/eval split empty; give data.eval, or another fraction'
    )
  return corpus.view(np.flatnonzero(~is_eval)), corpus.view(np.flatnonzero(is_eval))
