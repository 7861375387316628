"""Descriptions of Debian's packages, in English and in French: written by people, under the
licences of the packages. apt-get downloads the lists into a folder of its own, without root and
without a change to the machine; only the standard library is needed.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

RELEASE = 'bookworm'
KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg'
MIN_WORDS, MAX_WORDS = 3, 80  # of a text to translate
MAX_RATIO = 2.5  # of the lengths of a text and its translation
MIN_DOCUMENT, MAX_DOCUMENT = 200, 2000  # characters of a text to summarize

_CONFIG = """#clear Acquire::Languages;
Acquire::Languages {{ "en"; "fr"; }};
Acquire::GzipIndexes "false";
Dir::State::lists "{folder}/lists";
Dir::Cache "{folder}/cache";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "{folder}/none";
APT::Sandbox::User "";
"""


class Description(NamedTuple):
  """The short line of a package, and the paragraphs of its long text that are no lists."""

  short: str
  paragraphs: list[str]
  has_lists: bool


def fetch(folder: Path) -> None:
  """Downloads the lists.

  Raises:
    OSError: no apt-get, or no key of Debian's archive.
    CalledProcessError: apt-get failed.
  """
  if not Path(KEYRING).is_file():
    raise FileNotFoundError(f'{KEYRING}: apt-get install debian-archive-keyring')
  folder = folder.resolve()
  for name in ('lists/partial', 'cache/archives/partial', 'none'):
    (folder / name).mkdir(parents=True, exist_ok=True)
  (folder / 'sources.list').write_text(
    f'deb [signed-by={KEYRING}] http://deb.debian.org/debian {RELEASE} main\n'
  )
  (folder / 'apt.conf').write_text(_CONFIG.format(folder=folder))
  # A file given by -c is read last: its #clear undoes what an image of a container sets.
  command = ['apt-get', '-qq', '-c', str(folder / 'apt.conf'), 'update']
  subprocess.run([*command, '-o', 'APT::Update::Error-Mode=any'], check=True)


def read_list(folder: Path, name: str) -> list[str]:
  """The stanzas of the list whose file name ends in `name`."""
  (path,) = (folder / 'lists').glob(f'*_dists_{RELEASE}_main_{name}')
  return path.read_text(encoding='utf-8').split('\n\n')


def parse(stanza: str, language: str) -> tuple[tuple[str, str], Description] | None:
  """((package, hash of the English text), description) of one stanza of a translation."""
  found = re.search(
    rf'^Package: (\S+)\nDescription-md5: (\S+)\nDescription-{language}: ([^\n]*)\n?'
    r'((?: [^\n]*\n?)*)',
    stanza,
    re.MULTILINE,
  )
  if not found:
    return None
  paragraphs, lines, has_lists = [], [], False
  for line in [*found[4].splitlines(), ' .']:
    text = line[1:]
    if text.strip() == '.':
      if lines:
        paragraphs.append(' '.join(lines))
      lines = []
    elif text.startswith(' '):  # a list, or verbatim text
      has_lists = True
    elif text.strip():
      lines.append(text.strip())
  return (found[1], found[2]), Description(found[3].strip(), paragraphs, has_lists)


def descriptions(folder: Path, language: str) -> dict[tuple[str, str], Description]:
  stanzas = read_list(folder, f'i18n_Translation-{language}')
  return dict(filter(None, (parse(stanza, language) for stanza in stanzas)))


def sources(folder: Path) -> dict[str, str]:
  """The source package of each package."""
  out = {}
  for stanza in read_list(folder, 'binary-*_Packages'):
    package = re.search(r'^Package: (\S+)', stanza, re.MULTILINE)
    source = re.search(r'^Source: (\S+)', stanza, re.MULTILINE)
    if package:
      out[package[1]] = source[1] if source else package[1]
  return out


def translations(folder: Path) -> list[tuple[str, str, str]]:
  """(source package, English, French) of short lines and of paragraphs without lists."""
  english, french = descriptions(folder, 'en'), descriptions(folder, 'fr')
  source_of, out, seen = sources(folder), [], set()
  for key, theirs in sorted(french.items()):
    ours = english.get(key)
    if ours is None:
      continue
    pairs = [(ours.short, theirs.short)]
    is_aligned = len(ours.paragraphs) == len(theirs.paragraphs)
    if is_aligned and not ours.has_lists and not theirs.has_lists:
      pairs += zip(ours.paragraphs, theirs.paragraphs, strict=True)
    for text, translated in pairs:
      is_alike = 1 / MAX_RATIO < len(text) / max(1, len(translated)) < MAX_RATIO
      is_usable = text != translated and MIN_WORDS <= len(text.split()) <= MAX_WORDS
      if is_usable and is_alike and text.casefold() not in seen:
        seen.add(text.casefold())
        out.append((source_of.get(key[0], key[0]), text, translated))
  return out


def summaries(folder: Path) -> list[tuple[str, str, str]]:
  """(source package, long text, short line), one package of each source package."""
  source_of, out = sources(folder), {}
  for (package, _), found in sorted(descriptions(folder, 'en').items()):
    document = ' '.join(found.paragraphs)
    source = source_of.get(package, package)
    if MIN_DOCUMENT <= len(document) <= MAX_DOCUMENT and len(found.short.split()) >= MIN_WORDS:
      out.setdefault(source, (source, document, found.short))
  return list(out.values())
