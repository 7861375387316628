"""Training text that comes back verbatim: copied words of completions, and canaries.

A word of a completion is copied if it lies in a run of RUN words that is in a training text and not
in the prompt, which a model may repeat. Canaries are secrets that were planted in training rows:
whether they come back, and how far above its alternatives the model ranks one (`exposure`).
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence

import numpy as np

from ftjax.evaluation import metric, ngrams

RUN = 8
_CHUNK_WORDS = 250_000
_MOST_COMPARED = 100  # training texts in which the longest run of a completion is looked for


@dataclasses.dataclass(frozen=True)
class Copied:
  """What of one completion is training text.

  Attributes:
    words: of the completion.
    copied: of them, those in runs of RUN words of training texts that are not in the prompt.
    longest: words of the longest run that it shares with one training text, of the first texts that
      have a copied run; 0 without one.
    place: file and line of that training row; '' without one.
  """

  words: int
  copied: int
  longest: int = 0
  place: str = ''

  @property
  def share(self) -> float:
    """Returns the share of the completion's words that are copied; 0 for an empty one."""
    return self.copied / self.words if self.words else 0.0


class _Completions:
  """The words of completions, and the training texts that share a run with them."""

  def __init__(self, completions: Sequence[str], prompts: Sequence[str]):
    vocabulary: dict[str, int] = {}
    self.texts = [ngrams.words(text) for text in completions]
    parts = [np.append(ngrams.added(vocabulary, text), ngrams.UNKNOWN) for text in self.texts]
    self.ids = np.concatenate([np.zeros(0, np.int64), *parts])
    self.owner = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    self.vocabulary = vocabulary
    starts, grams = ngrams.of_numbers(self.ids, RUN)
    kept = np.ones(len(starts), bool)
    bounds = np.searchsorted(self.owner[starts], np.arange(len(parts) + 1))
    for i, prompt in enumerate(prompts):
      own = slice(bounds[i], bounds[i + 1])
      given = ngrams.of_numbers(ngrams.numbers(vocabulary, ngrams.words(prompt)), RUN)[1]
      kept[own] = ~np.isin(grams[own], given)
    self.starts, self.grams = starts[kept], grams[kept]
    self.table = ngrams.Table(self.grams)
    self.number = self.table.find(self.grams)[1]
    self.is_found = np.zeros(len(self.table), bool)
    order = np.argsort(self.number, kind='stable')
    self._owners = self.owner[self.starts[order]]
    self._bounds = np.searchsorted(self.number[order], np.arange(len(self.table) + 1))

  def owners(self, number: int) -> list[int]:
    """Returns the completions that have n-gram `number`."""
    return self._owners[self._bounds[number] : self._bounds[number + 1]].tolist()

  def copied(self) -> list[Copied]:
    """Returns how many words of each completion are copied."""
    hits = self.starts[self.is_found[self.number]]
    inside = self.owner[ngrams.covered(len(self.ids), hits, RUN)]
    counts = np.bincount(inside, minlength=len(self.texts)).tolist()
    return [Copied(len(t), k) for t, k in zip(self.texts, counts, strict=True)]


# Of results with the value `copied`: (words of training text, words).
COPIED = metric.optional_ratio('copied', 'words of training text', better='lower')


def check(
  completions: Sequence[str],
  training: Iterable[tuple[str, Sequence[str]]],
  prompts: Sequence[str] = (),
) -> list[Copied]:
  """Returns what of each completion is training text.

  Args:
    completions: of a model.
    training: (file and line, texts) of each training row, read once.
    prompts: of the completions, whose runs do not count; none: all runs count.

  Raises:
    ValueError: another number of prompts than of completions.
  """
  if prompts and len(prompts) != len(completions):
    raise ValueError(f'{len(prompts)} prompts for {len(completions)} completions')
  model = _Completions(completions, prompts)
  longest: dict[int, tuple[int, str]] = {}  # of each completion
  compared = [0] * len(completions)
  words: list[str] = []
  chunk: list[tuple[int, str]] = []  # (start in words, place) of each text

  def compare() -> None:
    starts, grams = ngrams.of_numbers(ngrams.numbers(model.vocabulary, words), RUN)
    at, number = model.table.find(grams)
    model.is_found[number] = True
    text = np.searchsorted([s for s, _ in chunk], starts[at], side='right') - 1
    found, begins, counts = ngrams.counts(text)
    for t, begin, count in zip(found.tolist(), begins, counts, strict=True):
      start, place = chunk[t]
      own = words[start : words.index('', start)]
      shared = number[begin : begin + count].tolist()
      for i in sorted({i for n in shared for i in model.owners(n)}):
        compared[i] += 1
        if compared[i] > _MOST_COMPARED:
          continue
        size = longest_run(model.texts[i], own)
        if size > longest.get(i, (0, ''))[0]:
          longest[i] = size, place
    words.clear()
    chunk.clear()

  for place, texts in training:
    for text in texts:
      chunk.append((len(words), place))
      words += [*ngrams.words(text), '']
    if len(words) >= _CHUNK_WORDS:
      compare()
  if chunk:
    compare()
  return [
    dataclasses.replace(one, longest=longest[i][0], place=longest[i][1]) if i in longest else one
    for i, one in enumerate(model.copied())
  ]


def longest_run(first: Sequence[str], second: Sequence[str]) -> int:
  """Returns the length of the longest run of words that both sequences have."""
  matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
  return matcher.find_longest_match().size


def returned(secrets: Sequence[str], completions: Iterable[str]) -> list[int]:
  """Returns in how many completions each secret stands, exactly as it was planted.

  Raises:
    ValueError: an empty secret, which every text has.
  """
  if not all(secrets):
    raise ValueError(f'the secrets {list(secrets)} have an empty one')
  out = [0] * len(secrets)
  for text in completions:
    for i, secret in enumerate(secrets):
      out[i] += secret in text
  return out


def exposure(secret: float, alternatives: Sequence[float]) -> float:
  """Returns the exposure of a canary, in bits: log2 of the number of candidates, the secret among
  them, minus log2 of its rank by likelihood (Carlini et al. 2019, definition 4).

  0 for the least likely candidate and log2 of their number for the most likely one. Random
  alternatives estimate the rank among all of them; the figure then cannot exceed log2 of theirs
  plus one. Of equal ones half count as more likely.

  Args:
    secret: its log-probability in nats.
    alternatives: those of texts of the same form that were not in training.

  Raises:
    ValueError: no alternatives, or NaN among the figures.
  """
  others = np.asarray(alternatives, np.float64)
  if not others.size or np.isnan(others).any() or math.isnan(secret):
    raise ValueError(
      f'exposure of log-probability {secret} among {others.size} alternatives, '
      f'{int(np.isnan(others).sum())} of them NaN; expected numbers and at least one alternative'
    )
  rank = 1 + np.count_nonzero(others > secret) + np.count_nonzero(others == secret) / 2
  return math.log2(others.size + 1) - math.log2(rank)
