"""Broken characters: mojibake, characters that no text has, and endless repetition."""

import importlib.util
import re
import unicodedata
from collections.abc import Sequence

from ftjax.audit.finding import Finding
from ftjax.audit.rows import Row, found

# UTF-8 read as Windows-1252 or Latin-1, where ftfy is not installed: the common pairs.
_MOJIBAKE = re.compile(
  '[\u00c2\u00c3][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013'
  '\u2014\u2018-\u201e\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122]|'
  '\u00e2\u20ac[\u0080-\u00bf\u0153\u0161\u017e\u02dc\u2013\u2014\u2018-\u201e\u2020-\u2022\u2026\u2122]'
  '|\u00e2\u0080[\u0080-\u00bf]|\u00f0\u0178[\u0080-\u00ff\u2018-\u201e]'
)
_GOOD_CONTROLS = frozenset('\t\n\r\x0b\x0c')
_ODD_CATEGORIES = frozenset(('Cc', 'Co', 'Cn', 'Cs'))
_REPEATED_WORD = re.compile(r'\b(\w{2,})(?:\W+\1){7,}\b', re.I)
_REPEATED_CHARACTER = re.compile(r'([^\W\d_])\1{15,}')
_REPEATED_LINES = 6
_SYMBOLS = 0.6  # share of characters that are neither letters, digits nor white space
_SYMBOL_LENGTH = 30  # characters of a text to which that applies
_BLOB = re.compile(r'(?<![\w/+])(?=[\w/+]*[a-z])(?=[\w/+]*[A-Z])(?=[\w/+]*\d)[\w/+]{200,}={0,2}')


def has_ftfy() -> bool:
  """Returns whether ftfy is installed; without it only common mojibake is found."""
  return importlib.util.find_spec('ftfy') is not None


def mojibake(rows: Sequence[Row]) -> list[Finding]:
  """Finds texts that were decoded with a wrong encoding: those that ftfy's measure calls so and can
  repair; without ftfy, those with the usual pairs of UTF-8 read as Windows-1252.
  """
  repaired = _by_ftfy if has_ftfy() else _by_pairs
  out = []
  for i, row in enumerate(rows):
    for text in row.texts:
      if not text.isascii() and (fix := repaired(text)):
        out.append(found('mojibake', rows, i, text, *fix))
        break
  return out


def _by_ftfy(text: str) -> tuple[str, int] | None:
  """Returns (the difference in words, where it is) of a text that ftfy repairs."""
  from ftfy import badness, fix_encoding

  if not badness.is_bad(text):
    return None
  fixed = fix_encoding(text)
  if fixed == text:
    return None
  at = next((k for k, (a, b) in enumerate(zip(text, fixed, strict=False)) if a != b), 0)
  start = text.rfind(' ', 0, at) + 1
  return f'repaired: {fixed[start : start + 30]!r}', at


def _by_pairs(text: str) -> tuple[str, int] | None:
  match = _MOJIBAKE.search(text)
  return (f'contains {match[0]!r}', match.start()) if match else None


def garbage(rows: Sequence[Row]) -> list[Finding]:
  """Finds texts with replacement characters, control characters, characters without a meaning, long
  runs of encoded bytes, or hardly a letter.
  """
  out = []
  for i, row in enumerate(rows):
    for text in row.texts:
      if why := _broken(text):
        out.append(found('garbage', rows, i, text, *why))
        break
  return out


def _broken(text: str) -> tuple[str, int] | None:
  """Returns (what is broken, where) of a text; None for a whole one."""
  if not text.isascii() or not text.isprintable():
    for at, c in enumerate(text):
      if c == '\ufffd':
        return 'a replacement character U+FFFD', at
      if ord(c) < 32 or ord(c) > 126:
        kind = unicodedata.category(c)
        if kind in _ODD_CATEGORIES and c not in _GOOD_CONTROLS:
          return f'the character U+{ord(c):04X} of category {kind}', at
  if len(text) > 200 and (match := _BLOB.search(text)):
    return f'{len(match[0]):,} characters without a blank, like encoded bytes', match.start()
  visible = [c for c in text if not c.isspace()]
  if len(visible) >= _SYMBOL_LENGTH:
    symbols = sum(unicodedata.category(c)[0] in 'PS' for c in visible)
    if symbols > _SYMBOLS * len(visible):
      return f'{symbols / len(visible):.0%} of the characters are symbols', 0
  return None


def repetition(rows: Sequence[Row]) -> list[Finding]:
  """Finds texts in which a word, a character or a line comes again and again without a pause."""
  out = []
  for i, row in enumerate(rows):
    for text in row.texts:
      match = _REPEATED_WORD.search(text) or _REPEATED_CHARACTER.search(text)
      if match:
        out.append(found('repetition', rows, i, text, f'repeats {match[1]!r}', match.start()))
        break
      lines = [line.strip() for line in text.splitlines() if len(line.split()) > 2]
      runs = (lines[k : k + _REPEATED_LINES] for k in range(len(lines) - _REPEATED_LINES + 1))
      if any(len(set(run)) == 1 for run in runs):
        out.append(found('repetition', rows, i, text, 'repeats a line'))
        break
  return out
