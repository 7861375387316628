"""Turns the files of a model into those of a model with labels, such as a reward model:
transformers' `AutoModelForSequenceClassification` and its like.

Of a decoder transformers takes the labels of a sequence at the last token that is not
`pad_token_id`. If that id also ended a completion, it would take them at the token before it; so
another special token is named."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ftjax.data.tokenizer import Tokenizer
from ftjax.families import label_head, table
from ftjax.families.family import Family
from ftjax.families.hf_config import HfConfig
from ftjax.hf.gguf_tokenizer import dump_json
from ftjax.hf.weight_files import parse_json
from ftjax.runtime.errors import ConfigError, DataError

EMBEDDING = 'embedding'
PROBLEMS = ('single_label_classification', 'multi_label_classification', 'regression')


@dataclasses.dataclass(frozen=True)
class Labels:
  """The labels that a model is given.

  task: one of architecture.TASKS, or EMBEDDING for a model without a head, whose states make
  vectors of texts. names: in the order of their numbers; of a span () for begin and end. problem:
  what transformers' loss makes of those of a sequence, one of PROBLEMS; '' for none.
  pool, max_tokens: of vectors, see sentence_files.files; pool '' where it is not known yet.
  """

  task: str
  names: tuple[str, ...] = ()
  problem: str = ''
  pool: str = ''
  max_tokens: int = 0

  @property
  def is_embedding(self) -> bool:
    """Whether the model has no head, and gives vectors."""
    return self.task == EMBEDDING

  def __post_init__(self):
    if self.is_embedding:
      return
    if self.task not in label_head.CLASSES:
      raise ValueError(f'task={self.task!r}; expected {", ".join(label_head.CLASSES)}')
    if self.problem not in ('', *PROBLEMS):
      raise ValueError(f'problem={self.problem!r}; expected {", ".join(PROBLEMS)}')
    if self.task != 'span' and not self.names:
      raise ValueError('no names of labels')
    if len({*self.names}) != len(self.names):
      raise ValueError(f'two labels of {self.names} have one name')


REWARD = Labels('sequence', ('reward',), 'regression')


def labeled(family: str, config: Mapping[str, Any], labels: Labels) -> dict[str, Any]:
  """Returns the config.json of the model with labels made from another one.

  Args:
    family: name of the model's family.
    config: the other model's.
    labels: of the new model.

  Raises:
    ConfigError: transformers has no class of the family for the task.
  """
  known = table.named(family)
  if not known.tasks:
    raise ConfigError(
      f'the family {family!r} takes neither labels nor a score here; give a decoder or an encoder '
      '(docs/families.md)'
    )
  if labels.is_embedding:
    return _bare(known, config)
  if labels.task not in known.tasks:
    raise ConfigError(
      f'the family {family!r} takes no labels of a {labels.task}: transformers has no '
      f'{known.hf_class}{label_head.CLASSES[labels.task]}; it takes those of a '
      f'{" or a ".join(known.tasks)}'
    )
  name = table.hf_class(family, label_head.CLASSES[labels.task])
  out = dict(config) | {'architectures': [name]}
  for key in ('num_labels', 'id2label', 'label2id', 'problem_type'):
    out.pop(key, None)
  if labels.names:
    out |= label_head.label_keys(labels.names)
  return out | ({'problem_type': labels.problem} if labels.problem else {})


def _bare(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config.json of a model whose states are read: an encoder has no head, and a decoder
  keeps that of a language model, which its files hold.

  Raises:
    ConfigError: a decoder with labels.
  """
  if family.is_encoder:
    gone = ('num_labels', 'id2label', 'label2id', 'problem_type')
    kept = {k: v for k, v in config.items() if k not in gone}
    return kept | {'architectures': [f'{family.hf_class}Model']}
  if task := label_head.task(HfConfig(dict(config))):
    raise ConfigError(
      f'the model gives labels of a {task}; vectors of texts need a language model or an encoder'
    )
  return dict(config)


def describe(
  family: str,
  files: Mapping[str, bytes],
  config: Mapping[str, Any],
  tokenizer: Tokenizer,
  stop_ids: tuple[int, ...],
  labels: Labels = REWARD,
) -> tuple[dict[str, bytes], dict[str, Any]]:
  """Returns (tokenizer files, config.json) of the model with labels made from another one.

  Args:
    family: name of the model's family.
    files, config: the other model's.
    tokenizer: made from the files.
    stop_ids: tokens that end a completion.
    labels: of the new model.

  Raises:
    ConfigError: transformers has no class of the family for the task.
    DataError: no special token is left to pad with.
  """
  out = labeled(family, config, labels)
  if table.named(family).is_encoder or labels.task != 'sequence':
    return dict(files), out
  pad = _padding(config, tokenizer, stop_ids)
  found, text = dict(files), tokenizer.token(pad)
  for name in ('tokenizer_config.json', 'special_tokens_map.json'):
    content = parse_json(files[name], name) if name in files else None
    if content and (name == 'tokenizer_config.json' or 'pad_token' in content):
      found[name] = dump_json(content | {'pad_token': text})
  return found, out | {'pad_token_id': pad}


def _padding(config: Mapping[str, Any], tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> int:
  """Returns the id of a special token that ends no completion."""
  named = config.get('pad_token_id')
  candidates = [i for i in (named, tokenizer.pad_id) if i is not None]
  candidates += sorted(tokenizer.special_ids)
  pad = next((i for i in candidates if i not in stop_ids), None)
  if pad is None:
    raise DataError(
      f'{tokenizer.name}: every special token ends a completion; add one to pad with, since a '
      'sequence is read at the last token that is not padding'
    )
  return pad
