"""Words of texts, and runs of n of them as 64-bit numbers: what the comparison of texts is made of.

contamination.py, near_duplicates.py and verbatim.py use it. A run of n words is called an n-gram;
equal runs have equal numbers, and different ones equal numbers with a chance of 2^-64.
"""

import bisect
import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

# Scripts without spaces between words: each character is a word.
_UNSPACED = (
  (0x0E00, 0x0EFF),  # Thai, Lao
  (0x1000, 0x109F),  # Burmese
  (0x1780, 0x17FF),  # Khmer
  (0x2E80, 0x2FDF),  # radicals
  (0x3005, 0x3007),  # iteration mark, closing mark, zero
  (0x3040, 0x30FF),  # kana
  (0x31F0, 0x31FF),
  (0x3400, 0x4DBF),  # Han
  (0x4E00, 0x9FFF),
  (0xF900, 0xFAFF),
  (0x20000, 0x3FFFF),
)
_STARTS = [first for first, _ in _UNSPACED]
UNKNOWN = -1
_MOST_BITS = 26  # of a table that finds most unknown n-grams in one look


class _Characters(dict):
  """What `str.translate` makes of each character, found when it first occurs."""

  def __missing__(self, code: int) -> str:
    kind = unicodedata.category(chr(code))
    at = bisect.bisect_right(_STARTS, code) - 1
    if kind == 'Cf':  # such as soft hyphens and joiners, which are inside words
      made = ''
    elif kind[0] not in 'LMN':
      made = ' '
    elif at >= 0 and code <= _UNSPACED[at][1] and kind[0] != 'M':
      made = f' {chr(code)}'
    else:
      made = chr(code)
    self[code] = made
    return made


_CHARACTERS = _Characters()


def words(text: str) -> list[str]:
  """Returns the words of a text: NFKC, case folded, letters and digits only.

  Everything else separates words. Scripts without spaces have a word a character.
  """
  if not text.isascii():
    text = unicodedata.normalize('NFKC', text)
  return text.casefold().translate(_CHARACTERS).split()


def whole(text: str) -> str:
  """Returns a text as whole texts are compared: NFKC, case folded, single spaces, punctuation kept.

  So '7 + 5' and '7 - 5' differ.
  """
  return ' '.join(unicodedata.normalize('NFKC', text).casefold().split())


def added(vocabulary: dict[str, int], found: Iterable[str]) -> np.ndarray:
  """Returns the numbers of words, int64[n], after adding new ones to the vocabulary; they are
  numbered from 0 in the order of their first occurrence.
  """
  return np.array([vocabulary.setdefault(word, len(vocabulary)) for word in found], np.int64)


def numbers(vocabulary: Mapping[str, int], found: Sequence[str]) -> np.ndarray:
  """Returns the numbers of words, int64[n]; UNKNOWN for those that are not in the vocabulary."""
  return np.array(list(map(vocabulary.get, found, itertools.repeat(UNKNOWN))), np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
  """Returns uint64 values with all bits mixed (the finalizer of splitmix64, Steele et al. 2014)."""
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


def of_numbers(ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the n-grams of a sequence that have no negative number in them.

  Args:
    ids: int64[n], numbers of words; negative ones belong to no n-gram.
    size: words of an n-gram.

  Returns:
    (starts int64[m], ascending; n-grams uint64[m]).
  """
  if len(ids) < size:
    return np.zeros(0, np.int64), np.zeros(0, np.uint64)
  before = np.concatenate([[0], np.cumsum(ids < 0)])
  starts = np.flatnonzero(before[size:] == before[:-size])
  if not len(starts):
    return starts, np.zeros(0, np.uint64)
  values = _mixed(ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
  out = np.zeros(len(ids) - size + 1, np.uint64)
  for i in range(size):
    out = out * np.uint64(0xD1342543DE82EF95) + values[i : len(out) + i]
  return starts, _mixed(out[starts])


def distinct(values: np.ndarray) -> np.ndarray:
  """Returns the different values of an array [n], sorted; np.unique hashes, which is slower."""
  values = np.sort(values)
  return values[_is_first(values)]


def _is_first(values: np.ndarray) -> np.ndarray:
  out = np.ones(len(values), bool)
  out[1:] = values[1:] != values[:-1]
  return out


def counts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the different values of a sorted array [n]: (values; where each begins, int64; how
  often each occurs, int64).
  """
  starts = np.flatnonzero(_is_first(values))
  return values[starts], starts, np.diff(np.append(starts, len(values)))


def covered(length: int, starts: np.ndarray, size: int) -> np.ndarray:
  """Returns which of `length` words lie in a run of `size` words from one of `starts`, bool[n]."""
  steps = np.zeros(length + 1, np.int64)
  np.add.at(steps, starts, 1)
  np.add.at(steps, np.minimum(starts + size, length), -1)
  return np.cumsum(steps[:-1]) > 0


class Table:
  """A set of n-grams, numbered in ascending order.

  Attributes:
    values: uint64[n], sorted.
  """

  def __init__(self, values: np.ndarray):
    """Stores n-grams uint64[m]; equal ones count once."""
    self.values = distinct(values)
    bits = min(len(self.values).bit_length() + 3, _MOST_BITS)
    self._shift = np.uint64(64 - bits)
    self._seen = np.zeros(1 << bits, bool)
    self._seen[self._slot(self.values)] = True

  def __len__(self) -> int:
    return len(self.values)

  def _slot(self, values: np.ndarray) -> np.ndarray:
    return (values >> self._shift).astype(np.int64)

  def find(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which of the n-grams uint64[m] are in the set: (their places in `values`, ascending;
    their numbers), int64[k] each.
    """
    if not len(self.values):
      return np.zeros(0, np.int64), np.zeros(0, np.int64)
    places = np.flatnonzero(self._seen[self._slot(values)])
    asked = values[places]
    order = np.argsort(asked)  # sorted ones are found several times faster
    index = np.zeros(len(asked), np.int64)
    index[order] = np.searchsorted(self.values, asked[order])
    index = np.minimum(index, len(self.values) - 1)
    is_known = self.values[index] == asked
    return places[is_known], index[is_known]
