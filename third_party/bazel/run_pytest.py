"""Runs pytest on the files of tests that Bazel gives it, in a copy of what their target declares.

A copy, because Bazel's runfiles are links into the checkout: a test that follows one, as
`Path(__file__).resolve()` does, would find there what its target forgot to declare.
"""

import os
import pathlib
import shutil
import sys
import tempfile

import pytest


class Shard:
  """Leaves the tests of other shards out, as Bazel numbers them.

  collected: tests of the file, before any was left out.
  """

  def __init__(self, index: int, count: int):
    self._index, self._count = index, count
    self.collected = 0

  @pytest.hookimpl(tryfirst=True)
  def pytest_collection_modifyitems(self, config, items):
    self.collected = len(items)
    items[:] = [item for i, item in enumerate(items) if i % self._count == self._index]


def copy_of_tree(root: pathlib.Path, target: pathlib.Path) -> None:
  """Copies the files of the target's runfiles that are the project's, not links to them."""
  shutil.copytree(root, target, ignore=shutil.ignore_patterns('__pycache__', '*.pyc'))


def keep_packages(path: list[str], root: pathlib.Path) -> None:
  """Removes the project's runfiles, below `root`, from a path of modules, in place.

  Packages that lie in runfiles stay: Bazel 8 and 9 have those of the lock there, Bazel 4 none.
  Processes that tests start find them by PYTHONPATH.
  """

  def is_kept(entry: pathlib.Path) -> bool:
    is_ours = root in (entry, *entry.parents) or entry == root.parent
    return not is_ours or 'site-packages' in entry.parts

  path[:] = [entry for entry in path if is_kept(pathlib.Path(entry))]
  packages = [entry for entry in path if '.runfiles' in entry and 'site-packages' in entry]
  os.environ.pop('PYTHONPATH', None)
  if packages:
    os.environ['PYTHONPATH'] = os.pathsep.join(packages)


def arguments(paths: list[str], scratch: pathlib.Path) -> list[str]:
  """Returns pytest's arguments: what the command line has, and what Bazel's variables ask for."""
  found = ['-q', '-p', 'no:cacheprovider', f'--basetemp={scratch / "pytest"}', *paths]
  if report := os.environ.get('XML_OUTPUT_FILE'):
    found.append(f'--junitxml={report}')
  if only := os.environ.get('TESTBRIDGE_TEST_ONLY'):  # bazel test --test_filter
    found += ['-k', only]
  return found


def main() -> int:
  """Returns pytest's exit code; 0 where the file has tests and each was left out."""
  if status := os.environ.get('TEST_SHARD_STATUS_FILE'):
    pathlib.Path(status).touch()  # Bazel asks whether the program knows of shards
  index = int(os.environ.get('TEST_SHARD_INDEX', '0'))
  shard = Shard(index, int(os.environ.get('TEST_TOTAL_SHARDS', '1')))
  with tempfile.TemporaryDirectory(dir=os.environ.get('TEST_TMPDIR')) as folder:
    scratch = pathlib.Path(folder).resolve()
    tree = scratch / 'tree'
    root = pathlib.Path(__file__).absolute().parents[2]  # not resolved: it lies in the runfiles
    copy_of_tree(root, tree)
    keep_packages(sys.path, root)
    os.environ.setdefault('HOME', str(scratch))
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    code = pytest.main(arguments(sys.argv[1:], scratch), plugins=[shard])
    os.chdir('/')
  is_empty = code == pytest.ExitCode.NO_TESTS_COLLECTED and shard.collected
  return 0 if is_empty else int(code)


if __name__ == '__main__':
  sys.exit(main())
