"""What a tuning cost outside of its task: the same few texts, replies and questions for every run.

general_texts: perplexity of plain English, code, sums and dialogue, and the KL divergence of the
tuned model from the base on them. general_replies: perplexity of replies to everyday requests.
general_answers: what the model answers to open questions, and whether it still answers in more
than one word. The rows are in general_texts/, written for this.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftjax.evaluation import kinds, metric, tasks
from ftjax.evaluation.kind import Answer, Kind
from ftjax.evaluation.metric import mean, proportion
from ftjax.evaluation.metrics import perplexity
from ftjax.evaluation.result import Result
from ftjax.evaluation.rows import Row
from ftjax.evaluation.tasks import Task

GROUP = 'general'
TEXTS_NAME = 'general_texts'
MAX_TOKENS = 64  # of an answer to an open question
_FOLDER = Path(__file__).with_name('general_texts')


def _plain(row: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns a row of one user turn as plain text, for models without a chat template."""
  (turn,) = row['messages']
  out = {k: v for k, v in row.items() if k != 'messages'}
  out['prompt'] = f'Question: {turn["content"]}\nAnswer:'
  if 'answer' in row:
    out['answer'] = f' {row["answer"]}'
  return out


def _score_answer(row: Row, answer: Answer) -> Mapping[str, float]:
  del row
  words = len(answer.text.split())
  return {'words': float(words), 'one_word': float(words <= 1)}


DIVERGENCE = metric.optional_ratio(
  'divergence', 'KL from the base, nats per token', better='lower', form='number'
)

# `add_divergences` gives the values that DIVERGENCE reads: they need both models at once.
TEXTS = dataclasses.replace(
  kinds.KINDS['perplexity'], metrics=(*perplexity.METRICS, DIVERGENCE), reads=('text',)
)
REPLIES = kinds.KINDS['answer_perplexity']
REPLIES_PLAIN = dataclasses.replace(REPLIES, read=_plain)
ANSWERS = Kind(
  _score_answer,
  (
    proportion('one_word', 'answers of at most one word', better='lower'),
    mean('words', 'words of an answer', better='', form='number'),
  ),
  has_answer=False,
)
ANSWERS_PLAIN = dataclasses.replace(ANSWERS, read=_plain)


def load(has_template: bool) -> tuple[Task, ...]:
  """Returns the three tasks, which run like any other.

  Args:
    has_template: whether the model has a chat template; without one the requests are plain text.
  """
  form = '' if has_template else '_PLAIN'
  found = (
    (TEXTS_NAME, 'TEXTS', 'texts'),
    ('general_replies', f'REPLIES{form}', 'replies'),
    ('general_answers', f'ANSWERS{form}', 'questions'),
  )
  out = []
  for name, kind, file in found:
    task = tasks.load_task(name, f'{__name__}:{kind}', str(_FOLDER / f'{file}.jsonl'))
    out.append(dataclasses.replace(task, group=GROUP))
  return tuple(out)


def texts(task: Task) -> tuple[str, ...]:
  """Returns the texts of general_texts, for experiment.divergence."""
  return tuple(row.choices[0] for row in task.rows)


def add_divergences(
  results: Sequence[Result], sums: Sequence[tuple[float, int]] | None
) -> list[Result]:
  """Returns results of general_texts with the values that DIVERGENCE reads.

  Args:
    results: one a text.
    sums: (KL from the base in nats, summed over tokens; tokens) of each text; None: these are the
      base's own results, whose divergence is 0.

  Raises:
    ValueError: of other texts.
  """
  if sums is None:
    sums = [(0.0, r.tokens) for r in results]
  return [
    dataclasses.replace(r, values={**r.values, 'divergence': (float(kl), float(tokens))})
    for r, (kl, tokens) in zip(results, sums, strict=True)
  ]
