"""Writes the BUILD files from the imports, layers.toml and targets.toml.

  python third_party/bazel/make_build_files.py           # writes them
  python third_party/bazel/make_build_files.py --check   # prints what differs; exit code 1 if any

A Python file is a target. Its deps are what it imports: `//ftjax/training:step`, `@pypi//jax`. The
visibility of a folder of ftjax/ is a package group of the root: the folders whose row in
layers.toml lists it.
"""

import argparse
import difflib
import functools
import pathlib
import re
import sys
import tomllib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import imports
import starlark
import tests_targets

ROOT = pathlib.Path(__file__).resolve().parents[2]
_HEAD = (
  '# Written by third_party/bazel/make_build_files.py from the imports: change these, run it.\n'
)
_PYTHON = '@rules_python//python:defs.bzl'
_OUTSIDE = ('benchmarks', 'configs', 'demo', 'docs', 'tests', 'third_party')
_FOR_ALL_FOLDERS = ('ftjax/__init__.py', 'ftjax/cli.py')  # the other files there are entries
# What third_party/build_wheel.py builds from.
_WHEEL_FILES = (
  'CHANGELOG.md', 'CITATION.cff', 'CONTRIBUTING.md', 'LICENSE', 'README.md', 'SECURITY.md',
  'pyproject.toml',
)  # fmt: skip
_WHEEL_FOLDERS = ('configs', 'ftjax', 'launch', 'third_party')
_ROOT_FILES = (
  '.bazelignore', '.bazelrc', '.bazelversion', '.ci/run', '.gitignore', 'CHANGELOG.md',
  'CITATION.cff', 'CONTRIBUTING.md', 'LICENSE', 'MODULE.bazel', 'Makefile', 'README.md',
  'SECURITY.md', 'WORKSPACE', 'layers.toml', 'pyproject.toml',
)  # fmt: skip


class Project:
  """The checkout: its files, and the two tables.

  layers: {folder of ftjax/: folders that it may import}.
  targets: what targets.toml holds.
  version: of ftjax.
  """

  def __init__(self, root: pathlib.Path):
    here = pathlib.Path(__file__).resolve().parent
    self.root = root
    self.layers = tomllib.loads((root / 'layers.toml').read_text())['imports']
    self.targets = tomllib.loads((here / 'targets.toml').read_text())
    self.sources = imports.Sources(root, self.targets['search'])
    lock = (root / 'third_party' / 'requirements' / 'test.txt').read_text()
    package = (root / 'ftjax' / '__init__.py').read_text()
    self.version = re.search(r"^__version__ = '(.+)'$", package, re.MULTILINE).group(1)
    self.locked = set(re.findall(r'^([\w.-]+)(?:\[.*?\])?==', lock, re.MULTILINE))

  @functools.cached_property
  def packages(self) -> list[str]:
    """Folders that get a BUILD file, sorted."""
    folders = {path.rpartition('/')[0] for path in self.sources.files}
    folders |= {top for top in imports.FOLDERS if (self.root / top).is_dir()}
    return sorted(folders)

  @functools.cached_property
  def needed_by_others(self) -> frozenset[str]:
    """Files that other files import, or name in a string."""
    found = (self.sources.imported(f)[0] | self.sources.named(f) for f in self.sources.files)
    return frozenset().union(*found)

  def package_of(self, path: str) -> str:
    """Returns the innermost package that a file or folder lies in."""
    inside = [p for p in self.packages if path == p or path.startswith(f'{p}/')]
    return max(inside, key=len, default='')

  def label(self, path: str) -> str:
    """Returns the py_library of a Python file."""
    folder, _, name = self.circle(path)[0].rpartition('/')
    name = name.removesuffix('.py')
    return f'//{folder}:{name}_module' if is_test(path) else f'//{folder}:{name}'

  def circle(self, path: str) -> tuple[str, ...]:
    """Returns the files of its folder that a file imports in a circle, and itself, sorted: they are
    one target, of the first's name. Python runs a folder's `__init__` before its other files.
    """
    folder = path.rpartition('/')[0]
    near = {f for f in self._reached(path) if f.rpartition('/')[0] == folder}
    return tuple(sorted({path} | {f for f in near if path in self._reached(f)}))

  @functools.cache  # noqa: B019 -- one object in a process
  def _reached(self, path: str) -> frozenset[str]:
    """Returns the files of its folder that a file imports, directly or through others of it."""
    folder, _, _ = path.rpartition('/')
    todo, seen = [path], set()
    while todo:
      current = todo.pop()
      found = {*self.sources.imported(current)[0], *self._parents(current)} - seen
      found = {f for f in found if f.rpartition('/')[0] == folder}
      seen |= found
      todo += found
    return frozenset(seen)

  def distribution(self, module: str, path: str) -> str | None:
    """Returns the label of the distribution that has a module; None for one in no lock.

    Raises:
      ValueError: no lock has the distribution, and targets.toml does not name the module.
    """
    names = self.targets['distributions']
    parts = module.split('.')
    prefixes = ('.'.join(parts[:end]) for end in range(len(parts), 0, -1))
    found = next((names[p] for p in prefixes if p in names), parts[0])
    found = found.lower().replace('_', '-')
    if parts[0] in self.targets['not_locked']['modules']:
      return None
    if found not in self.locked:
      raise ValueError(
        f'{path} imports {module}, and third_party/requirements/test.txt has no {found}. Name the'
        ' distribution in third_party/bazel/targets.toml, in [distributions] or [not_locked]'
      )
    return f'@pypi//{found.replace("-", "_")}'

  def check_layers(self, path: str, other: str) -> None:
    """Raises ValueError where layers.toml does not let a file of ftjax/ import another."""
    mine, theirs = (p.split('/')[1:-1][:1] for p in (path, other))
    if not path.startswith('ftjax/') or not (mine and theirs) or mine == theirs:
      return
    if theirs[0] not in self.layers.get(mine[0], ()):
      raise ValueError(
        f'{path} imports {other}: layers.toml does not let {mine[0]} import {theirs[0]}'
      )

  def deps(self, path: str) -> set[str]:
    """Returns labels of what a file imports, and of the `__init__` of its folder."""
    own, others = self.sources.imported(path)
    for other in own:
      self.check_layers(path, other)
    found = {self.label(other) for other in own}
    found |= {d for module in others if (d := self.distribution(module, path))}
    found |= {self.label(init) for init in self._parents(path)}
    return found

  def _parents(self, path: str) -> list[str]:
    """Returns the `__init__.py` that Python runs before it runs a file."""
    folder = path.rpartition('/')[0]
    if path.endswith('/__init__.py'):
      folder = folder.rpartition('/')[0]
    init = f'{folder}/__init__.py'
    return [init] if init in self.sources.files else []

  def data(self, path: str) -> set[str]:
    """Returns labels of the files that a file reads."""
    read = self.sources.read(path) | set(self.targets['data'].get(path, ()))
    return {self.data_label(found) for found in read} - {self.label(path), None}

  def data_label(self, path: str) -> str | None:
    package = self.package_of(path)
    if (self.root / path).is_dir():
      if path == package:
        return f'//{path}:all_files'
      # A folder of data is a target of its own: the first folder below the package.
      name = path.removeprefix(f'{package}/').split('/')[0]
      return f'//{package}:{name}'
    if path.endswith('.py') and not is_test(path):
      return self.label(path)
    inner = path.removeprefix(f'{package}/')
    if package and '/' in inner:
      return f'//{package}:{inner.split("/")[0]}'
    return f'//{package}:{inner}'

  def runtime(self, path: str) -> set[str]:
    """Returns the files that a program may import by name once it has imported this one."""
    todo, seen, found = [path], set(), set()
    while todo:
      current = todo.pop()
      if current in seen:
        continue
      seen.add(current)
      named = set(self.sources.named(current))
      for pattern in self.targets['runtime'].get(current, ()):
        folder = pattern.removesuffix('/*')
        named |= {f for f in self.sources.files if f.rpartition('/')[0] == folder}
      found |= {name for name in named if not name.endswith('/__init__.py')}
      todo += [*named, *self.sources.imported(current)[0]]
    return found - {path}


def is_test(path: str) -> bool:
  """Whether pytest collects a file."""
  folder, _, name = path.rpartition('/')
  return folder.split('/')[0] == 'tests' and name.startswith('test_')


def library(project: Project, circle: tuple[str, ...]) -> starlark.Call:
  """Returns the py_library of a file, or of those that import each other."""
  path = circle[0]
  folder = path.rpartition('/')[0]
  deps = set().union(*(project.deps(p) for p in circle)) - {project.label(path)}
  data = set().union(*(data_beside(project, p) for p in circle))
  return starlark.Call(
    'py_library',
    name=project.label(path).partition(':')[2],
    srcs=[p.rpartition('/')[2] for p in circle],
    data=sorted(data),
    visibility=['//:may_import_package'] if path in _FOR_ALL_FOLDERS else [],
    deps=starlark.labels(deps, folder),
  )


def binary(project: Project, path: str) -> starlark.Call:
  """Returns the py_binary of a file, as targets.toml describes it."""
  folder, _, file = path.rpartition('/')
  about = project.targets['binaries'][path]
  deps = {project.label(path), *about.get('deps', ())}
  deps |= {project.label(named) for named in project.runtime(path)}
  return starlark.Call(
    'py_binary',
    name=about['name'],
    srcs=[file],
    data=about.get('data', []),
    imports=about.get('imports', []),
    main=file,
    deps=starlark.labels(deps, folder),
  )


def data_beside(project: Project, path: str) -> set[str]:
  """Returns the folder without Python files that a file of ftjax/ names, as its data."""
  folder = path.rpartition('/')[0]
  if not folder.startswith('ftjax'):
    return set()
  beside = project.targets['data_beside'].get(path, ())
  found = {name if name.startswith('//') else f':{name}' for name in beside}
  for text in project.sources.strings(path):
    below = project.root / folder / text
    is_data = text.isidentifier() and text != '__pycache__' and below.is_dir()
    if is_data and f'{folder}/{text}' not in project.packages:
      found.add(f':{text}')
  return found


def visibility(project: Project, package: str) -> list[str]:
  """Returns who may depend on the targets of a folder."""
  parts = package.split('/')
  if parts[0] == 'launch':  # the card of TPU names
    return ['//:tools', '//ftjax:__subpackages__']
  if parts[0] != 'ftjax':
    return ['//:tools']
  return [f'//:may_import_{parts[1]}' if len(parts) > 1 else '//:tools']


def data_folders(project: Project, package: str) -> list[str]:
  """Returns the names of folders of data directly below a package, sorted."""
  below = sorted(p.name for p in (project.root / package).iterdir() if p.is_dir())
  hidden = ('.', '__')
  return [
    name
    for name in below
    if not name.startswith(hidden)
    and name not in imports.LEFT_OUT
    and not any(p == f'{package}/{name}' or p.startswith(f'{package}/{name}/')
                for p in project.packages)
  ]  # fmt: skip


def package_text(project: Project, package: str) -> str:
  """Returns the BUILD file of a folder."""
  files = [f for f in project.sources.files if f.rpartition('/')[0] == package]
  rules = []
  for path in files:
    circle = project.circle(path)
    if is_test(path):
      rules.append(tests_targets.of_file(project, path))
      is_library = path in project.needed_by_others
    else:
      is_library = circle[0] == path
    if is_library:
      rules.append(library(project, circle))
    if path in project.targets['binaries']:
      rules.append(binary(project, path))
  rules += file_groups(project, package)
  of_python = sorted({r.rule for r in rules} & {'py_binary', 'py_library'})
  loads = [(_PYTHON, of_python)] if of_python else []
  if any(r.rule == 'pytest_test' for r in rules):
    loads.append(('//third_party/bazel:pytest.bzl', ['pytest_test']))
  head = starlark.Call('package', default_visibility=visibility(project, package))
  if package == 'third_party/bazel':
    rules.insert(0, starlark.Call('exports_files', ['pytest.bzl', 'run_pytest.py', 'wheel.bzl']))
  return starlark.file(_HEAD, loads, [head, *rules])


def file_groups(project: Project, package: str) -> list[starlark.Call]:
  """Returns the groups of a folder's files: what tests read, and all of them with those below."""
  groups = [
    starlark.Call('filegroup', name=name, srcs=starlark.Glob([f'{name}/**']))
    for name in data_folders(project, package)
  ]
  exported = sorted(
    {
      label.partition(':')[2]
      for path in project.sources.files
      for label in tests_targets.data(project, path)
      if label.startswith(f'//{package}:') and '.' in label.partition(':')[2]
    }
  )
  if exported:
    groups.insert(0, starlark.Call('exports_files', exported))
  below = [p for p in project.packages if p.rpartition('/')[0] == package]
  glob = starlark.Glob(['**'], exclude=['**/__pycache__/**', '**/node_modules/**'])
  if below:
    glob = starlark.Glob(glob.include, glob.exclude, [f'//{p}:all_files' for p in below])
  return [*groups, starlark.Call('filegroup', name='all_files', srcs=glob)]


def root_text(project: Project) -> str:
  """Returns the BUILD file of the root: who may import whom, the licence, the wheel, //:ci."""
  everyone = [f'//{folder}/...' for folder in _OUTSIDE if (project.root / folder).is_dir()]
  groups = [
    starlark.Call('package_group', name='tools', packages=['//', *sorted([*everyone, '//ftjax'])]),
    starlark.Call(
      'package_group', name='may_import_package', includes=[':tools'], packages=['//ftjax/...']
    ),
  ]
  for folder in project.layers:
    users = [user for user, allowed in project.layers.items() if folder in allowed]
    packages = sorted(f'//ftjax/{user}/...' for user in [folder, *users])
    name = f'may_import_{folder}'
    groups.append(starlark.Call('package_group', name=name, includes=[':tools'], packages=packages))
  present = [f for f in _ROOT_FILES if (project.root / f).exists()]
  tops = [p for p in project.packages if '/' not in p]
  ci = {project.label(test).removesuffix('_module') for test in project.targets['ci'].values()}
  rules = [
    starlark.Call('exports_files', present),
    starlark.Call('filegroup', name='license', srcs=['LICENSE']),
    starlark.Call(
      'filegroup',
      name='all_files',
      srcs=[*sorted([*present, 'BUILD']), *(f'//{p}:all_files' for p in tops)],
    ),
    starlark.Call(
      'wheel',
      name='wheel',
      srcs=[*_WHEEL_FILES, *(f'//{folder}:all_files' for folder in _WHEEL_FOLDERS)],
      version=project.version,
    ),
    starlark.Call('alias', name='ftjax', actual='//third_party/bazel:ftjax'),
    starlark.Call('test_suite', name='ci', tests=starlark.labels(ci, '')),
  ]
  head = starlark.Call('package', default_visibility=['//:tools'])
  return starlark.file(
    _HEAD, [('//third_party/bazel:wheel.bzl', ['wheel'])], [head, *groups, *rules]
  )


def build_files(root: pathlib.Path) -> dict[str, str]:
  """Returns {path of a BUILD file: its text}."""
  project = Project(root)
  texts = {f'{package}/BUILD': package_text(project, package) for package in project.packages}
  return {'BUILD': root_text(project)} | texts


def stale_files(root: pathlib.Path, wanted: dict[str, str]) -> set[str]:
  """Returns the BUILD files of folders that have none any more."""
  found = set()
  for folder in imports.FOLDERS:
    found |= {path.relative_to(root).as_posix() for path in (root / folder).rglob('BUILD')}
  return {p for p in found - wanted.keys() if not imports.LEFT_OUT & set(p.split('/'))}


def differences(root: pathlib.Path) -> list[str]:
  """Returns the lines of a diff from the BUILD files that are there to those there should be."""
  wanted = build_files(root)
  lines = []
  for path in sorted(stale_files(root, wanted) | wanted.keys()):
    file = root / path
    old = file.read_text() if file.exists() else ''
    new = wanted.get(path, '').splitlines()
    lines += difflib.unified_diff(old.splitlines(), new, path, path, lineterm='')
  return lines


def write(root: pathlib.Path) -> None:
  """Writes the BUILD files, and removes those of folders that have none any more."""
  wanted = build_files(root)
  for path, text in wanted.items():
    (root / path).write_text(text)
  for path in stale_files(root, wanted):
    (root / path).unlink()


def main() -> int:
  parser = argparse.ArgumentParser(description='Writes the BUILD files from the imports.')
  parser.add_argument('--check', action='store_true', help='only print what differs')
  args = parser.parse_args()
  try:
    if args.check:
      lines = differences(ROOT)
      print('\n'.join(lines) or 'The BUILD files agree with the imports.')
      return int(bool(lines))
    write(ROOT)
  except ValueError as error:
    print(error, file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
