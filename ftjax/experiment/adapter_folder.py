"""The model of a PEFT folder before its weights: the base that it names, under its adapter."""

import dataclasses

from ftjax.experiment.model import Model, open_model
from ftjax.families import table
from ftjax.hf import load
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
  return folder.architecture(dataclasses.replace(table.architecture(config, family), num_labels=0))


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
    labels=int(folder.config.labels),
    family=family,
    tokenizer_files=own if 'tokenizer.json' in own else None,
  )
  plain = dataclasses.replace(model.arch.plain(), num_labels=0)
  return dataclasses.replace(model, arch=folder.architecture(plain))
