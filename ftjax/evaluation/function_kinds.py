"""Kinds that call a function named in the config: reward/NAME and judge/module:FUNCTION.

A reward is one of rollout.rewards, built in or a user's own: its mean over completions is the
figure. The arguments of a built-in one stand in parentheses: reward/length(at_most=9).

A judge compares a response with that of the first model:

  def prefer_short(prompt, first, second):
    return float(len(second) < len(first))   # 1: the second wins, 0: it loses, 0.5: a tie

It is called for both orders, so that a judge that prefers a place gives 0.5.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftjax.evaluation import metric
from ftjax.evaluation.kind import Answer, Kind
from ftjax.evaluation.result import Result
from ftjax.evaluation.rows import Row
from ftjax.grading import rewards
from ftjax.grading.reward_batch import Batch
from ftjax.runtime import named_object
from ftjax.runtime.errors import ConfigError, DataError, StoppedEarly

REWARD, JUDGE = 'reward/', 'judge/'
_CALL = re.compile(r'(\w+)\((.*)\)', re.DOTALL)


def find(name: str) -> Kind | None:
  """Returns the kind of 'reward/NAME' or 'judge/module:FUNCTION'; None for other names.

  Raises:
    ConfigError: there is no such reward or function.
  """
  if name.startswith(REWARD):
    return _reward(name.removeprefix(REWARD).replace('(', ':').removesuffix(')'))
  if name.startswith(JUDGE):
    return _judge(name.removeprefix(JUDGE))
  return None


def _reward(name: str) -> Kind:
  spec = name
  if found := _CALL.fullmatch(name):
    spec = f'{found[1]}:{found[2]}'
  try:
    parts = rewards.parse(spec)
  except ConfigError as error:
    raise ConfigError(f'eval.tasks, reward/{name}: {error}') from error
  if any(part.spec == 'model' for part in parts):
    raise ConfigError(
      'eval.tasks, reward/model: a task has no reward model; hand it in as a function, '
      'reward/module:FUNCTION'
    )

  def score_all(rows: Sequence[Row], answers: Sequence[Answer]) -> list[dict[str, float]]:
    names = sorted(set().union(*(row.columns for row in rows)))
    columns = {n: [row.columns.get(n) for row in rows] for n in names}
    batch = Batch(
      prompts=[a.prompt for a in answers],
      completions=[a.text for a in answers],
      # Tokens are known to the model alone.
      prompt_ids=[()] * len(answers),
      token_ids=[range(a.tokens) for a in answers],
      is_truncated=[a.is_cut for a in answers],
      columns=columns,
    )
    with rewards.Rewards(parts, names) as grader:
      grader.check_rows((row.place, row.columns) for row in rows)
      scores = grader.score(batch)
    if failed := {part: n for part, n in scores.failures.items() if n}:
      part = next(iter(failed))
      raise DataError(
        f'eval.tasks, reward/{name}: {failed[part]} of {len(answers)} completions could not be '
        f'scored: {scores.reasons[part]}'
      )
    return [{'reward': float(x)} for x in scores.total]

  return Kind(
    _unused,
    (metric.mean('reward', f'reward {name}', form='number'),),
    has_answer=False,
    reads_all=True,
    score_all=score_all,
  )


def _unused(row: Row, answer: Answer) -> Mapping[str, float]:
  raise AssertionError(f'{row.place}: scored together with the other rows, not alone')


def _judge(name: str) -> Kind:
  function = named_object.load('eval.tasks', name)
  if not callable(function):
    raise named_object.wrong('eval.tasks', name, function, 'a function')
  return Kind(
    _unused,
    (metric.mean('win', 'win rate against the first model'),),
    has_answer=False,
    judge=function,
  )


def judged(
  rows: Sequence[Row],
  kind: Kind,
  results: Mapping[str, Sequence[Result]],
  beat: Callable[[], None],
) -> dict[str, list[Result]]:
  """Returns the results with the value `win`, the judge's view of each against the first model's.

  Args:
    rows: of the task.
    kind: whose `judge` is asked.
    results: of each model, in the order of rows, as many samples each.
    beat: called before each answer of the judge, for a watchdog.

  Raises:
    DataError: the judge raised an error, or returned no number from 0 to 1.
  """
  questions = {row.id: row for row in rows}
  first = next(iter(results.values()))
  out = {}
  for name, own in results.items():
    if len(own) != len(first):
      raise ConfigError(
        f'a judge compares as many completions of each model; {name} has {len(own)}'
      )
    out[name] = [
      dataclasses.replace(r, values={'win': (_win(kind, questions[r.id], f, r, beat),)})
      for f, r in zip(first, own, strict=True)
    ]
  return out


def _win(kind: Kind, row: Row, first: Result, second: Result, beat: Callable[[], None]) -> float:
  beat()
  texts = [r.response or r.prediction for r in (first, second)]
  if texts[0] == texts[1]:
    return 0.5
  wins = _ask(kind, row, texts[0], texts[1]), 1 - _ask(kind, row, texts[1], texts[0])
  return sum(wins) / 2


def _ask(kind: Kind, row: Row, first: str, second: str) -> float:
  try:
    found: Any = kind.judge(row.question, first, second)
  except StoppedEarly:  # SIGTERM, during the call
    raise
  except Exception as error:  # of a user's function
    raise DataError(f'{row.place}: the judge: {type(error).__name__}: {error}') from error
  try:
    share = math.nan if isinstance(found, str) else float(found)
  except (TypeError, ValueError):
    share = math.nan
  if not 0 <= share <= 1:
    raise DataError(f'{row.place}: the judge returned {found!r}; expected a number from 0 to 1')
  return share
