"""Finds the words that differ between two answers, to mark them on a page."""

import difflib
import re

MOST_WORDS = 300  # of a text; comparing takes time that grows with the square

_WORDS = re.compile(r'\s+|\w+|[^\w\s]')

Pieces = list[tuple[str, bool]]


def diff(first: str, second: str) -> tuple[Pieces, Pieces]:
  """Returns both texts in pieces (text, whether only this text has it there).

  A text longer than MOST_WORDS words is compared as far as that; the rest is one piece without a
  mark.
  """
  (a, rest_a), (b, rest_b) = _split(first), _split(second)
  marked_a, marked_b = [False] * len(a), [False] * len(b)
  matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
  for name, i1, i2, j1, j2 in matcher.get_opcodes():
    if name != 'equal':
      marked_a[i1:i2] = [True] * (i2 - i1)
      marked_b[j1:j2] = [True] * (j2 - j1)
  return _pieces(a, marked_a, rest_a), _pieces(b, marked_b, rest_b)


def _split(text: str) -> tuple[list[str], str]:
  """Returns (the first words, blanks and signs, the rest of the text)."""
  words, end = [], 0
  for found in _WORDS.finditer(text):
    if len(words) == MOST_WORDS:
      break
    words.append(found[0])
    end = found.end()
  return words, text[end:]


def _pieces(words: list[str], marks: list[bool], rest: str) -> Pieces:
  out: Pieces = []
  for word, mark in zip(words, marks, strict=True):
    if out and out[-1][1] == mark:
      out[-1] = (out[-1][0] + word, mark)
    else:
      out.append((word, mark))
  return [*out, (rest, False)] if rest else out
