"""Contamination: evaluation rows whose text is in the training data too.

A row is contaminated if a run of NGRAM words of its prompt or its right answer is in a training
text (Brown et al. 2020, appendix C, and lm-eval's decontamination), or if at least OVERLAP of its
words lie in runs of SHORT words that are (the rule of Tulu 3, Lambert et al. 2024, and the share
that Llama 3 reports), or if its whole question is a training text, which is all that can be
compared where a row has no run of SHORT words. Words of a template that many rows of the set have
do not count, see templates.py.

The n-grams of the evaluation sets are kept in memory, and the training texts are streamed past
them. near_duplicates.py adds rows that are similar to a training text as a whole.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ftjax.evaluation import near_duplicates, ngrams, templates

NGRAM = 13
SHORT = 8
OVERLAP = 0.5
_CHUNK_WORDS = 250_000


@dataclasses.dataclass(frozen=True)
class Item:
  """An evaluation row as texts.

  Attributes:
    id: the row's.
    prompt: its messages, or the plain text, the question last.
    answers: the right answers.
  """

  id: str
  prompt: tuple[str, ...]
  answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finding:
  """What of one evaluation row is in the training data.

  Attributes:
    id: the row's.
    is_contaminated: by the rules above.
    share: of its words outside templates, those that lie in runs of SHORT words of training texts;
      of a row that is compared as a whole, 1 or 0.
    place: file and line of the first training row with text of it; '' without one.
    similarity: to the most similar training text, where it is at least near_duplicates.THRESHOLD;
      else 0.
    near: the place of that text, or ''.
    is_whole: the row has no run of SHORT words: only its whole question was compared.
  """

  id: str
  is_contaminated: bool
  share: float
  place: str = ''
  similarity: float = 0.0
  near: str = ''
  is_whole: bool = False

  @property
  def is_clean(self) -> bool:
    """Returns whether the row is neither contaminated nor a near-duplicate."""
    return not self.is_contaminated and not self.similarity


@dataclasses.dataclass(frozen=True)
class Report:
  """The findings of an evaluation set.

  Attributes:
    findings: of its rows, in order.
    against: names of the training sources.
    template_share: of its words, those that were set aside as template.
  """

  findings: tuple[Finding, ...]
  against: tuple[str, ...]
  template_share: float

  @property
  def contaminated(self) -> int:
    """Returns the number of contaminated rows."""
    return sum(f.is_contaminated for f in self.findings)

  @property
  def near_duplicates(self) -> int:
    """Returns the number of further rows, not contaminated ones, that are near-duplicates."""
    return sum(not f.is_contaminated and not f.is_clean for f in self.findings)

  @property
  def whole(self) -> int:
    """Returns the number of rows of which only the whole question was compared."""
    return sum(f.is_whole for f in self.findings)

  def clean_ids(self) -> frozenset[str]:
    """Returns the ids of the rows that are neither contaminated nor near-duplicates."""
    return frozenset(f.id for f in self.findings if f.is_clean)


class Check:
  """Evaluation sets, and what was found of them in the training texts so far."""

  def __init__(self, sets: Mapping[str, Sequence[Item]]):
    """Reads the evaluation sets: {name: rows}."""
    self._items = dict(sets)
    self._vocabulary: dict[str, int] = {}
    self._texts = [templates.read([self._read(i) for i in items]) for items in sets.values()]
    self._tables = {size: self._table(size) for size in (NGRAM, SHORT)}
    # The number of the first training text with each n-gram; -1: none.
    self._first = {s: np.full(len(t), -1, np.int64) for s, t in self._tables.items()}
    self._join = near_duplicates.Join(self._texts, self._vocabulary) if sets else None
    self._comparable = [_words_of_rows(t, _grams(t, SHORT)[0], SHORT) for t in self._texts]
    self._questions = self._whole_questions()
    self._longest = max(map(len, self._questions), default=0)
    self._found: dict[str, int] = {}  # whole question -> number of the first text that is it
    self._places: dict[int, str] = {}  # of the training texts that matter
    self._serial = 0  # training texts so far, those of the chunk included
    self._words: list[str] = []  # of the chunk, '' after each text
    self._chunk: list[tuple[int, str]] = []  # (start in _words, place) of each text

  def _read(self, item: Item) -> list[np.ndarray]:
    texts = (*item.prompt, *item.answers)
    return [ngrams.added(self._vocabulary, ngrams.words(text)) for text in texts]

  def _table(self, size: int) -> ngrams.Table:
    found = [ngrams.of_numbers(t.content, size)[1] for t in self._texts]
    return ngrams.Table(np.concatenate([np.zeros(0, np.uint64), *found]))

  def _whole_questions(self) -> dict[str, list[tuple[int, int]]]:
    """Returns {question: its (set, row)s} of the rows without a run of SHORT words; without
    questions that many different rows of a set have, as where the content is in other messages.
    """
    out: dict[str, list[tuple[int, int]]] = {}
    for number, items in enumerate(self._items.values()):
      different: dict[str, set[Item]] = {}
      for i, item in enumerate(items):
        question = ngrams.whole(item.prompt[-1]) if item.prompt else ''
        if question and not self._comparable[number][i]:
          different.setdefault(question, set()).add(dataclasses.replace(item, id=''))
          out.setdefault(question, []).append((number, i))
      rows = len({dataclasses.replace(item, id='') for item in items})
      for question, same in different.items():
        if templates.is_shared(len(same), rows):
          out[question] = [at for at in out[question] if at[0] != number]
    return {question: at for question, at in out.items() if at}

  def add(self, place: str, texts: Iterable[str]) -> None:
    """Compares the texts of a training row.

    Args:
      place: file and line, for the findings.
      texts: its messages, or its plain texts.
    """
    for text in texts:
      self._chunk.append((len(self._words), place))
      self._words += ngrams.words(text)
      self._words.append('')
      # NFKC makes up to 18 characters of one.
      if len(text) <= 18 * self._longest and self._questions:
        question = ngrams.whole(text)
        if question in self._questions and question not in self._found:
          self._found[question] = self._serial
          self._places[self._serial] = place
      self._serial += 1
    if len(self._words) >= _CHUNK_WORDS:
      self._compare_chunk()

  def _compare_chunk(self) -> None:
    if not self._chunk:
      return
    ids = ngrams.numbers(self._vocabulary, self._words)
    starts = np.array([start for start, _ in self._chunk])
    before = self._serial - len(self._chunk)
    for size, table in self._tables.items():
      text, gram = _found_in(ids, size, table, starts)
      first = self._first[size]
      is_new = first[gram] < 0
      first[gram[is_new][::-1]] = before + text[is_new][::-1]  # the first one is written last
      for t in ngrams.distinct(text[is_new]).tolist():
        self._places[before + t] = self._chunk[t][1]
    if self._join is not None:
      self._compare_texts(*_found_in(ids, near_duplicates.SHINGLE, self._join.table, starts))
    self._words, self._chunk = [], []

  def _compare_texts(self, text: np.ndarray, gram: np.ndarray) -> None:
    """Looks for near-duplicates among the training texts of the chunk."""
    before = self._serial - len(self._chunk)
    for t, others in self._join.candidates(text, gram):
      start, place = self._chunk[t]
      self._places[before + t] = place
      end = self._words.index('', start)
      self._join.compare(self._words[start:end], before + t, others)

  def reports(self, against: Sequence[str]) -> dict[str, Report]:
    """Returns what was found in all training texts, by the name of the evaluation set.

    Args:
      against: names of the training sources.
    """
    self._compare_chunk()
    wholes: dict[tuple[int, int], int] = {}
    for question, serial in self._found.items():
      wholes |= dict.fromkeys(self._questions[question], serial)
    out = {}
    for number, (name, items) in enumerate(self._items.items()):
      texts = self._texts[number]
      out[name] = Report(
        tuple(self._findings(number, items, wholes)),
        tuple(against),
        _template_share(texts),
      )
    return out

  def _findings(
    self, number: int, items: Sequence[Item], wholes: Mapping[tuple[int, int], int]
  ) -> Iterable[Finding]:
    texts, comparable = self._texts[number], self._comparable[number]
    nearest = self._join.best[number] if self._join else {}
    never = np.iinfo(np.int64).max
    first, hits = np.full(texts.rows, never), {}
    for size, table in self._tables.items():
      starts, grams = _grams(texts, size)
      serials = self._first[size][table.find(grams)[1]]  # all are in the table
      hits[size] = starts[serials >= 0]
      np.minimum.at(first, texts.row[texts.text[hits[size]]], serials[serials >= 0])
    share = _words_of_rows(texts, hits[SHORT], SHORT) / np.maximum(comparable, 1)
    has_long = np.bincount(texts.row[texts.text[hits[NGRAM]]], minlength=texts.rows) > 0
    for i, item in enumerate(items):
      whole = wholes.get((number, i))
      serial = first[i] if whole is None else whole  # without a run, `first` has none
      near = nearest.get(i)
      yield Finding(
        item.id,
        bool(has_long[i] or share[i] >= OVERLAP or whole is not None),
        float(share[i]) if whole is None else 1.0,
        self._places[int(serial)] if serial < never else '',
        near.similarity if near else 0.0,
        self._places[near.serial] if near else '',
        is_whole=not comparable[i],
      )


def check(
  sets: Mapping[str, Sequence[Item]],
  training: Iterable[tuple[str, Sequence[str]]],
  against: Sequence[str],
) -> dict[str, Report]:
  """Returns which rows of evaluation sets are in the training data.

  Args:
    sets: {name: rows}.
    training: (file and line, texts) of each training row, read once.
    against: names of the training sources, for the reports.
  """
  found = Check(sets)
  for place, texts in training:
    found.add(place, texts)
  return found.reports(against)


def _grams(texts: templates.Texts, size: int) -> tuple[np.ndarray, np.ndarray]:
  return ngrams.of_numbers(texts.content, size)


def _words_of_rows(texts: templates.Texts, starts: np.ndarray, size: int) -> np.ndarray:
  """Returns how many words of each row lie in runs of `size` words from `starts`, int64[rows]."""
  inside = ngrams.covered(len(texts.content), starts, size)
  return np.bincount(texts.row[texts.text[inside]], minlength=texts.rows)


def _found_in(
  ids: np.ndarray, size: int, table: ngrams.Table, texts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the n-grams of a table that a chunk has: (text, number of the n-gram), int64[m] each,
  in the order of the chunk; `texts` int64[n]: where each text starts.
  """
  starts, grams = ngrams.of_numbers(ids, size)
  places, index = table.find(grams)
  return np.searchsorted(texts, starts[places], side='right') - 1, index


def _template_share(texts: templates.Texts) -> float:
  left = int(np.count_nonzero(texts.content >= 0))
  return (texts.words - left) / texts.words if texts.words else 0.0
