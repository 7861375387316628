"""Reads the Python files of the project: what each imports, starts and reads."""

import ast
import functools
import pathlib
import re
import sys

FOLDERS = ('benchmarks', 'configs', 'demo', 'docs', 'ftjax', 'launch', 'tests', 'third_party')
_PLAIN = re.compile(r'[\w.-]+(/[\w.-]+)*/?')
_DOTTED = re.compile(r'[\w.]+')
_ATTRIBUTE = re.compile(r'\b([A-Za-z_][\w.]*):[A-Za-z_]')
_FROM = re.compile(r'^\s*from (ftjax[\w.]*) import ([\w, ]+)', re.MULTILINE)
_IMPORT = re.compile(r'^\s*import (ftjax[\w.]*)', re.MULTILINE)
LEFT_OUT = {'__pycache__', 'node_modules', 'stubs'}


def python_files(root: pathlib.Path) -> list[str]:
  """Returns the paths of the project's Python files, relative to `root`, sorted."""
  found = []
  for folder in FOLDERS:
    for path in (root / folder).rglob('*.py'):
      inner = path.relative_to(root)
      hidden = any(part.startswith('.') for part in inner.parts)
      if not hidden and not LEFT_OUT & set(inner.parts):
        found.append(inner.as_posix())
  return sorted(found)


class Sources:
  """The project's Python files and how they refer to each other.

  root: folder of the checkout.
  search: {file: folders that it adds to the path of modules}.
  files: paths relative to the root.
  """

  def __init__(self, root: pathlib.Path, search: dict[str, list[str]]):
    self.root, self._search = root, search
    self.files = python_files(root)
    self._known = set(self.files)

  @functools.cache  # noqa: B019 -- one object in a process
  def tree(self, path: str) -> ast.Module:
    return ast.parse((self.root / path).read_text(encoding='utf-8'))

  def file_of(self, module: str, importer: str) -> str | None:
    """Returns the file that a dotted module, or `module.name` of one, is; None for others' modules.

    Tests, benchmarks and demos are scripts: they import the files of their own folder and of the
    folder at the root that it is in by bare names.
    """
    parts = module.split('.')
    folders = ['']
    if importer.split('/')[0] != 'ftjax':
      parent = importer.rpartition('/')[0]
      added = [f'{folder}/' for folder in self._search.get(importer, ())]
      folders = [f'{parent}/', f'{parent.split("/")[0]}/', *added, '']
    for folder in folders:
      for end in range(len(parts), 0, -1):
        stem = folder + '/'.join(parts[:end])
        for path in (f'{stem}.py', f'{stem}/__init__.py'):
          if path in self._known and path != importer:
            return path
    return None

  @functools.cache  # noqa: B019
  def imported(self, path: str) -> tuple[frozenset[str], frozenset[str]]:
    """Returns the project's files that a file imports, and the modules of others, both at whatever
    depth in it.
    """
    own, others = set(), set()
    for module in _modules(self.tree(path), path):
      if found := self.file_of(module, path):
        own.add(found)
      elif module.split('.')[0] not in sys.stdlib_module_names:
        others.add(module)
    return frozenset(own), frozenset(others)

  @functools.cache  # noqa: B019
  def named(self, path: str) -> frozenset[str]:
    """Returns the project's files that a file's strings name as modules: `ftjax.data.worker`,
    `toy_task:AS_LONG`, and what a program in a string imports.

    They are imported by that name, or run by `python -m`, when the program reaches it.
    """
    found = set()
    for text in _strings(self.tree(path)):
      modules = [text] if text.startswith('ftjax.') and _DOTTED.fullmatch(text) else []
      modules += _ATTRIBUTE.findall(text)
      for module, names in _FROM.findall(text):
        modules += [f'{module}.{name.strip()}' for name in names.split(',')]
      modules += _IMPORT.findall(text)
      found |= {self.file_of(module, path) for module in modules}
    return frozenset(f for f in found - {path, None} if not f.endswith('__init__.py'))

  @functools.cache  # noqa: B019
  def strings(self, path: str) -> set[str]:
    """Returns the strings in a file."""
    return _strings(self.tree(path))

  @functools.cache  # noqa: B019
  def read(self, path: str) -> set[str]:
    """Returns paths of the project, files or folders, that the file's strings name.

    `ROOT / 'docs' / 'data.md'` names docs/data.md. A path counts from the folder of the file, from
    tests/ or from the root. The names of shipped configs count too, as in --config=tiny_sft.
    """
    here = path.rpartition('/')[0]
    found = set()
    for text in _paths(self.tree(path)):
      for start in dict.fromkeys((f'{here}/', 'tests/' if here.startswith('tests') else '', '')):
        if (text.endswith('/') or '/' in text) and self._is_data(start + text):
          found.add(f'{start}{text}'.rstrip('/'))
          break
      name = text.removeprefix('--config=')
      if name.isidentifier() and f'configs/{name}.py' in self._known:
        found.add(f'configs/{name}.py')
    return found

  def _is_data(self, text: str) -> bool:
    parts = text.rstrip('/').split('/')
    if len(text) > 200 or not text.isprintable() or not _PLAIN.fullmatch(text):
      return False
    is_ours = len(parts) == 1 or parts[0] in FOLDERS
    return is_ours and not parts[0].startswith('.') and (self.root / text).exists()


def _modules(tree: ast.Module, path: str) -> set[str]:
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      if node.level:
        raise ValueError(f'{path}:{node.lineno}: a relative import; write the whole module')
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return found


def _strings(tree: ast.AST) -> set[str]:
  nodes = ast.walk(tree)
  return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def _paths(tree: ast.Module) -> set[str]:
  """Returns each string that has a slash or is one name, and those that `/` joins to a path.

  A name alone, as in ROOT / 'docs', counts where the left side is the checkout or a file's place.
  """
  strings = _strings(tree)
  found = {text for text in strings if '/' in text.strip('/')}
  found |= {text for text in strings if text.removeprefix('--config=').isidentifier()}
  for node in ast.walk(tree):
    parts = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
      last = node.right
      is_text = isinstance(last, ast.Constant) and isinstance(last.value, str)
      parts = [last.value, *parts] if is_text else []
      node = node.left
    left = ast.dump(node).lower() if parts else ''
    if len(parts) > 1 or 'root' in left or '__file__' in left:
      found.add('/'.join(parts) + '/')
  return found
