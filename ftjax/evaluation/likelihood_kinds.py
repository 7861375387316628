"""Kinds for which the log-probabilities of texts are asked: choices, pairs, held-out text."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ftjax.evaluation import metric, rows
from ftjax.evaluation.kind import CHOOSE, READ, Answer, Kind, Values
from ftjax.evaluation.metrics import calibration, classification, perplexity, ranking
from ftjax.evaluation.model import Likelihood
from ftjax.evaluation.rows import Row

Likelihoods = tuple[Likelihood, ...]


def _best(scores: list[float]) -> int:
  return scores.index(max(scores))


def _by_length(row: Row, likelihoods: Likelihoods, priors: Likelihoods) -> int:
  """Returns the choice with the largest log-probability per byte, as acc_norm of lm-eval."""
  del priors
  sizes = [len(choice.encode()) for choice in row.choices]
  return _best([x.logp / n for x, n in zip(likelihoods, sizes, strict=True)])


def _by_prior(row: Row, likelihoods: Likelihoods, priors: Likelihoods) -> int:
  """Returns the choice whose probability the prompt raises most above that after a prompt without
  content (Zhao et al. 2021, arXiv:2102.09690; Holtzman et al. 2021, arXiv:2104.08315).
  """
  del row
  return _best(_lifts(likelihoods, priors))


def _lifts(likelihoods: Likelihoods, priors: Likelihoods) -> list[float]:
  return [x.logp - p.logp for x, p in zip(likelihoods, priors, strict=True)]


def _scores(row: Row, answer: Answer) -> list[float]:
  """Returns the log-probabilities of the choices, above their priors where there are any."""
  del row
  if answer.priors:
    return _lifts(answer.likelihoods, answer.priors)
  return [x.logp for x in answer.likelihoods]


def _score_choice(row: Row, answer: Answer) -> Values:
  by_length = row.choices[_by_length(row, answer.likelihoods, answer.priors)]
  found = calibration.calibration_values(row.choices, _scores(row, answer), row.answer)
  return {
    'right': answer.prediction == row.answer,
    'right_by_length': by_length == row.answer,
    **found,
  }


def _score_classes(row: Row, answer: Answer) -> Values:
  return ranking.ranking_values(row.choices, _scores(row, answer))


def _score_pair(row: Row, answer: Answer) -> Values:
  chosen, rejected = answer.likelihoods
  return {
    'right': answer.prediction == row.answer,
    'right_per_token': chosen.logp / chosen.tokens > rejected.logp / rejected.tokens,
    'margin': chosen.logp - rejected.logp,
  }


def _score_text(row: Row, answer: Answer) -> Values:
  (found,) = answer.likelihoods
  return perplexity.likelihood_values(found.logp, found.tokens, row.choices[0])


def _read_document(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
  return (rows.read_text(row, 'text'),), ''


def _read_answer(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
  return (rows.read_text(row, 'answer'),), ''


_CHOICE = Kind(
  _score_choice,
  (
    classification.ACCURACY,
    metric.proportion('right_by_length', 'accuracy, by length'),
  ),
  CHOOSE,
  details=(calibration.ECE, calibration.BRIER, calibration.LOG_LOSS),
  class_metrics=classification.OF_CLASSES,
  class_details=(*classification.FURTHER, *ranking.METRICS),
  class_score=_score_classes,
)
_ACCURACY = (classification.ACCURACY,)

KINDS: dict[str, Kind] = {
  'choice': _CHOICE,
  'choice_by_length': dataclasses.replace(_CHOICE, metrics=_ACCURACY, choose=_by_length),
  'choice_by_prior': dataclasses.replace(
    _CHOICE, metrics=_ACCURACY, choose=_by_prior, has_priors=True
  ),
  'preference': Kind(
    _score_pair,
    (
      classification.ACCURACY,
      metric.proportion('right_per_token', 'accuracy, per token'),
      metric.mean('margin', 'mean margin in nats', form='number'),
    ),
    CHOOSE,
    choices=rows.read_pair,
    reads=('chosen', 'rejected'),
  ),
  'perplexity': Kind(
    _score_text,
    perplexity.METRICS,
    READ,
    choices=_read_document,
    has_answer=False,
    reads=('text',),
  ),
  'answer_perplexity': Kind(
    _score_text, perplexity.METRICS, CHOOSE, choices=_read_answer, has_answer=False
  ),
}
