"""Builds the wheel, the source archive, their bill of materials and SHA256SUMS.

The same sources, epoch, commit and build packages (requirements/build.txt) give the same bytes, in
any folder, under any umask, locale and time zone. Needs no network and no .git; `make wheel` and
`bazel build //:wheel` both run it:

  python third_party/build_wheel.py --source=DIR --epoch=SECONDS --commit=SHA --output=DIR

--modified marks files that differ from the commit: the wheel and its bill hold that.
"""

import argparse
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import bill_of_materials

_FILES = (
  'pyproject.toml', 'CHANGELOG.md', 'CITATION.cff', 'CONTRIBUTING.md', 'LICENSE', 'README.md',
  'SECURITY.md',
)  # fmt: skip
_FOLDERS = ('ftjax', 'configs', 'launch', 'third_party')
_MAY_LACK = ('launch',)
# What tools leave in folders of sources. Hidden files are left out too.
_LEFT_OUT = shutil.ignore_patterns('.*', '__pycache__', '*.py[co]', 'BUILD', 'BUILD.bazel')
_FIRST_ZIP_YEAR = 315532800  # zip files hold no time before 1980


def build(
  source: pathlib.Path, epoch: int, commit: str, is_modified: bool, output: pathlib.Path
) -> None:
  """Writes the four files into `output`.

  Raises:
    ValueError: the sources lack a file.
    CalledProcessError: hatchling refuses the sources; it has printed why.
  """
  with tempfile.TemporaryDirectory(prefix='ftjax-wheel-') as temp:
    tree, made = pathlib.Path(temp, 'tree'), pathlib.Path(temp, 'made')
    _copy(source, tree)
    built_from = _build_commit(tree).BuildCommit(commit, is_modified)
    (tree / 'ftjax' / 'commit.json').write_text(built_from.to_json(), encoding='utf-8')
    _same_modes_and_times(tree, epoch)
    for target in ('sdist', 'wheel'):
      _hatchling(tree, target, made, epoch)
    wheel = next(made.glob('*.whl'))
    stem = '-'.join(wheel.name.split('-')[:2])
    locks = tree / 'third_party' / 'requirements'
    bill = bill_of_materials.build(wheel, _sha256(wheel), locks, epoch, commit, is_modified)
    (made / f'{stem}.cdx.json').write_text(bill, encoding='utf-8', newline='\n')
    files = sorted(made.iterdir())
    sums = ''.join(f'{_sha256(file)}  {file.name}\n' for file in files)
    (made / 'SHA256SUMS').write_text(sums, encoding='utf-8', newline='\n')
    output.mkdir(parents=True, exist_ok=True)
    for file in [*files, made / 'SHA256SUMS']:
      # Replaced at once: a file of an earlier build is never seen half overwritten.
      part = output / f'.{file.name}.part'
      shutil.copyfile(file, part)
      part.chmod(0o644)
      part.replace(output / file.name)
  print(sums, end='')


def _copy(source: pathlib.Path, tree: pathlib.Path) -> None:
  """Copies what is built, with the files that links lead to in their place."""
  tree.mkdir()
  (tree / '.git').mkdir()  # where hatchling's search for a .gitignore ends
  for name in (*_FILES, *_FOLDERS):
    if (source / name).is_file():
      shutil.copyfile(source / name, tree / name)
    elif (source / name).is_dir():
      shutil.copytree(source / name, tree / name, ignore=_LEFT_OUT, copy_function=shutil.copyfile)
    elif name not in _MAY_LACK:
      raise ValueError(f'--source={source} has no {name}; give the root of the sources')


def _same_modes_and_times(tree: pathlib.Path, epoch: int) -> None:
  """Gives each file the commit's time, and the mode that its content asks for: a script can be
  executed. A sandbox or an archive may have changed the modes.
  """
  for path in tree.rglob('*'):
    if path.is_file():
      with path.open('rb') as file:
        path.chmod(0o755 if file.read(2) == b'#!' else 0o644)
    os.utime(path, (epoch, epoch))


def _hatchling(tree: pathlib.Path, target: str, made: pathlib.Path, epoch: int) -> None:
  environment = {
    'LC_ALL': 'C.UTF-8',
    'PATH': os.environ.get('PATH', ''),
    'PYTHONDONTWRITEBYTECODE': '1',
    'PYTHONHASHSEED': '0',
    'PYTHONPATH': os.pathsep.join(p for p in sys.path if p),
    'PYTHONUTF8': '1',
    'SOURCE_DATE_EPOCH': str(epoch),
    'TZ': 'UTC',
  }
  command = [sys.executable, '-P', '-m', 'hatchling', 'build', '-t', target, '-d', str(made)]
  run = subprocess.run(
    command,
    cwd=tree,
    env=environment,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  if run.returncode:
    print(run.stdout, file=sys.stderr)
    run.check_returncode()


def _build_commit(tree: pathlib.Path):
  """Returns the module ftjax.runtime.build_commit of the sources, whichever ftjax is installed."""
  path = tree / 'ftjax' / 'runtime' / 'build_commit.py'
  spec = importlib.util.spec_from_file_location('build_commit', path)
  module = importlib.util.module_from_spec(spec)
  sys.modules['build_commit'] = module  # dataclasses look there
  spec.loader.exec_module(module)
  return module


def _sha256(path: pathlib.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()


def _commit(text: str) -> str:
  if text != 'unknown' and not (len(text) in (40, 64) and set(text) <= set('0123456789abcdef')):
    raise argparse.ArgumentTypeError(
      f"got {text!r}, expected all digits of a commit (git rev-parse HEAD) or 'unknown'"
    )
  return text


def _epoch(text: str) -> int:
  if not text.isascii() or not text.isdigit() or int(text) < _FIRST_ZIP_YEAR:
    raise argparse.ArgumentTypeError(
      f'got {text!r}, expected seconds since 1970, after 1980 (git log -1 --format=%ct)'
    )
  return int(text)


def main() -> None:
  """Parses the flags and builds; exits with 2 for what is wrong with flags or sources."""
  sys.dont_write_bytecode = True
  parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition('\n')[0])
  parser.add_argument('--source', type=pathlib.Path, required=True, help='root of the sources')
  parser.add_argument('--epoch', type=_epoch, required=True, help="the commit's date, seconds")
  parser.add_argument('--commit', type=_commit, required=True, help="its name, or 'unknown'")
  parser.add_argument('--modified', action='store_true', help='the sources differ from the commit')
  parser.add_argument('--output', type=pathlib.Path, required=True, help='folder for the files')
  flags = parser.parse_args()
  try:
    build(flags.source, flags.epoch, flags.commit, flags.modified, flags.output.absolute())
  except ValueError as error:
    parser.error(str(error))
  except subprocess.CalledProcessError:
    sys.exit(1)


if __name__ == '__main__':
  main()
