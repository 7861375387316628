"""Checks the form of eval/summary.json, so that a damaged file is named and not a traceback.

Single figures may be missing or null everywhere; what is checked are the records around them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

# Lists of records, and mappings of records, of a task.
_LISTS = ('metrics', 'differences', 'examples')
_MAPPINGS = ('scores', 'per_class', 'confusion', 'calibration', 'cost', 'seeds', 'by_source')
# Entries of records that are texts, and numbers; each may be missing or null.
_TASK = (('kind', 'group'), ('n', 'prompts', 'groups', 'samples'))
_METRIC = (('title', 'better', 'form'), ())
_DIFFERENCE = (('first', 'second', 'outcome', 'verdict'), ('rows_needed',))
_TEST = (('name',), ('only_first_right', 'only_second_right'))
_OVERLAP = ((), ('ngram', 'n', 'contaminated', 'near_duplicates', 'whole'))
_SHARE = (('class',), ('n', 'share', 'label_share'))
_COST = ((), ('seconds', 'tokens', 'rows'))


def _has(record: Mapping[str, Any], form: tuple[tuple[str, ...], tuple[str, ...]]) -> bool:
  """Returns whether the entries of a record are texts and numbers as the form wants them."""
  pairs = [(k, str) for k in form[0]] + [(k, (int, float)) for k in form[1]]
  return all(record.get(k) is None or isinstance(record[k], kind) for k, kind in pairs)


def damage(summary: Mapping[str, Any]) -> str:
  """Returns the place of the first entry that has not the form of version 2; '' without one."""
  return next((place for place, is_right in _entries(summary) if not is_right), '')


def _entries(summary: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
  """Yields (place, whether it is right); what follows a wrong one may not be asked for."""
  models = summary.get('models')
  yield 'models', isinstance(models, list) and all(isinstance(m, str) for m in models)
  tasks = summary.get('tasks')
  yield 'tasks', isinstance(tasks, dict)
  for name, task in (tasks or {}).items():
    for place, is_right in _task(task):
      yield f'tasks/{name}{place}', is_right
  gate = summary.get('gate')
  yield 'gate', gate is None or (isinstance(gate, dict) and _are_records(gate.get('checks')))
  yield 'verdict', isinstance(summary.get('verdict') or [], list)
  yield 'answers', _are_records(summary.get('answers'))


def _are_records(value: Any) -> bool:
  """Returns whether a value is a list of mappings, or nothing."""
  return value is None or (isinstance(value, list) and all(isinstance(x, dict) for x in value))


def _is_mapping(value: Any) -> bool:
  """Returns whether a value is a mapping of mappings, or nothing."""
  return value is None or (
    isinstance(value, dict) and all(isinstance(x, dict) for x in value.values())
  )


def _task(task: Any) -> Iterator[tuple[str, bool]]:
  yield '', isinstance(task, dict) and isinstance(task.get('task'), str)
  for key in _LISTS:
    yield f'/{key}', _are_records(task.get(key))
  for key in _MAPPINGS:
    yield f'/{key}', _is_mapping(task.get(key))
  for key in ('contamination', 'cut'):
    yield f'/{key}', isinstance(task.get(key) or {}, dict)
  yield '', _has(task, _TASK)
  overlap = task.get('contamination') or {}
  yield '/contamination', _has(overlap, _OVERLAP) and _is_mapping(overlap.get('scores_clean'))
  yield '/contamination', isinstance(overlap.get('against') or [], list)
  frequent = task.get('most_frequent') or {}
  yield '/most_frequent', isinstance(frequent, dict)
  yield '/most_frequent', isinstance(frequent.get('label') or {}, dict)
  yield '/most_frequent', _is_mapping(frequent.get('answers'))
  shares = [frequent.get('label') or {}, *(frequent.get('answers') or {}).values()]
  yield '/most_frequent', all(_has(found, _SHARE) for found in shares)
  yield '/cost', all(_has(found, _COST) for found in (task.get('cost') or {}).values())
  yield '/classes', isinstance(task.get('classes') or [], list)
  for metric in task.get('metrics') or []:
    yield '/metrics', isinstance(metric.get('name'), str) and _has(metric, _METRIC)
  for scores in (task.get('scores') or {}).values():
    yield '/scores', all(x is None or isinstance(x, dict) for x in scores.values())
  for found in task.get('differences') or []:
    yield '/differences', _is_mapping(found.get('metrics'))
    yield '/differences', isinstance(found.get('test') or {}, dict) and _has(found, _DIFFERENCE)
    yield '/differences', _has(found.get('test') or {}, _TEST)
  for key in ('per_class', 'seeds'):
    for found in (task.get(key) or {}).values():
      yield f'/{key}', _is_mapping(found)
  for matrix in (task.get('confusion') or {}).values():
    yield '/confusion', not matrix or _is_matrix(matrix)
  for found in (task.get('calibration') or {}).values():
    yield '/calibration', _are_records(found.get('bins'))
  for example in task.get('examples') or []:
    for key in ('responses', 'predictions', 'values'):
      yield '/examples', isinstance(example.get(key) or {}, dict)


def _is_matrix(found: Mapping[str, Any]) -> bool:
  """Returns whether the counts are as many as labels and predictions."""
  labels, predictions, counts = (found.get(k) for k in ('labels', 'predictions', 'counts'))
  if not all(isinstance(x, list) for x in (labels, predictions, counts)):
    return False
  rows = [r for r in counts if isinstance(r, list) and len(r) == len(predictions)]
  return len(rows) == len(counts) == len(labels) and all(
    isinstance(n, int) for row in rows for n in row
  )
