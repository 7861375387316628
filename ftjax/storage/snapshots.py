"""Reads checkpoints of a workdir without changing anything in it: it may belong to a run that is
alive. checkpoint.py writes them, and is the only one that removes them.

A step counts when Orbax has finalized it (its folder then has its plain number for a name; in a
bucket it holds commit_success.txt) and its JSON files can be read. Listing them needs neither jax
nor Orbax.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from ftjax.runtime.errors import DataError
from ftjax.storage import files

_AT = re.compile(r'(.+)@(\d+|last|best)')
# Of TensorStore: a file is shorter than it was, of other content, or gone.
_DAMAGE = re.compile(r'\b(?:OUT_OF_RANGE|DATA_LOSS|NOT_FOUND|FAILED_PRECONDITION): ')
# JSON of a step without which it cannot be read.
INDEXES = ('_CHECKPOINT_METADATA', 'meta/metadata', 'state/_METADATA')
COMMIT = 'commit_success.txt'  # in a bucket: the object that Orbax writes last


def is_workdir(path: str) -> bool:
  """Whether a run of ftjax.train has begun in a folder."""
  try:
    found = json.loads(files.read_text(files.join(path, 'config.json')))
  except (OSError, ValueError):
    return files.exists(files.join(path, 'manifest.json'))
  return isinstance(found, dict) and 'algorithm' in found and 'model_type' not in found


def parse(source: str) -> tuple[str, str]:
  """('WORKDIR', '7', 'last', 'best' or '') of WORKDIR[@STEP]; a path that exists is taken whole."""
  found = _AT.fullmatch(source)
  if found and not files.exists(source) and files.exists(found[1]):
    return found[1].rstrip('/') or '/', found[2]
  return source, ''


def folder(workdir: str) -> str:
  """Returns the folder of checkpoints of a workdir."""
  return files.join(workdir, 'checkpoints')


def steps(workdir: str) -> list[int]:
  """Returns the finalized steps, ascending; [] without checkpoints."""
  place = folder(workdir)
  names = files.listdir(place) if files.exists(place) else []
  return sorted(int(n) for n in names if n.isdigit() and _is_whole(files.join(place, n)))


def newest(workdir: str) -> int | None:
  """Returns the newest finalized step, or None.

  Raises:
    OSError, ConfigError, DataError: the folder cannot be listed.
  """
  return max(steps(workdir), default=None)


def _is_whole(step_folder: str) -> bool:
  if files.is_remote(step_folder):
    return files.exists(files.join(step_folder, COMMIT))
  return all(_json(files.join(step_folder, name)) is not None for name in INDEXES)


def _json(path: str) -> Any:
  try:
    return json.loads(files.read_text(path))
  except (OSError, ValueError):  # also where the run removes this step just now
    return None


def meta(workdir: str, step: int) -> dict[str, Any]:
  """Returns the JSON saved beside a state: config, fingerprints, progress.

  Raises:
    DataError: it cannot be read.
  """
  path = files.join(folder(workdir), str(step), 'meta', 'metadata')
  found = _json(path)
  if not isinstance(found, dict):
    raise DataError(f'{path} cannot be read')
  return found


def best(workdir: str, metric: str, mode: str) -> int | None:
  """Returns the step with the best recorded metric ('min' or 'max' of it); None where no step that
  is still there has one. Of equal ones the latest, as the run itself chooses.
  """
  values = {}
  for step in steps(workdir):
    row = _json(files.join(folder(workdir), str(step), 'metrics', 'metrics'))
    if isinstance(row, dict) and isinstance(row.get(metric), int | float):
      values[step] = row[metric]
  if not values:
    return None
  wanted = (min if mode == 'min' else max)(values.values())
  return max(step for step, value in values.items() if value == wanted)


def committed_ns(workdir: str, step: int) -> int:
  """Returns when a step was finalized, in nanoseconds since 1970; 0 where that is not recorded."""
  row = _json(files.join(folder(workdir), str(step), '_CHECKPOINT_METADATA'))
  return int((row or {}).get('commit_timestamp_nsecs') or 0)


def read(workdir: str, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a part of the state saved at a step, as arrays.

  Args:
    workdir: of the run.
    step: a finalized one.
    wanted: {field of the state: nested dict of ShapeDtypeStruct with shardings}; arrays are cast
      to these dtypes.

  Raises:
    DataError: the step is gone, or has other arrays.
  """
  import orbax.checkpoint as ocp
  from orbax.checkpoint import checkpoint_utils

  place = files.join(folder(workdir), str(step), 'state')
  args = ocp.args.PyTreeRestore(
    item=dict(wanted),
    restore_args=checkpoint_utils.construct_restore_args(dict(wanted)),
    partial_restore=True,
  )
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      return checkpointer.restore(_absolute(place), args=args)
  except Exception as error:
    if not (damage(error) or isinstance(error, (OSError, ValueError, KeyError, TypeError))):
      raise
    if not files.exists(place):
      raise DataError(
        f'{place} is gone: the run removed it (checkpoint.keep) while it was read'
      ) from error
    raise DataError(f'{place} cannot be read: {damage(error) or str(error)[:500]}') from error


def damage(error: Exception) -> str:
  """Returns what TensorStore found wrong with an array's file; '' for any other error. Orbax wraps
  it in a bare Exception, at times, and adds pages of JSON.
  """
  text = str(error.__cause__ or error)
  return text.partition(' [tensorstore_spec')[0][:300] if _DAMAGE.search(text) else ''


def shapes(workdir: str, step: int) -> dict[str, Any]:
  """Returns {field of the state: nested dict of what Orbax knows of each array}.

  Raises:
    DataError: it cannot be read.
  """
  import orbax.checkpoint as ocp
  from etils import epath

  place = files.join(folder(workdir), str(step), 'state')
  try:
    return dict(ocp.PyTreeCheckpointHandler().metadata(epath.Path(_absolute(place))).tree)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise DataError(f'{place} cannot be read: {str(error)[:500]}') from error


def _absolute(path: str | os.PathLike) -> str:
  return files.absolute(path)  # Orbax takes no relative path
