"""Data that can be read but carries no signal: reported or refused before the first step."""

import logging
from collections.abc import Sequence

from ftjax.config import algorithms
from ftjax.data.token_cache import Corpus
from ftjax.experiment import data as examples
from ftjax.experiment.run import Run
from ftjax.runtime.errors import DataError

log = logging.getLogger(__name__)


def check(run: Run) -> None:
  """Checks the training and evaluation data of a run.

  Raises:
    DataError: labels or scores that are all equal.
  """
  c, data = run.config, run.data
  record = algorithms.of(c)
  is_sampled = record.on_rollouts
  training = data.sources if is_sampled else data.corpora
  _warn_of_equal_sources(training, data.evaluation)
  total = sum(len(s.rows) if is_sampled else len(s) for s in training)
  what = 'prompt' if is_sampled else 'example'
  if total == 1:
    log.warning('data.train holds one %s alone: the model will memorize it', what)
  if record.example(c) in ('label', 'score'):
    _check_values(data, record.example(c))


def _warn_of_equal_sources(training: Sequence, evaluation: Sequence) -> None:
  known = {source.fingerprint: source.name for source in training}
  for source in evaluation:
    if source.fingerprint in known:
      log.warning(
        'data.eval: %s holds the same examples as data.train (%s): its figures will not show '
        'overfitting; give held-out examples, or set data.eval_fraction',
        *(source.name, known[source.fingerprint]),
      )


def _check_values(data: examples.Data, shape: str) -> None:
  """Refuses training data, and warns of evaluation data, whose labels or scores are all equal."""
  for key, corpora in (('data.train', data.corpora), ('data.eval', data.evaluation)):
    value = _only_value(corpora)
    if value is None:
      continue
    number = sum(map(len, corpora))
    if shape == 'label':
      text = f'true for all {number}' if value > 0 else f'false for all {number}'
      found = f'"label" is {text} examples (0 with the other label)'
      remedy = (
        'KTO needs desirable and undesirable responses; for good ones alone use algorithm=sft'
      )
    else:
      found = f'"score" is {value:g} for all {number} examples'
      remedy = 'a reward model learns nothing from equal scores'
    message = f'{key} ({", ".join(c.name for c in corpora)}): {found}; {remedy}'
    if key == 'data.train':
      raise DataError(message)
    log.warning('%s', message)


def _only_value(corpora: Sequence[Corpus]) -> float | None:
  """Returns the value of all examples; None where they differ, or with fewer than two examples.
  Stops at the first difference.
  """
  values = (corpus.value(i) for corpus in corpora for i in range(len(corpus)))
  first, number = next(values, None), sum(map(len, corpora))
  if number < 2 or any(value != first for value in values):
    return None
  return first
