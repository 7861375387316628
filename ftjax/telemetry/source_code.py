"""Identifies the code of ftjax that runs: digests of its source files, and the commit.

The digest is of files and not of a commit, so that a wheel, a checkout and a checkout with local
changes can be compared. Configs are left out: a run records the config that it resolved."""

import functools
import hashlib
import pathlib
from typing import Any

from ftjax.runtime import build_commit
from ftjax.runtime.digest import digest

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_CONFIGS = 'configs'  # inside a wheel, beside the package in a checkout
_ENTRIES = 'entries'  # files in no folder
_SHORT = 16  # hexadecimal digits of a folder's digest


def digests(package: pathlib.Path = _PACKAGE) -> dict[str, Any]:
  """Returns {"digest": sha256 hex of all Python files, "folders": {folder: first digits of its
  own}}. A file counts with its path and its bytes.
  """
  folders: dict[str, dict[str, str]] = {}
  for path in sorted(package.rglob('*.py')):
    parts = path.relative_to(package).parts
    if parts[0] != _CONFIGS:
      folder = parts[0] if len(parts) > 1 else _ENTRIES
      content = hashlib.sha256(path.read_bytes()).hexdigest()
      folders.setdefault(folder, {})['/'.join(parts)] = content
  return {
    'digest': digest(folders),
    'folders': {folder: digest(found)[:_SHORT] for folder, found in folders.items()},
  }


@functools.cache
def identity() -> dict[str, Any]:
  """Returns `digests`, and where the commit is known {"commit", "modified"}; computed once in a
  process, since files may be edited while it runs.
  """
  found = build_commit.find(_PACKAGE.parent)
  known = {'commit': found.commit, 'modified': found.is_modified} if found.is_known else {}
  return known | digests()


def changed_since(commit: str) -> list[str]:
  """Returns the files of the package that differ from a commit, as git lists them; none outside of
  a checkout, or where the commit is not known.
  """
  return build_commit.changed_files(_PACKAGE.parent, commit, _PACKAGE.name)
