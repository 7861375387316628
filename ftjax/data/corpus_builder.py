"""Tokenizes a source into the files of a cache folder, block by block, on all cores.

Finished blocks are files in a folder named by the cache key: a build that was killed continues from
them. Several processes may fill one such folder at once; the bytes of a block do not depend on the
process, nor the result on the number of processes.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ftjax.data import blocks, row_counts, sources, token_blocks
from ftjax.data.blocks import Block, BlockTokenizer
from ftjax.data.policy import Policy
from ftjax.data.row_counts import Counts, Reasons
from ftjax.data.sources import Spec
from ftjax.data.token_blocks import TokenBlock
from ftjax.data.tokenize_pool import Gone, Pool, cores
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

log = logging.getLogger(__name__)

# A smaller source is tokenized in this process: starting processes would take as long.
_FEW_BLOCKS, _FEW_BYTES = 8, 4_000_000
# Limits of the search for further bad rows once one has made the build fail.
_MAX_REFUSED = 1000
_BLOCKS_AFTER_REFUSED = 100

# Files of a finished folder, '<name>.bin'.
DTYPES = {
  'tokens': '<i4',  # [all tokens]
  'supervised': '|u1',  # [all tokens]
  'offsets': '<i8',  # [examples + 1]
  'supervised_lengths': '<i4',  # [examples]
  'places': '<i8',  # [examples, 2]: file number, line
  'boundaries': '<i4',  # [examples]: where the second side of a pair begins, else 0
  'labels': '<i4',  # [all tokens] of annotated rows, -1 without a label; [0] of others
  'values': '<f4',  # [examples]: margin, label or score, else 0
  'row_weights': '<f4',  # [examples]: factor of the loss
  'difficulties': '<f4',  # [examples]: NaN without one
}


class Writer:
  """Appends blocks to the files of a cache folder under construction."""

  def __init__(self, folder: Path, shape: str):
    """Opens the files; the folder exists, and no other process uses it."""
    self._folder, self._shape = folder, shape
    self._files = {part: open(folder / f'{part}.bin', 'wb') for part in DTYPES}  # noqa: SIM115
    self._digest = hashlib.sha256(b'ftjax corpus 1\n')
    self.counts = Counts()
    self._files['offsets'].write(np.zeros(1, DTYPES['offsets']).tobytes())

  def add(self, block: TokenBlock) -> None:
    """Appends a block, in order."""
    arrays = block.arrays
    offsets = self.counts.tokens + np.cumsum(arrays['lengths'])
    for part, dtype in DTYPES.items():
      values = offsets if part == 'offsets' else arrays[part]
      self._files[part].write(np.ascontiguousarray(values, dtype).data)
    self._digest.update(arrays['digest'].data)
    self.counts.update(block.counts)

  def close(self) -> None:
    """Closes the files."""
    for file in self._files.values():
      file.close()

  def finish(self, schema: int) -> None:
    """Syncs the arrays to disk, then writes meta.json, which marks a complete folder."""
    for file in self._files.values():
      file.flush()
      os.fsync(file.fileno())
    self.close()
    meta = {
      'schema': schema,
      'shape': self._shape,
      'fingerprint': self._digest.hexdigest(),
      'counts': dataclasses.asdict(self.counts),
      'bytes': {part: (self._folder / f'{part}.bin').stat().st_size for part in DTYPES},
    }
    with open(self._folder / 'meta.json', 'w') as file:
      file.write(json.dumps(meta, indent=1))
      file.flush()
      os.fsync(file.fileno())


@dataclasses.dataclass(frozen=True)
class Build:
  """A source to tokenize.

  Attributes:
    spec, tokenizer, policy: the source and the settings of tokenizing.
    drop_bad: whether unusable rows are left out, else they are an error.
    folder: that of finished blocks, shared by all builds of the same tokens.
    workers: processes; 0: one for each core.
    progress: show a bar.
    rows: how many of the first rows; None: all.
  """

  spec: Spec
  tokenizer: Tokenizer
  policy: Policy
  drop_bad: bool
  folder: Path
  workers: int
  progress: bool
  rows: int | None = None

  def merge(self, writer: Writer) -> None:
    """Tokenizes the blocks that no earlier run finished, and adds all to `writer` in order.

    Raises:
      DataError: unusable rows, or nothing to train on; see `row_counts.check`. The blocks of a
        large source are kept then, for a build with another data.on_bad_row.
      tokenize_pool.Gone: another process has finished the same corpus.
    """
    few, source = self._open()
    errors, refused_at = Reasons(), None
    try:
      with contextlib.closing(_in_order(self._finish(source, 1 if few else self.workers))) as found:
        for number in found:
          made = self._read(number)
          errors.update(Reasons(made.refused))
          if not self.drop_bad:
            errors.update(Reasons(made.counts.bad_reasons))
          if not errors.rows:
            writer.add(made)
            continue
          writer.counts.rows += made.counts.rows
          refused_at = number if refused_at is None else refused_at
          if errors.rows >= _MAX_REFUSED or number - refused_at >= _BLOCKS_AFTER_REFUSED:
            break
      self._check(writer.counts, errors)
    except DataError:
      if few:
        shutil.rmtree(self.folder, ignore_errors=True)
      raise

  def share(self, number: int, count: int) -> list[str]:
    """Tokenizes every `count`-th block, from block `number` on, for another process's `merge`.

    Does nothing for a small source; `merge` reports bad rows.

    Returns:
      names of the blocks' files.
    """
    few, source = self._open()
    if few:
      return []
    own = (block for block in source if block.number % count == number)
    with contextlib.closing(self._finish(own, self.workers)) as found:
      return [blocks.file_name(number) for number in found]

  def _open(self) -> tuple[bool, Iterator[Block]]:
    """Returns whether the source is small, and its blocks."""
    self.folder.mkdir(exist_ok=True)
    self.folder.chmod(0o755)
    rows = itertools.islice(sources.scan(self.spec), self.rows)
    source = blocks.split(rows, self.policy.format, self.policy.shape)
    first = list(itertools.islice(source, _FEW_BLOCKS + 1))
    few = len(first) <= _FEW_BLOCKS and sum(b.size for b in first) <= _FEW_BYTES
    return few, itertools.chain(first, source)

  def _check(self, seen: Counts, errors: Reasons) -> None:
    names = sources.source_names(self.spec)
    path, rows = self.spec.path, f'{seen.rows:,} rows read'
    if errors.rows:
      found = sorted(errors.as_list(), key=lambda entry: entry['places'][0])
      remedy = '' if self.drop_bad else " (data.on_bad_row='drop' leaves out what cannot be parsed)"
      raise DataError(
        f'{path}: rows that cannot be used: {errors.rows:,} of {rows}{remedy}:\n'
        + row_counts.listing(found, names)
      )
    if seen.bad and seen.bad == seen.rows:
      raise DataError(
        f'{path}: none of the {rows} can be used:\n' + row_counts.listing(seen.bad_reasons, names)
      )
    row_counts.check(path, seen, self.policy.loss_on)

  def _path(self, number: int) -> Path:
    return self.folder / blocks.file_name(number)

  def _read(self, number: int) -> TokenBlock:
    """Reads a finished block."""
    found = token_blocks.read(self._path(number))
    if found is None and not self.folder.is_dir():
      raise Gone
    if found is None:
      raise DataError(f'{self._path(number)}: was damaged; delete {self.folder} and start again')
    return found

  def _finish(self, source: Iterator[Block], workers: int) -> Iterator[int]:
    """Yields the number of each block once its file exists; not in order."""
    name = self.spec.path.rstrip('/').rpartition('/')[2]
    found: list[int] = []
    # A log file gets a line every 30 s.
    often = {'mininterval': 0.2 if sys.stderr.isatty() else 30.0, 'disable': not self.progress}
    with tqdm(desc=f'tokenize {name}', unit=' rows', leave=False, **often) as bar:

      def unfinished() -> Iterator[Block]:
        for block in source:
          if token_blocks.is_finished(self._path(block.number), *block.identity):
            found.append(block.number)
            bar.update(len(block.packed))
          else:
            yield block

      for block in self._tokenize(unfinished(), workers or cores()):
        bar.update(len(block.packed))
        yield from found
        found.clear()
        yield block.number
      yield from found

  def _tokenize(self, source: Iterator[Block], workers: int) -> Iterator[Block]:
    """Yields each block once its file is written, by this process or others."""
    first = next(source, None)
    if first is None:
      return
    source = itertools.chain([first], source)
    if workers > 1:
      with Pool(self.policy, self.tokenizer, self.folder, workers) as pool:
        yield from pool.run(source)
      return
    tokenizer = BlockTokenizer(self.policy, self.tokenizer)
    for block in source:
      made = tokenizer.tokenize(block)
      try:
        made.write(self._path(block.number))
      except FileNotFoundError as error:
        raise Gone from error
      yield block


def _in_order(numbers: Iterator[int]) -> Iterator[int]:
  """Yields 0, 1, 2, ..., each as soon as it and all smaller numbers have occurred."""
  waiting: set[int] = set()
  following = 0
  for number in numbers:
    waiting.add(number)
    while following in waiting:
      waiting.remove(following)
      yield following
      following += 1
