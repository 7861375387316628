"""Computes ROUGE of summaries with the package rouge-score."""

import functools
import re
from collections.abc import Sequence

from ftjax.evaluation.metric import Metric, mean
from ftjax.evaluation.metrics.packages import need

_TYPES = {'rouge1': 'ROUGE-1', 'rouge2': 'ROUGE-2', 'rougeL': 'ROUGE-L', 'rougeLsum': 'ROUGE-Lsum'}
_PARTS = {'precision': ' precision', 'recall': ' recall', 'f1': ''}


class _Words:
  """A tokenizer of rouge-score's form: runs of letters, marks and digits of any script."""

  _WORD = re.compile(r'[^\W_]+')

  def tokenize(self, text: str) -> list[str]:
    return self._WORD.findall(text.casefold())


@functools.lru_cache(maxsize=4)
def _scorer(is_english: bool, use_stemmer: bool):
  need('rouge_score', 'the metric rouge')
  from rouge_score import rouge_scorer

  return rouge_scorer.RougeScorer(
    list(_TYPES), use_stemmer=use_stemmer, tokenizer=None if is_english else _Words()
  )


def rouge_values(
  text: str, references: Sequence[str], *, is_english: bool = True, use_stemmer: bool = False
) -> dict[str, tuple[float, ...]]:
  """Returns precision, recall and F1 of one summary, 0 to 1, of the reference with the best F1.

  Args:
    references: right summaries, at least one.
    is_english: words are runs of a-z and 0-9, as rouge-score's; else letters of any script.
    use_stemmer: English words are compared by their stems (Porter's).

  Returns:
    {'rouge1_precision': (x,), ..., 'rougeLsum_f1': (x,)}; rougeLsum takes lines as sentences.

  Raises:
    ConfigError: rouge-score is not installed.
    ValueError: no references.
  Source: Lin 2004, https://aclanthology.org/W04-1013.
  """
  if not references:
    raise ValueError('no references; expected at least one')
  found = _scorer(is_english, use_stemmer).score_multi(list(references), text)
  out = {}
  for kind in _TYPES:
    numbers = found[kind].precision, found[kind].recall, found[kind].fmeasure
    for part, number in zip(_PARTS, numbers, strict=True):
      out[f'{kind}_{part}'] = (float(number),)
  return out


# {'rouge1_f1': ...}: means over results.
MEANS: dict[str, Metric] = {
  f'{kind}_{part}': mean(f'{kind}_{part}', title + suffix)
  for kind, title in _TYPES.items()
  for part, suffix in _PARTS.items()
}
METRICS = tuple(MEANS[f'{kind}_f1'] for kind in ('rougeL', 'rouge1', 'rouge2', 'rougeLsum'))
