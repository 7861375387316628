"""Tokenizes a source into the files of a cache folder, block by block, on all cores.

Finished blocks are files of a folder that starts with the same key find again: a build that was
killed goes on where it was. Several processes may fill one such folder at once; a block is the same
whoever makes it. What comes out does not depend on how many processes there were.
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

from ftjax.data import blocks, row_counts, sources
from ftjax.data.blocks import Block, BlockTokenizer, Policy, TokenBlock
from ftjax.data.row_counts import Counts, Reasons
from ftjax.data.sources import Spec
from ftjax.data.tokenize_pool import Gone, Pool, cores
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import DataError

log = logging.getLogger(__name__)

# A source of no more blocks and bytes is tokenized here: starting processes would take as long.
_FEW_BLOCKS, _FEW_BYTES = 8, 4_000_000
# Once rows have been found that make the build fail, so many more are looked for.
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
  'values': '<f4',  # [examples]: margin, label or score, else 0
}


class Writer:
  """Appends blocks to the files of a cache folder under construction."""

  def __init__(self, folder: Path, shape: str):
    """Opens the files; the folder exists and is this writer's own."""
    self._folder, self._shape = folder, shape
    self._files = {part: open(folder / f'{part}.bin', 'wb') for part in DTYPES}  # noqa: SIM115
    self._digest = hashlib.sha256(b'ftjax corpus 1\n')
    self.counts = Counts()
    self._files['offsets'].write(np.zeros(1, DTYPES['offsets']).tobytes())

  def add(self, block: TokenBlock) -> None:
    """Appends a block; those before it were added."""
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
    """Flushes the arrays to disk, then writes meta.json, the mark of a whole folder."""
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
    spec, tokenizer, policy: what is tokenized, and how.
    drop_bad: whether unusable rows are left out, else they are an error.
    folder: of finished blocks, which the builds with the same tokens share.
    workers: processes; 0: one for each core.
    progress: show a bar.
    rows: only the first so many; None: all.
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
    """Tokenizes what no earlier start did, and hands all blocks to `writer` in order.

    Raises:
      DataError: rows that cannot be used, nothing to train on; see `counts.check`. A small source
        leaves no block behind then, a large one does: another data.on_bad_row needs them again.
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

    Nothing is done for a small source, and bad rows are left for `merge` to report.

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
    """Whether the source is small, and its blocks."""
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
    """The tokens of a finished block."""
    found = blocks.read(self._path(number))
    if found is None and not self.folder.is_dir():
      raise Gone
    if found is None:
      raise DataError(f'{self._path(number)}: was damaged; delete {self.folder} and start again')
    return found

  def _finish(self, source: Iterator[Block], workers: int) -> Iterator[int]:
    """Numbers of blocks as their files are finished, or were found so; not in order."""
    name = self.spec.path.rstrip('/').rpartition('/')[2]
    found: list[int] = []
    # A log file is no terminal: a line in it now and then.
    often = {'mininterval': 0.2 if sys.stderr.isatty() else 30.0, 'disable': not self.progress}
    with tqdm(desc=f'tokenize {name}', unit=' rows', leave=False, **often) as bar:

      def unfinished() -> Iterator[Block]:
        for block in source:
          if blocks.is_finished(self._path(block.number), block):
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
    """Blocks as their files are written, in this process or in others."""
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
  """0, 1, 2, ... each as soon as it and all before it have come."""
  waiting: set[int] = set()
  following = 0
  for number in numbers:
    waiting.add(number)
    while following in waiting:
      waiting.remove(following)
      yield following
      following += 1
