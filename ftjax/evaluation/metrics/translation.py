"""Computes BLEU, chrF and TER of translations, equal to sacrebleu's corpus scores.

Each result has the counts of its sentence; a corpus score is a function of their sums, so that a
resample costs no more than adding counts.
"""

import collections
import functools
from collections.abc import Sequence

import numpy as np

from ftjax.evaluation.metric import Columns, Metric, of_sums, ratio, read_values
from ftjax.evaluation.metrics.packages import need
from ftjax.runtime.errors import ConfigError

_BLEU_ORDER = 4
_CHRF_ORDER = 6
_CHRF_BETA = 2
# Tokenizers that need no further package and no download.
TOKENIZERS = ('13a', 'intl', 'zh', 'char', 'none')


def translation_values(
  text: str, references: Sequence[str], tokenize: str = '13a'
) -> dict[str, tuple[float, ...]]:
  """Returns the counts of one translation: 'bleu', 'chrf' and 'ter'.

  Args:
    references: right translations, at least one.
    tokenize: sacrebleu's name of BLEU's tokenizer; one of TOKENIZERS.

  Raises:
    ConfigError: sacrebleu is not installed, or there is no such tokenizer.
    ValueError: no references.
  """
  if not references:
    raise ValueError('no references; expected at least one')
  return {
    'bleu': bleu_counts(text, references, tokenize),
    'chrf': chrf_counts(text, references),
    'ter': ter_counts(text, references),
  }


@functools.lru_cache(maxsize=8)
def _bleu(tokenize: str):
  need('sacrebleu', 'the metric bleu')
  from sacrebleu.metrics import BLEU

  # effective_order changes the score of a sentence, which is not read, and keeps it from warning.
  return BLEU(tokenize=tokenize, effective_order=True)


@functools.lru_cache(maxsize=1)
def _ter():
  need('sacrebleu', 'the metric ter')
  from sacrebleu.metrics import TER

  return TER()


def bleu_counts(text: str, references: Sequence[str], tokenize: str) -> tuple[float, ...]:
  """Returns (length, reference length, matches of 1- to 4-grams, n-grams of 1 to 4): 10 numbers.

  Raises:
    ConfigError: see `translation_values`.
  """
  if tokenize not in TOKENIZERS:
    raise ConfigError(f'the metric bleu: tokenize={tokenize!r}; expected one of {TOKENIZERS}')
  found = _bleu(tokenize).sentence_score(text, list(references))
  return tuple(map(float, (found.sys_len, found.ref_len, *found.counts, *found.totals)))


def ter_counts(text: str, references: Sequence[str]) -> tuple[float, ...]:
  """Returns (edits to the nearest reference, mean length of the references in words).

  Slow: up to 40 ms for 25 words that are all in another order, seconds for hundreds.

  Raises:
    ConfigError: sacrebleu is not installed.
  """
  found = _ter().sentence_score(text, list(references))
  return float(found.num_edits), float(found.ref_length)


def chrf_counts(text: str, references: Sequence[str]) -> tuple[float, ...]:
  """Returns, of the reference with the best score, the counts of 1- to 6-grams of characters.

  White space is left out.

  Returns:
    18 numbers: of each order (n-grams of the text, n-grams of the reference, matches).

  Source: Popovic 2015, doi:10.18653/v1/W15-3049; as sacrebleu 2 chooses among references.
  """
  best: tuple[float, tuple[float, ...]] | None = None
  given = _character_ngrams(text)
  for reference in references:
    counts = []
    for own, other in zip(given, _character_ngrams(reference), strict=True):
      matches = sum((own & other).values())
      # Without n-grams in the reference the text's are not counted.
      counts += [own.total() if other else 0, other.total(), matches]
    score = float(_chrf(np.array([counts], np.float64))[0])
    if best is None or score > best[0]:
      best = score, tuple(map(float, counts))
  return best[1]


def _character_ngrams(text: str) -> list[collections.Counter]:
  text = ''.join(text.split())
  return [
    collections.Counter(text[i : i + n] for i in range(len(text) - n + 1))
    for n in range(1, _CHRF_ORDER + 1)
  ]


def _bleu_score(sums: np.ndarray) -> np.ndarray:
  """Returns BLEU with exponential smoothing of sums of `bleu_counts`: float64[R, 10] -> [R]."""
  length, reference = sums[:, 0], sums[:, 1]
  matches, totals = sums[:, 2 : 2 + _BLEU_ORDER], sums[:, 2 + _BLEU_ORDER :]
  halvings = np.cumsum(matches == 0, axis=1)
  smooth = np.where(matches == 0, 0.5**halvings, matches)
  is_scored = (matches > 0).any(1) & (totals > 0).all(1)
  with np.errstate(divide='ignore', invalid='ignore'):
    log_precision = np.log(100 * smooth / totals).mean(1)
    penalty = np.exp(np.minimum(0, 1 - reference / length))
    return np.where(is_scored, penalty * np.exp(log_precision), 0.0)


def _chrf(sums: np.ndarray) -> np.ndarray:
  """Returns chrF2 of sums of `chrf_counts`: float64[R, 18] -> [R]."""
  given, reference, matches = (sums[:, i::3] for i in range(3))
  counts = (given > 0) & (reference > 0)  # orders that both sides have
  orders = np.maximum(counts.sum(1), 1)

  def mean_share(of):
    return np.divide(matches, of, out=np.zeros(of.shape), where=counts).sum(1) / orders

  precision, recall, factor = mean_share(given), mean_share(reference), _CHRF_BETA**2
  bottom = factor * precision + recall
  top = (1 + factor) * precision * recall
  # In sacrebleu's order of operations: rounding must not choose another of two equal references.
  return 100 * np.divide(top, bottom, out=np.zeros(top.shape), where=bottom > 0)


def _ter_score(sums: np.ndarray) -> np.ndarray:
  edits, length = sums[:, 0], sums[:, 1]
  share = np.where(length > 0, ratio(edits, length), edits > 0)
  return 100 * share.astype(np.float64)


def _counted(name: str) -> Columns:
  """Returns the columns of value `name` and ones after them, which count the results."""
  read = read_values(name)
  return lambda results, classes: np.pad(
    read(results, classes), ((0, 0), (0, 1)), constant_values=1.0
  )


def _metric(name: str, title: str, score, better: str) -> Metric:
  value = of_sums(lambda sums: np.where(sums[:, -1] > 0, score(sums[:, :-1]), np.nan))
  return Metric(name, title, _counted(name), value, better, form='points')


BLEU = _metric('bleu', 'BLEU', _bleu_score, 'higher')
CHRF = _metric('chrf', 'chrF', _chrf, 'higher')
TER = _metric('ter', 'TER', _ter_score, 'lower')
METRICS = (BLEU, CHRF, TER)
