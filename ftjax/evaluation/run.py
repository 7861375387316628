"""Runs a task on a model: one result a row, or a row and sample.

The model answers texts (model.py), so that nothing here depends on parameters, meshes or
compilation. Scores do not depend on batch size, padding or the order of rows.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from ftjax.cluster import processes
from ftjax.data.formats import Chat
from ftjax.evaluation import kinds, metric, result, tasks
from ftjax.evaluation.kind import CHOOSE, COMPLETE, Answer
from ftjax.evaluation.model import Draw, Likelihood, Model
from ftjax.evaluation.result import Result
from ftjax.evaluation.rows import Row
from ftjax.evaluation.shots import Shots
from ftjax.evaluation.tasks import Task
from ftjax.runtime.errors import DataError, NonFiniteError
from ftjax.storage import files

# A prompt without content (Zhao et al. 2021), after which priors of choices are scored.
_NO_CONTENT = 'N/A'
_OWN = 'base'  # the name of the one model in a file of `cached`


def alone(make: Callable[[], Any]) -> Any:
  """Returns what `make` returns: for `evaluate` where process 0 runs it without the others."""
  return make()


def evaluate(
  task: Task,
  model: Model,
  *,
  draw: Draw,
  title: str,
  shots: Shots | None = None,
  from_main: Callable[[Callable[[], Any]], Any] = processes.from_main,
) -> list[Result]:
  """Returns the results of all rows of a task, in its order, and shows a progress bar.

  Args:
    task: what is asked.
    model: under test.
    draw: how completions are drawn.
    title: whose results these are ('base', 'tuned'), for the bar and for messages.
    shots: examples that stand before every prompt; None: there are none.
    from_main: how scores that one process computes reach the others, which all wait for them;
      `alone` where process 0 evaluates without the others.

  Raises:
    DataError: a row that is too long for the model, or that its kind cannot score; values that are
      not those of its metrics.
    NonFiniteError: a log-probability that is no number.
  """
  respond = task.kind.respond
  total = len(task.rows) * (draw.samples if respond == COMPLETE else 1)
  with _bar(f'{task.name} {title}', total) as done:
    if respond == COMPLETE:
      answers = _complete(task, model, draw, shots, done)
    else:
      answers = [[a] for a in _score(task, model, title, shots, done)]
  flat = [
    (row, a, i) for row, own in zip(task.rows, answers, strict=True) for i, a in enumerate(own)
  ]
  values = _values(task, [row for row, _, _ in flat], [a for _, a, _ in flat], from_main)
  out = [_result(row, a, i, v) for (row, a, i), v in zip(flat, values, strict=True)]
  if task.kind.judge is None:  # now, not when the tuned model is compared
    metric.read_columns((*task.metrics, *task.kind.details), out, task.classes, task.name)
  return out


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
  with tqdm(total=total, desc=title, unit='row', disable=not processes.is_main()) as bar:
    yield bar.update


def _prompts(task: Task, shots: Shots | None) -> list[Chat | str]:
  """Returns what the model reads before each row's response; '' for whole texts."""
  asked = [row.asked if row.asked is not None else '' for row in task.rows]
  return [shots.before(a) for a in asked] if shots else asked


def _complete(task, model, draw, shots, done) -> list[list[Answer]]:
  places = [row.place for row in task.rows]
  found = model.complete(_prompts(task, shots), places, draw, done)
  out = []
  for row, completions in zip(task.rows, found, strict=True):
    own = []
    for c in completions:
      try:
        parsed = tasks.call(task.kind.parse, c.text, c.prompt, row)
        if not isinstance(parsed, str):
          raise ValueError(f'returned {parsed!r}; expected text')
      except ValueError as error:
        raise _fault(task, row, f'parse of the completion {c.text!r}', error) from error
      own.append(Answer(c.text, parsed, c.prompt, c.tokens, c.is_cut))
    out.append(own)
  return out


def _score(task, model, title, shots, done) -> list[Answer]:
  places = [row.place for row in task.rows]
  choices = [row.choices for row in task.rows]
  if task.kind.respond == CHOOSE:
    found = model.score(_prompts(task, shots), choices, places, done)
  else:
    texts = [(row, c) for row in task.rows for c in row.choices]
    flat = iter(model.score_texts([c for _, c in texts], [r.place for r, _ in texts], done))
    found = [tuple(next(flat) for _ in row.choices) for row in task.rows]
  priors: list[tuple[Likelihood, ...]] = [()] * len(choices)
  if task.kind.has_priors:
    empty = [_without_content(p) for p in _prompts(task, shots)]
    priors = model.score(empty, choices, places, lambda n: None)
  out = []
  for row, own, prior in zip(task.rows, found, priors, strict=True):
    if not all(math.isfinite(x.logp) for x in (*own, *prior)):
      logps = tuple(x.logp for x in (*own, *prior))
      raise NonFiniteError(f'{row.place}: the {title} model gives log-probabilities {logps}')
    try:
      chosen = row.choices[tasks.call(task.kind.choose, row, own, prior)]
    except (ValueError, TypeError, IndexError) as error:
      raise _fault(task, row, 'choose', error) from error
    tokens = sum(x.tokens for x in own)
    out.append(Answer(prediction=chosen, tokens=tokens, likelihoods=own, priors=prior))
  return out


def _without_content(prompt: Chat | str) -> Chat | str:
  if isinstance(prompt, str):
    return _NO_CONTENT
  last = {**prompt.messages[-1], 'content': _NO_CONTENT}
  return dataclasses.replace(prompt, messages=(*prompt.messages[:-1], last))


def _values(
  task: Task,
  rows: Sequence[Row],
  answers: Sequence[Answer],
  from_main: Callable[[Callable[[], Any]], Any],
) -> Sequence[Mapping[str, tuple[float, ...]]]:
  """Returns what the kind's score gives each answer; nothing yet for a judge."""
  kind = task.kind
  if kind.judge is not None:
    return [{}] * len(rows)
  if kind.score_all is not None:
    found = from_main(lambda: [dict(v) for v in kind.score_all(rows, answers)])
    return [kinds.values_of(v) for v in found]
  out = []
  for row, answer in zip(rows, answers, strict=True):
    try:
      found = kinds.values_of(tasks.call(kind.score, row, answer))
      if task.classes and kind.class_score is not None:
        found |= kinds.values_of(tasks.call(kind.class_score, row, answer))
      out.append(found)
    except ValueError as error:
      of = f'the completion {answer.text!r}' if answer.text else f'{answer.prediction!r}'
      raise _fault(task, row, f'score of {of}', error) from error
  return out


def _result(
  row: Row, answer: Answer, sample: int, values: Mapping[str, tuple[float, ...]]
) -> Result:
  return Result(
    id=row.id,
    label=row.answer,
    prediction=answer.prediction,
    values=values,
    scores=tuple(x.logp for x in answer.likelihoods),
    response=answer.text,
    sample=sample,
    tokens=answer.tokens,
    is_cut=answer.is_cut,
  )


def _fault(task: Task, row: Row, what: str, error: Exception) -> DataError:
  return DataError(f'{row.place}: {task.kind_name}: {what}: {error}')


def cache_key(
  kind: str, content: str, *, model: str, template: str, settings: Mapping[str, str | int | float]
) -> str:
  """Returns a name of all that results depend on: equal keys, equal results.

  Args:
    kind: of the task. content: digest of its rows.
    model: fingerprint of the weights.
    template: hash of tokenizer and chat template.
    settings: whatever else changes scores, such as compute_dtype, max_tokens and max_len.
  """
  parts = [tasks.VERSION, kind, content, model, template, sorted(settings.items())]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _cache_path(folder: str, key: str, name: str) -> str:
  return files.join(folder, f'{name}.{key}.jsonl')


def is_cached(folder: str, key: str, name: str) -> bool:
  """Returns whether `cached` will find results."""
  return files.exists(_cache_path(folder, key, name))


def cached(
  folder: str,
  key: str,
  name: str,
  make: Callable[[], Sequence[Result]],
  ids: Sequence[str] | None = None,
) -> Sequence[Result]:
  """Returns the results that `folder` has under a key; computes and stores them if they are not
  there.

  Args:
    name: of the task.
    ids: of its rows, where they are known.

  Raises:
    DataError: the file holds other rows than the task.
  """
  path = _cache_path(folder, key, name)
  if files.exists(path):
    results = result.load(path).get(_OWN, [])
    if ids is not None and list(dict.fromkeys(r.id for r in results)) != list(ids):
      raise DataError(f'{path}: its rows are not those of the task {name}; delete it to score anew')
    return results
  results = make()
  files.makedirs(folder)
  result.save(path, {_OWN: results})
  return results


@dataclasses.dataclass
class Cost:
  """What an evaluation took."""

  seconds: float = 0.0
  tokens: int = 0
  rows: int = 0

  @contextmanager
  def measured(self) -> Iterator[list[Result]]:
    """Adds the time of its block, and the results that the block puts into its list."""
    begun, results = time.perf_counter(), []
    yield results
    self.seconds += time.perf_counter() - begun
    self.tokens += sum(r.tokens for r in results)
    self.rows += len(results)
