"""Tokenized blocks of a source (blocks.py) as arrays, each in a file of its own."""

import dataclasses
import json
import os
import socket
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.data import encode
from ftjax.data.policy import Policy
from ftjax.data.row_counts import Counts

# Arrays of a block; the corpus's fingerprint hashes the `digest` of every block.
PARTS = {
  'tokens': '<i4',  # [all tokens]
  'supervised': '|u1',  # [all tokens]
  'lengths': '<i8',  # [examples]
  'supervised_lengths': '<i4',  # [examples]
  'places': '<i8',  # [examples, 2]: file number, line
  'boundaries': '<i4',  # [examples]: where the second side of a pair begins, else 0
  'labels': '<i4',  # [all tokens] of annotated rows, -1 without a label; [0] of others
  'values': '<f4',  # [examples]: margin, label or score, else 0
  'row_weights': '<f4',  # [examples]: factor of the loss, 1 where the row names none
  'difficulties': '<f4',  # [examples]: NaN where the row names none
  'digest': '|u1',
}


def arrays_of(
  kept: Sequence[tuple[encode.Encoded, int, int]], policy: Policy
) -> dict[str, np.ndarray]:
  """Returns the arrays of PARTS."""
  examples = [example for example, _, _ in kept]
  labels = [e.labels for e in examples if e.labels is not None]
  joined: dict[str, Any] = {
    'tokens': np.concatenate([e.tokens for e in examples]) if examples else [],
    'supervised': np.concatenate([e.supervised for e in examples]) if examples else [],
    'lengths': [len(e.tokens) for e in examples],
    'supervised_lengths': [np.count_nonzero(e.supervised) for e in examples],
    'places': [[file, line] for _, file, line in kept],
    'boundaries': [e.boundary for e in examples],
    'labels': np.concatenate(labels) if labels else [],
    'values': [e.value for e in examples],
    'row_weights': [e.weight for e in examples],
    'difficulties': [e.difficulty for e in examples],
  }
  digest = []
  for e in examples:
    digest.append(np.int64(len(e.tokens)).tobytes())
    digest.append(e.tokens.astype('<i4', copy=False).tobytes())
    digest.append(np.packbits(e.supervised).tobytes())
    if policy.shape != 'text':
      digest.append(np.array([e.boundary, e.value], '<f8').tobytes())
    if e.labels is not None:
      digest.append(e.labels.astype('<i4', copy=False).tobytes())
    if e.weight != 1 or e.difficulty == e.difficulty:
      digest.append(np.array([e.weight, e.difficulty], '<f8').tobytes())
  joined['digest'] = np.frombuffer(b''.join(digest), np.uint8)
  return {part: np.ascontiguousarray(joined[part], dtype) for part, dtype in PARTS.items()}


@dataclasses.dataclass
class TokenBlock:
  """A tokenized block.

  Attributes:
    first, last: as of its Block.
    counts: of its rows; unusable rows count as left out, for each data.on_bad_row.
    refused: `Reasons.as_list` of rows that a policy makes an error, for each data.on_bad_row.
    arrays: see PARTS.
  """

  first: tuple[int, int]
  last: tuple[int, int]
  counts: Counts
  refused: list[dict[str, Any]]
  arrays: dict[str, np.ndarray]

  def write(self, path: Path) -> None:
    """Writes the block's file atomically.

    Raises:
      OSError: for example FileNotFoundError, where another process has finished the corpus and
        removed the folder.
    """
    content = b''.join(self.arrays[part].tobytes() for part in PARTS)
    head = {
      'first': self.first,
      'last': self.last,
      'counts': dataclasses.asdict(self.counts),
      'refused': self.refused,
      'bytes': {part: self.arrays[part].nbytes for part in PARTS},
      'crc32': zlib.crc32(content),
    }
    scratch = path.with_name(f'.{path.name}.{socket.gethostname()}.{os.getpid()}')
    try:
      with open(scratch, 'wb') as file:
        file.write(json.dumps(head).encode() + b'\n')
        file.write(content)
      os.replace(scratch, path)
    except BaseException:
      scratch.unlink(missing_ok=True)
      raise


def is_finished(path: Path, first: tuple[int, int], last: tuple[int, int], rows: int) -> bool:
  """Returns whether an earlier run or another process has written the file of this block: its first
  and last place, and its number of rows.
  """
  if not path.is_file():
    return False
  found = read(path)
  return found is not None and (found.first, found.last, found.counts.rows) == (first, last, rows)


def read(path: Path) -> TokenBlock | None:
  """Reads a block's file; None where it is missing or damaged, as by a power failure."""
  try:
    with open(path, 'rb') as file:
      head = json.loads(file.readline())
      content = file.read()
    if zlib.crc32(content) != head['crc32']:
      return None
    arrays, start = {}, 0
    for part, dtype in PARTS.items():
      end = start + head['bytes'][part]
      arrays[part] = np.frombuffer(content[start:end], dtype)
      start = end
    counts = Counts(**head['counts'])
    return TokenBlock(tuple(head['first']), tuple(head['last']), counts, head['refused'], arrays)
  except (OSError, ValueError, KeyError, TypeError):
    return None
