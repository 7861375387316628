"""Tokenizes blocks of a source: some hundred consecutive rows, stored in one file.

The end of a block depends on its rows alone, and its tokens on nothing outside it, so blocks can be
tokenized in any order, by any process, and again after a kill: the bytes are the same.
`token_blocks.py` holds the result, `corpus_builder.py` joins them, `tokenize_pool.py` distributes
them to processes.
"""

import dataclasses
import marshal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ftjax.data import (
  annotated_rows,
  embedding_rows,
  encode,
  example_shapes,
  formats,
  labeled_examples,
  preference_rows,
  row_numbers,
  token_blocks,
)
from ftjax.data.formats import Bad
from ftjax.data.policy import TEXT_SHAPES, Policy
from ftjax.data.row_counts import Counts, Reasons
from ftjax.data.tokenizer import Tokenizer

BLOCK_ROWS = 500
BLOCK_BYTES = 4_000_000  # of its rows as `_pack` writes them
_CHUNK_ROWS = 250  # tokenized at once: some 600 bytes of memory a character
_CHUNK_BYTES = 250_000
# Version 2 writes no references between values: the same row has the same size in every process.
_MARSHAL = 2


Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Block:
  """Consecutive rows of a source.

  Attributes:
    number: 0, 1, ... in the order of the source.
    first, last: (file number, line) of its first and last row.
    packed: each row as `unpack` reads it.
    form: the row format that an earlier row determined, if any.
  """

  number: int
  first: tuple[int, int]
  last: tuple[int, int]
  packed: list[bytes]
  form: str | None

  @property
  def name(self) -> str:
    """The name of its file."""
    return file_name(self.number)

  @property
  def identity(self) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Its first and last place, and its number of rows."""
    return self.first, self.last, len(self.packed)

  @property
  def size(self) -> int:
    """The bytes of its rows."""
    return sum(map(len, self.packed))

  def request(self) -> dict[str, Any]:
    """Returns the fields that a process needs to tokenize it, for `marshal`."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def file_name(number: int) -> str:
  """Returns the name of a block's file."""
  return f'block-{number:08d}'


class _StandIn:
  """Replaces a value that `marshal` cannot write, such as a date of a Parquet column.

  It has the type's name, `str` and `repr`: messages and templates use nothing else.
  """

  def __init__(self, text: str, shown: str):
    self._text, self._shown = text, shown

  def __str__(self) -> str:
    return self._text

  def __repr__(self) -> str:
    return self._shown


def _portable(value: Any) -> Any:
  """Returns an equal value for `marshal`; a tuple is a stand-in, since rows have no tuples."""
  if isinstance(value, dict):
    return {str(k): _portable(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_portable(v) for v in value]
  if value is None or isinstance(value, str | bool | int | float | bytes):
    return value
  return (type(value).__name__, str(value), repr(value))


def _restored(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _restored(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_restored(v) for v in value]
  if isinstance(value, tuple):
    return type(value[0], (_StandIn,), {})(*value[1:])
  return value


def _pack(file: int, line: int, row: Row | Bad) -> bytes:
  """Returns a row as bytes for another process of this program; never read from a file."""
  if isinstance(row, Bad):
    return marshal.dumps((file, line, None, row.reason), _MARSHAL)
  try:
    return marshal.dumps((file, line, row, False), _MARSHAL)
  except ValueError:  # a type that marshal cannot write
    return marshal.dumps((file, line, _portable(row), True), _MARSHAL)


def unpack(packed: bytes) -> tuple[int, int, Row | Bad]:
  """Returns (file number, line, row or Bad) of a block's row."""
  file, line, row, note = marshal.loads(packed)
  if row is None:
    return file, line, Bad(note)
  return file, line, _restored(row) if note else row


def split(
  rows: Iterable[tuple[int, int, Row | Bad]], form: str | None, shape: str
) -> Iterator[Block]:
  """Splits the rows of `sources.scan` into blocks, which are read one at a time.

  Args:
    rows: those of a whole source.
    form: the format in the config, or None: that of the first row with a known one.
    shape: as in Policy.
  """
  number, packed, size, form_before = 0, [], 0, form
  first = last = (0, 0)
  for file, line, row in rows:
    if not packed:
      first = (file, line)
    last = (file, line)
    packed.append(_pack(file, line, row))
    size += len(packed[-1])
    if form is None and shape in TEXT_SHAPES and not isinstance(row, Bad):
      form = _detected(row)
    if len(packed) >= BLOCK_ROWS or size >= BLOCK_BYTES:
      yield Block(number, first, last, packed, form_before)
      number, packed, size, form_before = number + 1, [], 0, form
  if packed:
    yield Block(number, first, last, packed, form_before)


def _detected(row: Row) -> str | None:
  try:
    return formats.detect(row)
  except ValueError:
    return None


class BlockTokenizer:
  """Tokenizes blocks: parse, encode, fit to seq_len, count."""

  def __init__(self, policy: Policy, tokenizer: Tokenizer):
    """Stores the settings of all blocks."""
    self._policy, self._tokenizer = policy, tokenizer
    self._form: str | None = None
    self._clear()

  def _clear(self) -> None:
    self._counts, self._bad, self._refused = Counts(), Reasons(), Reasons()
    self._fields, self._columns = Reasons(), Reasons()
    self._kept: list[tuple[encode.Encoded, int, int]] = []

  def tokenize(self, block: Block) -> token_blocks.TokenBlock:
    """Tokenizes and counts a block's rows.

    Raises:
      DataError: the tokenizer lacks what all rows need (a template, an EOS).
    """
    self._clear()
    self._form = block.form
    for chunk in _chunks(block.packed):
      self._add_rows([unpack(p) for p in chunk])
    counts = self._counts
    counts.bad, counts.bad_reasons = self._bad.rows, self._bad.as_list()
    counts.unrendered_fields = self._fields.as_list()
    counts.unread_columns = self._columns.as_list()
    made = token_blocks.TokenBlock(
      block.first,
      block.last,
      counts,
      self._refused.as_list(),
      token_blocks.arrays_of(self._kept, self._policy),
    )
    self._clear()
    return made

  @property
  def _is_annotated(self) -> bool:
    return self._policy.shape in annotated_rows.SHAPES

  def _parse(self, row: Row | Bad) -> Any:
    """Returns what the module of the shape makes of a row, or Bad."""
    if isinstance(row, Bad):
      return row
    policy, has_template = self._policy, self._tokenizer.template is not None
    try:
      if policy.shape == 'texts':
        return embedding_rows.parse(row, policy.annotation)
      if self._is_annotated:
        return annotated_rows.parse(row, policy.shape, policy.annotation)
      if not policy.is_text:
        return preference_rows.parse(row, policy.shape, policy.format, has_template)
      self._form = self._form or policy.format or formats.detect(row)
      return formats.parse(row, self._form, has_template, is_named=policy.format is not None)
    except ValueError as error:
      return Bad(str(error))

  def _parse_all(self, row: Row | Bad) -> tuple[list[Any] | Bad, dict[str, float]]:
    """Returns (the example of a row and its altered copies, or Bad; its numbers that are not the
    usual ones)."""
    example = self._parse(row)
    has_numbers = self._is_annotated or self._policy.is_text
    if isinstance(example, Bad) or not has_numbers:
      return (example if isinstance(example, Bad) else [example]), {}
    try:
      weight, difficulty = row_numbers.read(row)
      own = [example] if self._is_annotated else [example, *self._policy.copies(example)]
    except ValueError as error:
      return Bad(str(error)), {}
    is_usual = weight == 1 and difficulty != difficulty
    return own, {} if is_usual else {'weight': weight, 'difficulty': difficulty}

  def _note_unread(self, row: Row, file: int, line: int) -> None:
    shape = self._policy.shape
    if self._policy.is_text:
      found = formats.unread(row, self._form)
    elif shape == 'texts':
      found = embedding_rows.unread(row, self._policy.annotation)
    else:
      found = (annotated_rows if self._is_annotated else preference_rows).unread(row, shape)
    for column in sorted(found):
      self._columns.add(column, (file, line))

  def _add_rows(self, rows: Sequence[tuple[int, int, Row | Bad]]) -> None:
    parsed = [(file, line, *self._parse_all(row)) for file, line, row in rows]
    good = [one for _, _, own, _ in parsed for one in (() if isinstance(own, Bad) else own)]
    encoded = iter(example_shapes.encode(good, self._tokenizer, self._policy))
    for (_, _, row), (file, line, own, numbers) in zip(rows, parsed, strict=True):
      self._counts.rows += 1
      results = own if isinstance(own, Bad) else [next(encoded) for _ in own]
      result = results if isinstance(results, Bad) else results[0]
      if isinstance(result, Bad):
        self._bad.add(result.reason, (file, line))
      elif self._is_rendered(result, file, line):
        self._note_unread(row, file, line)
        if len(result) > 1:
          tokens = sum(len(e.tokens) for e in result)
          row = {'place': [file, line], 'examples': len(result), 'tokens': tokens}
          self._counts.see_row(row)
        copies = [one for copy in results[1:] if not isinstance(copy, Bad) for one in copy]
        for one in (*result, *copies):
          self._add(dataclasses.replace(one, **numbers) if numbers else one, file, line)

  def _is_rendered(self, row: list[encode.Encoded], file: int, line: int) -> bool:
    """Returns whether a row is kept: rendered whole, or data.on_unrendered='warn'."""
    places = tuple(dict.fromkeys(place for example in row for place in example.unrendered))
    if not places:
      return True
    if self._policy.on_unrendered == 'error':
      self._refused.add(encode.unrendered_reason(places, self._tokenizer), (file, line))
      return False
    self._counts.unrendered += 1
    for place in places:
      self._fields.add(place, (file, line))
    return True

  def _add(self, example: encode.Encoded, file: int, line: int) -> None:
    counts, policy = self._counts, self._policy
    is_pair = policy.shape == 'pair'
    if is_pair:
      chosen, rejected = labeled_examples.over(example, policy.seq_len)
      counts.chosen_over += chosen
      counts.rejected_over += rejected
    try:
      kept = example_shapes.fit(example, policy)
    except ValueError as error:
      self._refused.add(str(error), (file, line))
      return
    if kept is None:
      if policy.on_overlength == 'drop':
        counts.dropped += 1
      else:
        counts.unsupervised += 1
      return
    if is_pair and labeled_examples.is_identical(kept):
      counts.identical += 1
      return
    counts.truncated += len(kept.tokens) < len(example.tokens)
    self._keep(kept, file, line)

  def _keep(self, example: encode.Encoded, file: int, line: int) -> None:
    counts, n = self._counts, len(example.tokens)
    supervised = int(np.count_nonzero(example.supervised))
    counts.examples += 1
    counts.tokens += n
    counts.supervised += supervised
    counts.boundary_tokens += example.boundary_tokens
    if example.is_chat:
      counts.chat_examples += 1
      counts.chat_tokens += n
      counts.chat_supervised += supervised
    self._kept.append((example, file, line))


def _chunks(packed: Sequence[bytes]) -> Iterator[list[bytes]]:
  """Yields the rows of a block in parts that are tokenized at once."""
  chunk, size = [], 0
  for row in packed:
    chunk.append(row)
    size += len(row)
    if len(chunk) >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
      yield chunk
      chunk, size = [], 0
  if chunk:
    yield chunk
