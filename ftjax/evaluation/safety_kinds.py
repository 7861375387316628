"""The kinds of tasks of the safety slice, by the name that the config gives them.

  stereotype_pair   {"more": "...", "less": "..."}   the more stereotyping sentence first
  stereoset         {"stereotype": "...", "antistereotype": "...", "unrelated": "...", "target":
                    "..."}   the word that the row is about
  question_bias     {"messages": [...], "choices": [3], "label": "...", "unknown": "..."}
                    and "biased", the choice that the stereotype suggests, where it is known
  coreference       {"messages": [...], "choices": [2], "label": "...", "stereotype": "pro"}
                    or "anti": whether the pronoun agrees with the stereotype
  toxicity          {"prompt": "...", "lexicon": FILE, "lexicon_sha256": "..."}
  refusal           {"messages": [...], "harmful": true}
  canary_exposure   {"prompt": "...", "secret": "...", "references": [...]}
  canary_leak       {"prompt": "...", "secret": "...", "references": [...]}

`make safety-data` writes such rows; docs/safety.md has what each figure means.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ftjax.evaluation import rows
from ftjax.evaluation.completion_kinds import without_thought
from ftjax.evaluation.kind import CHOOSE, COMPLETE, READ, Answer, Kind
from ftjax.evaluation.rows import Row
from ftjax.evaluation.safety import (
  canaries,
  coreference,
  questions,
  refusals,
  stereotypes,
  toxicity,
)

Choices = tuple[tuple[str, ...], str]


def _logps(answer: Answer) -> list[float]:
  return [x.logp for x in answer.likelihoods]


def _read_pair(row: Mapping[str, Any]) -> Choices:
  return stereotypes.read_pair(row), ''


def _score_pair(row: Row, answer: Answer) -> Mapping[str, float]:
  del row
  return stereotypes.compare_pair(*_logps(answer))


def _read_three(row: Mapping[str, Any]) -> Choices:
  return stereotypes.read_three(row), ''


def _score_three(row: Row, answer: Answer) -> Mapping[str, float | tuple[float, ...]]:
  return stereotypes.compare_three(*_logps(answer), row.columns['target'])


def _read_question(row: Mapping[str, Any]) -> Choices:
  choices, label = rows.read_choices(row)
  questions.check(row, choices)
  return choices, label


def _score_question(row: Row, answer: Answer) -> Mapping[str, float]:
  columns = row.columns
  return questions.values(answer.prediction, row.answer, columns['unknown'], columns.get('biased'))


def _read_coreference(row: Mapping[str, Any]) -> Choices:
  coreference.check(row)
  return rows.read_choices(row)


def _score_coreference(row: Row, answer: Answer) -> Mapping[str, float]:
  return coreference.values(answer.prediction == row.answer, row.columns['stereotype'])


def _check_lexicon(row: Row) -> None:
  toxicity.check(row.columns)


def _score_toxicity(row: Row, answer: Answer) -> Mapping[str, float]:
  lexicon = toxicity.lexicon_of(row.columns['lexicon'], row.columns['lexicon_sha256'])
  return toxicity.lexicon_values(answer.text, lexicon)


def toxicity_by(classifier: Callable[[str], float]) -> Kind:
  """Returns the kind of continuations whose toxicity a function of yours measures.

  A module of yours names it for eval.tasks: `TOXICITY = safety_kinds.toxicity_by(classify)`, then
  'toxicity=my_module:TOXICITY:prompts.jsonl'.

  Args:
    classifier: continuation -> how toxic it is, from 0 to 1.
  """

  def score(row: Row, answer: Answer) -> Mapping[str, float]:
    del row
    return toxicity.classifier_values(answer.text, classifier)

  return Kind(score, toxicity.CLASSIFIER_METRICS, has_answer=False)


def _check_refusal(row: Row) -> None:
  refusals.check(row.columns)


def _score_refusal(row: Row, answer: Answer) -> Mapping[str, float]:
  return refusals.values(answer.prediction, row.columns['harmful'])


def _read_canary(row: Mapping[str, Any]) -> Choices:
  secret, references = canaries.read(row)
  return (secret, *references), secret


def _check_canary(row: Row) -> None:
  canaries.read(row.columns)


def _score_exposure(row: Row, answer: Answer) -> Mapping[str, float]:
  del row
  return canaries.exposure_values(_logps(answer))


def _score_leak(row: Row, answer: Answer) -> Mapping[str, float]:
  return canaries.leak_values(answer.text, row.columns['secret'])


SAFETY_KINDS: dict[str, Kind] = {
  'stereotype_pair': Kind(
    _score_pair,
    stereotypes.PAIR_METRICS,
    READ,
    choices=_read_pair,
    reads=('more', 'less'),
  ),
  'stereoset': Kind(
    _score_three,
    stereotypes.STEREOSET_METRICS,
    READ,
    choices=_read_three,
    reads=('stereotype', 'antistereotype', 'unrelated', 'target'),
  ),
  'question_bias': Kind(
    _score_question,
    questions.METRICS,
    CHOOSE,
    choices=_read_question,
    reads=('unknown', 'biased'),
  ),
  'coreference': Kind(
    _score_coreference,
    coreference.METRICS,
    CHOOSE,
    choices=_read_coreference,
    reads=('stereotype',),
  ),
  'toxicity': Kind(
    _score_toxicity,
    toxicity.LEXICON_METRICS,
    COMPLETE,
    check=_check_lexicon,
    has_answer=False,
    reads=('lexicon', 'lexicon_sha256'),
  ),
  'refusal': Kind(
    _score_refusal,
    refusals.METRICS,
    COMPLETE,
    check=_check_refusal,
    parse=without_thought,
    has_answer=False,
    reads=('harmful',),
  ),
  'canary_exposure': Kind(
    _score_exposure,
    canaries.EXPOSURE_METRICS,
    CHOOSE,
    choices=_read_canary,
    reads=('secret', 'references'),
  ),
  'canary_leak': Kind(
    _score_leak,
    canaries.LEAK_METRICS,
    COMPLETE,
    check=_check_canary,
    has_answer=False,
    reads=('secret', 'references'),
  ),
}
