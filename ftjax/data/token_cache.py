"""Caches tokenized sources on disk, keyed by everything that could change a token, read by memmap.

A cache folder is built under a temporary name and renamed when it is complete, also when several
processes build at once: the first one wins, the others use its folder. The finished blocks of a
killed process are used by the next one (corpus_builder.py). A cache in a bucket is read through a
local mirror: a machine without it downloads the folder, or builds and uploads it. `order.py` orders
the examples, `batches.py` reads them.
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
from typing import Any, Protocol

import numpy as np

from ftjax.data import annotated_rows, encode, sources
from ftjax.data import row_counts as counts_lib
from ftjax.data.annotated_rows import Annotation
from ftjax.data.corpus_builder import DTYPES, Build, Writer
from ftjax.data.policy import Policy
from ftjax.data.row_counts import Counts
from ftjax.data.sources import Spec
from ftjax.data.tokenize_pool import Gone
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files

log = logging.getLogger(__name__)

SCHEMA = 7  # raise it when the same rows would give other tokens, masks or files
_MARK = 'meta.json'  # written last: a folder with it is complete
_BUILDING = 'building-'  # prefix of folders of unfinished caches
_ABANDONED = 24 * 3600  # seconds
_TRANSFERS = 8  # files at once


class TopTokens(Protocol):
  """Arrays with several numbers of each supervised position; see teacher_file.py."""

  fingerprint: str

  def empty(self, batch_size: int, seq_len: int) -> dict[str, np.ndarray]:
    """Returns the arrays [B, T, ...] of padding."""

  def read(self, i: int) -> dict[str, np.ndarray]:
    """Returns the arrays [n, ...] of the n tokens of example i that are predicted, in order."""


class Corpus:
  """Tokenized examples of a source, or a selection of them; cheap to create and to pass on.

  Attributes:
    name: the source's name, for messages.
    lengths: int32[n], tokens of each example.
    shape: the shape of an example: one of policy.TEXT_SHAPES, of preference_rows.SHAPES or of
      annotated_rows.SHAPES.
    boundaries: int32[n], where the second side of an example begins; 0 for one side alone.
    tokens, supervised: number of tokens of all examples, and of supervised ones.
    counts: counts of the whole source.
    fingerprint: sha256 hex of the examples in order.
    columns: float32[n] by name, further numbers of each example, which batches include.
    weights: float32[n], factors of the loss of each example in training; None: all are 1.
    difficulties: float32[n], NaN for rows that name none.
    top_tokens: a teacher's likeliest tokens of each supervised position; None: there are none.
  """

  def __init__(
    self, folder: Path, name: str, file_names: list[str], index: np.ndarray | None = None
  ):
    """Opens a finished cache folder; `index` int64[n] selects examples.

    Raises:
      DataError: the folder's files are missing, damaged or inconsistent.
    """
    self._folder, self._file_names, self._index = folder, file_names, index
    self.name, self.columns = name, {}
    self.top_tokens: TopTokens | None = None
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
          f'{path}: missing or truncated; delete the folder {folder}, it is built again'
        )
      # A plain array over the same pages: slicing a memmap object takes ten times as long.
      is_empty = not meta['bytes'][part]  # which cannot be mapped
      arrays[part] = np.zeros(0, dtype) if is_empty else np.asarray(np.memmap(path, dtype, 'r'))
    self._tokens, self._supervised = arrays['tokens'], arrays['supervised']
    self._offsets, self._places = arrays['offsets'], arrays['places'].reshape(-1, 2)
    self._boundaries, self._values = arrays['boundaries'], arrays['values']
    self._labels = arrays['labels']
    lengths, supervised = np.diff(self._offsets).astype(np.int32), arrays['supervised_lengths']
    self.fingerprint = meta['fingerprint']
    if index is not None:
      lengths, supervised = lengths[index], supervised[index]
      picked = hashlib.sha256(index.astype('<i8').tobytes()).hexdigest()
      self.fingerprint = hashlib.sha256(f'{self.fingerprint} {picked}'.encode()).hexdigest()
    weights, self.difficulties = arrays['row_weights'], arrays['difficulties']
    if index is not None:
      weights, self.difficulties = weights[index], self.difficulties[index]
    self.weights = None if (weights == 1).all() else weights
    boundaries = arrays['boundaries']
    self.boundaries = boundaries if index is None else boundaries[index]
    self.lengths = lengths
    self.tokens = int(lengths.sum(dtype=np.int64))
    self.supervised = int(supervised.sum(dtype=np.int64))

  def __len__(self) -> int:
    return len(self.lengths)

  def _at(self, i: int) -> int:
    return i if self._index is None else int(self._index[i])

  def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns example i: (tokens int32[n], supervised bool[n])."""
    start, end = self._offsets[self._at(i) : self._at(i) + 2]
    return self._tokens[start:end], self._supervised[start:end].view(bool)

  def sides(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the attention segments of example i: both sides of a pair, else the example."""
    tokens, supervised = self.example(i)
    boundary = int(self._boundaries[self._at(i)])
    if not boundary or self.shape in annotated_rows.SHAPES:
      return [(tokens, supervised)]
    return [
      (tokens[:boundary], supervised[:boundary]),
      (tokens[boundary:], supervised[boundary:]),
    ]

  def labels(self, i: int) -> np.ndarray:
    """Returns the labels of example i of annotated rows, int32[n], -1 for a token without one."""
    start, end = self._offsets[self._at(i) : self._at(i) + 2]
    return self._labels[start:end]

  def token_types(self, i: int) -> np.ndarray:
    """Returns 1 for the tokens of example i from its second text on, else 0: float32[n]."""
    start, end = self._offsets[self._at(i) : self._at(i) + 2]
    boundary = int(self._boundaries[self._at(i)])
    return (np.arange(end - start) >= (boundary or end - start)).astype(np.float32)

  def value(self, i: int) -> float:
    """Returns the margin, label or score of example i."""
    return float(self._values[self._at(i)])

  def where(self, i: int) -> str:
    """Returns the file and line of the row of example i: 'file.jsonl:17'."""
    file, line = self._places[self._at(i)]
    return f'{self._file_names[file]}:{line}'

  def row_of(self, i: int) -> tuple[int, int]:
    """Returns (file number, line) of the row of example i."""
    file, line = self._places[self._at(i)]
    return int(file), int(line)

  def notes(self) -> list[str]:
    """Returns messages about rows of the source that were left out or changed."""
    return counts_lib.notes(self.name, self.counts, self._file_names)

  def view(self, index: np.ndarray) -> 'Corpus':
    """Returns the examples with the given indices int[n], in that order."""
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
  """Returns a hex hash of content, tokenizer, template, policy and schema."""
  facts = {
    'schema': SCHEMA,
    'content': sources.fingerprint(spec),
    'tokenizer': tokenizer.fingerprint,
  } | policy.facts()
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _build(build: Build, writer: Writer) -> None:
  """Builds the cache in the writer's folder."""
  build.merge(writer)
  writer.finish(SCHEMA)


@dataclasses.dataclass(frozen=True)
class Source:
  """A source with the settings of tokenizing.

  Attributes:
    spec: the source; its weight is ignored.
    tokenizer: the tokenizer with its template.
    cache_dir: folder of all caches, created if missing; may be gs://.
    seq_len: the most tokens of an example.
    loss_on: see `encode.encode`.
    on_overlength: 'error', 'drop', 'truncate_left' (keeps the end) or 'truncate_right'.
    on_bad_row: 'error', or 'drop': unusable rows are left out, counted and listed.
    on_unrendered: 'error', or 'warn': rows with content that the template does not render are kept
      and counted.
    shape: the shape of the rows, see Corpus; of others than 'text' `loss_on` is not read.
    source_len: the most tokens that an encoder reads of an example, of the shape 'source_target'.
    annotation: of annotated rows.
    augment, augment_templates, augment_copies, augment_seed: see augment.py; of TEXT_SHAPES.
    workers: processes that tokenize; 0: one for each core. The result does not depend on them.
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
  augment: tuple[str, ...] = ()
  augment_templates: tuple[str, ...] = ()
  augment_copies: int = 0
  augment_seed: int = 0
  source_len: int = 0
  annotation: Annotation = Annotation()  # noqa: RUF009 - frozen

  def policy(self) -> Policy:
    """Returns the settings that the tokens of a row depend on.

    Raises:
      ConfigError: an unknown policy.
    """
    _check_settings(self.loss_on, self.on_overlength, self.on_bad_row, self.seq_len)
    return Policy(
      *(self.spec.format, self.seq_len, self.loss_on, self.on_overlength),
      *(self.on_unrendered, self.shape, tuple(self.augment), tuple(self.augment_templates)),
      *((self.augment_copies, self.augment_seed) if self.augment else (0, 0)),
      self.source_len,
      self.annotation,
    )

  def _folders(self) -> tuple[Path, Build]:
    """Returns the folder of the finished tokens, and their build."""
    policy = self.policy()
    root = files.local_mirror(self.cache_dir)
    key = cache_key(self.spec, self.tokenizer, policy)
    # Blocks do not depend on `on_bad_row`: they are kept when a run ends with bad rows.
    blocks = root / f'{_BUILDING}{key}'
    drop_bad = self.on_bad_row == 'drop'
    if drop_bad:
      key = hashlib.sha256(f'{key} drop'.encode()).hexdigest()[:32]
    settings = (drop_bad, blocks, self.workers, self.progress)
    return root / key, Build(self.spec, self.tokenizer, policy, *settings)

  def open(self) -> Corpus:
    """Tokenizes the source, or opens the cache of an earlier run.

    Raises:
      ConfigError: an unknown policy.
      DataError: unusable rows (reasons with their count and first places), no examples left, or a
        mask that covers nothing or everything.
    """
    folder, build = self._folders()
    remote = files.join(self.cache_dir, folder.name)
    while not folder.is_dir():
      _prepare(folder.parent, build.folder)
      with contextlib.suppress(Gone):  # another process finished it or found bad rows: look again
        _make(folder, build, self.cache_dir)
    corpus = Corpus(folder, self.spec.path, sources.source_names(self.spec))
    try:
      files.put_folder(folder, remote, _MARK)
    except (OSError, DataError) as error:  # the local tokens can be used
      log.warning('%s: tokens were not uploaded for other machines: %s', remote, error)
    return corpus

  def tokenize_share(self, number: int, count: int) -> None:
    """Tokenizes part `number` of `count` of a large source for a cache that several hosts share.

    `open` in the process of part 0 then joins the parts. Does nothing where the cache exists.
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
  """Copies blocks between a bucket and this machine; a missing one is tokenized again."""

  def copy(name: str) -> None:
    files.write_bytes(files.join(target, name), files.read_bytes(files.join(source, name)))

  try:
    with concurrent.futures.ThreadPoolExecutor(_TRANSFERS) as pool:
      list(pool.map(copy, names))
  except (OSError, DataError) as error:
    log.warning('%s: blocks of tokens were not copied to %s: %s', source, target, error)


def _make(folder: Path, build: Build, cache_dir: str | Path) -> None:
  """Downloads or builds a cache folder, and renames it to its final name."""
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
  """Tokenizes only the first rows of a source, into the local folder `cache_dir`.

  Raises as `Source.open`.
  """
  folder = Path(source.cache_dir) / f'head-{secrets.token_hex(8)}'
  folder.mkdir(parents=True)
  settings = (source.on_bad_row == 'drop', folder / 'blocks', 1, False, rows)
  build = Build(source.spec, source.tokenizer, source.policy(), *settings)
  with contextlib.closing(Writer(folder, source.shape)) as writer:
    _build(build, writer)
  return Corpus(folder, source.spec.path, sources.source_names(source.spec))


def _sweep(root: Path, own: Path) -> None:
  """Removes unfinished folders that have not changed for a day, except `own`."""
  for folder in root.glob(f'{_BUILDING}*'):
    if folder == own:
      continue
    try:
      touched = max(p.stat().st_mtime for p in (folder, *folder.iterdir()))
    except OSError:  # another process is changing it
      continue
    if time.time() - touched > _ABANDONED:
      shutil.rmtree(folder, ignore_errors=True)


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
  """Divides a corpus into (train, eval) by a hash of content.

  The side of a row depends on the tokens and mask of its first example: equal rows are on one side,
  all examples of a row stay together, and neither the order of rows nor other rows matter.

  Args:
    corpus: the corpus to divide.
    fraction: expected fraction of rows on the eval side, between 0 and 1.
    seed: another seed gives another division.

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
