"""python docs/site/build.py [TARGET]    Builds the documentation as a static site (make docs).

Writes TARGET/index.html (default: build/site), and TARGET.source, what Sphinx reads. A broken link
or anchor, a page in no section and every other warning of Sphinx end it with code 1. Runs in the
environment of third_party/requirements/docs.txt."""

import os
import pathlib
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import pages  # noqa: E402 # beside this file

import ftjax  # noqa: E402 # of the checkout; it imports no other package
from ftjax.runtime import build_commit  # noqa: E402


def build(root: pathlib.Path, target: pathlib.Path) -> int:
  """Builds the site of a checkout, and returns the exit code of Sphinx.

  Args:
    root: of the checkout, with README.md and docs/.
    target: folder of the site; replaced.
  """
  source = target.with_name(f'{target.name}.source')
  if target.exists() and not (target / '.buildinfo').exists() and any(target.iterdir()):
    print(f'error: {target} is not empty, and no site; give another folder', file=sys.stderr)
    return 1
  for folder in (source, target):
    shutil.rmtree(folder, ignore_errors=True)
  try:
    pages.prepare(root, source)
  except pages.PageError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  environment = os.environ | {
    'FTJAX_DOCS_VERSION': ftjax.__version__,
    'FTJAX_DOCS_COMMIT': build_commit.find(root).text(),
  }
  sphinx = [sys.executable, '-m', 'sphinx', '-b', 'html', '-q', '-W', '--keep-going', '-E']
  folders = ['-c', HERE, '-d', source / '.doctrees', source, target]
  return subprocess.run([*sphinx, *folders], env=environment).returncode


if __name__ == '__main__':
  place = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else 'build/site').absolute()
  code = build(ROOT, place)
  if code == 0:
    print(f'{place}/index.html')
  sys.exit(min(code, 1))
