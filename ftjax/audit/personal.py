"""Personal data and secrets, by pattern and check digits.

A pattern cannot find names, addresses of houses or what a text implies. Addresses of documentation
(example.com, 192.0.2.0/24, 555-01xx) and private networks are no personal data.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from ftjax.audit.finding import Finding
from ftjax.audit.rows import Row, found

_EMAIL = re.compile(
  r'(?<![\w.+%-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w@])'
)
_EXAMPLE_HOST = re.compile(
  r'@(?:.*\.)?(?:example(?:\.(?:com|org|net|edu))?|test|invalid|localhost)$', re.I
)
_PHONE = re.compile(
  r'(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}|'
  r'(?:\+?1[ .-])?(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[.-]\d{4})(?![\w-]|\.\d)'
)
_IBAN = re.compile(
  r'(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?![A-Za-z0-9])'
)
_CARD = re.compile(r'(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-]|\.\d)')
_CARD_BEGIN = re.compile(r'4|5[1-5]|2[2-7]|3[47]|3[068]|6(?:011|4[4-9]|5)|35|62')
_IPV4 = re.compile(r'(?<![\w.:/-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\w)')
_IPV6 = re.compile(r'(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4})(?:%\w+)?(?![\w:])')
_VERSION = re.compile(
  r'(?:version|release|v|ver\.?|>=|<=|==|rfc|section|chapter|firmware)\s*$', re.I
)
_PRIVATE_KEY = re.compile(r'-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----')
# First letters and lengths that services give their keys.
_KEYS = re.compile(
  r'\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[opsur]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22,}|'
  r'glpat-[\w-]{20}|sk-(?:ant-|proj-)?[A-Za-z0-9_-]{20,}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,}|'
  r'sk_live_[A-Za-z0-9]{16,}|rk_live_[A-Za-z0-9]{16,}|hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{36}|'
  r'pypi-[\w-]{50,}|SG\.[\w-]{22}\.[\w-]{43}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})'
)
_NAMED = re.compile(
  r'\b((?:api|access|secret|auth|private)[ _-]?(?:key|token)|client[ _-]?secret|password|passwd)'
  r'\b["\']?\s*(?:[:=]|is)\s*["\']?([^\s"\',;<>{}()]{12,})', re.I
)  # fmt: skip
_LEAST_BITS = 3.0  # entropy of the characters of a secret, bits a character


def find(rows: Sequence[Row]) -> list[Finding]:
  """Finds personal data and secrets; of each kind the first one of a row, with their number."""
  out = []
  for i, row in enumerate(rows):
    seen: dict[str, list[str]] = {}
    for text in row.texts:
      for kind, value in matches(text):
        seen.setdefault(kind, []).append(value)
    for kind, values in seen.items():
      more = f'{len(set(values))} of them' if len(set(values)) > 1 else ''
      out.append(found(kind, rows, i, values[0], more))
  return out


def matches(text: str) -> Iterator[tuple[str, str]]:
  """Yields (kind, value) of the personal data and secrets in a text."""
  if '@' in text:
    for match in _EMAIL.finditer(text):
      if not _EXAMPLE_HOST.search(match[0]):
        yield 'email', match[0]
  if 'PRIVATE KEY' in text:
    for match in _PRIVATE_KEY.finditer(text):
      yield 'private_key', match[0]
  for match in _KEYS.finditer(text):
    yield 'api_key', match[0]
  for match in _NAMED.finditer(text):
    if _entropy(match[2]) >= _LEAST_BITS and _is_mixed(match[2]) and not _KEYS.match(match[2]):
      yield 'api_key', match[2]
  if re.search(r'\d', text) or ':' in text:
    yield from _numbers(text)


def _numbers(text: str) -> Iterator[tuple[str, str]]:
  taken: list[tuple[int, int]] = []
  for kind, pattern, is_one in (
    ('iban', _IBAN, is_iban), ('credit_card', _CARD, is_card), ('phone', _PHONE, _is_phone)
  ):  # fmt: skip
    for match in pattern.finditer(text):
      begin, end = match.span()
      is_new = all(end <= a or begin >= b for a, b in taken)
      if is_new and is_one(match[0]):
        taken.append((begin, end))
        yield kind, match[0]
  for pattern in (_IPV4, _IPV6):
    for match in pattern.finditer(text):
      if _is_public(match[0]) and not _VERSION.search(
        text[max(0, match.start() - 12) : match.start()]
      ):
        yield 'ip_address', match[0]


def is_card(text: str) -> bool:
  """Returns whether a text has beginning, length and Luhn's check digit of a card number."""
  digits = [int(c) for c in text if c.isdigit()]
  if not 13 <= len(digits) <= 19 or not _CARD_BEGIN.match(''.join(map(str, digits))):
    return False
  if len(set(digits)) == 1:
    return False
  doubled = [
    d if k % 2 == 0 else (2 * d - 9 if d > 4 else 2 * d) for k, d in enumerate(digits[::-1])
  ]
  return sum(doubled) % 10 == 0


# Characters of an account number by country (ISO 13616 registry, the more frequent ones).
_IBAN_LENGTHS = {
  'AD': 24, 'AE': 23, 'AL': 28, 'AT': 20, 'AZ': 28, 'BA': 20, 'BE': 16, 'BG': 22, 'BH': 22,
  'BR': 29, 'CH': 21, 'CR': 22, 'CY': 28, 'CZ': 24, 'DE': 22, 'DK': 18, 'DO': 28, 'EE': 20,
  'EG': 29, 'ES': 24, 'FI': 18, 'FO': 18, 'FR': 27, 'GB': 22, 'GE': 22, 'GI': 23, 'GL': 18,
  'GR': 27, 'GT': 28, 'HR': 21, 'HU': 28, 'IE': 22, 'IL': 23, 'IQ': 23, 'IS': 26, 'IT': 27,
  'JO': 30, 'KW': 30, 'KZ': 20, 'LB': 28, 'LI': 21, 'LT': 20, 'LU': 20, 'LV': 21, 'MC': 27,
  'MD': 24, 'ME': 22, 'MK': 19, 'MR': 27, 'MT': 31, 'MU': 30, 'NL': 18, 'NO': 15, 'PK': 24,
  'PL': 28, 'PS': 29, 'PT': 25, 'QA': 29, 'RO': 24, 'RS': 22, 'SA': 24, 'SE': 24, 'SI': 19,
  'SK': 24, 'SM': 27, 'TN': 24, 'TR': 26, 'UA': 29, 'VA': 22, 'VG': 24, 'XK': 20,
}  # fmt: skip


def is_iban(text: str) -> bool:
  """Returns whether a text is an account number: length of its country, remainder 1 mod 97."""
  text = text.replace(' ', '')
  if _IBAN_LENGTHS.get(text[:2]) != len(text):
    return False
  turned = text[4:] + text[:4]
  return int(''.join(str(int(c, 36)) for c in turned)) % 97 == 1


def _is_phone(text: str) -> bool:
  digits = re.sub(r'\D', '', text)
  is_fiction = re.search(r'555-?.?01\d\d$', text) is not None
  return 9 <= len(digits) <= 15 and len(set(digits)) > 2 and not is_fiction


def _is_public(text: str) -> bool:
  try:
    address = ipaddress.ip_address(text.partition('%')[0])
  except ValueError:
    return False
  # Small numbers are versions or sections: 1.2.3.4.
  is_small = address.version == 4 and max(address.packed) < 32
  return address.is_global and not address.is_multicast and not is_small


def _entropy(text: str) -> float:
  counts = Counter(text)
  return -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())


def _is_mixed(text: str) -> bool:
  """Returns whether a text has letters and digits, and is no path or sentence."""
  return bool(re.search(r'\d', text) and re.search(r'[A-Za-z]', text)) and '/' not in text
