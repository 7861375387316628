"""SQuAD's normalization of short answers, for the reward `normalized`."""

import re
import string
import unicodedata

_ARTICLES = frozenset({'a', 'an', 'the'})


_THOUSANDS = re.compile(r'(?<=\d),(?=\d{3}(?!\d))')
_BEFORE_NUMBER = re.compile(r'\s?[$\u20ac\u00a3\u00a5]?\.?\d')
_GRADE = re.compile(r'(?<![^\W\d_])[a-z]{1,2}-(?!\w)')  # A-, AB-


def _counts(text: str, i: int) -> bool:
  """Returns whether the punctuation text[i] changes the meaning of a text."""
  char, before, after = text[i], text[max(i - 1, 0) : i], text[i + 1 : i + 2]
  if char == '-' and any(_GRADE.match(text, max(i - n, 0)) for n in (1, 2)):
    return True
  if char in '-<>' and not before.isalnum():
    return _BEFORE_NUMBER.match(text, i + 1) is not None
  if char in '+#':
    return before.isalpha() or before in ('+', '#') or (before.isdigit() and after.isdigit())
  return char == '%' or (after.isdigit() and (before.isdigit() or char == '.'))


def normalize(text: str) -> str:
  """Applies SQuAD's normalization, but keeps punctuation that changes the value of a number.

  Lower case, no ASCII punctuation, no articles, single spaces (Rajpurkar et al. 2016,
  arXiv:1606.05250, evaluate-v1.1). Kept: a sign or point before a digit, marks between digits
  except thousands separators (1/2, 10^2), + and # after a letter (C++), the - of A-, %. Unicode is
  composed (NFC), never folded: look-alike letters stay other letters.
  """
  text = _THOUSANDS.sub('', unicodedata.normalize('NFC', text).lower())
  kept = [c for i, c in enumerate(text) if c not in string.punctuation or _counts(text, i)]
  return ' '.join(word for word in ''.join(kept).split() if word not in _ARTICLES)
