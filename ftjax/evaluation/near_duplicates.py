"""Near-duplicates: texts that share most of their runs of five words.

The similarity of two texts is Jaccard's index of their sets of shingles, n-grams of SHINGLE words:
common ones over all of both. Between evaluation and training texts (`Join`) it is computed exactly:
the shingles of the evaluation sets are few, and training texts are streamed past them. Within the
training texts, where every pair counts, candidates are found by MinHash (Broder 1997) and verified.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ftjax.evaluation import ngrams, templates
from ftjax.runtime.errors import ConfigError

SHINGLE = 5
THRESHOLD = 0.8
FEWEST_WORDS = 8  # shorter texts have too few shingles
# 20 bands of 5 rows: a pair of similarity 0.8 becomes a candidate with probability 0.9996, and one
# of 0.5 with 0.47, which the exact comparison removes again.
_BANDS, _ROWS = 20, 5
_SEED = 1


class Near(NamedTuple):
  """The most similar training text: the similarity, and the number of the text."""

  similarity: float
  serial: int


class Join:
  """Evaluation texts that wait for similar training texts."""

  def __init__(self, sets: Sequence[templates.Texts], vocabulary: Mapping[str, int]):
    """Stores the shingles of the texts of several sets, without their templates."""
    self._sets, self._vocabulary = sets, vocabulary
    self.best: list[dict[int, Near]] = [{} for _ in sets]  # of each set: row -> its nearest
    # Equal texts of a set are one: its set, and the rows that have it.
    self._texts: list[tuple[int, list[int]]] = []
    sizes, grams, owners = [], [], []
    for number, texts in enumerate(sets):
      rows: dict[bytes, list[int]] = {}
      for text, shingles in _shingles(texts, texts.text):
        if len(shingles) > FEWEST_WORDS - SHINGLE:
          rows.setdefault(shingles.tobytes(), []).append(int(texts.row[text]))
      for data, having in rows.items():
        grams.append(np.frombuffer(data, np.uint64))
        owners.append(np.full(len(grams[-1]), len(self._texts)))
        self._texts.append((number, having))
        sizes.append(len(grams[-1]))
    grams = np.concatenate([np.zeros(0, np.uint64), *grams])
    owners = np.concatenate([np.zeros(0, np.int64), *owners])
    self.table = ngrams.Table(grams)
    order = np.argsort(grams, kind='stable')
    self._owners = owners[order]
    self._offsets = np.append(np.searchsorted(grams[order], self.table.values), len(grams))
    self._sizes = np.array(sizes, np.int64)
    self._fewest = math.ceil(THRESHOLD * min(sizes, default=1))

  def candidates(self, text: np.ndarray, gram: np.ndarray) -> list[tuple[int, list[int]]]:
    """Returns the training texts that share enough shingles with one evaluation text.

    Args:
      text, gram: int64[m] each: a training text, and a shingle of `table` that it has.

    Returns:
      of each such training text (its number, the evaluation texts).
    """
    pairs = ngrams.distinct(text * len(self.table) + gram)
    text, gram = np.divmod(pairs, max(len(self.table), 1))
    found, starts, counts = ngrams.counts(text)
    is_enough = counts >= self._fewest
    out = []
    for number, start, count in zip(*(x[is_enough] for x in (found, starts, counts)), strict=True):
      shingles = gram[start : start + count]
      near = np.flatnonzero(self._common(shingles) >= THRESHOLD * self._sizes)
      if len(near):
        out.append((int(number), near.tolist()))
    return out

  def _common(self, shingles: np.ndarray) -> np.ndarray:
    """Returns how many of these shingles, numbers in `table`, each evaluation text has."""
    owners = [self._owners[self._offsets[g] : self._offsets[g + 1]] for g in shingles]
    return np.bincount(np.concatenate(owners), minlength=len(self._texts))

  def compare(self, words: Sequence[str], serial: int, texts: Sequence[int]) -> None:
    """Compares a training text with evaluation texts that `candidates` gave, and keeps the most
    similar one of each row.
    """
    texts = [t for t in texts if not self._is_equal(t)]  # nothing is more similar
    for number in {self._texts[t][0] for t in texts}:
      ids = templates.without(words, self._vocabulary, self._sets[number].template)
      shingles = ngrams.distinct(ngrams.of_numbers(ids, SHINGLE)[1])
      _, index = self.table.find(shingles)
      if not len(index):
        continue
      common, best = self._common(index), self.best[number]
      similarity = (common / (self._sizes + len(shingles) - common)).tolist()
      for t in texts:
        if self._texts[t][0] != number or similarity[t] < THRESHOLD:
          continue
        for row in self._texts[t][1]:
          if similarity[t] > best.get(row, Near(0.0, 0)).similarity:
            best[row] = Near(similarity[t], serial)

  def _is_equal(self, text: int) -> bool:
    """Returns whether an equal training text was found for all rows of an evaluation text."""
    number, rows = self._texts[text]
    return all(self.best[number].get(row, Near(0.0, 0)).similarity == 1 for row in rows)


def _shingles(texts: templates.Texts, owner: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (owner, its different shingles uint64[m], sorted); `owner` int64[n]: of each word."""
  starts, grams = ngrams.of_numbers(texts.content, SHINGLE)
  found, begins, counts = ngrams.counts(owner[starts])
  for number, begin, count in zip(found.tolist(), begins, counts, strict=True):
    yield number, ngrams.distinct(grams[begin : begin + count])


def need_datasketch(what: str) -> None:
  """Raises ConfigError with the extra to install if datasketch is missing."""
  if importlib.util.find_spec('datasketch') is None:
    raise ConfigError(
      f"{what} needs the package datasketch; pip install '.[eval]' in the checkout of ftjax"
    )


def count(rows: Sequence[Sequence[Sequence[str]]]) -> int:
  """Returns how many rows have a near-duplicate among the others; see `pairs`.

  Raises:
    ConfigError: datasketch is missing.
  """
  need_datasketch('the count of near-duplicates among training rows')
  return len({i for later, earlier, _ in pairs(rows) for i in (later, earlier)})


def pairs(rows: Sequence[Sequence[Sequence[str]]]) -> Iterator[tuple[int, int, float]]:
  """Yields (row, an earlier row, their similarity) of near-duplicates; MinHash, verified.

  Each row with a near-duplicate is in at least one pair, and each but the first of those that are
  alike is in one with an earlier row.

  Args:
    rows: of each row its texts, of each text its words. Template words do not count, and rows with
      fewer than FEWEST_WORDS others in a run are left out.
  """
  import datasketch

  vocabulary: dict[str, int] = {}
  texts = templates.read([[ngrams.added(vocabulary, text) for text in row] for row in rows])
  sketch = datasketch.MinHash(_BANDS * _ROWS, seed=_SEED, hashfunc=int)
  index = datasketch.MinHashLSH(num_perm=_BANDS * _ROWS, params=(_BANDS, _ROWS))
  kept: list[np.ndarray] = []  # different sets of shingles
  equal: dict[bytes, list[int]] = {}
  for i, shingles in _shingles(texts, texts.row[texts.text]):
    if len(shingles) > FEWEST_WORDS - SHINGLE:
      equal.setdefault(shingles.tobytes(), []).append(i)
  near: set[int] = set()
  first = [same[0] for same in equal.values()]
  for i, (data, same) in enumerate(equal.items()):
    shingles = np.frombuffer(data, np.uint64)
    own = sketch.copy()
    own.update_batch((shingles >> np.uint64(32)).tolist())
    for row in same[1:]:
      yield row, same[0], 1.0
    for other in index.query(own):
      if not {i, other} <= near:
        similarity = _jaccard(shingles, kept[other])
        if similarity >= THRESHOLD:
          near |= {i, other}
          yield first[i], first[other], similarity
    index.insert(i, own, check_duplication=False)
    kept.append(shingles)


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
  """Returns the similarity of two sets of shingles, uint64[m] sorted."""
  common = len(np.intersect1d(first, second, assume_unique=True))
  return common / (len(first) + len(second) - common)
