"""Probabilities of labels from a cross-validation (python -m ftjax.study, study.kind=kfold): what
models gave to rows that they were not trained on. The audit looks for label errors by them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ftjax.audit.labels import Given
from ftjax.evaluation.comparison import TUNED
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files

_EXPECTED = 'expected STUDY/out_of_fold/TASK.jsonl, which a study of the kind kfold writes'


def read(path: str) -> Given:
  """Returns {place of a row: {label: probability}}, the mean over repeats of softmax of the
  log-probabilities of the choices under the tuned model that has not seen the row.

  Args:
    path: STUDY/out_of_fold/TASK.jsonl; the choices are read from STUDY/folds/TASK.jsonl.

  Raises:
    ConfigError: a file that is not there, or a task without log-probabilities of choices.
    DataError: a line that is no result.
  """
  folder, _, name = path.rpartition('/')
  tasks = files.join(folder.rpartition('/')[0] or '.', 'folds', name)
  for file in (path, tasks):
    if not files.exists(file):
      raise ConfigError(f'--out_of_fold={path}: {file} is not there; {_EXPECTED}')
  choices = {str(row.get('id')): row.get('choices') for _, row in _lines(tasks)}
  found: dict[str, list[dict[str, float]]] = {}
  for place, row in _lines(path):
    if row.get('model') != TUNED:
      continue
    own, scores = choices.get(str(row.get('id'))), row.get('scores')
    if not scores or not own:
      raise ConfigError(
        f'--out_of_fold={path}: the task has no log-probabilities of choices; name one of the kind '
        'choice in eval.tasks of the study'
      )
    if len(own) != len(scores) or 'place' not in row:
      raise DataError(f'{place}: {len(scores)} scores for {len(own)} choices; {_EXPECTED}')
    values = np.exp(np.asarray(scores, np.float64) - max(scores))
    shares = dict(zip(map(str, own), (values / values.sum()).tolist(), strict=True))
    found.setdefault(str(row['place']), []).append(shares)
  if not found:
    raise ConfigError(f'--out_of_fold={path}: no result of a tuned model in it; {_EXPECTED}')
  return {
    place: {label: float(np.mean([r.get(label, 0.0) for r in rows])) for label in rows[0]}
    for place, rows in found.items()
  }


def _lines(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Yields ('file:line', object) of a file of JSON objects."""
  for number, line in enumerate(files.read_text(path).split('\n'), 1):
    if not line:
      continue
    try:
      row = json.loads(line)
    except ValueError as error:
      raise DataError(f'{path}:{number}: not JSON: {error}; {_EXPECTED}') from error
    if not isinstance(row, dict):
      raise DataError(f'{path}:{number}: not an object; {_EXPECTED}')
    yield f'{path}:{number}', row
