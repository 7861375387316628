"""Measures completions by themselves: how long, how repetitive, how different from each other.

Words are runs without white space. All columns come from the completions, so no task has to prepare
them; rows with choices have none to measure.
"""

import collections
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ftjax.evaluation.metric import Columns, Metric, of_sums, ratio
from ftjax.evaluation.result import Result

_CHUNK = 1 << 24  # numbers held at once


def ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
  """Returns the runs of n words of a text."""
  words = text.split()
  return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def repeated_counts(text: str, n: int) -> tuple[int, int]:
  """Returns (n-grams that occurred before in this text, all n-grams)."""
  counts = collections.Counter(ngrams(text, n))
  return counts.total() - len(counts), counts.total()


def _ngram_columns(n: int) -> Columns:
  """Returns the columns: the number of each n-gram of a completion, -1 where there are no more."""

  def columns(results: Sequence[Result], classes: Sequence[str]) -> np.ndarray:
    number: dict[tuple[str, ...], int] = {}
    rows = [[number.setdefault(g, len(number)) for g in ngrams(r.response, n)] for r in results]
    out = np.full((len(rows), max(map(len, rows), default=0)), -1.0)
    for row, found in zip(out, rows, strict=True):
      row[: len(found)] = found
    return out

  return columns


def _distinct_share(weights: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """Returns the share of different n-grams among all: float64[R, n], [n, L] -> [R]."""
  from scipy.sparse import csr_array

  rows, places = np.nonzero(columns >= 0)
  numbers = columns[rows, places].astype(np.int64)
  if not len(rows):
    return np.full(len(weights), np.nan)
  shape = len(columns), int(numbers.max()) + 1
  # Where a row has an n-gram twice the entries are summed; only whether it is above 0 counts.
  has = csr_array((np.ones(len(rows)), (rows, numbers)), shape=shape).T.tocsr()
  step = max(1, _CHUNK // shape[1])
  distinct = [
    (has @ (weights[i : i + step] > 0).T.astype(np.float64) > 0).sum(0)
    for i in range(0, len(weights), step)
  ]
  return ratio(np.concatenate(distinct), weights @ (columns >= 0).sum(1))


def distinct(n: int) -> Metric:
  """Returns distinct-n: different n-grams of all completions / all their n-grams.

  It falls with the number of completions. A resample that repeats rows has fewer different n-grams
  than the rows themselves, so a bootstrap interval lies below the figure: show it without one.

  Source: Li et al. 2016, arXiv:1510.03055.
  """
  return Metric(
    f'distinct_{n}', f'distinct-{n}', _ngram_columns(n), _distinct_share, '', is_resampled=False
  )


def _mean_of(measure: Callable[[Result], float]) -> Columns:
  def columns(results: Sequence[Result], classes: Sequence[str]) -> np.ndarray:
    found = np.array([float(measure(r)) for r in results], np.float64)
    return np.stack([found, np.ones_like(found)], axis=1)

  return columns


_RATIO = of_sums(lambda sums: ratio(sums[:, 0], sums[:, 1]))


def self_repetition(n: int) -> Metric:
  """Returns the share of n-grams that occurred before in the same completion.

  Source: seq-rep-n of Welleck et al. 2019, arXiv:1908.04319, over all n-grams at once.
  """

  def columns(results: Sequence[Result], classes: Sequence[str]) -> np.ndarray:
    found = [repeated_counts(r.response, n) for r in results]
    return np.array(found, np.float64).reshape(len(results), 2)

  return Metric(f'repetition_{n}', f'self-repetition, {n} words', columns, _RATIO, 'lower')


def _length(name: str, title: str, measure: Callable[[Result], float]) -> Metric:
  return Metric(name, title, _mean_of(measure), _RATIO, '', form='number')


DISTINCT_1, DISTINCT_2 = distinct(1), distinct(2)
REPETITION = self_repetition(4)
CHARACTERS = _length('characters', 'length in characters', lambda r: len(r.response))
WORDS = _length('words', 'length in words', lambda r: len(r.response.split()))
TOKENS = _length('tokens', 'length in tokens', lambda r: r.tokens)
TRUNCATED = Metric(
  'truncated', 'truncated', _mean_of(lambda r: r.is_cut), _RATIO, 'lower', is_proportion=True
)
METRICS = (DISTINCT_1, DISTINCT_2, REPETITION, CHARACTERS, WORDS, TOKENS, TRUNCATED)
