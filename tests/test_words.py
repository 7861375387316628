"""Messages, docstrings and comments of the product use the words of the field."""

import ast
import io
import pathlib
import tokenize

import pytest
from field_words import FORBIDDEN

ROOT = pathlib.Path(__file__).resolve().parents[1] / 'ftjax'
# Folders that are checked; '.' is the entries.
CHECKED = sorted({'.', *(p.parent.relative_to(ROOT).parts[0] for p in ROOT.glob('*/*.py'))})
# Terms of the field in one folder that are none elsewhere: a judge compares responses.
TERMS = {folder: {'judge', 'judges', 'judged'} for folder in ('config', 'evaluation')}


def texts(source):
  """[(line, text)] of the comments and string literals of a Python file."""
  tokens = tokenize.generate_tokens(io.StringIO(source).readline)
  found = [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      found += [(node.lineno + i, line) for i, line in enumerate(node.value.split('\n'))]
  return found


def old_words(source):
  """[(line, word)] of a Python file."""
  return sorted((n, m[0]) for n, text in texts(source) for m in FORBIDDEN.finditer(text))


@pytest.mark.parametrize('folder', CHECKED)
def test_words_of_the_field(folder):
  paths = ROOT.glob('*.py') if folder == '.' else (ROOT / folder).rglob('*.py')
  found = [
    f'{p.name}:{n} {word}'
    for p in paths
    for n, word in old_words(p.read_text())
    if word not in TERMS.get(folder, ())
  ]
  assert not found


def test_an_old_word_is_found():
  source = '"""Is told."""\nsaid = 1  # what the model says\nraise ValueError(f"{said} is owed")\n'
  assert old_words(source) == [(1, 'told'), (2, 'model says'), (3, 'owed')]
