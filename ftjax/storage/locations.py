"""Checks the text of a path, and finds hints for a path that does not exist.

Python's pathlib makes `gs:/bucket` of `gs://bucket`, which would be a folder of this machine.
"""

import difflib
import os
import re

from ftjax.runtime.errors import ConfigError

_URL = re.compile(r'([A-Za-z][A-Za-z0-9+.-]{1,20}):(/+)(.*)', re.DOTALL)
_NO_SLASH = re.compile(r'(gs|gcs|s3|hf|https?):(?!/)(.+)')
_HUB = re.compile(r'huggingface\.co/(?:datasets/|models/)?([\w.-]+/[\w.-]+)')
_GOOGLE = re.compile(r'storage\.(?:cloud\.google|googleapis)\.com/(.+)')


def check(name: str, path: str | os.PathLike) -> None:
  """Raises ConfigError, under the key or flag `name`, for a path that is neither a local one, nor
  gs://BUCKET/..., nor the name of a model or data set on the hub.
  """
  text = os.fspath(path)
  if text.startswith('gs://') and text[5:6] not in ('', '/'):
    return
  found = _URL.fullmatch(text) or _NO_SLASH.fullmatch(text)
  if not found:
    return
  scheme, rest = found[1].lower(), found[found.lastindex].lstrip('/')
  if os.path.exists(text) and not text.startswith('gs:'):
    return  # a local folder of such a name
  raise ConfigError(f'{name}={text}: {_remedy(scheme, rest)}')


def _remedy(scheme: str, rest: str) -> str:
  if scheme in ('gs', 'gcs'):
    return (
      f'write gs://{rest or "BUCKET/FOLDER"}; pathlib.Path makes gs:/ of gs://, so keep it a text'
    )
  if scheme == 'hf':
    name = re.sub(r'^(datasets|models)/', '', rest)
    return f'the name of a model or data set on the hub is written without hf://, as {name}'
  if scheme == 'file':
    return f'write the path itself, /{rest}'
  if scheme in ('http', 'https'):
    if found := _HUB.search(rest):
      return f'files are not fetched from URLs; the name on the hub is {found[1]}'
    if found := _GOOGLE.search(rest):
      return f'files are not fetched from URLs; in a bucket write gs://{found[1]}'
    return 'files are not fetched from URLs; download it, and give its local path'
  return f'{scheme}:// cannot be read; only local paths and gs:// work: copy it to one of them'


def nearest(path: str | os.PathLike) -> str:
  """Returns the end of a message about a path that does not exist: the nearest existing name, the
  folder that paths start from, and where the demo's files come from. Begins with '; ', or is ''.
  """
  text = os.fspath(path)
  out = ''
  folder, name = os.path.split(os.path.abspath(text))
  while not os.path.isdir(folder):
    folder, name = os.path.split(folder)
  try:
    names = [n for n in os.listdir(folder) if not n.startswith('.') or name.startswith('.')]
  except OSError:
    names = []
  by_lower = {n.lower(): n for n in names}
  near = difflib.get_close_matches(name.lower(), by_lower, n=2, cutoff=0.6)
  shown = os.path.relpath(folder) if not os.path.isabs(text) else folder
  existing = [os.path.normpath(os.path.join(shown, by_lower[n])) for n in near]
  if '.cache' in (parts := text.split('/')):
    after = [*parts[parts.index('.cache') + 1 :], ''][0]
    target = {'safety': 'safety-data', 'eval': 'eval-data'}.get(after, 'assets')
    out += f'; `make {target}` fetches the files of the shipped configs into .cache'
  elif not os.path.isabs(text) and folder == os.getcwd() and not near:
    out += f'; paths are looked up from {folder}'
  if existing:
    out += f'; did you mean {" or ".join(existing)}?'
  return out
