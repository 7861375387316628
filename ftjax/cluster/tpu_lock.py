"""Finds the process that holds the TPU: libtpu admits one process, and the error names it."""

import os
import pathlib

from ftjax.runtime.errors import ConfigError
from ftjax.runtime.redaction import redact_text

LOCKFILE = '/tmp/libtpu_lockfile'
_DEVICES = ('/dev/accel', '/dev/vfio/')


def holders(proc: str = '/proc') -> list[tuple[int, str]]:
  """Returns (process id, command line) of the other processes that have libtpu's lock file or a TPU
  device open; only those that this user may see.
  """
  found = []
  for folder in pathlib.Path(proc).glob('[0-9]*'):
    number = int(folder.name)
    try:
      links = [os.readlink(link) for link in (folder / 'fd').iterdir()]
      command = (folder / 'cmdline').read_bytes().replace(b'\0', b' ').decode(errors='replace')
    except OSError:  # ended, or another user's
      continue
    if number != os.getpid() and any(_is_tpu(link) for link in links):
      found.append((number, command.strip()))
  return sorted(found)


def _is_tpu(link: str) -> bool:
  return link.startswith((LOCKFILE, *_DEVICES)) and link != '/dev/vfio/vfio'


def explain(error: RuntimeError) -> None:
  """Raises a ConfigError that names the holder, where `error` is about a TPU in use; else returns.

  Args:
    error: what jax raised when it looked for its devices.
  """
  text = str(error)
  if 'lockfile' not in text and 'already in use' not in text:
    return
  who = '; '.join(f'process {n}: {redact_text(command[:200])}' for n, command in holders())
  raise ConfigError(
    f'the TPU is in use by {who or "a process that this user may not see (try sudo)"}. End it, or '
    f'where none runs, delete {LOCKFILE}. Message of libtpu: {text.splitlines()[0][:300]}'
  ) from error
