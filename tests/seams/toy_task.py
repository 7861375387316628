"""Toy evaluation tasks outside of ftjax: a kind with a measure of its own, on rows {"question",
"result"}; a reward; and a judge.
"""

from ftjax.evaluation import metric
from ftjax.evaluation.kind import Kind


def read(row):
  return {'id': row['number'], 'prompt': row['question'], 'answer': row['result']}


def check(row):
  if len(row.answer) > 9:
    raise ValueError(f'{row.answer!r} is too long')


def score(row, answer):
  assert answer.prompt
  return {'right': len(answer.text) >= len(row.answer), 'length': len(answer.text)}


AS_LONG = Kind(
  score,
  (metric.proportion('right', 'long enough'), metric.mean('length', 'mean length', form='number')),
  read=read,
  check=check,
)


def count_letters(completions, level=None):
  return [len(c) for c in completions]


def prefer_short(prompt, first, second):
  return float(len(second) < len(first))
