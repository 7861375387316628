"""Identifies the code of ftjax that runs: digests of its source files, and the commit of git.

The digest is of files and not of a commit, so that a wheel, a checkout and a checkout with local
changes can be compared. Configs are left out: a run records the config that it resolved."""

import functools
import hashlib
import pathlib
import subprocess
from typing import Any

from ftjax.runtime.digest import digest

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parent
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
  """Returns `digests`, and in a checkout {"commit", "modified"}; computed once in a process, since
  files may be edited while it runs.
  """
  return _git() | digests()


def _git() -> dict[str, Any]:
  """Returns the commit and whether files differ from it; empty outside of a checkout or without
  git.
  """
  commit = _ask('rev-parse', 'HEAD')
  if not commit:
    return {}
  return {'commit': commit, 'modified': bool(_ask('status', '--porcelain', '-uno'))}


def changed_since(commit: str) -> list[str]:
  """Returns the files of the package that differ from a commit, as git lists them; none outside of
  a checkout, or where the commit is not known.
  """
  return _ask('diff', '--name-only', commit, '--', _PACKAGE.name).splitlines()


def _ask(*words: str) -> str:
  """Returns what git prints in the checkout of the package; '' where it fails."""
  if not (_CHECKOUT / '.git').exists():
    return ''
  try:
    run = subprocess.run(
      ['git', '-C', _CHECKOUT, *words], capture_output=True, text=True, timeout=10, check=False
    )
  except (OSError, subprocess.SubprocessError):
    return ''
  return run.stdout.strip() if run.returncode == 0 else ''
