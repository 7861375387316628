"""Finds out which files of a model folder go to the Hugging Face hub, and uploads them."""

import fnmatch
import logging
from pathlib import Path

from ftjax.families.hf_config import check_unquantized
from ftjax.hf import load, model_card, model_folder, weight_files
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files as files_lib
from ftjax.storage import hub_push

log = logging.getLogger(__name__)

_ADAPTER = ('adapter_config.json', 'adapter_model.safetensors')
_FURTHER = (model_card.FILE, 'LICENSE*', 'NOTICE*', 'Modelfile', '*.gguf')


def check(folder: str) -> None:
  """Raises ConfigError for what is no folder of this machine."""
  if folder.endswith('.gguf'):
    raise ConfigError(
      f'--push uploads a folder, and {folder} is a file; give its folder as --source'
    )
  if files_lib.is_remote(folder):
    raise ConfigError(f'--push: {folder} is in a bucket; give a local --target to upload from')


def push(folder: str, name: str, is_public: bool) -> str:
  """Uploads a whole model folder as one commit and returns its address.

  Files that belong to no model stay here, with a line in the log. Model files of an older upload
  that this folder does not have are removed from the hub's newest commit; its history keeps them.

  Args:
    folder: local model folder, or PEFT folder.
    name: 'org/name' on the hub.
    is_public: see `hub_push.push`.

  Raises:
    DataError: the folder is no whole model. ConfigError, DataError: see `hub_push.push`.
  """
  check(folder)
  found, left = _files(Path(folder))
  if left:
    log.warning('%s: not uploaded, no part of a model: %s', folder, ', '.join(left))
  return hub_push.push(name, found, is_public, _is_model_file)


def _is_model_file(path: str) -> bool:
  inside, _, name = path.rpartition('/')
  if inside:
    return inside == model_folder.TEMPLATES
  return name in _ADAPTER or model_folder.is_model_file(name)


def _files(folder: Path) -> tuple[dict[str, Path], list[str]]:
  """Returns the files to upload by their names in the repository, and the names that are left.

  Raises:
    DataError: no whole model; a link that leaves the folder.
  """
  if not folder.is_dir():
    raise DataError(f'{folder}: no such folder; --push uploads a model folder')
  _check_whole(folder)
  found, left = {}, []
  for path in sorted(folder.iterdir()):
    if path.name == model_folder.TEMPLATES and path.is_dir():
      found |= {
        f'{path.name}/{p.name}': weight_files.file_inside(folder, p.name, path.name)
        for p in sorted(path.iterdir())
      }
    elif path.is_file() and (
      _is_model_file(path.name) or any(fnmatch.fnmatchcase(path.name, f) for f in _FURTHER)
    ):
      found[path.name] = weight_files.file_inside(folder, path.name)
    else:
      left.append(path.name)
  return found, left


def _check_whole(folder: Path) -> None:
  """Raises DataError where weights or config are missing or damaged."""
  if all((folder / name).is_file() for name in _ADAPTER):
    return
  if not (folder / 'config.json').is_file() and model_folder.gguf_file(folder) is None:
    raise model_folder.no_config(folder)
  check_unquantized(load.read_config(folder))
  load.open_source(folder)
