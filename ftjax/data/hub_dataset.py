"""Finds the files of a data set on the Hugging Face hub: `org/name[/CONFIG][@REVISION][:SPLIT]`.

The library `datasets` says which files are a config's split, by the data set's own card or by their
names; huggingface_hub downloads them into its cache. They are then read as local files are, by
containers.py, in place of `datasets`' own tables: rows keep FILE:LINE, a null that only fills up a
table is not a null of the row, a cell `007` stays a text, and memory stays that of one batch.

Which files a commit has for a split never changes. It is kept in HF_HOME/ftjax, so that a later run
needs neither the library nor, with HF_HUB_OFFLINE, a network.
"""

import functools
import glob
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ftjax.data import data_folder
from ftjax.data.containers import ARCHIVE, File, describe_kinds, kind_of
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files, hub

log = logging.getLogger(__name__)

_PART = r'[\w-][\w.-]*'
_NAME = re.compile(
  rf'(?P<repo>{_PART}/{_PART})(?:/(?P<config>{_PART}))?(?:@(?P<revision>\w[\w./-]*))?'
  rf'(?::(?P<split>[\w.-]+))?'
)
# Fields of a builder's config that do not say how its files are read.
_PLAIN = {'name', 'version', 'data_dir', 'data_files', 'description', 'features'}


def is_name(path: str) -> bool:
  """Returns whether a source is meant as a data set on the hub.

  A local path wins, and so does a local folder `org`. A name that ends like a file is a path.
  """
  found = _NAME.fullmatch(path)
  if not found or data_folder.exists(path) or os.path.isdir(path.partition('/')[0]):
    return False
  name = f'{found["repo"]}/{found["config"]}' if found['config'] else found['repo']
  return kind_of(name) is None and not name.endswith(ARCHIVE)


def repository(path: str) -> str:
  """Returns 'org/name' of a data set on the hub. Raises ValueError for another path."""
  found = _NAME.fullmatch(path)
  if found is None:
    raise ValueError(f'{path!r} is no name on the hub')
  return found['repo']


@functools.cache
def list_files(path: str) -> tuple[File, ...]:
  """Returns the files of a data set in the order they are read; downloads what the cache lacks.

  Args:
    path: a name, see the module; without SPLIT it is 'train', or the only one.

  Raises:
    ConfigError: no such data set, config or split.
    DataError: no permission, no network, or files that cannot be read as rows.
  """
  found = _NAME.fullmatch(path)
  if found is None:
    raise ValueError(f'{path!r} is no name on the hub')
  repo, config, split = found['repo'], found['config'], found['split']
  asked = f'{repo}@{found["revision"]}' if found['revision'] else repo
  pinned = hub.pin(asked, 'dataset')
  record = _record(pinned, config, split)
  names = _read(record)
  if names is None:
    # The card first: huggingface_hub says which of name, permission and network is wrong.
    hub.download(pinned, ['README.md'], is_shown=False, kind='dataset')
    names = _choose(path, _splits(path, repo, config, hub.split(pinned)[1]), split)
    _check_kinds(path, names)
    files.makedirs(record.parent)
    files.write_text(record, json.dumps(names))
  lacking = not hub.has_all(pinned, names, 'dataset')
  folder = hub.download(pinned, [glob.escape(n) for n in names], is_shown=lacking, kind='dataset')
  log.info('%s: %d files of commit %s', path, len(names), hub.split(pinned)[1])
  return tuple(f for n in names for f in data_folder.list_files(str(folder / n)))


def _record(pinned: str, config: str | None, split: str | None) -> Path:
  from huggingface_hub import constants

  return Path(constants.HF_HOME) / 'ftjax' / f'{digest([pinned, config, split])}.json'


def _read(record: Path) -> list[str] | None:
  try:
    return json.loads(record.read_bytes())
  except (OSError, ValueError):
    return None


def _splits(path: str, repo: str, config: str | None, commit: str) -> dict[str, list[str]]:
  """Returns the names of the files of each split of a config, as `datasets` finds them."""
  import yaml
  from datasets import load_dataset_builder

  try:
    builder = load_dataset_builder(repo, config, revision=commit)
  except ValueError as error:  # a config that is not there, or is not named; a card that is wrong
    reason = ' '.join(str(error).split('Example of usage')[0].split())
    raise ConfigError(f'data: {path}: {reason} (write {repo}/CONFIG)') from error
  except FileNotFoundError as error:
    reason = ' '.join(str(error).split())[:300]
    raise DataError(f'{path}: `datasets` finds no data files for it: {reason}') from error
  except OSError as error:
    raise hub.explain(path, error, 'dataset') from error
  except RuntimeError as error:  # a data set that is a program, which `datasets` refuses
    raise DataError(
      f'{path}: {error}; code of a data set is never run. Its files may be converted in another '
      f'revision: try {repo}@refs/convert/parquet'
    ) from error
  except (TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
    raise DataError(f'{path}: its card (README.md) cannot be read: {reason}') from error
  settings, usual = vars(builder.config), vars(type(builder.config)())
  if other := [k for k in settings if k not in _PLAIN and settings[k] != usual.get(k)]:
    raise DataError(
      f'{path}: its card sets {other[0]}={settings[other[0]]!r} for its files, which is not '
      f'applied here. Run `hf download {repo} --repo-type dataset --local-dir DIR`, and write them '
      f'as one of {describe_kinds()}'
    )
  prefix, found = f'hf://datasets/{repo}@{commit}/', {}
  for split, urls in (builder.config.data_files or {}).items():
    found[str(split)] = [str(url).removeprefix(prefix) for url in urls]
    if outside := [url for url in map(str, urls) if not url.startswith(prefix)]:
      raise DataError(f'{path}: {outside[0]} is not a file of the data set; it is not read')
  if not found:
    raise DataError(f'{path}: the data set has no data files')
  return found


def _choose(path: str, splits: Mapping[str, list[str]], split: str | None) -> list[str]:
  if split is None:
    split = next(iter(splits)) if len(splits) == 1 else 'train'
  if split not in splits:
    raise ConfigError(f'data: {path}: no split {split!r} in it; it holds {sorted(splits)}')
  return splits[split]


def _check_kinds(path: str, names: list[str]) -> None:
  strange = [n for n in names if kind_of(n) is None and not n.endswith(ARCHIVE)]
  if strange:
    raise DataError(
      f'{path}: {strange[0]!r} is not read as rows; expected one of {describe_kinds()}'
    )
