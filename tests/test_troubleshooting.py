"""docs/troubleshooting.md: every message that it quotes is one that the sources can raise."""

import ast
import functools
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'troubleshooting.md'
GAP = '…'


@functools.cache
def templates():
  """Every text of the sources that holds a message, with GAP for what varies."""
  out = set()
  for path in (ROOT / 'ftjax').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else GAP for v in node.values]
        out.add(''.join(parts))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        out.add(node.value)
  return out


def fixed_parts(message):
  return [part for part in message.split(GAP) if part.strip(' .:,;()')]


def is_raised(message):
  """Whether a text of the sources has the fixed parts of a message in this order."""
  pattern = re.compile('.*'.join(map(re.escape, fixed_parts(message))), re.DOTALL)
  return any(pattern.search(text) for text in templates())


def quoted():
  """The messages of the page's tables, without those of other programs."""
  text = PAGE.read_text(encoding='utf-8').partition('## Not messages of ftjax')[0]
  return re.findall(r'^\| `([^`]+)` \|', text, re.MULTILINE)


def test_every_message_is_one_of_the_sources():
  found = quoted()
  assert len(found) >= 40 and len(set(found)) == len(found)
  assert not [message for message in found if not is_raised(message)]


def test_every_row_of_a_table_quotes_a_message():
  text = PAGE.read_text(encoding='utf-8').partition('## Not messages of ftjax')[0]
  rows = re.findall(r'^\| (?!message \|)(.*) \|$', text, re.MULTILINE)
  assert len(rows) == len(quoted()) and all(row.count(' | ') == 2 for row in rows)


def test_the_fixed_part_of_a_message_is_enough_to_find_it():
  """A quote of a few letters would match any text."""
  assert all(sum(map(len, fixed_parts(message))) >= 14 for message in quoted())


def test_a_message_that_nothing_raises_is_found():
  assert not is_raised('…: the model is tired; let it rest')
  assert not is_raised('did not give, or another fraction data.eval')
