"""Keeps models.json in a workdir: the commits of its hub models, and fingerprints of its weights.

Commits: a name like `org/name` or `org/name@main` is looked up when a run starts for the first
time. The config then holds `org/name@COMMIT`, and a resume, an evaluation or the text of a
checkpoint read that commit, wherever the branch has moved since.

Fingerprints: SHA-256 of weights, by the `file_marks.stamp` of their files. When one is needed:

- A fresh run needs it after its weights are loaded (manifest, checkpoints, the cache of the base's
  scores). They are hashed while they are read, by process 0, which reads for the hash what it does
  not load itself. dpo.reference=cache needs it before that: there the weights are read twice.
- A resume needs it before anything is trained, to refuse a base that has changed. Most resumes read
  no base weights at all. Where the stamp of the files is the recorded one they were neither written
  nor replaced, and the recorded fingerprint is theirs; else (another host, a copied folder, a
  changed file) all bytes are hashed.

A stamp counts only if its times are a second old: a file can be written twice within the clock's
resolution.
"""

import json
import time
from collections.abc import Mapping

from ftjax.cluster import processes
from ftjax.hf import file_marks, load
from ftjax.runtime.digest import digest
from ftjax.storage import files, hub

FILE = 'models.json'
_SETTLED_NS = 1_000_000_000


def _read(workdir: str) -> dict[str, dict[str, str]]:
  path, empty = files.join(workdir, FILE), {'commits': {}, 'fingerprints': {}}
  if not workdir or not files.exists(path):
    return empty
  try:
    return empty | json.loads(files.read_text(path))
  except ValueError:  # a damaged record costs a look-up and a hash
    return empty


def _add(workdir: str, kind: str, key: str, value: str) -> None:
  if workdir:
    found = _read(workdir)
    found[kind][key] = value
    files.write_text(files.join(workdir, FILE), json.dumps(found, indent=1) + '\n')


def pin(path: str, workdir: str) -> str:
  """Returns `org/name@COMMIT` of a hub model, the same in all processes; other paths as they are.

  Raises:
    ConfigError, DataError: see `hub.pin`.
  """
  return processes.from_main(lambda: _pin(path, workdir))


def _pin(path: str, workdir: str) -> str:
  commit = _read(workdir)['commits'].get(path)
  # A recorded name is one even if the workdir made a folder of the name's first part.
  if not (hub.is_name(path) or (commit and not files.exists(path))):
    return path
  if commit:
    return f'{hub.split(path)[0]}@{commit}'
  return hub.pin(path)


def keep_commits(pinned: Mapping[str, str], workdir: str) -> None:
  """Records the commits of names for later starts; pinned: {name: what `pin` returned}."""
  processes.from_main(lambda: _keep_commits(pinned, workdir))


def _keep_commits(pinned: Mapping[str, str], workdir: str) -> None:
  known = _read(workdir)['commits']
  for path, found in pinned.items():
    if path != found and path not in known:
      _add(workdir, 'commits', path, hub.split(found)[1])


def adopt(source: str, workdir: str) -> None:
  """Copies the fingerprints that another workdir has recorded. They count for files that were
  neither written nor moved since, as in that workdir.
  """
  processes.from_main(lambda: _adopt(source, workdir))


def _adopt(source: str, workdir: str) -> None:
  found = _read(source)['fingerprints']
  for key, value in (found if isinstance(found, dict) else {}).items():
    _add(workdir, 'fingerprints', key, value)


def hash_while_loading(path: str, workdir: str) -> None:
  """Makes the next load of these weights hash them, where their fingerprint is not recorded."""
  if processes.is_main() and digest(file_marks.stamp(path)) not in _read(workdir)['fingerprints']:
    load.open_source(path).hash_reads()


def fingerprint(path: str, workdir: str) -> str:
  """Returns the SHA-256, in hex, of the weights of a model; all processes call this.

  Raises:
    DataError: they cannot be read.
  """
  return processes.from_main(lambda: _fingerprint(path, workdir))


def _fingerprint(path: str, workdir: str) -> str:
  stamp, now = file_marks.stamp(path), time.time_ns()
  key = digest(stamp)
  if known := _read(workdir)['fingerprints'].get(key):
    return known
  found = load.fingerprint(path)
  is_settled = all(now - ns > _SETTLED_NS for file in stamp for ns in file[3:])
  if is_settled and file_marks.stamp(path) == stamp:
    _add(workdir, 'fingerprints', key, found)
  return found
