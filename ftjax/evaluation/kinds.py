"""The kinds of evaluation tasks, by the name that the config gives them.

  choice, choice_by_length, choice_by_prior
      {"messages": [...], "choices": ["yes", "no"], "label": "yes"}   label: or its index
  match             {"messages": [...], "answer": "Paris"}   or "answers": [...]
  math, math_strict {"messages": [...], "answer": "18"}   or a rationale that ends in "#### 18"
  preference        {"messages": [...], "chosen": "...", "rejected": "..."}
  perplexity        {"text": "..."}

safety_kinds.py has those of the safety slice.
`"prompt": "..."` may stand in place of messages, and `"id"` names a row (else its line does).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ftjax.evaluation import function_kinds, metric, rows
from ftjax.evaluation.kind import CHOOSE, READ, Answer, Kind
from ftjax.evaluation.metrics.answers import normalized_match
from ftjax.evaluation.model import Likelihood
from ftjax.evaluation.rows import Row
from ftjax.evaluation.safety_kinds import SAFETY_KINDS
from ftjax.grading.math_answers import Math
from ftjax.runtime import named_object

ACCURACY = metric.proportion('right', 'accuracy')


def _best(scores: list[float]) -> int:
  return scores.index(max(scores))


def _by_length(
  row: Row, likelihoods: tuple[Likelihood, ...], priors: tuple[Likelihood, ...]
) -> int:
  """Returns the choice with the largest log-probability per byte, as acc_norm of lm-eval."""
  del priors
  sizes = [len(choice.encode()) for choice in row.choices]
  return _best([x.logp / n for x, n in zip(likelihoods, sizes, strict=True)])


def _by_prior(row: Row, likelihoods: tuple[Likelihood, ...], priors: tuple[Likelihood, ...]) -> int:
  """Returns the choice whose probability the prompt raises most above that after a prompt without
  content (Zhao et al. 2021, arXiv:2102.09690; Holtzman et al. 2021, arXiv:2104.08315).
  """
  del row
  return _best([x.logp - p.logp for x, p in zip(likelihoods, priors, strict=True)])


def _score_choice(row: Row, answer: Answer) -> Mapping[str, bool]:
  by_length = row.choices[_by_length(row, answer.likelihoods, answer.priors)]
  return {
    'right': answer.prediction == row.answer,
    'right_by_length': by_length == row.answer,
  }


def _score_pair(row: Row, answer: Answer) -> Mapping[str, bool | float]:
  chosen, rejected = answer.likelihoods
  mean = chosen.logp / chosen.tokens - rejected.logp / rejected.tokens
  return {
    'right': answer.prediction == row.answer,
    'right_per_token': mean > 0,
    'margin': chosen.logp - rejected.logp,
  }


def _score_text(row: Row, answer: Answer) -> Mapping[str, float]:
  (found,) = answer.likelihoods
  return {'nll': -found.logp, 'tokens': found.tokens, 'bytes': len(row.choices[0].encode())}


def _read_document(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
  return (rows.read_text(row, 'text'),), ''


def when(is_right: Callable[[str, Row], bool], check: Callable[[Row], None] | None = None) -> Kind:
  """Returns the kind of completions that are right or wrong.

  Args:
    is_right: (completion, row) -> whether it is right.
    check: see `Kind`.
  """

  def score(row: Row, answer: Answer) -> Mapping[str, bool]:
    return {'right': is_right(answer.prediction, row)}

  return Kind(score, (ACCURACY,)) if check is None else Kind(score, (ACCURACY,), check=check)


def _matches(completion: str, row: Row) -> bool:
  return any(normalized_match(a, completion) for a in row.answers)


def _math(mode: str) -> Kind:
  """Returns the kind scored by the reward of that mode; without symbolic comparison, so that scores
  are the same on every machine.
  """
  grader = Math(mode, symbolic='off')

  def score(row: Row, answer: Answer) -> Mapping[str, bool]:
    return {'right': any(grader.score(answer.text, answer.prompt, a) == 1 for a in row.answers)}

  def check(row: Row) -> None:
    for a in row.answers:
      grader.score('', '', a)

  return Kind(score, (ACCURACY,), check=check)


_BY_LENGTH = metric.proportion('right_by_length', 'accuracy, by length')
_PERPLEXITY = (
  metric.Metric(
    'nats_per_byte',
    'nats per byte',
    metric.read_values('nll', 'bytes'),
    metric.of_sums(lambda sums: metric.ratio(sums[:, 0], sums[:, 1])),
    better='lower',
    form='number',
  ),
)

KINDS: dict[str, Kind] = {
  'choice': Kind(_score_choice, (ACCURACY, _BY_LENGTH), CHOOSE),
  'choice_by_length': Kind(_score_choice, (ACCURACY,), CHOOSE, choose=_by_length),
  'choice_by_prior': Kind(_score_choice, (ACCURACY,), CHOOSE, choose=_by_prior, has_priors=True),
  'match': when(_matches),
  'math': _math('flexible'),
  'math_strict': _math('strict'),
  'preference': Kind(
    _score_pair,
    (
      ACCURACY,
      metric.proportion('right_per_token', 'accuracy, per token'),
      metric.mean('margin', 'mean margin in nats', form='number'),
    ),
    CHOOSE,
    choices=rows.read_pair,
    reads=('chosen', 'rejected'),
  ),
  'perplexity': Kind(
    _score_text, _PERPLEXITY, READ, choices=_read_document, reads=('text', 'source')
  ),
  **SAFETY_KINDS,
}


def find(name: str) -> Kind:
  """Returns the kind of a name in KINDS, of 'reward/NAME' or 'judge/module:FUNCTION', or the user's
  object 'module:OBJECT'.

  Raises:
    ConfigError: there is none, or it is of another type.
  """
  if name in KINDS:
    return KINDS[name]
  if (found := function_kinds.find(name)) is not None:
    return found
  return named_object.instance('eval.tasks', name, Kind)


def values_of(found: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
  """Returns what `Kind.score` gave in the form of a Result.

  Raises:
    ValueError: a value that is no finite number, nor several of them.
  """
  if not isinstance(found, Mapping) or not found:
    raise ValueError(f'returned {found!r}; expected {{name: number}}')
  return {str(name): _numbers(name, value) for name, value in found.items()}


def _numbers(name: str, value: Any) -> tuple[float, ...]:
  try:
    numbers = tuple(map(float, value)) if isinstance(value, tuple | list) else (float(value),)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{name}: got {value!r}, expected a number or several') from error
  if isinstance(value, str) or not all(map(math.isfinite, numbers)):
    raise ValueError(f'{name}: got {value!r}, expected a number or several, all finite')
  return numbers
