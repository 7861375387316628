"""Packs lengths into rows: best-fit decreasing on the histogram of lengths.

Ten million examples have a few thousand lengths, so rows are counted, not listed: a group is
(number of rows, the lengths in each). `order.py` assigns the examples.
"""

import bisect
from collections.abc import Sequence

import numpy as np

Group = tuple[int, tuple[int, ...]]


class _OpenRows:
  """Groups of rows with free tokens, found by the smallest sufficient number of them."""

  def __init__(self):
    self._rooms: list[int] = []  # sorted, each once
    self._groups: dict[int, list[Group]] = {}

  def add(self, room: int, group: Group) -> None:
    if room not in self._groups:
      bisect.insort(self._rooms, room)
      self._groups[room] = []
    self._groups[room].append(group)

  def pop_tightest(self, length: int) -> tuple[int, Group] | None:
    """Removes and returns a group with the least room >= length."""
    i = bisect.bisect_left(self._rooms, length)
    if i == len(self._rooms):
      return None
    room = self._rooms[i]
    group = self._groups[room].pop()
    if not self._groups[room]:
      del self._groups[room]
      del self._rooms[i]
    return room, group

  def all(self) -> list[Group]:
    return [g for room in self._rooms for g in self._groups[room]]


def pack_lengths(
  counts: Sequence[int] | np.ndarray, seq_len: int, most: int | None = None
) -> list[Group]:
  """Packs all examples into rows of `seq_len` tokens.

  Args:
    counts: int[T+1], how many examples have each length; counts[0] must be 0.
    seq_len: T, tokens of a row.
    most: examples that a row may hold; None: as many as find room.

  Returns:
    (rows, lengths in each of them, descending) groups; the same for the same counts.

  Raises:
    ValueError: an example of no token or of more than `seq_len`.
  """
  counts = np.asarray(counts)
  if counts[0] or counts[seq_len + 1 :].any():
    raise ValueError(f'pack_lengths: got lengths of 0 or above seq_len={seq_len}')
  closed: list[Group] = []
  open_rows = _OpenRows()
  for length in range(min(seq_len, len(counts) - 1), 0, -1):
    left = int(counts[length])
    while left:
      room, (rows, held) = open_rows.pop_tightest(length) or (seq_len, (left, ()))
      # Best fit puts a second example of this length after the first, while there is room.
      copies = min(room // length, left)
      if most is not None:
        copies = min(copies, most - len(held))
      used = min(rows, left // copies)
      if held and used < rows:
        open_rows.add(room, (rows - used, held))
      left -= used * copies
      room, group = room - copies * length, (used, held + (length,) * copies)
      if room and len(group[1]) != most:
        open_rows.add(room, group)
      else:
        closed.append(group)
  return closed + open_rows.all()


def one_per_row(counts: Sequence[int] | np.ndarray) -> list[Group]:
  """Returns the groups without packing: every row has one example."""
  return [(int(c), (length,)) for length, c in enumerate(counts) if c]
