"""Tokenized sources on disk: built once, keyed by everything that could change a token, read by
memmap.

A cache folder is made beside its final name and renamed when it is whole, so that whatever carries
the name is complete, also when several processes build at once: the first one wins, the others use
its folder. A cache in a bucket has a mirror on each machine, which is what is read: a machine
without it downloads what another one built, or builds it and uploads it. `schedule.py` orders the
examples, `batches.py` reads them.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ftjax.data import counts, encode, formats, judged, sources
from ftjax.data.counts import Counts
from ftjax.data.formats import Bad
from ftjax.data.sources import Spec
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime import files
from ftjax.runtime.errors import ConfigError, DataError

log = logging.getLogger(__name__)

SCHEMA = 3  # raise it when the same rows would give other tokens, masks or files
_MARK = 'meta.json'  # written last: a folder with it is whole
_CHUNK = 1000  # rows tokenized at once
_CHUNK_CHARACTERS = 4_000_000  # or so many characters
_MAX_REPORTED = 20  # bad rows listed in one message
_ABANDONED = 24 * 3600  # seconds

_DTYPES = {
  'tokens': '<i4',  # [all tokens]
  'supervised': '|u1',  # [all tokens]
  'offsets': '<i8',  # [examples + 1]
  'supervised_lengths': '<i4',  # [examples]
  'places': '<i8',  # [examples, 2]: file number, line
  'boundaries': '<i4',  # [examples]: where the second side of a pair begins, else 0
  'values': '<f4',  # [examples]: margin, label or score, else 0
}


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
    for part, dtype in _DTYPES.items():
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

  def view(self, index: np.ndarray) -> 'Corpus':
    """Some of the examples, given by their numbers int[n], in that order."""
    index = np.asarray(index, np.int64)
    index = index if self._index is None else self._index[index]
    return Corpus(self._folder, self.name, self._file_names, index)


class _Writer:
  """Appends examples to the files of a cache folder under construction."""

  def __init__(self, folder: Path, shape: str):
    self._folder, self._shape = folder, shape
    self._files = {part: open(folder / f'{part}.bin', 'wb') for part in _DTYPES}  # noqa: SIM115
    self._digest = hashlib.sha256(b'ftjax corpus 1\n')
    self.counts = Counts()
    self._put('offsets', np.zeros(1))

  def _put(self, part: str, values) -> None:
    self._files[part].write(np.ascontiguousarray(values, _DTYPES[part]).tobytes())

  def add(self, example: encode.Encoded, file: int, line: int) -> None:
    counts, n = self.counts, len(example.tokens)
    supervised = int(example.supervised.sum())
    counts.examples += 1
    counts.tokens += n
    counts.supervised += supervised
    counts.straddled += example.straddled
    if example.is_chat:
      counts.chat_examples += 1
      counts.chat_tokens += n
      counts.chat_supervised += supervised
    self._put('tokens', example.tokens)
    self._put('supervised', example.supervised)
    self._put('offsets', [counts.tokens])
    self._put('supervised_lengths', [supervised])
    self._put('places', [file, line])
    self._put('boundaries', [example.boundary])
    self._put('values', [example.value])
    self._digest.update(np.int64(n).tobytes())
    self._digest.update(example.tokens.astype('<i4').tobytes())
    self._digest.update(np.packbits(example.supervised).tobytes())
    if self._shape != 'text':
      self._digest.update(np.array([example.boundary, example.value], '<f8').tobytes())

  def close(self) -> None:
    for file in self._files.values():
      file.close()

  def finish(self) -> None:
    """Flushes the arrays to disk, then writes meta.json, the mark of a whole folder."""
    for file in self._files.values():
      file.flush()
      os.fsync(file.fileno())
    self.close()
    meta = {
      'schema': SCHEMA,
      'shape': self._shape,
      'fingerprint': self._digest.hexdigest(),
      'counts': dataclasses.asdict(self.counts),
      'bytes': {part: (self._folder / f'{part}.bin').stat().st_size for part in _DTYPES},
    }
    with open(self._folder / 'meta.json', 'w') as file:
      file.write(json.dumps(meta, indent=1))
      file.flush()
      os.fsync(file.fileno())


@dataclasses.dataclass
class _Build:
  """One pass over a source: parse, encode, fit, write; bad rows are collected."""

  spec: Spec
  tokenizer: Tokenizer
  seq_len: int
  loss_on: str
  on_overlength: str
  shape: str
  names: list[str]
  writer: _Writer
  form: str | None = None
  bad: list[str] = dataclasses.field(default_factory=list)

  def _reject(self, file: int, line: int, reason: str) -> None:
    self.bad.append(f'{self.names[file]}:{line}: {reason}')

  def _parse(self, row) -> formats.Example | judged.Pair | judged.Judged | Bad:
    if isinstance(row, Bad):
      return row
    try:
      if self.shape != 'text':
        return judged.parse(row, self.shape, self.spec.format)
      self.form = self.form or self.spec.format or formats.detect(row)
      return formats.parse(row, self.form, self.tokenizer.template is not None)
    except ValueError as error:
      return Bad(str(error))

  def add_rows(self, chunk: list[tuple[int, int, sources.Row | Bad]]) -> None:
    parsed = [(file, line, self._parse(row)) for file, line, row in chunk]
    good = [example for _, _, example in parsed if not isinstance(example, Bad)]
    found = (
      encode.encode(good, self.tokenizer, self.loss_on)
      if self.shape == 'text'
      else judged.encode(good, self.tokenizer)
    )
    encoded = iter(found)
    for file, line, example in parsed:
      self.writer.counts.rows += 1
      result = example if isinstance(example, Bad) else next(encoded)
      if isinstance(result, Bad):
        self._reject(file, line, result.reason)
        continue
      for one in result:
        self._add(one, file, line)

  def _add(self, example: encode.Encoded, file: int, line: int) -> None:
    seen = self.writer.counts
    fit = judged.fit if example.boundary else encode.fit
    if example.boundary:
      chosen, rejected = judged.over(example, self.seq_len)
      seen.chosen_over += chosen
      seen.rejected_over += rejected
    try:
      kept = fit(example, self.seq_len, self.on_overlength)
    except ValueError as error:
      self._reject(file, line, str(error))
      return
    if kept is not None:
      seen.truncated += len(kept.tokens) < len(example.tokens)
      self.writer.add(kept, file, line)
    elif self.on_overlength == 'drop':
      seen.dropped += 1
    else:
      seen.unsupervised += 1


def _chunks(rows: Iterator, size: int) -> Iterator[list]:
  """Lists of `size` rows, or of fewer long ones: tokenizing takes some 600 bytes a character."""
  chunk, weight = [], 0
  for row in rows:
    chunk.append(row)
    weight += len(repr(row)) if isinstance(row[-1], dict) else 0
    if len(chunk) == size or weight > _CHUNK_CHARACTERS:
      yield chunk
      chunk, weight = [], 0
  if chunk:
    yield chunk


def _build(build: _Build, progress: bool) -> None:
  rows = sources.scan(build.spec)
  name = build.spec.path.rstrip('/').rpartition('/')[2]
  with tqdm(desc=f'tokenize {name}', unit=' rows', disable=not progress, leave=False) as bar:
    for chunk in _chunks(rows, _CHUNK):
      build.add_rows(chunk)
      bar.update(len(chunk))
      if len(build.bad) >= _MAX_REPORTED:
        break
  if build.bad:
    more = ' (there may be more)' if len(build.bad) >= _MAX_REPORTED else ''
    listed = '\n  '.join(build.bad[:_MAX_REPORTED])
    raise DataError(f'{build.spec.path}: rows that cannot be used{more}:\n  {listed}')
  counts.check(build.spec.path, build.writer.counts, build.loss_on)


def cache_key(
  spec: Spec, tokenizer: Tokenizer, seq_len: int, loss_on: str, on_overlength: str, shape: str
) -> str:
  """Hex name of the cache of these settings: content, tokenizer, template, policy, schema."""
  facts = {
    'schema': SCHEMA,
    'content': sources.fingerprint(spec),
    'tokenizer': tokenizer.fingerprint,
    'format': spec.format,
    'seq_len': seq_len,
    'loss_on': loss_on,
    'on_overlength': on_overlength,
    'shape': shape,
  }
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def build_or_open(
  spec: Spec,
  tokenizer: Tokenizer,
  *,
  cache_dir: str | Path,
  seq_len: int,
  loss_on: str,
  on_overlength: str,
  progress: bool,
  shape: str = 'text',
) -> Corpus:
  """Tokenizes a source, or opens what an earlier run tokenized.

  Args:
    spec: the source; its weight does not matter here.
    tokenizer: with its template.
    cache_dir: folder of all caches, made if missing; may be gs://.
    seq_len: most tokens of an example.
    loss_on: see `encode.encode`.
    on_overlength: 'error', 'drop', 'truncate_left' (keeps the end) or 'truncate_right'.
    progress: show a bar while tokenizing.
    shape: what the rows must be: 'text', or one of judged.SHAPES, which ignore `loss_on`.

  Raises:
    ConfigError: an unknown policy. DataError: rows that cannot be used (up to 20 listed with file,
    line and reason), nothing left to train on, or a mask that covers nothing or everything. Nothing
    stays on disk then.
  """
  encode.check_loss_on(loss_on)
  if on_overlength not in encode.ON_OVERLENGTH:
    raise ConfigError(
      f'data.on_overlength={on_overlength!r}; expected one of {list(encode.ON_OVERLENGTH)}'
    )
  if seq_len < 2:
    raise ConfigError(f'seq_len={seq_len}; expected at least 2')
  names = sources.source_names(spec)
  root = files.local_mirror(cache_dir)
  folder = root / cache_key(spec, tokenizer, seq_len, loss_on, on_overlength, shape)
  remote = files.join(cache_dir, folder.name)
  if not folder.is_dir():
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    scratch = Path(tempfile.mkdtemp(prefix='building-', dir=root))
    scratch.chmod(0o755)  # a cache may be shared; mkdtemp's folders are private
    try:
      if not files.fetch_folder(remote, scratch, _MARK):
        writer = _Writer(scratch, shape)
        policy = (seq_len, loss_on, on_overlength, shape)
        try:
          _build(_Build(spec, tokenizer, *policy, names, writer), progress)
          writer.finish()
        finally:
          writer.close()
      try:
        os.rename(scratch, folder)
      except OSError:
        if not folder.is_dir():  # else another process was first, with the same content
          raise
    finally:
      shutil.rmtree(scratch, ignore_errors=True)
  corpus = Corpus(folder, spec.path, names)
  try:
    files.put_folder(folder, remote, _MARK)
  except (OSError, DataError) as error:  # the tokens are here all the same
    log.warning('%s: tokens were not uploaded for other machines: %s', remote, error)
  return corpus


def _sweep(root: Path) -> None:
  """Removes what nobody has written to for a day: a killed process was building it."""
  for folder in root.glob('building-*'):
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
