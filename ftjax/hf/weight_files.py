"""Finds the safetensors files that are the weights of a HF folder, and reads its JSON files.

A folder is hostile until checked: names are plain names inside it, and links may not leave it. A
folder that could be read as two models is refused.
"""

import json
import os
from pathlib import Path
from typing import Any

from ftjax.runtime import strict_json
from ftjax.runtime.errors import DataError
from ftjax.storage import files

INDEX_FILE = 'model.safetensors.index.json'
SINGLE_FILE = 'model.safetensors'
MAX_HEADER_BYTES = 100_000_000
PICKLED = (
  ', which can run code when loaded and are never read here; expected safetensors. Convert once, '
  'where torch is installed: '
  'AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DIR, safe_serialization=True)'
)


def _read_json(path: Path, limit: int = MAX_HEADER_BYTES) -> Any:
  if path.stat().st_size > limit:
    raise DataError(
      f'{path}: {path.stat().st_size} bytes; a JSON of at most {limit} bytes was expected'
    )
  return parse_json(path.read_bytes(), str(path))


def parse_json(text: bytes, place: str) -> Any:
  """Returns the value of a JSON text; its failure is a DataError with file and line.

  Repeated keys are refused.
  """
  try:
    return strict_json.loads(text.decode())
  except UnicodeDecodeError as e:
    raise DataError(f'{place}: not UTF-8 at byte {e.start}') from e
  except strict_json.RepeatedKey as e:
    raise DataError(f'{place}: {e}') from e
  except json.JSONDecodeError as e:
    raise DataError(f'{place}:{e.lineno}: not JSON: {e.msg}') from e
  except ValueError as e:  # a number of more than 4,300 digits
    raise DataError(f'{place}: not JSON: {e}') from e
  except RecursionError as e:
    raise DataError(f'{place}: JSON nested too deep') from e


def _check_plain(folder: Path, name: Any) -> None:
  ok = isinstance(name, str) and name not in ('', '.', '..') and not any(c in name for c in '/\\\0')
  if not ok:
    raise DataError(
      f'{folder}: file name {name!r} is refused; a plain name, without folders, is expected'
    )


def file_inside(folder: Path, name: Any, inside: str = '') -> Path:
  """Returns the file of a name that a model folder gives.

  It is refused unless it is a plain name inside the folder, or inside its subfolder `inside`.

  A symbolic link may leave the folder in one case, the hub's cache: `CACHE/snapshots/REVISION/x`
  points into `CACHE/blobs/`, and both ends are checked after all links are resolved.
  """
  _check_plain(folder, name)
  path = folder / inside / name if inside else folder / name
  if not path.is_file():
    raise DataError(f'{folder}: {name} is missing (unfinished download?)')
  if files.is_remote(path):
    return path  # a plain name below a prefix; buckets have no links
  real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
  # Only a folder named snapshots/REVISION has a blobs folder of its own: elsewhere "../../blobs" is
  # nobody's cache.
  in_hub_cache = home.parent.name == 'snapshots' and real.parent == home.parent.parent / 'blobs'
  own = home / inside if inside else home
  if real.parent != own and not in_hub_cache:
    raise DataError(
      f'{path}: the link leaves the model folder, to {real}; refused. Copy the file into the folder'
    )
  return path


def weight_files(folder: Path) -> list[Path]:
  """Returns the safetensors files of a HF folder in the order of their names: model.safetensors, or
  the shards that its index names.

  Raises:
    DataError: none there (with what to do about `.bin` files), two models in one folder, a bad
      index, or a shard name that is refused.
  """
  single, index = folder / SINGLE_FILE, folder / INDEX_FILE
  has_single, has_index = single.exists(), index.exists()
  _check_adapter(folder, has_single or has_index)
  if has_index:
    return _shards(folder, has_single)
  if has_single:
    return [file_inside(folder, SINGLE_FILE)]
  if found := sorted(p.name for p in folder.glob('*.safetensors')):
    raise DataError(
      f'{folder}: holds {found[0]}, but neither {SINGLE_FILE} nor {INDEX_FILE}, which says where '
      'each tensor is (unfinished download?)'
    )
  if any(folder.glob('*.bin')) or any(folder.glob('*.pth')):
    raise DataError(f'{folder}: only pickled weights (.bin, .pth){PICKLED}')
  raise DataError(f'{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there')


def _shards(folder: Path, has_single: bool) -> list[Path]:
  """Returns the files that an index names."""
  listed = list(weight_map(folder).values())
  for name in listed:
    _check_plain(folder, name)
  names = sorted(set(listed))
  if has_single and SINGLE_FILE not in names:
    raise DataError(
      f'{folder}: holds {SINGLE_FILE} and {INDEX_FILE}, which names {_some(names)}: two sets of '
      'weights. Delete the older one: the single file, or the index with its shards'
    )
  if missing := [name for name in names if not (folder / name).is_file()]:
    raise DataError(
      f'{folder}: {INDEX_FILE} names {len(names)} files, of which {_some(missing)} '
      f'{"is" if len(missing) == 1 else "are"} missing (unfinished download?)'
    )
  return [file_inside(folder, name) for name in names]


def _some(names: list[str]) -> str:
  return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


ADAPTER_ALONE = (
  'this is a LoRA adapter, not a whole model. To train on from it, set model.path to its base '
  '(adapter_config.json names it) and init_from to the adapter; for a whole model merge it: '
  'python -m ftjax.convert --source=ADAPTER --target=DIR'
)


_ADAPTER = ('adapter_config.json', 'adapter_model.*')


def _check_adapter(folder: Path, has_weights: bool) -> None:
  """Refuses a folder that holds an adapter: transformers would add it to the weights."""
  adapter = [p.name for pattern in _ADAPTER for p in folder.glob(pattern)]
  if not adapter:
    return
  if not has_weights:
    raise DataError(f'{folder}: {ADAPTER_ALONE}')
  raise DataError(
    f'{folder}: holds a whole model and a LoRA adapter ({_some(sorted(adapter))}), which '
    'transformers would add to it and which is not applied here. Move the adapter away, or merge '
    'it first'
  )


def read_config(folder: Path) -> dict[str, Any]:
  """Returns the config.json of a folder as it is. Raises DataError where it is none."""
  path = file_inside(folder, 'config.json')
  config = _read_json(path)
  if not isinstance(config, dict):
    raise DataError(f'{path}: expected a JSON object')
  return config


def weight_map(folder: Path) -> dict[str, Any]:
  """Returns {tensor: file} of the index of a folder. Raises DataError where it is none."""
  path = folder / INDEX_FILE
  file_inside(folder, INDEX_FILE)
  index = _read_json(path)
  found = index.get('weight_map') if isinstance(index, dict) else None
  if not isinstance(found, dict) or not found:
    raise DataError(f'{path}: weight_map is missing or empty; expected {{tensor: file}}')
  return found
