"""Label heads in a config.json: the class that `architectures` names, and the labels' names."""

from collections.abc import Mapping
from typing import Any

from ftjax.families.hf_config import HfConfig
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import Architecture, BlockSpec, ScoreHead
from ftjax.runtime.errors import DataError

# {task: what the name of transformers' class ends with}.
CLASSES = {
  'sequence': 'ForSequenceClassification',
  'token': 'ForTokenClassification',
  'span': 'ForQuestionAnswering',
}


def classes(c: HfConfig) -> list[str]:
  """Returns the names in `architectures`. Raises DataError where it is no list of texts."""
  found = c.get('architectures') or []
  if not isinstance(found, list) or not all(isinstance(a, str) for a in found):
    raise DataError(f'config.json: architectures={found!r}; expected a list of class names')
  return found


def task(c: HfConfig) -> str:
  """Returns the task of a config.json, one of architecture.TASKS; '' for a language model."""
  found = [t for t, name in CLASSES.items() if any(name in a for a in classes(c))]
  return found[0] if found else ''


def read(c: HfConfig, score_head: ScoreHead) -> dict[str, Any]:
  """Returns the fields of an Architecture with labels, {} for a language model.

  Args:
    c: the config.json.
    score_head: of its task, as the family has it.

  Raises:
    DataError: labels that do not count from 0, or another number of them than num_labels.
  """
  kind = task(c)
  if not kind:
    return {}
  names = _names(c)
  count = c.count('num_labels', len(names) or 2)  # transformers' default
  if names and len(names) != count:
    raise DataError(f'config.json: num_labels={count} and id2label has {len(names)} entries')
  if kind == 'span' and count != 2:
    raise DataError(
      f'config.json: {count} labels of {classes(c)[0]}; expected 2, for where an answer begins and '
      'ends'
    )
  is_default = count == 1 or kind == 'span' or names == default_names(count)
  return {
    'num_labels': count,
    'label_task': kind,
    'score_head': score_head,
    'labels': () if is_default else names,
  }


def _names(c: HfConfig) -> tuple[str, ...]:
  """Returns the names in id2label in the order of their numbers."""
  found = c.mapping('id2label')
  try:
    by_number = {int(key): str(name) for key, name in found.items()}
  except ValueError:
    by_number = {}
  if sorted(by_number) != list(range(len(found))):
    raise DataError(
      f'config.json: id2label={found!r}; expected a name for each of 0, 1, 2, ... without a gap'
    )
  return tuple(by_number[i] for i in range(len(found)))


def default_names(count: int) -> tuple[str, ...]:
  """Returns transformers' names of labels that have none."""
  return tuple(f'LABEL_{i}' for i in range(count))


def write(arch: Architecture, hf_class: str) -> dict[str, Any]:
  """Returns the keys of a config.json of a label model, {} of a language model.

  hf_class: the name of its class in transformers.
  """
  if not arch.num_labels:
    return {}
  return {'architectures': [hf_class]} | label_keys(arch.labels or default_names(arch.num_labels))


def label_keys(names: tuple[str, ...]) -> dict[str, Mapping]:
  """Returns id2label and label2id."""
  return {
    'id2label': {str(i): name for i, name in enumerate(names)},
    'label2id': {name: i for i, name in enumerate(names)},
  }


def decoder_head(c: HfConfig, kind: str) -> ScoreHead:
  """Returns the label head of a decoder in transformers: a map of the last token of a sequence
  without a bias, or of each token with one.
  """
  del c
  return ScoreHead() if kind == 'sequence' else ScoreHead(pool='each', bias=True)


def is_task(*tasks: str):
  """Returns a condition of tensor_map.Row: whether the labels of a model are for one of `tasks`."""

  def needs(arch: Architecture, spec: BlockSpec | None) -> bool:
    del spec
    return arch.task in tasks

  return needs


def linear(hf: str, leaf: str, axes: str, needs) -> tuple[Row, Row]:
  """Returns the rows of the weight and the bias of torch's linear map around the blocks.

  axes: those of the weight in the file, outputs first, a letter each: 'RD' for labels.
  """
  out, inner = axes
  ours = f'{out}{inner}' if leaf == 'score' else f'{inner}{out}'
  return (
    Row(f'{hf}.weight', f'{out} {inner}', f'{leaf}/w', ours, needs),
    Row(f'{hf}.bias', out, f'{leaf}/b', out, needs),
  )
