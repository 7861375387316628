"""Compares two versions of a data set: the rows that came, went and changed, and whether lengths,
labels and vocabulary drifted, each with a statistic and its p-value.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ftjax.audit import labels as labels_lib
from ftjax.audit import rows as rows_lib
from ftjax.audit.rows import Row
from ftjax.evaluation import ngrams

_VOCABULARY = 1000  # most frequent words that are compared
_PERMUTATIONS = 499
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Test:
  """A comparison of two samples: its name, the statistic's name and value, and the p-value.

  old, new: what was compared, in words.
  """

  name: str
  statistic: str
  value: float
  p: float
  old: str
  new: str


@dataclasses.dataclass(frozen=True)
class Drift:
  """What changed from an old version to a new one.

  Attributes:
    old, new: numbers of rows.
    same: rows of both. came, went: new rows and old rows with an input that only this version has.
    changed: (old row, new row) with equal inputs and different answers.
    tests: of lengths, labels and vocabulary.
  """

  old: int
  new: int
  same: int
  came: tuple[Row, ...]
  went: tuple[Row, ...]
  changed: tuple[tuple[Row, Row], ...]
  tests: tuple[Test, ...]


def compare(old: Sequence[Row], new: Sequence[Row]) -> Drift:
  """Compares two versions. Rows that a version has several times are matched one by one."""
  left: dict[tuple[str, str], list[Row]] = {}
  for row in old:
    left.setdefault((rows_lib.input_key(row), rows_lib.answer_key(row)), []).append(row)
  rest, same = [], 0
  for row in new:
    waiting = left.get((rows_lib.input_key(row), rows_lib.answer_key(row)))
    if waiting:
      waiting.pop()
      same += 1
    else:
      rest.append(row)
  by_input: dict[str, list[Row]] = {}
  for (key, _), waiting in left.items():
    by_input.setdefault(key, []).extend(waiting)
  came, changed = [], []
  for row in rest:
    # A document is its own input: another text is another row.
    waiting = by_input.get(rows_lib.input_key(row)) if row.prompt else None
    if waiting:
      changed.append((waiting.pop(0), row))
    else:
      came.append(row)
  went = [row for waiting in by_input.values() for row in waiting]
  tests = (*_lengths(old, new), *_labels(old, new), *_words(old, new))
  return Drift(len(old), len(new), same, tuple(came), tuple(went), tuple(changed), tests)


def _lengths(old: Sequence[Row], new: Sequence[Row]) -> list[Test]:
  """Compares lengths in characters by the two-sample test of Kolmogorov and Smirnov, with its
  p-value for large samples.
  """
  import scipy.stats

  out = []
  for name in ('question', 'answer'):
    first, second = (
      [n for row in rows if (n := len(row.question if name == 'question' else row.answer))]
      for rows in (old, new)
    )
    if first and second:
      found = scipy.stats.ks_2samp(first, second, method='asymp')
      medians = [f'median {np.median(x):,.0f} characters' for x in (first, second)]
      out.append(
        Test(f'length of the {name}', 'D', float(found.statistic), float(found.pvalue), *medians)
      )
  return out


def _labels(old: Sequence[Row], new: Sequence[Row]) -> list[Test]:
  """Compares the counts of labels by Pearson's chi-squared test."""
  import scipy.stats

  found = [labels_lib.of_rows(rows) for rows in (old, new)]
  if found[0] is None or found[1] is None:
    return []
  counts = [Counter(x) for x in found]
  names = sorted(counts[0] | counts[1])
  if len(names) < 2:
    return []
  table = np.array([[c[name] for name in names] for c in counts])
  result = scipy.stats.chi2_contingency(table, correction=False)
  texts = [', '.join(f'{name} {c[name] / c.total():.1%}' for name in names[:4]) for c in counts]
  return [Test('labels', 'chi2', float(result.statistic), float(result.pvalue), *texts)]


def _words(old: Sequence[Row], new: Sequence[Row]) -> list[Test]:
  """Compares the frequent words: Jensen-Shannon divergence in bits; its p-value is the share of
  random divisions of all rows into two sets of these sizes with one as large. Rows of both versions
  are in both.
  """
  rows = [*old, *new]
  bags = [Counter(w for text in row.texts for w in ngrams.words(text)) for row in rows]
  total = Counter()
  for bag in bags:
    total.update(bag)
  names = [word for word, _ in total.most_common(_VOCABULARY)]
  if not names:
    return []
  counts = _matrix(bags, names)
  whole = np.asarray(counts.sum(0)).ravel()
  first = np.zeros(len(rows))
  first[: len(old)] = 1.0
  value = _divergence(first @ counts, whole)
  random, larger = np.random.default_rng(_SEED), 1
  for _ in range(_PERMUTATIONS):
    larger += _divergence(random.permutation(first) @ counts, whole) >= value - 1e-12
  share = [np.asarray(x) / max(x.sum(), 1) for x in (first @ counts, whole - first @ counts)]
  gained = names[int(np.argmax(share[1] - share[0]))]
  lost = names[int(np.argmin(share[1] - share[0]))]
  p = larger / (_PERMUTATIONS + 1)
  texts = (f'most lost word {lost!r}', f'most gained word {gained!r}')
  return [Test('vocabulary', 'JS bits', value, p, *texts)]


def _matrix(bags, names):
  """Returns the counts of words as a sparse matrix [rows, words]."""
  import scipy.sparse

  at = {name: k for k, name in enumerate(names)}
  entries = [(i, at[w], n) for i, bag in enumerate(bags) for w, n in bag.items() if w in at]
  i, k, n = (np.array(x) for x in zip(*entries, strict=True))
  return scipy.sparse.csr_matrix((n.astype(float), (i, k)), shape=(len(bags), len(names)))


def _divergence(first: np.ndarray, whole: np.ndarray) -> float:
  """Returns the Jensen-Shannon divergence in bits of two sets of counts: first, whole - first."""
  second = whole - first
  if not first.sum() or not second.sum():
    return 0.0
  p, q = first / first.sum(), second / second.sum()
  middle = (p + q) / 2

  def to_middle(x):
    own = x > 0
    return float((x[own] * np.log2(x[own] / middle[own])).sum())

  return (to_middle(p) + to_middle(q)) / 2


def row_hash(row: Row) -> str:
  """Returns 16 hex digits of a row's input and answer, for files."""
  content = '\0'.join([rows_lib.input_key(row), rows_lib.answer_key(row)])
  return hashlib.sha256(content.encode(errors='surrogatepass')).hexdigest()[:16]
