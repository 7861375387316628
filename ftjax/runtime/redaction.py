"""Takes secrets out of a config before it is logged, dumped or sent to a tracker.

ftjax has no key for a token or a password; this is the second line of defence, for secrets that
users put into paths, URLs and names. Three rules: the name of a key, the user part of a URL, and
strings that look random.
"""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

REDACTED = '<redacted>'

_SECRET_WORDS = {
  'secret', 'secrets', 'password', 'passwd', 'passphrase', 'pwd', 'credential', 'credentials',
  'apikey', 'authorization', 'bearer',
}  # fmt: skip
_SECRET_PAIRS = {
  ('api', 'key'),
  ('access', 'key'),
  ('private', 'key'),
  ('secret', 'key'),
  ('auth', 'key'),
  ('upload', 'id'),  # of a resumable upload: whoever has it may write the object
}
# Words beside `token` that make it a piece of text and not a right of access: eos_token, token_ids,
# per_token.
_TOKEN_OF_TEXT = {
  'bos', 'eos', 'pad', 'unk', 'sep', 'cls', 'mask', 'stop', 'special', 'image', 'per', 'id', 'ids',
  'type', 'count', 'weight', 'loss', 'length', 'len', 'first', 'last', 'new',
}  # fmt: skip
# A key under which a long hexadecimal string is a fingerprint.
_HASH_WORDS = {
  'hash',
  'sha',
  'sha1',
  'sha256',
  'digest',
  'revision',
  'commit',
  'fingerprint',
  'checksum',
  'id',
}

_USERINFO = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*://)[^/\s?#]*@')
_PAIR = re.compile(r'([A-Za-z][\w.-]*)(\s*[=:]\s*)(?!//)([^\s&,;"\'}\]]{6,})')
_BEARER = re.compile(r'\b([Bb]earer|[Bb]asic)\s+[A-Za-z0-9+/_.=-]{8,}')
# First letters that services give their keys; what follows is the secret.
_KNOWN_KEY = re.compile(
  r'\b(hf_|gh[opsur]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA|ASIA|AIza|ya29\.|eyJ|npm_|pypi-|dapi|'
  r'wandb_v1_)[A-Za-z0-9_.-]{12,}'
)
# Folder names of cached models carry the revision: .../snapshots/<40 hex>.
_RUN = re.compile(r'(?<!snapshots/)(?<![A-Za-z0-9+])[A-Za-z0-9+]{20,}(?![A-Za-z0-9+])')
_HEX = re.compile(r'[0-9a-f]+|[0-9A-F]+')


def _words(name: str) -> list[str]:
  name = re.sub(r'([a-z0-9])([A-Z])', r'\1_\2', name)
  return [w for w in re.split(r'[^A-Za-z0-9]+', name.lower()) if w]


def is_secret_name(name: str) -> bool:
  """True for a key whose value is a secret: hf_token, apiKey, db.password.

  Not for what only sounds like one: max_tokens, tokenizer, eos_token.
  """
  words = _words(name)
  if _SECRET_WORDS & set(words) or _SECRET_PAIRS & set(itertools.pairwise(words)):
    return True
  return 'token' in words and not _TOKEN_OF_TEXT & set(words)


def _looks_random(run: str) -> bool:
  """Entropy in bits per character, and a mix of character classes no words have."""
  shares = [run.count(c) / len(run) for c in set(run)]
  if -sum(p * math.log2(p) for p in shares) < 3.2:
    return False
  kinds = ['d' if c.isdigit() else 'u' if c.isupper() else 'l' for c in run]
  changes = sum(a != b for a, b in itertools.pairwise(kinds))
  digits, uppers = kinds.count('d'), kinds.count('u')
  # CamelCase has fewer capitals than a third; random letters have half.
  is_mixed = 0.3 < uppers / len(run) < 0.7 and changes > 0.3 * len(run)
  return (digits >= 3 and len(run) - digits >= 3) or is_mixed


def redact_text(text: str, name: str = '') -> str:
  """`text` with the secrets in it replaced; `name` is the key it stands under."""
  text = _USERINFO.sub(rf'\1{REDACTED}@', text)
  text = _BEARER.sub(rf'\1 {REDACTED}', text)
  text = _PAIR.sub(lambda m: m[1] + m[2] + (REDACTED if is_secret_name(m[1]) else m[3]), text)
  text = _KNOWN_KEY.sub(REDACTED, text)
  is_hash = bool(_HASH_WORDS & set(_words(name)))

  def judge(m):
    if is_hash and _HEX.fullmatch(m[0]):
      return m[0]
    return REDACTED if _looks_random(m[0]) else m[0]

  return _RUN.sub(judge, text)


def redact(value: Any, name: str = '') -> Any:
  """A copy of nested dicts, lists, tuples and scalars with secrets replaced by '<redacted>'.

  A value under a secret name goes whole, whatever it is, unless it is empty, None or a bool (those
  tell that nothing is set). Keys are cleaned as text too.
  """
  if is_secret_name(name) and not isinstance(value, bool) and value not in (None, '', (), [], {}):
    return REDACTED
  if isinstance(value, Mapping):
    return {redact_text(str(k)): redact(v, str(k)) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(redact(v, name) for v in value)
  if isinstance(value, str):
    return redact_text(value, name)
  return value
