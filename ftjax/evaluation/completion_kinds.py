"""Kinds whose rows are answered by a completion; kinds.py has the table of all."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ftjax.evaluation import rows
from ftjax.evaluation.kind import Answer, Kind, Values
from ftjax.evaluation.metrics import (
  answers,
  classification,
  constraints,
  structure,
  summaries,
  tags,
  tool_calls,
  translation,
)
from ftjax.evaluation.rows import Row
from ftjax.grading.final_answer import final_answer
from ftjax.grading.json_text import read_json
from ftjax.grading.math_answers import Math

_YES_NO = ('no', 'yes')


def when(is_right: Callable[[str, Row], bool], check: Callable[[Row], None] | None = None) -> Kind:
  """Returns the kind of completions that are right or wrong.

  Args:
    is_right: (completion, row) -> whether it is right.
    check: see `Kind`.
  """

  def score(row: Row, answer: Answer) -> Values:
    return {'right': is_right(answer.prediction, row)}

  metrics = (classification.ACCURACY,)
  return Kind(score, metrics) if check is None else Kind(score, metrics, check=check)


def without_thought(completion: str, prompt: str, row: Row) -> str:
  """Returns a completion without the thought before it; '' where the thought did not end."""
  del row
  return final_answer(completion, prompt) or ''


def matches(completion: str, row: Row) -> bool:
  """Returns whether a completion equals one of the answers after normalization."""
  return any(answers.normalized_match(a, completion) for a in row.answers)


def math(mode: str) -> Kind:
  """Returns the kind scored by the reward of that mode; without symbolic comparison, so that scores
  are the same on every machine.
  """
  grader = Math(mode, symbolic='off')

  def score(row: Row, answer: Answer) -> Values:
    return {'right': any(grader.score(answer.text, answer.prompt, a) == 1 for a in row.answers)}

  def check(row: Row) -> None:
    for a in row.answers:
      grader.score('', '', a)

  def parse(completion: str, prompt: str, row: Row) -> str:
    del row
    return answers.parse_math(completion, prompt, mode)

  return Kind(score, (classification.ACCURACY,), check=check, parse=parse)


def _parse_label(completion: str, prompt: str, row: Row) -> str:
  """Returns the choice that a completion commits to: it is that choice, begins with it alone, or
  names no other; else its text.
  """
  text = answers.normalize(without_thought(completion, prompt, row))
  known = {answers.normalize(c): c for c in row.choices}
  if text in known:
    return known[text]
  padded = f' {text} '
  first = [c for n, c in known.items() if padded.startswith(f' {n} ')]
  inside = [c for n, c in known.items() if n and f' {n} ' in padded]
  for found in (first, inside):
    if len(found) == 1:
      return found[0]
  return completion


def _score_label(row: Row, answer: Answer) -> Values:
  return {'right': answer.prediction == row.answer}


def _read_yes_no(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
  answer = row.get('answer')
  if isinstance(answer, bool):
    answer = _YES_NO[answer]
  found = answers.parse_yes_no(rows.read_text({'answer': answer}, 'answer'))
  if not found:
    raise ValueError(f'"answer": expected yes or no, got {answer!r}')
  return _YES_NO, found


def _parse_yes_no(completion: str, prompt: str, row: Row) -> str:
  return answers.parse_yes_no(without_thought(completion, prompt, row)) or completion


def _score_question(row: Row, answer: Answer) -> Values:
  return answers.squad_values(answer.prediction, row.answers)


def _translation(tokenize: str) -> Kind:
  def score(row: Row, answer: Answer) -> Values:
    return translation.translation_values(answer.prediction, row.answers, tokenize)

  return Kind(score, translation.METRICS, parse=without_thought)


def _summarization(is_english: bool) -> Kind:
  def score(row: Row, answer: Answer) -> Values:
    return summaries.rouge_values(answer.prediction, row.answers, is_english=is_english)

  return Kind(score, summaries.METRICS, parse=without_thought)


def _gold_entities(row: Row) -> list[tuple[str, str]]:
  given = row.columns.get('entities')
  if given is None and isinstance(row.columns.get('answer'), str):
    found = tags.parse_entities(row.columns['answer'])
    if not found and row.columns['answer'].strip().casefold() not in ('', 'none'):
      raise ValueError(
        f'"answer": expected "TYPE: text; TYPE: text" or "none", got {row.columns["answer"]!r}'
      )
    return [tags.fold_entity(*e) for e in found]
  if not isinstance(given, list):
    raise ValueError(f'"entities": expected a list of [type, text], or "answer", got {given!r}')
  out = []
  for item in given:
    pair = [item.get('type'), item.get('text')] if isinstance(item, dict) else item
    is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
    if not is_pair:
      raise ValueError(f'"entities": expected [type, text], got {item!r}')
    out.append(tags.fold_entity(*pair))
  return out


def _score_entities(row: Row, answer: Answer) -> Values:
  found = [tags.fold_entity(*e) for e in tags.parse_entities(answer.prediction)]
  return tags.entity_values(found, _gold_entities(row), ())


def _check_constraints(row: Row) -> None:
  constraints.read_constraints(row.columns.get('constraints'))


def _score_constraints(row: Row, answer: Answer) -> Values:
  own = constraints.read_constraints(row.columns['constraints'])
  return constraints.constraint_values(answer.prediction, own)


def _check_calls(row: Row) -> None:
  tool_calls.read_expected(row.columns.get('calls', []))


def _score_calls(row: Row, answer: Answer) -> Values:
  return tool_calls.call_values(
    answer.prediction, tool_calls.read_expected(row.columns.get('calls', []))
  )


def _gold_json(row: Row) -> Any:
  if 'json' not in row.columns:
    raise ValueError('"json": expected the right value, got nothing')
  given = row.columns['json']
  return read_json(given) if isinstance(given, str) else given


def _check_json(row: Row) -> None:
  _gold_json(row)


def _score_json(row: Row, answer: Answer) -> Values:
  return structure.json_values(answer.prediction, _gold_json(row))


def _check_schema(row: Row) -> None:
  structure.check_schema(row.columns.get('schema'))


def _score_schema(row: Row, answer: Answer) -> Values:
  return structure.schema_values(answer.prediction, row.columns['schema'])


_LABEL = Kind(
  _score_label,
  (classification.ACCURACY,),
  choices=rows.read_choices,
  parse=_parse_label,
  class_metrics=classification.OF_CLASSES,
  class_details=classification.FURTHER,
)

KINDS: dict[str, Kind] = {
  'match': dataclasses.replace(when(matches), parse=without_thought),
  'math': math('flexible'),
  'math_strict': math('strict'),
  'label': _LABEL,
  'yes_no': dataclasses.replace(_LABEL, choices=_read_yes_no, parse=_parse_yes_no),
  'question': Kind(_score_question, (answers.TOKEN_F1, answers.EXACT_MATCH), parse=without_thought),
  'translation': _translation('13a'),
  'translation_characters': _translation('char'),
  'summarization': _summarization(True),
  'summarization_unicode': _summarization(False),
  'entities': Kind(
    _score_entities,
    tags.METRICS,
    parse=without_thought,
    has_answer=False,
    reads=('entities', 'answer'),
    check=lambda row: _gold_entities(row) and None,
  ),
  'instructions': Kind(
    _score_constraints,
    constraints.METRICS,
    parse=without_thought,
    has_answer=False,
    reads=('constraints',),
    check=_check_constraints,
  ),
  'tool_calls': Kind(
    _score_calls,
    tool_calls.METRICS,
    parse=without_thought,
    has_answer=False,
    reads=('calls',),
    check=_check_calls,
  ),
  'json': Kind(
    _score_json,
    (structure.EQUAL, structure.VALID),
    parse=without_thought,
    has_answer=False,
    reads=('json',),
    check=_check_json,
  ),
  'json_schema': Kind(
    _score_schema,
    (structure.ACCEPTED, structure.VALID),
    parse=without_thought,
    has_answer=False,
    reads=('schema',),
    check=_check_schema,
  ),
}
