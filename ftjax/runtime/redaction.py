"""Replaces secrets in a config before it is logged, dumped or sent to a tracker.

ftjax has no key for a token or a password; this is the second line of defence, for secrets that
users put into paths, URLs and names. A secret is the value under a secret name, the user part of a
URL, or a string that begins as the keys of known services do. A key of another service, under
another name, is not recognized.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

REDACTED = '<redacted>'

_SECRET_WORDS = {
  'secret', 'secrets', 'password', 'passwd', 'passphrase', 'pwd', 'credential', 'credentials',
  'apikey', 'authorization', 'bearer', 'sig', 'signature',
}  # fmt: skip
_SECRET_PAIRS = {
  *((kind, 'key') for kind in ('api', 'access', 'private', 'secret', 'auth')),
  ('upload', 'id'),  # of a resumable upload: whoever has it may write the object
}
# Words next to `token` in names of pieces of text: eos_token, token_ids, loss_per_token.
_TOKEN_OF_TEXT = {
  'bos', 'eos', 'pad', 'unk', 'sep', 'cls', 'mask', 'stop', 'special', 'image', 'per', 'id', 'ids',
  'type', 'count', 'weight', 'loss', 'length', 'len', 'first', 'last', 'new', 'classification',
}  # fmt: skip

# Each begins at a border of a word: tried from every letter of a long one, it would take time that
# grows with the square of the length.
_USERINFO = re.compile(r'(?<=[A-Za-z0-9+.-])://[^/\s?#]*@')
_PAIR = re.compile(
  r'(?<![\w.-])((?:(?![A-Za-z])[\w.-])*+)([A-Za-z][\w.-]*+)(\s*[=:]\s*)(?!//)([^\s&,;"\'}\]]{6,})'
)
_BEARER = re.compile(r'\b([Bb]earer|[Bb]asic)\s+[A-Za-z0-9+/_.=-]{8,}')
# First letters that services give their keys.
_KNOWN_KEY = re.compile(
  r'\b(hf_|gh[opsur]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA|ASIA|AIza|ya29\.|eyJ|npm_|pypi-|dapi|'
  r'wandb_v1_)[A-Za-z0-9_.-]{12,}'
)


def is_secret_name(name: str) -> bool:
  """Returns whether the value under a key is a secret: hf_token, apiKey, db.password; not
  max_tokens, tokenizer or eos_token.
  """
  name = re.sub(r'([a-z0-9])([A-Z])', r'\1_\2', name)
  words = [w for w in re.split(r'[^A-Za-z0-9]+', name.lower()) if w]
  if _SECRET_WORDS & set(words) or _SECRET_PAIRS & set(itertools.pairwise(words)):
    return True
  return 'token' in words and not _TOKEN_OF_TEXT & set(words)


def redact_text(text: str) -> str:
  """Returns the text with the secrets in it replaced."""
  text = _USERINFO.sub(f'://{REDACTED}@', text)
  text = _BEARER.sub(rf'\1 {REDACTED}', text)
  text = _PAIR.sub(_without_secret, text)
  return _KNOWN_KEY.sub(REDACTED, text)


def _without_secret(found: re.Match[str]) -> str:
  """Returns what replaces a name, its sign and its value."""
  before, name, sign, value = found.groups()
  return before + name + sign + (REDACTED if is_secret_name(name) else value)


def redact(value: Any, name: str = '') -> Any:
  """Returns a copy of nested dicts, lists, tuples and scalars with secrets replaced.

  The whole value under a secret name is replaced, whatever it is, unless it is empty, None or a
  bool: those mean that nothing is set. Keys are cleaned as text too.
  """
  if is_secret_name(name) and not isinstance(value, bool) and value not in (None, '', (), [], {}):
    return REDACTED
  if isinstance(value, Mapping):
    return {redact_text(str(k)): redact(v, str(k)) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(redact(v, name) for v in value)
  return redact_text(value) if isinstance(value, str) else value
