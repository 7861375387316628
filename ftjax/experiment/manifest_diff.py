"""Compares the manifest of a run with what a replay finds: what makes it another run, and what of
the environment differs."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ftjax.config import replayed_run
from ftjax.telemetry import environment, source_code

# Config keys that change no loss of a training step: a run that was resumed with others of these is
# replayed with those of its last start.
_HARMLESS = (
  'checkpoint.', 'compile_cache', 'data.cache', 'data.eval', 'data.workers', 'eval.', 'gate',
  'log.', 'profile.', 'stop_at', 'study.', 'watchdog.',
)  # fmt: skip
_SHORT = 12  # hexadecimal digits of a digest in a message
_ORDER = 'data order'
_WIDTH = 60  # characters of a column of the table


class Difference(NamedTuple):
  """Something of the environment that is not as it was.

  may_change_bits: whether losses may differ in their last bits by it.
  """

  name: str
  run: str
  here: str
  may_change_bits: bool = True

  def text(self) -> str:
    return f'{self.name}: {self.run} in the run, {self.here} here'


# What makes it another run.


def causes(
  manifest: Mapping[str, Any],
  fingerprints: Mapping[str, str],
  code: Mapping[str, Any],
  user_code: Mapping[str, str],
  despite: Sequence[str],
) -> list[str]:
  """Returns why a replay would train something else than the run did; [] where it would not.

  Args:
    manifest: of the run.
    fingerprints: of model, tokenizer and data, as they are now.
    code: `source_code.identity` of the code that runs now.
    user_code: fingerprints of the user's modules, by config key.
    despite: differences that are accepted, of replayed_run.DESPITE.
  """
  out = _other_content(manifest, fingerprints)
  if replayed_run.CODE not in despite:
    out += _other_code(manifest, code, user_code)
  if replayed_run.STARTS not in despite:
    out += _other_starts(manifest)
  return out


def _other_content(manifest: Mapping[str, Any], found: Mapping[str, str]) -> list[str]:
  """Returns a line for each source of data, model or tokenizer whose content changed."""
  known = manifest.get('fingerprints') or {}
  names = [k for k in {**known, **found} if known.get(k) != found.get(k)]
  if any(n.startswith('data ') and n != _ORDER for n in names):
    names = [n for n in names if n != _ORDER]  # it follows from the data
  data, models, lines = manifest.get('data') or {}, manifest.get('models') or {}, []
  for name in names:
    path = str((data.get(name) or {}).get('name') or '')
    if name == 'model':
      path = str(models.get('init_from') or models.get('model.path') or 'model.random')
    what = f'{name} ({path})' if path else name
    lines.append(
      f'{what}: other content, sha256 {_short(known.get(name))} in the run and '
      f'{_short(found.get(name))} here'
    )
  return lines


def _other_code(
  manifest: Mapping[str, Any], code: Mapping[str, Any], user_code: Mapping[str, str]
) -> list[str]:
  """Returns what was edited of ftjax and of the user's modules."""
  known, own = manifest.get('code') or {}, manifest.get('user_code') or {}
  lines = [
    f'{key}: the code of the module that it names was edited'
    for key in {**own, **user_code}
    if own.get(key) != user_code.get(key)
  ]
  if not known.get('digest'):
    lines.append('code: manifest.json has no digest of it; an older ftjax wrote it')
  elif known['digest'] != code['digest']:
    theirs, ours = known.get('folders') or {}, code['folders']
    where = [f for f in {**theirs, **ours} if theirs.get(f) != ours.get(f)]
    lines.append(
      f'code of ftjax: commit {_commit(known)} in the run and {_commit(code)} here; files differ '
      f'in {", ".join(sorted(where))}{_files_of(known)}'
    )
  if lines:
    lines[-1] += ' (--replay_despite=code accepts that)'
  return lines


def _commit(code: Mapping[str, Any]) -> str:
  commit = str(code.get('commit') or '')
  if not commit:
    return f'unknown (sha256 {_short(code.get("digest"))})'
  return commit[:_SHORT] + (' with local changes' if code.get('modified') else '')


def _files_of(code: Mapping[str, Any]) -> str:
  """Returns the files that differ from the run's commit now, as git lists them."""
  changed = source_code.changed_since(str(code['commit'])) if code.get('commit') else []
  more = f' and {len(changed) - 8} more' if len(changed) > 8 else ''
  return f'; git lists {", ".join(changed[:8])}{more}' if changed else ''


def _other_starts(manifest: Mapping[str, Any]) -> list[str]:
  """Returns what changed between the starts of a run that was resumed."""
  lines, starts = [], _starts(manifest)
  for before, start in itertools.pairwise(starts):
    step = start.get('step')
    for key, value in (start.get('changed') or {}).items():
      if not key.startswith(_HARMLESS):
        lines.append(f'{key} was {value!r} until step {step}, where the run was resumed')
    if before.get('code') != start.get('code'):
      lines.append(f'the code of ftjax changed at step {step}, where the run was resumed')
  if lines:
    lines[-1] += ' (--replay_despite=starts accepts that)'
  return lines


def changed_keys(manifest: Mapping[str, Any]) -> set[str]:
  """Returns the config keys that changed between the starts of a run."""
  return {key for start in _starts(manifest)[1:] for key in start.get('changed') or {}}


def _starts(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  return [s for s in manifest.get('starts') or [] if isinstance(s, dict)]


# The environment.


def environment_differences(run: Mapping[str, Any], here: Mapping[str, Any]) -> list[Difference]:
  """Returns what of the environment of two manifests differs, what may change bits first."""
  cores = [_text(m.get('host_cores')) for m in (run, here)]
  out = [
    Difference('devices', _devices(run), _devices(here)),
    Difference('host cores', *cores, not _has_same_threads(run, here)),
    Difference('compiled step', _short(run.get('executable')), _short(here.get('executable'))),
    Difference(
      'compiler options', _text(run.get('compiler_options')), _text(here.get('compiler_options'))
    ),
    Difference('XLA_FLAGS', *(_flags(m) for m in (run, here))),
    Difference('--deterministic', *(_text(bool(m.get('deterministic'))) for m in (run, here))),
    Difference('Python', _text(run.get('python')), _text(here.get('python')), False),
  ]
  # The processor computes the losses, or feeds an accelerator.
  on_cpu = 'cpu' in (_kind(run), _kind(here))
  out.append(Difference('processor', _text(run.get('cpu')), _text(here.get('cpu')), on_cpu))
  out += [
    Difference(name, theirs, ours, name != 'JAX_PLATFORMS')
    for name, theirs, ours in _by_key(run.get('environment'), here.get('environment'))
  ]
  versions = [(m.get('dependencies') or {}).get('versions') for m in (run, here)]
  out += [
    Difference(name, theirs, ours, environment.is_numeric(name))
    for name, theirs, ours in _by_key(*versions)
  ]
  found = [d for d in out if d.run != d.here] + _earlier_starts(run, here)
  codes = [m.get('code') or {} for m in (run, here)]
  if codes[0].get('digest') != codes[1].get('digest'):  # a commit of docs is no difference
    found.append(Difference('code of ftjax', *map(_commit, codes), False))
  return sorted(found, key=lambda d: not d.may_change_bits)


def table(differences: Sequence[Difference]) -> str:
  """Returns differences as lines of three columns."""
  rows = [('', 'in the run', 'here'), *(d[:3] for d in differences)]
  cut = [[c if len(c) <= _WIDTH else f'{c[: _WIDTH - 3]}...' for c in row] for row in rows]
  widths = [max(len(row[i]) for row in cut) for i in range(3)]
  lines = ['  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cut]
  return '\n'.join(f'  {line.rstrip()}' for line in lines)


def has_same_devices(run: Mapping[str, Any], kind: str, cpu: Mapping[str, Any]) -> bool:
  """Returns whether programs that a run compiled fit here: the same kind of device, and if that is
  a CPU the same instruction sets.
  """
  return _kind(run) == kind and (kind != 'cpu' or run.get('cpu') == cpu)


def _earlier_starts(run: Mapping[str, Any], here: Mapping[str, Any]) -> list[Difference]:
  """Returns the starts of a run before its last one that were of another executable or machine."""
  executable, out = str(here.get('executable') or ''), []
  for start in _starts(run)[:-1]:
    theirs = (
      f'{_devices(start)}, {start.get("host_cores")} cores, {_short(start.get("executable"))}'
    )
    ours = f'{_devices(here)}, {here.get("host_cores")} cores, {_short(executable)}'
    if theirs != ours:
      out.append(Difference(f'start at step {start.get("step")}', theirs, ours))
  return out


def _has_same_threads(run: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
  """Returns whether NPROC sets the number of XLA's threads, to the same in both, whatever the
  number of cores.
  """
  theirs, ours = ((m.get('environment') or {}).get('NPROC') for m in (run, here))
  return theirs is not None and theirs == ours


def _kind(manifest: Mapping[str, Any]) -> str:
  return str((manifest.get('devices') or {}).get('kind') or '')


def _devices(manifest: Mapping[str, Any]) -> str:
  found = manifest.get('devices') or {}
  return f'{found.get("count")} x {found.get("kind")}, {found.get("processes")} process(es)'


def _flags(manifest: Mapping[str, Any]) -> str:
  return ' '.join(environment.xla_flags(str(manifest.get('xla_flags') or ''))) or 'none'


def _by_key(run: Any, here: Any) -> list[tuple[str, str, str]]:
  run, here = run or {}, here or {}
  return [(k, _text(run.get(k)), _text(here.get(k))) for k in sorted({**run, **here})]


def _text(value: Any) -> str:
  """Returns a JSON value as one line."""
  if value is None or value == '':
    return 'none'
  return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _short(digest: Any) -> str:
  return str(digest)[:_SHORT] if digest else 'none'
