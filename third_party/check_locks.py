"""Installs the locks of requirements/ in empty environments, and resolves them for other machines.

  python third_party/check_locks.py [--locks=cpu,test] [--pythons=3.11,3.12] [--skip=install]

An install is that of docs/building.md: pip (or uv, which takes a tenth of the time) with
--require-hashes, the wheel of the checked out commit, `pip check`, and a training of some steps on
the CPU. uv resolves without a download: each pin has a wheel for the machine, and each hash of the
lock is one that the index has. What cannot be checked here, such as a Python that is not installed,
is printed as such. Prints a table in markdown; the exit code is 1 where a check failed.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import bill_of_materials  # beside this file

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOCKS = ROOT / 'third_party' / 'requirements'
NAMES = ('build', 'lint', 'cpu', 'plan', 'test', 'tpu', 'cuda')
TOOLS = ('build', 'lint')  # without ftjax's own dependencies
PYTHONS = ('3.11', '3.12', '3.13')
# libtpu is there for x86-64 alone, and asks for a younger glibc than the others.
MACHINES = {'x86_64': 'manylinux_2_28', 'aarch64': 'manylinux_2_28'}
LIBTPU_LOCKS, LIBTPU_GLIBC = ('tpu', 'plan'), 'manylinux_2_31'
X86_ALONE = (*LIBTPU_LOCKS, 'lint')  # shellcheck too
# Published without wheels; built with the packages of build.txt.
FROM_SOURCE = ('rouge-score', 'sqlitedict', 'word2number')


def find_python(version: str) -> str | None:
  """Returns a Python of a version (3.12) that can make environments, or None."""
  folder = pathlib.Path.home() / '.pyenv' / 'versions'
  for path in (f'python{version}', *sorted(folder.glob(f'{version}.*/bin/python'))):
    code = 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])'
    try:
      done = subprocess.run([path, '-c', code], capture_output=True, text=True, check=False)
    except FileNotFoundError:
      continue
    if done.stdout.strip() == version:
      return str(path)
  return None


def run(*command, **environment) -> str:
  """Returns the output of a command; raises CalledProcessError with its errors."""
  done = subprocess.run(
    [str(word) for word in command],
    env=os.environ | {'PYTHONPATH': ''} | environment,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  if done.returncode:
    raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
  return done.stdout


def size_of(folder: pathlib.Path) -> int:
  """Returns the bytes of all files below a folder."""
  return sum(p.lstat().st_size for p in folder.rglob('*') if p.is_file())


def install(name: str, version: str, python: str, scratch: pathlib.Path, flags) -> str:
  """Installs a lock and the wheel, and trains; returns what was installed."""
  start, folder = time.monotonic(), scratch / f'{name}-{version}'
  own = folder / 'bin' / 'python'
  pip = (own, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-deps')
  locked = (*pip, '--no-compile', '--use-pep517', '--require-hashes')
  if flags.installer == 'uv':
    locked = (find_uv(), 'pip', 'install', f'--python={own}', '--no-deps', '--require-hashes')
  try:
    run(python, '-m', 'venv', folder)
    if name == 'lint':
      run(*locked, '--only-binary=:all:', '-r', LOCKS / 'lint.txt')
    else:
      run(*locked, '-r', LOCKS / 'build.txt')
    if name not in TOOLS:
      run(*locked, '--no-build-isolation', '-r', LOCKS / f'{name}.txt')
      dist = scratch / 'dist'
      if not dist.exists():
        run(ROOT / 'third_party' / 'wheel.sh', own, dist)
      run(*pip, *dist.glob('*.whl'))
    run(own, '-m', 'pip', 'check', '--disable-pip-version-check')
    count = len(run(own, '-m', 'pip', 'list', '--format=freeze').split())
    seen = ''
    if name not in TOOLS:
      seen = run(own, '-c', 'import jax; print(", jax", jax.__version__)', JAX_PLATFORMS='cpu')
    if name not in TOOLS and flags.steps:
      train = (
        folder / 'bin' / 'ftjax',
        'train',
        '--config=tiny_sft',
        f'--config.steps={flags.steps}',
      )
      run(*train, f'--workdir={folder}/run', JAX_PLATFORMS='cpu')
      seen = f'{seen.strip()}, trained {flags.steps} steps'
    took = time.monotonic() - start
    return f'{count} packages{seen.strip()}, {size_of(folder) / 2**20:,.0f} MiB, {took:.0f} s'
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def resolve(name: str, version: str, machine: str, uv: str, scratch: pathlib.Path) -> str:
  """Resolves a lock for a machine that need not be this one; every pin must have a wheel."""
  glibc = LIBTPU_GLIBC if name in LIBTPU_LOCKS else MACHINES[machine]
  pins = bill_of_materials.read_lock((LOCKS / f'{name}.txt').read_text())
  wheels = scratch / f'{name}.wheels.txt'
  wheels.write_text(''.join(f'{p.requirement}\n' for p in pins if p.name not in FROM_SOURCE))
  places = (f'--python-platform={machine}-{glibc}', f'--python-version={version}')
  plan = ('--dry-run', '--no-deps', '--only-binary=:all:', f'--target={scratch}/none')
  text = run(uv, 'pip', 'install', *plan, *places, '-r', wheels)
  return f'{sum(line.startswith(" + ") for line in text.splitlines())} wheels'


def unknown_hashes(name: str, uv: str, scratch: pathlib.Path) -> list[str]:
  """Returns the pins of a lock with a hash that no file of the index has."""
  pins = bill_of_materials.read_lock((LOCKS / f'{name}.txt').read_text())
  asked, found = scratch / f'{name}.in', scratch / f'{name}.found.txt'
  asked.write_text(''.join(f'{pin.requirement}\n' for pin in pins))
  run(
    *(uv, 'pip', 'compile', '--no-deps', '--universal', '--python-version=3.11'),
    *('--generate-hashes', '--no-header', '--no-strip-extras', asked, '--output-file', found),
  )
  there = {
    (p.name, p.version): set(p.hashes) for p in bill_of_materials.read_lock(found.read_text())
  }
  return [p.name for p in pins if not set(p.hashes) <= there.get((p.name, p.version), set())]


def find_uv() -> str | None:
  """Returns uv, of this environment or of PATH, or None."""
  return shutil.which('uv', path=f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}')


def rows_of(name: str, versions: list[str], scratch: pathlib.Path, flags):
  """Yields (lock, Python, machine, what was done, result, whether it is as it should be)."""

  def attempt(function, *arguments):
    try:
      return function(*arguments), True
    except subprocess.CalledProcessError as error:
      lines = (error.output or '').strip().splitlines()[-8:]
      return f'failed: {" / ".join(lines)}', False

  if flags.skip != 'install':
    for version in versions:
      if python := find_python(version):
        result = attempt(install, name, version, python, scratch, flags)
        yield name, version, 'this machine', f'installed by {flags.installer}', *result
      else:
        yield name, version, 'this machine', 'not installed', f'no Python {version} here', True
  uv = find_uv()
  if flags.skip != 'resolve' and uv is None:
    yield name, 'all', 'all', 'not resolved', 'uv is not on PATH', True
  elif flags.skip != 'resolve':
    unknown, good = attempt(unknown_hashes, name, uv, scratch)
    text = f'not on the index: {unknown}' if unknown else 'all on the index'
    yield name, 'all', 'all', 'hashes', text, good and not unknown
    for version in versions:
      for machine in MACHINES if name not in X86_ALONE else ('x86_64',):
        result = attempt(resolve, name, version, machine, uv, scratch)
        yield name, version, machine, 'resolved', *result


def main() -> int:
  """Checks, prints a table, and returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--locks', default=','.join(NAMES), help='comma-separated')
  parser.add_argument('--pythons', default=','.join(PYTHONS), help='comma-separated')
  parser.add_argument('--skip', default='', choices=('', 'install', 'resolve'))
  parser.add_argument('--installer', default='pip', choices=('pip', 'uv'))
  parser.add_argument('--steps', type=int, default=6, help='of the training; 0 for none')
  parser.add_argument('--scratch', help='folder for environments; needs 10 GB for cuda')
  flags = parser.parse_args()
  if flags.installer == 'uv' and find_uv() is None:
    parser.error('--installer=uv: uv is not on PATH')
  names, versions = flags.locks.split(','), flags.pythons.split(',')
  for given, known in ((names, NAMES), (versions, PYTHONS)):
    if strange := [word for word in given if word not in known]:
      parser.error(f'{strange[0]}: expected some of {",".join(known)}')
  scratch = pathlib.Path(tempfile.mkdtemp(prefix='ftjax-locks-', dir=flags.scratch))
  failed = False
  try:
    print('| lock | Python | machine | check | result |\n|---|---|---|---|---|', flush=True)
    for name in names:
      for *row, good in rows_of(name, versions, scratch, flags):
        failed |= not good
        print(f'| {" | ".join(row)} |', flush=True)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return int(failed)


if __name__ == '__main__':
  sys.exit(main())
