"""Finds the commit that this copy of ftjax was built from. Imports the standard library only."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess

UNKNOWN = 'unknown'
FILE = 'commit.json'  # in the package of a wheel and of a source archive; see third_party/
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class BuildCommit:
  """A commit.

  Attributes:
    commit: 40 hexadecimal digits (64 in repositories of SHA-256), or 'unknown'.
    is_modified: whether tracked files differ from the commit; False where it is unknown.
  """

  commit: str = UNKNOWN
  is_modified: bool = False

  @property
  def is_known(self) -> bool:
    """Whether the commit was found."""
    return self.commit != UNKNOWN

  def text(self) -> str:
    """Returns 'commit 0123…', with ', modified' where files differ, or 'commit unknown'."""
    return f'commit {self.commit}{", modified" if self.is_modified else ""}'

  def to_json(self) -> str:
    """Returns what the file commit.json holds."""
    return json.dumps({'commit': self.commit, 'modified': self.is_modified}) + '\n'


def find(root: str | os.PathLike = _ROOT) -> BuildCommit:
  """Returns the commit of an installed package, of a source archive or of a checkout.

  A wheel and a source archive carry it in ftjax/commit.json; a checkout is asked through git.
  Without both, or without git, it is unknown. Takes some 20 ms in a checkout.

  Args:
    root: the folder that holds the folder ftjax.
  """
  root = pathlib.Path(root)
  try:
    content = (root / 'ftjax' / FILE).read_bytes()
  except OSError:
    return _checked_out(root) if (root / '.git').exists() else BuildCommit()
  return _read(content)


def changed_files(root: pathlib.Path, commit: str, folder: str) -> list[str]:
  """Returns the files of a folder of a checkout that differ from a commit; none outside of a
  checkout, without git, or where git does not know the commit.
  """
  if not (root / '.git').exists():
    return []
  try:
    return _git(root, 'diff', '--name-only', commit, '--', folder).splitlines()
  except (OSError, subprocess.SubprocessError):
    return []


def is_commit(text: str) -> bool:
  """Returns whether a text is the full name of a commit, SHA-1 or SHA-256."""
  return re.fullmatch(r'[0-9a-f]{40}|[0-9a-f]{64}', text) is not None


def _read(content: bytes) -> BuildCommit:
  """Returns the commit that commit.json holds; unknown where the file is damaged."""
  try:
    row = json.loads(content)
    if is_commit(row['commit']):
      return BuildCommit(row['commit'], bool(row['modified']))
  except (ValueError, KeyError, TypeError):
    pass
  return BuildCommit()


def _checked_out(root: pathlib.Path) -> BuildCommit:
  """Returns the commit of a checkout; unknown where git is missing or refuses the folder."""
  try:
    commit = _git(root, 'rev-parse', '--verify', 'HEAD')
    if not is_commit(commit):
      return BuildCommit()
    return BuildCommit(commit, bool(_git(root, 'status', '--porcelain', '--untracked-files=no')))
  except (OSError, subprocess.SubprocessError):
    return BuildCommit()


def _git(root: pathlib.Path, *words: str) -> str:
  """Returns what a git command prints. Changes nothing, so that it can run beside other commands.

  Raises:
    CalledProcessError: git exits with another code than 0.
  """
  # Git's own variables, as in a hook, would name another repository.
  environment = {k: v for k, v in os.environ.items() if not k.startswith('GIT_')}
  run = subprocess.run(
    ['git', '--no-optional-locks', '-C', root, *words],
    env=environment,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=_SECONDS,
    check=True,
  )
  return run.stdout.strip()
