"""Finds out which files of a model folder go to the Hugging Face hub, and uploads them."""

import fnmatch
import logging
from pathlib import Path

from ftjax.families.hf_config import check_unquantized
from ftjax.hf import load, model_card, model_folder, peft_config, weight_files
from ftjax.hf.gguf_tokenizer import dump_json
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files as files_lib
from ftjax.storage import hub, hub_push

log = logging.getLogger(__name__)

_ADAPTER = (peft_config.CONFIG_FILE, model_folder.ADAPTER_WEIGHTS)
_BASE = 'base_model_name_or_path'
_FURTHER = (model_card.FILE, 'LICENSE*', 'NOTICE*', 'Modelfile', '*.gguf')


def check_place(folder: str) -> None:
  """Raises ConfigError for what is no folder of this machine."""
  if folder.endswith('.gguf'):
    raise ConfigError(
      f'--push uploads a folder, and {folder} is a file; give its folder as --source'
    )
  if files_lib.is_remote(folder):
    raise ConfigError(f'--push: {folder} is in a bucket; give a local --target to upload from')


def _adapter_config(folder: Path, base: str) -> bytes | None:
  """Returns adapter_config.json with another name of the base; None where it stays as it is.

  PEFT opens the base by the path that is recorded there. A path of this machine opens nothing
  elsewhere, and shows its folders to all who read the model.
  """
  path = folder / peft_config.CONFIG_FILE
  if not path.is_file() or not model_folder.is_adapter(folder):
    if base:
      raise ConfigError(f'--base={base} belongs to a merge; give its --target=DIR too')
    return None
  content = weight_files.parse_json(path.read_bytes(), str(path))
  recorded = content.get(_BASE) if isinstance(content, dict) else None
  if base and hub.is_name(base):
    name, revision = hub.split(base)
    return dump_json(content | {_BASE: name, 'revision': revision or None})
  if base != (recorded if base else ''):
    raise ConfigError(
      f'--base={base}: with --push expected the name of the base on the hub, org/name, or '
      f'{recorded}, which the adapter records'
    )
  if not base and isinstance(recorded, str) and recorded and not _is_on_hub(recorded):
    raise ConfigError(
      f'{path} names its base {recorded}, which is no name on the hub: whoever loads the uploaded '
      'adapter looks for it at that path. Give --base=org/name, the name of the '
      f'base on the hub, which is uploaded in its place; or --base={recorded}, if all who load '
      'the adapter have it there'
    )
  return None


def _is_on_hub(base: str) -> bool:
  """Returns whether the base of an adapter is meant as a name on the hub; some have no org."""
  return hub.is_name(base) or (hub.is_name(f'org/{base}') and not Path(base).exists())


def push(folder: str, name: str, is_public: bool, base: str = '') -> str:
  """Uploads a whole model folder as one commit and returns its address.

  Files that belong to no model stay here, with a line in the log. Model files of an older upload
  that this folder does not have are removed from the hub's newest commit; its history keeps them.

  Args:
    folder: local model folder, or PEFT folder.
    name: 'org/name' on the hub.
    is_public: see `hub_push.push`.
    base: of an adapter: its base's name on the hub, which is uploaded in place of the one that the
      folder records; or what it records, a path that others have too. '': as recorded, if that is a
      name on the hub.

  Raises:
    ConfigError: an adapter records a base that is not on the hub, and `base` is ''. DataError: the
      folder is no whole model. Both: see `hub_push.push`.
  """
  check_place(folder)
  found, left = _files(Path(folder))
  if (config := _adapter_config(Path(folder), base)) is not None:
    found[peft_config.CONFIG_FILE] = config
  if left:
    log.warning('%s: not uploaded, no part of a model: %s', folder, ', '.join(left))
  return hub_push.push(name, found, is_public, _is_model_file)


def _is_model_file(path: str) -> bool:
  inside, _, name = path.rpartition('/')
  if inside:
    return inside in model_folder.FOLDERS
  return name in _ADAPTER or model_folder.is_model_file(name)


def _files(folder: Path) -> tuple[dict[str, Path | bytes], list[str]]:
  """Returns the files to upload by their names in the repository, and the names that are left.

  Raises:
    DataError: no whole model; a link that leaves the folder.
  """
  if not folder.is_dir():
    raise DataError(f'{folder}: no such folder; --push uploads a model folder')
  _check_whole(folder)
  found: dict[str, Path | bytes] = {}
  left: list[str] = []
  for path in sorted(folder.iterdir()):
    if path.name in model_folder.FOLDERS and path.is_dir():
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
