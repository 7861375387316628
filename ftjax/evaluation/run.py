"""Evaluates one model on all rows of a task, and stores one result a row.

The model is given as functions, so that nothing here depends on parameters, meshes or compilation.
Scores do not depend on batch size, padding or the order of rows. tasks.py decides which responses
are right, report.py compares models.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from ftjax.cluster import processes
from ftjax.evaluation import tasks
from ftjax.evaluation.tasks import Row, Task
from ftjax.runtime.errors import DataError, NonFiniteError
from ftjax.storage import files


@dataclasses.dataclass(frozen=True)
class Functions:
  """One model, as evaluation sees it.

  Attributes:
    encode_prompt: a row -> ids of what the model reads, up to where the assistant begins.
    encode_choice: a row, a choice -> ids that follow where it is the response: the text and the
      stop token.
    score: (prompts, their choices' ids) -> float[B, C]: log p(choice | prompt) in nats. Always
      `batch_size` prompts with C choices each.
    generate: (prompts, max_tokens) -> for each the ids of the greedy completion, without the
      stop token. Always `batch_size` prompts.
    decode: ids of a completion -> text, without the tokens that end or frame it.
    prompt_text: ids of a prompt -> everything that the model reads.
  """

  encode_prompt: Callable[[Row], list[int]]
  encode_choice: Callable[[Row, str], list[int]]
  score: Callable[[list[list[int]], list[list[list[int]]]], np.ndarray]
  generate: Callable[[list[list[int]], int], list[list[int]]]
  decode: Callable[[list[int]], str]
  prompt_text: Callable[[list[int]], str]


@dataclasses.dataclass(frozen=True)
class Result:
  """The response of a model to one row.

  Attributes:
    id, label: the row's; the label is the right text.
    prediction: the choice with the largest score (the first of equal ones), or the generated text.
    right: whether that counts.
    scores: log-probability in nats of each choice, in the row's order; empty for a
      generated text.
  """

  id: str
  label: str
  prediction: str
  right: bool
  scores: tuple[float, ...]


def evaluate(
  task: Task,
  model: Functions,
  *,
  batch_size: int,
  max_len: int,
  max_tokens: int,
  title: str,
) -> list[Result]:
  """Returns the results of all rows of a task, in its order, and shows a progress bar.

  Args:
    batch_size: rows at once; `eval.batch_size`.
    max_len: the longest sequence, in tokens, that the model may see.
    max_tokens: the longest completion.
    title: whose results these are ('base', 'tuned'), for the bar and for messages.

  Raises:
    DataError: a row longer than max_len.
    NonFiniteError: a log-probability that is no number.
  """
  ask = _choose if tasks.find_kind(task.kind).is_right is None else _generate
  return ask(task, model, batch_size, max_len, max_tokens, title)


def _choose(task, model, batch_size, max_len, _, title) -> list[Result]:
  prompts = [model.encode_prompt(row) for row in task.rows]
  choices = [[model.encode_choice(row, c) for c in row.choices] for row in task.rows]
  for row, prompt, ids in zip(task.rows, prompts, choices, strict=True):
    if not prompt or not all(ids):
      raise DataError(f'{row.place}: the prompt or a choice of {list(row.choices)} has no tokens')
    _check_length(row, len(prompt) + max(map(len, ids)), max_len)
  # Rows with as many choices together, like lengths together.
  order = sorted(range(len(prompts)), key=lambda i: (len(choices[i]), len(prompts[i])))
  scores: list[tuple[float, ...]] = [()] * len(prompts)
  with tqdm(
    total=len(prompts), desc=f'{task.name} {title}', unit='row', disable=not processes.is_main()
  ) as bar:
    for _, group in itertools.groupby(order, key=lambda i: len(choices[i])):
      for index in _batches(list(group), batch_size):
        padded = [*index, *[index[-1]] * (batch_size - len(index))]
        found = model.score([prompts[i] for i in padded], [choices[i] for i in padded])
        for i, row_scores in zip(index, np.asarray(found, np.float64), strict=False):
          scores[i] = tuple(row_scores.tolist())
        bar.update(len(index))
  results = []
  for row, own in zip(task.rows, scores, strict=True):
    if not all(math.isfinite(s) for s in own):
      raise NonFiniteError(f'{row.place}: the {title} model gives log-probabilities {own}')
    choice = row.choices[own.index(max(own))]
    results.append(Result(row.id, row.answer, choice, choice == row.answer, own))
  return results


def _batches(items: list[int], size: int) -> list[list[int]]:
  return [items[i : i + size] for i in range(0, len(items), size)]


def _check_length(row: Row, length: int, max_len: int) -> None:
  if length > max_len:
    raise DataError(
      f'{row.place}: {length} tokens with its answer, the model may see {max_len}: '
      'shorten the row or take it out'
    )


def _generate(task, model, batch_size, max_len, max_tokens, title) -> list[Result]:
  prompts = [model.encode_prompt(row) for row in task.rows]
  for row, prompt in zip(task.rows, prompts, strict=True):
    _check_length(row, len(prompt) + max_tokens, max_len)
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together
  texts = [''] * len(prompts)
  with tqdm(
    total=len(prompts), desc=f'{task.name} {title}', unit='row', disable=not processes.is_main()
  ) as bar:
    for index in _batches(order, batch_size):
      spare = [prompts[index[-1]]] * (batch_size - len(index))
      outputs = model.generate([prompts[i] for i in index] + spare, max_tokens)
      for i, ids in zip(index, outputs[: len(index)], strict=True):
        texts[i] = model.decode(ids).strip()
      bar.update(len(index))
  kind, results = tasks.find_kind(task.kind), []
  for row, text, ids in zip(task.rows, texts, prompts, strict=True):
    try:
      right = tasks.call(kind.is_right, text, model.prompt_text(ids), row.answer)
      if not isinstance(right, bool | np.bool_):
        raise ValueError(f'returned {right!r}; expected True or False')
    except ValueError as error:
      raise DataError(
        f'{row.place}: {task.kind}: is_right of the completion {text!r}: {error}'
      ) from error
    results.append(Result(row.id, row.answer, text, bool(right), ()))
  return results


def cache_key(
  task: Task, *, model: str, template: str, settings: Mapping[str, str | int | float]
) -> str:
  """Returns a name of all that results depend on: equal keys, equal results.

  Args:
    model: fingerprint of the weights.
    template: hash of tokenizer and chat template.
    settings: whatever else changes scores, such as compute_dtype, max_tokens and max_len.
  """
  parts = [tasks.VERSION, task.kind, task.digest, model, template, sorted(settings.items())]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def save(path: str, results: Mapping[str, Sequence[Result]]) -> None:
  """Writes `eval/<task>.jsonl`, a row per model and example: model, id, label, prediction, right,
  scores.

  Args:
    results: by model, 'base' and 'tuned'.
  """
  rows = [{'model': m, **dataclasses.asdict(r)} for m, rs in results.items() for r in rs]
  text = ''.join(json.dumps(r, ensure_ascii=False, allow_nan=False) + '\n' for r in rows)
  files.write_text(path, text)


def load(path: str) -> dict[str, list[Result]]:
  """Returns what `save` wrote, bitwise the same scores.

  Raises:
    DataError: a line that is no result; names it.
  """
  out: dict[str, list[Result]] = {}
  for number, line in enumerate(files.read_text(path).split('\n'), 1):
    if not line:
      continue
    try:
      row = json.loads(line)
      model = row.pop('model')
      result = Result(**(row | {'scores': tuple(row['scores'])}))
    except (ValueError, KeyError, TypeError) as e:
      raise DataError(f'{path}:{number}: not a result ({e}); delete the file to score anew') from e
    out.setdefault(model, []).append(result)
  return out


def _cache_path(folder: str, key: str, task: Task) -> str:
  return files.join(folder, f'{task.name}.{key}.jsonl')


def is_cached(folder: str, key: str, task: Task) -> bool:
  """Returns whether `cached` will find results."""
  return files.exists(_cache_path(folder, key, task))


def cached(
  folder: str, key: str, task: Task, make: Callable[[], list[Result]]
) -> tuple[list[Result], bool]:
  """Returns the base's results under `key`; computes and stores them in `folder` if needed.

  Returns:
    (results in the order of the task's rows, whether they were there).

  Raises:
    DataError: the file holds other rows than the task.
  """
  path = _cache_path(folder, key, task)
  if files.exists(path):
    results = load(path).get('base', [])
    if [r.id for r in results] != [row.id for row in task.rows]:
      raise DataError(f'{path}: its rows are not those of {task.path}; delete it to score anew')
    return results, True
  results = make()
  files.makedirs(folder)
  save(path, {'base': results})
  return results, False
