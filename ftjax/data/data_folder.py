"""Finds the files of rows behind a path: a file, an archive, a folder, a pattern, or one split of
these.

A folder with training, validation and test files is never read as one source: the split has to be
named, as in `folder:train`.
"""

import glob
import json
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ftjax.data.containers import ARCHIVE, COMPRESSIONS, KINDS, File, describe_kinds, kind_of
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage import files

# Words of file names that say which split of a data set is in them, and what they mean.
_SPLITS = {
  'train': 'train', 'training': 'train',
  'validation': 'validation', 'valid': 'validation', 'val': 'validation', 'dev': 'validation',
  'test': 'test', 'testing': 'test',
  'eval': 'eval', 'evaluation': 'eval',
  'holdout': 'holdout', 'heldout': 'holdout',
}  # fmt: skip
# As `datasets` names shards: earlier versions put a hash behind the count.
_SHARD = re.compile(r'(.+)-\d+-of-\d+(?:-[0-9a-f]{16})?')

# What a folder of data may hold and we cannot read: left out silently it would be missing.
_DATA_LIKE = {*KINDS, *COMPRESSIONS, ARCHIVE, '.tar', '.7z', '.feather', '.orc'} - {'.txt'}
_METADATA = {'dataset_info.json', 'dataset_infos.json', 'dataset_dict.json', 'state.json'}
_DEPTH = 3  # folders within folders that are looked at

_MAGIC = re.compile(r'[*?\[]')


def _split_of(name: str) -> str | None:
  """Returns the split that a path inside a folder names, by a folder or a word of the file name."""
  *folders, last = PurePosixPath(name).parts
  for folder in folders:
    if folder.lower() in _SPLITS:
      return folder
  stem = last
  while (suffix := PurePosixPath(stem).suffix) in (*KINDS, *COMPRESSIONS):
    stem = stem.removesuffix(suffix)
  shard = _SHARD.fullmatch(stem)
  stem = shard[1] if shard else stem
  words = {w for w in re.split(r'[^a-z]+', stem.lower()) if w in _SPLITS}
  if len(words) != 1:
    return None
  return stem if shard else words.pop()  # shards carry the split's whole name, as in train_sft


def _meaning(split: str) -> set[str]:
  return {_SPLITS[w] for w in re.split(r'[^a-z]+', split.lower()) if w in _SPLITS}


def _choose(place: str, found: Sequence[tuple[str, File]], split: str | None) -> list[File]:
  """Returns the files of a split, or all if there is one; `found`: (path inside `place`, file)."""
  groups: dict[str | None, list[File]] = {}
  for name, file in found:
    groups.setdefault(_split_of(name), []).append(file)
  named = sorted(g for g in groups if g is not None)
  if split is not None:
    if split in groups:
      return groups[split]
    same = [g for g in named if split in _SPLITS and _meaning(g) == {_SPLITS[split]}]
    if len(same) != 1:
      raise DataError(f'{place}: no split {split!r} in it; it holds {named or "no splits"}')
    return groups[same[0]]
  if len(named) > 1 or (None in groups and named and named != ['train']):
    others = groups.get(None, [])
    rest = f' beside {len(others)} files of none ({others[0].name})' if others else ''
    raise DataError(
      f'{place}: holds the splits {named}{rest}; name one of them, as in {place}:{named[0]}, or '
      f'its files, as in {groups[named[0]][0]}'
    )
  return [file for _, file in found]


def _saved_dataset_files(folder: Path) -> list[File]:
  """Returns the Arrow files of a folder written by `datasets`' save_to_disk, in order."""
  try:
    state = json.loads((folder / 'state.json').read_bytes())
    names = [entry['filename'] for entry in state['_data_files']]
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f'{folder}/state.json: not as `datasets` writes it: {error!r}') from error
  if strange := [n for n in names if PurePosixPath(n).name != n]:
    raise DataError(f'{folder}/state.json: {strange[0]!r} is not a file name inside the folder')
  return [File(folder / name) for name in names]


def _saved_splits(folder: Path, split: str | None) -> list[File]:
  splits = sorted(p.name for p in folder.iterdir() if (p / 'state.json').is_file())
  if split in splits:
    return _saved_dataset_files(folder / split)
  if split is not None:
    raise DataError(f'{folder}: no split {split!r} in it; it holds {splits}')
  raise DataError(
    f'{folder}: holds the splits {splits}; name one of them, as in {folder}:{splits[0]}'
    if splits
    else f'{folder}: a dataset_dict.json without splits beside it'
  )


def _visible(folder: Path) -> list[Path]:
  return sorted(p for p in folder.iterdir() if not p.name.startswith(('.', '_')))


def _is_rows(path: Path) -> bool:
  known = kind_of(path.name) is not None or path.name.endswith(ARCHIVE)
  return known and path.name not in _METADATA and path.is_file()


def _walk(folder: Path, inside: str, depth: int) -> list[tuple[str, File]]:
  """Returns (path inside, file) of the data files of a folder and of its folders."""
  found = []
  for path in _visible(folder):
    name = f'{inside}{path.name}'
    if _is_rows(path):
      found += [(name, f) for f in _expand(path)]
    elif depth and path.is_dir():
      found += _walk(path, f'{name}/', depth - 1)
  return found


def _expand(path: Path) -> list[File]:
  """Returns the file itself, or the members of an archive, which must be of one split."""
  return list_archive(path, None) if path.name.endswith(ARCHIVE) else [File(path)]


def _without_notes(found: Sequence[tuple[str, File]]) -> list[tuple[str, File]]:
  """Leaves out .txt files among files of rows: a licence, notes. A compressed one is no note."""
  if all((kind_of(f.name) or ('',))[0] == '.txt' for _, f in found):
    return list(found)
  return [(name, f) for name, f in found if not f.name.endswith('.txt')]


def list_archive(path: Path, split: str | None) -> list[File]:
  """Returns the files of rows in a zip archive.

  Raises:
    DataError: it cannot be read, holds none or files that cannot be read, or several splits.
  """
  try:
    with path.open('rb') as raw, zipfile.ZipFile(raw) as archive:
      members = [m for m in archive.infolist() if not m.is_dir()]
  except (OSError, zipfile.BadZipFile) as error:
    raise DataError(f'{path}: cannot be read: {error}') from error
  hidden = ('.', '_')
  members = [m for m in members if not any(p.startswith(hidden) for p in m.filename.split('/'))]
  if locked := [m.filename for m in members if m.flag_bits & 1]:
    raise DataError(f'{path}: {locked[0]!r} is encrypted; unpack the archive')
  names = sorted(m.filename for m in members)
  found = [n for n in names if kind_of(n) and PurePosixPath(n).name not in _METADATA]
  lost = [n for n in names if n not in found and _DATA_LIKE & {*PurePosixPath(n).suffixes}]
  if lost := [n for n in lost if PurePosixPath(n).name not in _METADATA]:
    raise DataError(f'{path}: {lost[0]!r} in it would not be read; kinds: {describe_kinds()}')
  if not found:
    raise DataError(f'{path}: no data file in it; expected one of {describe_kinds()}')
  return _choose(str(path), _without_notes([(n, File(path, n)) for n in found]), split)


def list_folder(folder: Path, split: str | None = None) -> list[File]:
  """Returns the files of rows of a folder, in the order they are read.

  Args:
    folder: of data files, of a folder per split, of a folder `data` with them, or as `datasets`'
      save_to_disk writes it.
    split: which of its splits, or None where there is one.

  Raises:
    DataError: nothing can be read, something would not be read, or it holds several splits.
  """
  if (folder / 'dataset_dict.json').is_file():
    return _saved_splits(folder, split)
  if (folder / 'state.json').is_file() and (folder / 'dataset_info.json').is_file():
    if split is not None:
      raise DataError(f'{folder}: a saved data set without splits; leave out :{split}')
    return _saved_dataset_files(folder)
  shown = _visible(folder)
  direct = [p for p in shown if _is_rows(p)]
  nested = {
    p: _walk(p, f'{p.name}/', _DEPTH)
    for p in shown
    if p not in direct and p.is_dir() and (p.name.lower() in _SPLITS or p.name == 'data')
  }
  nested = {p: inner for p, inner in nested.items() if inner}
  found = [(p.name, f) for p in direct for f in _expand(p)]
  found = _without_notes([*found, *(entry for inner in nested.values() for entry in inner)])
  others = [p for p in shown if p not in direct and p not in nested and p.name not in _METADATA]
  if not found:
    _refuse_empty(folder, others)
  if lost := sorted(p.name for p in others if p.is_dir() or _DATA_LIKE & {*p.suffixes}):
    raise DataError(
      f'{folder}: {lost[0]!r} lies beside {len(found)} data files and would not be read; move it, '
      f'or name the files one by one (kinds that are read: {describe_kinds()})'
    )
  return _choose(str(folder), found, split)


def _refuse_empty(folder: Path, others: Sequence[Path]) -> None:
  inside = [p.name for p in others if p.is_dir() and _walk(p, '', _DEPTH)]
  hint = f'; folders in it have some: name one, as in {folder}/{inside[0]}' if inside else ''
  raise DataError(
    f'{folder}: no data file in this folder; expected one of {describe_kinds()}{hint}'
  )


def _match(pattern: str) -> list[Path]:
  """Returns the paths that a pattern matches, sorted."""
  if not files.is_remote(pattern):
    return [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
  folder, _, last = pattern.rpartition('/')
  if _MAGIC.search(folder):
    raise ConfigError(f'{pattern}: of gs:// only the last part may be a pattern')
  return sorted(files.as_path(folder).glob(last))


def _list_pattern(pattern: str) -> list[File]:
  matched = [p for p in _match(pattern) if not p.name.startswith('.')]
  direct = [p for p in matched if p.is_file() and _is_rows(p)]
  others = [p for p in matched if p not in direct and p.name not in _METADATA]
  if lost := sorted(str(p) for p in others if p.is_dir() or _DATA_LIKE & {*p.suffixes}):
    raise DataError(f'{pattern}: matches {lost[0]!r}, which is not read; narrow the pattern')
  found = [(p.name, f) for p in direct for f in _expand(p)]
  if not found:
    raise DataError(
      f'{pattern}: no data file matches this pattern (data.train, data.eval, eval.tasks)'
    )
  return _choose(pattern, found, None)


def exists(path: str) -> bool:
  """Returns whether a path, or what stands before its last ':', is a file or a folder."""
  path = os.path.expanduser(path)
  return files.as_path(path).exists() or (
    ':' in path.rpartition('/')[2] and files.as_path(path.rpartition(':')[0]).exists()
  )


def is_pattern(path: str) -> bool:
  """Returns whether a path has * ? or [ and is no file by that name."""
  return bool(_MAGIC.search(path)) and not files.as_path(path).exists()


def list_files(path: str) -> list[File]:
  """Returns the files of rows behind `PATH`, `PATTERN` or `FOLDER:SPLIT`, in reading order.

  Raises:
    DataError: nothing is there, or it cannot be read as one source.
  """
  path = os.path.expanduser(path)
  if is_pattern(path):
    return _list_pattern(path)
  place, split = files.as_path(path), None
  if not place.exists() and exists(path):
    folder, _, split = path.rpartition(':')
    place = files.as_path(folder)
  if place.is_dir():
    return list_folder(place, split)
  if not place.is_file():
    raise DataError(f'{path}: no such file or folder (data.train, data.eval, eval.tasks)')
  if place.name.endswith(ARCHIVE):
    return list_archive(place, split)
  if split is not None:
    raise DataError(f'{place}: a file has no splits; leave out :{split}')
  if kind_of(place.name) is None:
    raise DataError(f'{place}: unknown kind of file; expected one of {describe_kinds()}')
  return [File(place)]
