"""What `--replay=DIR` names: the config and the manifest of a run, read and checked before jax is
imported. experiment/replay.py compares the rest."""

import dataclasses
import json
import os
from typing import Any

from ftjax.config import keys, saved_config, section
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import CheckError, ConfigError
from ftjax.storage import files, snapshots

RECORD = 'replay.json'  # in the workdir of a replay
CODE, STARTS = 'code', 'starts'
_OBJECTS = (
  'fingerprints', 'code', 'code.folders', 'user_code', 'data', 'models', 'devices', 'environment',
  'dependencies', 'dependencies.versions',
)  # fmt: skip
DESPITE = (CODE, STARTS)  # values of --replay_despite

# What a replay leaves out, since it changes no loss: tasks, completions, the gate of the export,
# trackers, profiles.
_LEFT_OUT = (
  'eval.tasks', 'eval.general', 'eval.in_loop', 'eval.models', 'eval.shots', 'eval.shots_from',
  'eval.prompts', 'gate', 'log.sinks', 'profile.start', 'profile.stop', 'stop_at',
)  # fmt: skip
# What also chooses the best checkpoint, which only an export reads.
_BEST = ('checkpoint.best_metric', 'checkpoint.best_mode', 'checkpoint.patience')
_OF_METRIC = ('eval.tasks', 'eval.in_loop', 'eval.shots', 'eval.shots_from')


@dataclasses.dataclass(frozen=True)
class ReplayedRun:
  """A run that is run again.

  Attributes:
    folder: its workdir.
    manifest: its manifest.json.
    config: what the replay trains: the run's config without what changes no loss.
    despite: differences that do not end the replay, of DESPITE.
  """

  folder: str
  manifest: dict[str, Any]
  config: section.Section
  despite: tuple[str, ...]

  @property
  def is_deterministic(self) -> bool:
    """Whether the run was started with --deterministic."""
    return self.manifest.get('deterministic') is True


def read(folder: str, workdir: str, despite: list[str]) -> ReplayedRun:
  """Returns the run in `folder`, to be run again in `workdir`.

  Raises:
    ConfigError: there is no run, an unknown value of `despite`, or a workdir that holds another
      run.
    CheckError: config.json or manifest.json was changed.
  """
  if unknown := [d for d in despite if d not in DESPITE]:
    raise ConfigError(f'--replay_despite={unknown[0]}; expected some of {", ".join(DESPITE)}')
  for name in ('config.json', 'manifest.json', 'metrics.jsonl'):
    if not files.exists(files.join(folder, name)):
      raise ConfigError(
        f'--replay={folder}: there is no {name} in it; expected the workdir of a run that has '
        'trained'
      )
  manifest, values = (_object(folder, name) for name in ('manifest.json', 'config.json'))
  if digest(values) != manifest.get('config'):
    raise CheckError(
      f'--replay={folder}: config.json is not the one that manifest.json has the digest of: it was '
      f'edited after the run{_edited(folder, values)}'
    )
  if wrong := _malformed(manifest):
    raise CheckError(f'--replay={folder}: manifest.json was edited: {wrong} has another form')
  _check_target(folder, workdir, manifest)
  c = saved_config.from_plain(values, files.join(folder, 'config.json'))
  return ReplayedRun(folder, manifest, _reduced(c), tuple(despite))


def _object(folder: str, name: str) -> dict[str, Any]:
  try:
    found = json.loads(files.read_bytes(files.join(folder, name)))
  except (ValueError, RecursionError) as error:
    raise CheckError(f'--replay={folder}: {name} cannot be read: {error}') from error
  if not isinstance(found, dict):
    raise CheckError(f'--replay={folder}: {name} is no JSON object')
  return found


def _malformed(manifest: dict[str, Any]) -> str:
  """Returns the first part of a manifest that is no object where telemetry/manifest.py writes one;
  '' for none. Parts may be missing, as in manifests of an older ftjax.
  """
  for name in _OBJECTS:
    found: Any = manifest
    for part in name.split('.'):
      found = found.get(part, {})
      if not isinstance(found, dict):
        return name
  starts = manifest.get('starts', [])
  if not isinstance(starts, list) or not all(_is_start(s) for s in starts):
    return 'starts'
  return '' if all(isinstance(d, dict) for d in manifest.get('data', {}).values()) else 'data'


def _is_start(entry: Any) -> bool:
  return isinstance(entry, dict) and all(
    isinstance(entry.get(k, {}), dict) for k in ('changed', 'devices')
  )


def _edited(folder: str, values: dict[str, Any]) -> str:
  """Returns which keys were edited, by the config in the newest checkpoint; '' without one."""
  for step in reversed(snapshots.steps(folder)):
    saved = snapshots.meta(folder, step).get('config')
    if isinstance(saved, dict):
      names = [k for k in {**saved, **values} if saved.get(k) != values.get(k)]
      shown = [f'{k} is {values.get(k)!r}, checkpoint {step} has {saved.get(k)!r}' for k in names]
      return f': {"; ".join(shown)}' if shown else ''
  return ''


def _check_target(folder: str, workdir: str, manifest: dict[str, Any]) -> None:
  """Refuses a workdir of another run; that of the same replay, stopped early, is continued."""
  if _place(folder) == _place(workdir):
    raise ConfigError(
      f'--workdir={workdir} is the run that --replay names; give a new folder for the replay'
    )
  if files.exists(record := files.join(workdir, RECORD)):
    found = _object(workdir, RECORD)
    if found.get('manifest') == digest(manifest):
      return
    raise ConfigError(
      f'--workdir={workdir} holds a replay of another run, {found.get("run")} ({record}); give a '
      'new folder'
    )
  for name in ('config.json', 'manifest.json', 'metrics.jsonl', 'checkpoints'):
    if files.exists(files.join(workdir, name)):
      raise ConfigError(f'--workdir={workdir} holds a run ({name}); give a new folder')


def _place(path: str) -> str:
  return path.rstrip('/') if files.is_remote(path) else os.path.realpath(path)


def _reduced(c: section.Section) -> section.Section:
  """Returns a config without what changes no loss."""
  left_out = set(_LEFT_OUT)
  if c.optim.plateau_factor < 1:  # the learning rate follows the metric
    left_out -= set(_OF_METRIC)
    left_out.add('checkpoint.patience')
    c.eval.max_share = 1.0  # which depends on the clock
  else:
    left_out.update(_BEST)
  usual = keys.default()
  for key in left_out:
    above, _, name = key.rpartition('.')
    (c[above] if above else c)[name] = (usual[above] if above else usual)[name]
  if not (c.data.eval or c.data.eval_fraction or c.eval.in_loop):
    c.eval.every = 0  # nothing is left to evaluate
  c.places().clear()
  return c
