"""Packs a user's own modules for the hosts, and finds those of this machine that a config needs and
--code leaves out. Run by lib.sh with the python3 of the machine that launches, so that it has the
standard library of Python 3.9 alone. Errors are one line, with exit code 2.

  python3 own_code.py --code=PATH,... --config=FILE --archive=FILE [-- FLAG ...]
"""

import argparse
import ast
import gzip
import os
import pathlib
import re
import sys
import tarfile

MOST_BYTES = 10 << 20
MOST_FILES = 2000
LEFT_OUT = ('__pycache__', 'node_modules')  # and what begins with a dot, and environments
_MTIME = 946684800  # of every file: the same code is the same archive
_KEY = b'PRIVATE ' + b'KEY-----'
# my_rewards in 'my_rewards:slogan', 'math@1,my_rewards:slogan@2' and 'mine=reward/my_rewards:f'.
_NAMED = re.compile(r'(?<![\w.])([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):[A-Za-z_]')
_STANDARD = {*getattr(sys, 'stdlib_module_names', sys.builtin_module_names), 'ftjax'}


class Refused(Exception):
  """What the user has to change."""


# Files of --code


def collect(paths):
  """Returns {name on the host: file} of the files and folders that --code names.

  A folder arrives under its own name; of one that ends in / (or is `.`), its contents arrive.
  """
  files = {}
  for text in paths:
    path = pathlib.Path(os.path.expanduser(text))
    if path.name.startswith('.') and path.name != '..':
      raise Refused(f'--code={text}: names that begin with a dot are not copied')
    if path.is_dir():
      is_inside = text.endswith('/') or path.name in ('', '..')
      if not _walk(path, '' if is_inside else path.name + '/', files):
        raise Refused(f'--code={text}: there is no file in it that would be copied')
    elif path.is_file():
      _add(files, path.name, path)
    else:
      raise Refused(f'--code={text}: no such file or folder')
  _limit(files)
  return files


def _walk(root, prefix, files):
  """Adds the files below a folder; returns how many there are."""
  count = 0
  for folder, names, plain in os.walk(root):
    here = pathlib.Path(folder)
    names[:] = sorted(n for n in names if not _is_left_out(here / n))
    for name in names:
      if (here / name).is_symlink():
        raise Refused(f'--code: {here / name} is a link to a folder; name the folder itself')
    for name in sorted(plain):
      if not _is_left_out(here / name):
        _add(files, prefix + (here / name).relative_to(root).as_posix(), here / name)
        count += 1
    _limit(files)  # not after a walk through a home folder
  return count


def _is_left_out(path):
  is_environment = path.is_dir() and (path / 'pyvenv.cfg').exists()
  return path.name.startswith('.') or path.name in LEFT_OUT or is_environment


def _add(files, name, path):
  if not path.is_file():
    raise Refused(f'--code: {path} is no file that can be copied (a broken link, a pipe)')
  if not os.access(path, os.R_OK):
    raise Refused(f'--code: {path} cannot be read')
  if name in files and not files[name].samefile(path):
    raise Refused(f'--code: {files[name]} and {path} would both be {name} on the hosts')
  files[name] = path


def _limit(files):
  sizes = sorted(((p.stat().st_size, str(p)) for p in files.values()), reverse=True)
  if len(files) <= MOST_FILES and sum(size for size, _ in sizes) <= MOST_BYTES:
    return
  largest = ', '.join(f'{path} ({size:,} bytes)' for size, path in sizes[:3])
  raise Refused(
    f'--code: more than {MOST_BYTES >> 20} MiB or {MOST_FILES:,} files; the largest so far: '
    f'{largest}. Name the modules alone; data belong into the bucket or on a shared disk'
  )


def check(files, config, secrets, locks):
  """Refuses files that are too large together, hold a secret, or hide a module of others."""
  for path in [*files.values(), *([config] if config else [])]:
    data = path.read_bytes()
    for name in secrets:
      value = os.environ.get(name, '').encode()
      if value and value in data:
        raise Refused(f'{path} holds the value of {name}; it is passed by the environment alone')
    if _KEY in data:
      raise Refused(f'{path} holds a private key; it would be copied to the hosts')
  locked = {
    found[1].lower().replace('-', '_')
    for lock in locks
    if lock.is_file()
    for found in re.finditer(r'^([\w.-]+)==', lock.read_text(), re.MULTILINE)
  }
  for name, path in files.items():
    module = name.partition('/')[0]
    module = module[:-3] if module.endswith('.py') else module
    if module in _STANDARD or module.lower() in locked:
      raise Refused(f'--code: {path} would hide the module {module} that ftjax uses; rename it')


def pack(files, archive, most):
  """Writes the archive; the same files are the same bytes."""
  with archive.open('wb') as raw:
    packed = gzip.GzipFile(filename='', mode='wb', fileobj=raw, mtime=0)
    with packed, tarfile.open(fileobj=packed, mode='w') as tar:
      for name, path in sorted(files.items()):
        info = tarfile.TarInfo(name)
        info.size, info.mtime = path.stat().st_size, _MTIME
        info.mode = 0o755 if os.access(path, os.X_OK) else 0o644
        with path.open('rb') as file:
          tar.addfile(info, file)
  size = archive.stat().st_size
  if most and size > most:
    raise Refused(
      f'the code is {size:,} bytes when packed, and this launcher carries at most {most:,}, in a '
      'manifest; put it into the image (docs/launching.md)'
    )


# What a config needs


def _parsed(path):
  """Returns the syntax tree of a file, None where this Python may be too old for it."""
  try:
    return ast.parse(path.read_bytes())
  except (SyntaxError, ValueError) as error:
    if sys.version_info < (3, 11):  # noqa: UP036 # that of the launching machine
      return None
    line = getattr(error, 'lineno', None) or 1
    raise Refused(f'{path}:{line}: {type(error).__name__}: {error}') from error


def _names(path, package):
  """Returns [(module or module.attribute, line)] that a file imports or names in a text.

  Args:
    path: the file.
    package: the package it is in, for relative imports; '' for none.
  """
  if path.suffix == '.json':
    return [(found, 1) for found in _NAMED.findall(path.read_text(errors='replace'))]
  tree = _parsed(path)
  found = []
  docstrings = set()
  for node in ast.walk(tree) if tree else ():
    if isinstance(node, ast.Expr):
      docstrings.add(id(node.value))
    elif isinstance(node, ast.Import):
      found += [(alias.name, node.lineno) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      module = _absolute(node, package)
      if not module:
        continue
      found += [(f'{module}.{alias.name}', node.lineno) for alias in node.names]
    elif isinstance(getattr(node, 'value', None), str) and id(node) not in docstrings:
      found += [(name, node.lineno) for name in _NAMED.findall(node.value)]
  return found


def _absolute(node, package):
  """Returns the module that `from ... import` names, '' for a relative one outside of packages."""
  if not node.level:
    return node.module
  parts = package.split('.') if package else []
  above = parts[: len(parts) - node.level + 1]
  return '.'.join([*above, *([node.module] if node.module else [])]) if above else ''


def _find(name, has):
  """Returns [(path below a folder, file)] of the modules that importing `name` reads."""
  parts, found = name.split('.'), []
  for i in range(1, len(parts) + 1):
    base = '/'.join(parts[:i])
    for relative in (f'{base}/__init__.py', f'{base}.py'):
      path = has(relative)
      if path:
        found.append((relative, path))
        break
  return found


def missing(config, flags, files, folders):
  """Returns {top-level file or folder of this machine: FILE:LINE that needs it} that is not among
  `files`; follows what modules of the user import in turn.
  """
  waiting = [(name, flag) for flag in flags for name in _NAMED.findall(flag.partition('=')[2])]
  if config:
    waiting += [(name, f'{config}:{line}') for name, line in _names(config, '')]
  out, seen = {}, set()
  while waiting:
    name, by = waiting.pop(0)
    folder, modules = _located(name, files, folders)
    for relative, path in modules:
      if folder and relative not in files:
        out.setdefault(folder / relative.partition('/')[0], by)
      if path not in seen:
        seen.add(path)
        package = relative[: -len('.py')].replace('/', '.').rpartition('.')[0]
        waiting += [(n, f'{_shown(path)}:{line}') for n, line in _names(path, package)]
  return out


def _located(name, files, folders):
  """Returns the folder of this machine (None for --code), and the modules in it that importing
  `name` reads: none of what is installed on the hosts, or is no module at all.
  """
  if name.partition('.')[0] in _STANDARD:
    return None, []
  modules = _find(name, files.get)
  if modules:
    return None, modules
  for folder in folders:
    modules = _find(name, lambda relative, at=folder: _file(at / relative))
    if modules:
      return folder, modules
  return None, []


def _file(path):
  return path if path.is_file() else None


def _folders(config):
  """Returns where Python finds modules of the user on this machine: beside the config, in the
  working directory, and on PYTHONPATH but for folders of installed packages.
  """
  own = [pathlib.Path(p) for p in os.environ.get('PYTHONPATH', '').split(os.pathsep) if p]
  own = [p for p in own if p.is_dir() and not any(p.glob('*.dist-info'))]
  folders = [*([config.absolute().parent] if config else []), pathlib.Path.cwd(), *own]
  return list(dict.fromkeys(p.resolve() for p in folders))


def _shown(path):
  try:
    return str(path.relative_to(pathlib.Path.cwd().resolve()))
  except ValueError:
    return str(path)


def main():
  """Checks, and packs where there is --code; prints the names of what it packed."""
  parser = argparse.ArgumentParser(allow_abbrev=False)
  parser.add_argument('--code', default='', help='what --code of the launcher names')
  parser.add_argument('--config', default='', help='config file of this machine')
  parser.add_argument(
    '--carry-config', action='store_true', help='the config goes into the archive'
  )
  parser.add_argument('--archive', type=pathlib.Path, help='written where there is code')
  parser.add_argument('--most-packed', type=int, default=0, help='largest archive, bytes; 0: any')
  parser.add_argument('--secrets', default='', help='names of variables that hold secrets')
  parser.add_argument('--lock', action='append', default=[], type=pathlib.Path)
  parser.add_argument('flags', nargs='*')
  given = parser.parse_args()
  config = pathlib.Path(given.config) if given.config else None
  paths = [p for p in given.code.split(',') if p]
  files = collect(paths)
  check(files, config, [s for s in given.secrets.split(',') if s], given.lock)
  left = missing(config, given.flags, files, _folders(config))
  if left:
    needed = ', '.join(f'{_shown(top)} (needed by {by})' for top, by in left.items())
    remedy = ','.join([*paths, *map(_shown, left)])
    raise Refused(f'the hosts would not have {needed}; add --code={remedy}')
  if given.carry_config and config:
    _add(files, config.name, config)
  if files and given.archive:
    pack(files, given.archive, given.most_packed)
    print(', '.join(sorted(files)))


if __name__ == '__main__':
  try:
    main()
  except Refused as refused:
    print(f'error: {refused}', file=sys.stderr)
    sys.exit(2)
  except OSError as error:
    print(f'error: --code: {error}', file=sys.stderr)
    sys.exit(2)
