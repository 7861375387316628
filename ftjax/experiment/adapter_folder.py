"""The model of a PEFT folder before its weights: the base that it names, under its adapter."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ftjax.experiment.model import Model, open_model
from ftjax.families import label_head, table
from ftjax.hf import label_files, load, sentence_files
from ftjax.hf.label_files import EMBEDDING, Labels
from ftjax.hf.peft import PeftFolder
from ftjax.models.architecture import Architecture
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files, hub


def architecture(folder: PeftFolder, family: str) -> Architecture:
  """Returns the architecture of base and adapter; family: value of model.family.

  Raises:
    ConfigError, DataError: see `open_adapter`.
  """
  config = load.read_config(_base_path(folder, ''))
  labels = _labels(folder, config, family)
  if labels is None:
    plain = dataclasses.replace(table.architecture(config, family), num_labels=0)
    return folder.architecture(plain)
  own = table.architecture(config, family).family
  return folder.architecture(table.architecture(label_files.labeled(own, config, labels), family))


def _labels(folder: PeftFolder, config: Mapping[str, Any], family: str) -> Labels | None:
  """Returns the labels that an adapter gives; None of a language model.

  config: config.json of the base.
  """
  task = folder.config.task
  if folder.config.is_bare:
    return Labels(EMBEDDING, pool=sentence_files.find_pool(folder.place))
  if not task or task == 'span':
    return Labels(task) if task else None
  any_number = Labels(task, ('0', '1'))
  own = table.architecture(config, family).family
  labeled = table.architecture(label_files.labeled(own, config, any_number), family)
  count, names = folder.count_labels(labeled), folder.base.labels
  if count == 1 and task == 'sequence' and not names:
    return label_files.REWARD
  if names and len(names) != count:
    raise DataError(f'{folder.place}: {count} labels, and names of {len(names)}: {list(names)}')
  return Labels(task, names or label_head.default_names(count), folder.base.problem)


def _base_path(folder: PeftFolder, base: str) -> str:
  path = base or folder.base.path
  if not path:
    raise ConfigError(f'{folder.place}: the adapter names no base; give its path with --base')
  if not files.exists(path) and not hub.is_name(path):
    raise DataError(
      f'{folder.place}: its base, {path}, is not there (a relative path counts from the current '
      'folder); give the path with --base'
    )
  return path


def open_adapter(folder: PeftFolder, base: str, family: str) -> Model:
  """Returns the model of base and adapter: with the adapter's tokenizer where the folder has one.

  Args:
    folder: the adapter's.
    base: path of the base; '': the one that the folder names. A relative path counts from the
      current folder, as PEFT has it.
    family: value of model.family.

  Raises:
    ConfigError: no base is named.
    DataError: the base is not there, or the adapter does not fit it.
  """
  path = _base_path(folder, base)
  own = load.tokenizer_files(folder.place)
  model = open_model(
    path,
    {},
    0,
    _labels(folder, load.read_config(path), family),
    family=family,
    tokenizer_files=own if 'tokenizer.json' in own else None,
  )
  return dataclasses.replace(model, arch=folder.architecture(model.arch.plain()))
