"""docs/site/: every page has a place in the navigation, links lead somewhere, the site is complete
in itself.

The tests of a built site need the environment that `make docs` makes (.venv-docs), and Chromium
(Debian: apt-get install chromium); .ci/run makes the first.
"""

import html.parser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.parse

import chromium
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / 'docs' / 'site'))
import pages  # noqa: E402 # the folder is no package

ENVIRONMENT = ROOT / os.environ.get('DOCS_VENV', '.venv-docs')
PYTHON = ENVIRONMENT / 'bin' / 'python'
needs_sphinx = pytest.mark.skipif(
  not (ENVIRONMENT / '.ready').exists(),
  reason=f'no {ENVIRONMENT.name}: make docs makes it; .ci/run does so before the tests',
)
needs_browser = pytest.mark.skipif(
  chromium.find() is None, reason=f'no browser: none of {", ".join(chromium.NAMES)} is on PATH'
)


# Navigation


def test_every_page_stands_in_one_section():
  found = pages.find(ROOT)
  listed = [page.path for section in pages.sections(found).values() for page in section]
  assert sorted([*listed, 'README.md']) == sorted(found)


def test_a_page_without_a_section_is_an_error():
  page = pages.Page('docs/strange.md', 'Strange', '# Strange\n')
  with pytest.raises(pages.PageError, match=r'docs/strange\.md: in no section .*sections\.toml'):
    pages.sections({page.path: page})


def test_pages_are_in_the_order_of_the_patterns_then_of_their_titles(tmp_path):
  table = tmp_path / 'sections.toml'
  table.write_text('[sections]\nB = ["docs/z.md", "docs/*.md"]\nA = ["docs/y.md"]\n')
  made = {
    f'docs/{n}.md': pages.Page(f'docs/{n}.md', t, '') for n, t in zip('xyz', 'baz', strict=True)
  }
  found = pages.sections(made, table)
  assert {s: [p.path for p in listed] for s, listed in found.items()} == {
    'B': ['docs/z.md', 'docs/y.md', 'docs/x.md']
  }


def test_a_page_without_a_title_is_an_error(tmp_path):
  (tmp_path / 'a.md').write_text('text\n')
  with pytest.raises(pages.PageError, match=r'a\.md: expected "# TITLE"'):
    pages.find(tmp_path)


# Links


def repository(folder, **files):
  """A small repository: {name with _ for /: text}."""
  for name, text in {'README.md': '# R\n', 'docs/data.md': '# D\n', **files}.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
  return folder


def test_links_lead_to_the_pages_of_the_site(tmp_path):
  text = (
    '# F\n[r](../README.md#a) [d](data.md) [c](../code.py) [s](#f) [w](https://x.org/y.md)\n'
    '`[r](../README.md)` ![i](images/a.svg) [t](../ftjax)\n\n```\n[r](../README.md)\n```\n'
  )
  files = {'docs/files.md': text, 'code.py': '"""```"""\n', 'docs/images/a.svg': '<svg/>'}
  root = repository(tmp_path / 'root', **files, **{'ftjax/x.py': ''})
  pages.prepare(root, out := tmp_path / 'out')
  assert (out / 'docs/files.md').read_text() == (
    '# F\n[r](../index.md#a) [d](data.md) [c](../files/code.py.md) [s](#f) [w](https://x.org/y.md)\n'
    '`[r](../README.md)` ![i](images/a.svg) [t](../files/ftjax.md)\n\n```\n[r](../README.md)\n```\n'
  )
  assert '````python\n"""```"""\n````' in (out / 'files/code.py.md').read_text()
  assert '- `x.py`' in (out / 'files/ftjax.md').read_text()
  assert (out / 'docs/images/a.svg').exists()
  assert ':caption: Data\n\ndocs/data\n' in (out / 'index.md').read_text()


@pytest.mark.parametrize('target', ['nothing.md', '../../outside.md', 'docs/data.md'])
def test_a_link_to_no_file_is_an_error(tmp_path, target):
  (tmp_path / 'outside.md').write_text('# O\n')
  root = repository(tmp_path / 'root', **{'docs/files.md': f'# F\n[x]({target})\n'})
  with pytest.raises(pages.PageError, match='leads to no file'):
    pages.prepare(root, tmp_path / 'out')


def test_pages_of_the_repository_are_prepared(tmp_path):
  pages.prepare(ROOT, tmp_path / 'out')
  assert (tmp_path / 'out/index.md').read_text().count(':caption:') >= 8


# The built site


def build(root, target):
  command = [PYTHON, root / 'docs/site/build.py', target]
  return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  target = tmp_path_factory.mktemp('the site') / 'out'
  found = build(ROOT, target)
  assert found.returncode == 0, found.stderr
  return target


@pytest.mark.full
@needs_sphinx
def test_a_broken_anchor_fails_the_build(tmp_path):
  root = repository(tmp_path, **{'docs/files.md': '# F\n[x](data.md#nowhere)\n'})
  shutil.copytree(ROOT / 'docs/site', root / 'docs/site')
  shutil.copytree(ROOT / 'ftjax/runtime', root / 'ftjax/runtime')
  shutil.copy(ROOT / 'ftjax/__init__.py', root / 'ftjax')
  found = build(root, root / 'out')
  assert found.returncode == 1 and "'nowhere'" in found.stderr
  (root / 'docs/files.md').write_text('# F\n[x](data.md#d)\n')
  found = build(root, root / 'out')
  assert found.returncode == 0, found.stderr
  assert 'commit unknown' in (root / 'out/index.html').read_text()
  assert build(root, root).returncode == 1 and (root / 'README.md').exists()


class Page(html.parser.HTMLParser):
  """What a page links, loads and defines."""

  def __init__(self, text):
    super().__init__()
    self.links, self.loaded, self.ids = [], [], set()
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    found = dict(attrs)
    self.ids.add(found.get('id'))
    if tag == 'a':
      self.links.append(found.get('href', '#'))
    elif tag in ('script', 'img', 'iframe', 'source', 'link'):
      self.loaded += [found[k] for k in ('src', 'href') if k in found]


@pytest.mark.full
@needs_sphinx
def test_links_and_files_of_the_site_are_there(site):
  parsed = {p: Page(p.read_text()) for p in site.rglob('*.html')}
  wrong = []
  for file, page in parsed.items():
    for link in [*page.links, *page.loaded]:
      url = urllib.parse.urlsplit(link)
      if url.scheme and link in page.links:
        continue
      target = (file.parent / urllib.parse.unquote(url.path)).resolve() if url.path else file
      anchor = urllib.parse.unquote(url.fragment)
      is_there = target not in parsed or not anchor or anchor in parsed[target].ids
      if url.scheme or not target.is_file() or not is_there:
        wrong.append((file.name, link))
  assert not wrong
  styles = [p.read_text() for p in site.rglob('*.css')]
  assert not re.findall(r'url\([\'"]?https?:|@import', ''.join(styles))


@pytest.mark.full
@needs_sphinx
def test_every_page_shows_the_commit(site):
  head = ['git', 'rev-parse', 'HEAD']
  commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
  assert all(f'built from commit {commit}' in p.read_text() for p in site.rglob('docs/*.html'))


@pytest.mark.full
@needs_sphinx
@needs_browser
@pytest.mark.parametrize('width', [390, 1280])
def test_pages_are_readable_and_ask_for_nothing_outside(site, width):
  with chromium.Browser() as browser:
    for name in ('index.html', 'docs/config_keys.html'):
      browser.open(site / name, width=width)
      assert not browser.problems()
      assert all(url.startswith(('file:', 'data:')) for url in browser.requests())
      assert browser.ask('document.documentElement.scrollWidth') <= width
      assert browser.ask('document.querySelector(".sidebar-tree .caption") !== null')


@pytest.mark.full
@needs_sphinx
@needs_browser
def test_search_works_without_a_server(site):
  with chromium.Browser() as browser:
    browser.open(f'{site}/search.html?q=rematerialization')
    found = browser.ask(
      """new Promise(done => {
        const look = n => {
          const links = [...document.querySelectorAll('#search-results li a')].map(a => a.href);
          if (/finished/i.test(document.querySelector('#search-results p')?.innerText) || n > 100)
            done(links);
          else setTimeout(look, 100, n + 1);
        };
        look(0);
      })"""
    )
    assert any('docs/config_keys.html' in link or 'index.html' in link for link in found)
    assert not any('/files/' in link for link in found)
    assert not browser.problems()
    assert all(url.startswith(('file:', 'data:')) for url in browser.requests())
