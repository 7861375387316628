"""What the rows of a set share: instructions and examples that stand in front of every question.

Words of a template are no evidence that a row was trained on: training rows of the same task have
them too. A run of RUN words, the ends of a text counting as words, that more than SHARE of the
set's different rows have (and at least three rows) is template.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ftjax.evaluation import ngrams

RUN = 5
SHARE = 0.25
_FEWEST = 2  # what no more rows share is never template
_START, _END = 0, 1  # numbers of the ends of a text; words are numbered from 2


@dataclasses.dataclass(frozen=True)
class Texts:
  """The words of several texts, one after the other, and the template among them.

  Attributes:
    content: int64[n], numbers of the words; negative between texts and for words of the template.
    text: int64[n], the text of each word.
    row: int64[texts], the row of each text.
    rows: number of rows.
    words: number of words, template included.
    template: the n-grams of RUN words that are template.
  """

  content: np.ndarray
  text: np.ndarray
  row: np.ndarray
  rows: int
  words: int
  template: ngrams.Table


def is_shared(count: np.ndarray | int, rows: int) -> np.ndarray | bool:
  """Returns whether what `count` of `rows` different rows have is template: int64[n] or one."""
  return count > max(SHARE * rows, _FEWEST)


def _padded(ids: np.ndarray) -> np.ndarray:
  """Returns numbers of words with RUN - 1 marks of its ends on each side, and a separator."""
  ends = RUN - 1
  return np.concatenate([[_START] * ends, np.where(ids < 0, ids, ids + 2), [_END] * ends, [-1]])


def read(rows: Sequence[Sequence[np.ndarray]]) -> Texts:
  """Returns the texts of rows, with their template found.

  Args:
    rows: of each row its texts, of each text the numbers of its words, int64[n].
  """
  parts = [_padded(text) for row in rows for text in row]
  owner = np.array([i for i, row in enumerate(rows) for _ in row], np.int64)
  padded = np.concatenate([np.zeros(0, np.int64), *parts])
  text = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
  starts, grams = ngrams.of_numbers(padded, RUN)
  template = ngrams.Table(_shared(rows, grams, owner[text[starts]]))
  is_template = _is_template(padded, template)
  content = np.where(is_template | (padded < 2), -1, padded - 2)
  words = int(np.count_nonzero(padded >= 2))
  return Texts(content, text, owner, len(rows), words, template)


def _shared(rows: Sequence[Sequence[np.ndarray]], grams: np.ndarray, row: np.ndarray) -> np.ndarray:
  """Returns the n-grams that too many different rows have; grams uint64[m] of rows int64[m]."""
  first: dict[tuple, int] = {}
  for i, texts in enumerate(rows):
    first.setdefault(tuple(t.tobytes() for t in texts), i)
  is_first = np.zeros(len(rows), bool)
  is_first[list(first.values())] = True
  kept = is_first[row]
  grams, row = grams[kept], row[kept]
  order = np.lexsort((row, grams))
  grams, row = grams[order], row[order]
  is_new = np.ones(len(grams), bool)  # each row counts once
  is_new[1:] = (grams[1:] != grams[:-1]) | (row[1:] != row[:-1])
  found, _, often = ngrams.counts(grams[is_new])
  return found[is_shared(often, len(first))]


def _is_template(padded: np.ndarray, template: ngrams.Table) -> np.ndarray:
  starts, grams = ngrams.of_numbers(padded, RUN)
  places, _ = template.find(grams)
  return ngrams.covered(len(padded), starts[places], RUN)


def without(
  words: Sequence[str], vocabulary: Mapping[str, int], template: ngrams.Table
) -> np.ndarray:
  """Returns the numbers of a text's words, int64[n]; negative for words of a set's template. Words
  that are not in the vocabulary get numbers of their own.
  """
  own = {w: i for i, w in enumerate(dict.fromkeys(w for w in words if w not in vocabulary))}
  ids = [vocabulary[w] if w in vocabulary else len(vocabulary) + own[w] for w in words]
  padded = _padded(np.array(ids, np.int64))
  content = np.where(_is_template(padded, template), -1, padded - 2)
  return content[RUN - 1 : -RUN]
