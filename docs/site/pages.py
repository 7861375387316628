"""Prepares the pages of the documentation for Sphinx: navigation, links, and the files they link.

In the repository the pages are read as they are, and link each other and files by relative paths.
On the site README.md is index.html, and a linked file or folder has a page of its own below files/.
Imports the standard library only.
"""

import dataclasses
import fnmatch
import pathlib
import posixpath
import re
import shutil
import tomllib
from collections.abc import Iterator

SECTIONS = pathlib.Path(__file__).parent / 'sections.toml'
INDEX = 'README.md'
_LANGUAGES = {'.py': 'python', '.toml': 'toml', '.sh': 'bash', '.yaml': 'yaml', '.json': 'json'}
_MEDIA = ('.png', '.svg', '.jpg', '.gif')
_FENCE = re.compile(r' {0,3}(`{3,}|~{3,})')
_SPAN_OR_LINK = re.compile(r'(`+)(?:(?!\1).)+\1|(?<=\]\()([^()\s]+)(?=\))', re.DOTALL)
_OUTSIDE = re.compile(r'[a-z][a-z0-9+.-]*:|#')


class PageError(Exception):
  """A page that cannot be shown: in no section, without a title, or with a broken link."""


@dataclasses.dataclass(frozen=True)
class Page:
  """A page of the documentation.

  Attributes:
    path: below the root of the repository, with '/'.
    title: its first heading.
    text: its Markdown.
  """

  path: str
  title: str
  text: str


def find(root: pathlib.Path) -> dict[str, Page]:
  """Returns {path: page} of *.md in the root of the repository, and below docs/.

  Raises:
    PageError: a page whose first line is no heading.
  """
  paths = [*root.glob('*.md'), *(root / 'docs').rglob('*.md')]
  found = {}
  for file in sorted(paths):
    path = file.relative_to(root).as_posix()
    text = file.read_text(encoding='utf-8')
    title = re.match(r'# +(.+)', text)
    if not title:
      raise PageError(f'{path}: expected "# TITLE" in its first line')
    found[path] = Page(path, title[1].strip(), text)
  return found


def sections(pages: dict[str, Page], table: pathlib.Path = SECTIONS) -> dict[str, list[Page]]:
  """Returns {section: its pages} in the order of the navigation, without empty sections.

  Raises:
    PageError: a page that stands in no section.
  """
  left = {path: page for path, page in pages.items() if path != INDEX}
  found = {}
  for section, patterns in tomllib.loads(table.read_text())['sections'].items():
    mine = []
    for pattern in patterns:
      matching = [p for p in left.values() if fnmatch.fnmatchcase(p.path, pattern)]
      mine += sorted(matching, key=lambda p: p.title.lower())
      left = {path: page for path, page in left.items() if page not in matching}
    if mine:
      found[section] = mine
  if left:
    raise PageError(
      f'{", ".join(left)}: in no section of the site; add a pattern for it to docs/site/'
      'sections.toml'
    )
  return found


def prepare(root: pathlib.Path, target: pathlib.Path) -> None:
  """Writes the sources of the site into an empty folder.

  Args:
    root: of the repository.
    target: gets index.md, the other pages at their paths, media files, and files/.

  Raises:
    PageError: see `find` and `sections`; or a link to a file that does not exist.
  """
  pages = find(root)
  tree = sections(pages)
  linked = set()
  for page in pages.values():
    text = _rewrite(page, root, pages, linked)
    if page.path == INDEX:
      text += ''.join(_toctree(section, listed) for section, listed in tree.items())
    _write(target / _place(page.path), text)
  for path in sorted(linked):
    if path.endswith(_MEDIA):
      copy = target / path
      copy.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(root / path, copy)
    else:
      _write(target / _file_page(path), _shown(root, path))


def _place(path: str) -> str:
  """Returns where a page stands below the sources."""
  return 'index.md' if path == INDEX else path


def _file_page(path: str) -> str:
  """Returns the page that shows a file or folder of the repository."""
  return f'files/{path}.md'


def _toctree(section: str, pages: list[Page]) -> str:
  lines = '\n'.join(page.path.removesuffix('.md') for page in pages)
  return f'\n```{{toctree}}\n:hidden:\n:caption: {section}\n\n{lines}\n```\n'


def _rewrite(page: Page, root: pathlib.Path, pages: dict[str, Page], linked: set[str]) -> str:
  """Returns the text of a page with the links of the site.

  Args:
    page: the page.
    root: of the repository.
    pages: all pages.
    linked: gets the files and folders that it links.
  """

  def replace(match: re.Match) -> str:
    target = match[2]
    if target is None or _OUTSIDE.match(target):
      return match[0]
    path, hash_mark, anchor = target.partition('#')
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page.path), path))
    if path.startswith('..') or not (root / path).exists():
      raise PageError(f'{page.path}: the link {target} leads to no file of the repository')
    if path in pages:
      place = _place(path)
    else:
      linked.add(path)
      place = path if path.endswith(_MEDIA) else _file_page(path)
    start = posixpath.dirname(_place(page.path)) or '.'
    return posixpath.relpath(place, start) + hash_mark + anchor

  return ''.join(
    part if is_code else _SPAN_OR_LINK.sub(replace, part) for is_code, part in _parts(page.text)
  )


def _parts(text: str) -> Iterator[tuple[bool, str]]:
  """Yields (whether it is a code block, its lines) of the parts of a page, in order."""
  kept, fence = [], ''
  for line in text.splitlines(keepends=True):
    mark = _FENCE.match(line)
    if not fence and mark:
      yield False, ''.join(kept)
      kept, fence = [line], mark[1]
    elif fence and mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
      yield True, ''.join([*kept, line])
      kept, fence = [], ''
    else:
      kept.append(line)
  yield bool(fence), ''.join(kept)


def _shown(root: pathlib.Path, path: str) -> str:
  """Returns a page with the content of a file, or the names in a folder."""
  # The search finds the documentation, not the files that it links.
  head = f'---\norphan: true\nnosearch: true\n---\n# {path}\n\n'
  file = root / path
  if file.is_dir():
    names = sorted(p.name + '/' * p.is_dir() for p in file.iterdir() if _is_listed(p))
    return head + '\n'.join(f'- `{name}`' for name in names) + '\n'
  text = file.read_text(encoding='utf-8').rstrip('\n')
  fence = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
  return f'{head}{fence}{_LANGUAGES.get(file.suffix, "text")}\n{text}\n{fence}\n'


def _is_listed(path: pathlib.Path) -> bool:
  return not path.name.startswith('.') and path.name not in ('__pycache__', 'BUILD')


def _write(file: pathlib.Path, text: str) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text, encoding='utf-8')
