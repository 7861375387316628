"""Arranges what a run was made of and what it took: model, data, resources, how to repeat it."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.reporting import charts
from ftjax.reporting.figures import count, duration, is_finite, number, share
from ftjax.reporting.metrics_log import MetricsLog
from ftjax.reporting.run_files import ReportInput

Facts = list[tuple[str, str]]

_LEFT_OUT = ('dropped', 'unsupervised', 'bad', 'identical')
_COMMIT = 12  # characters of a commit


def trained(run: ReportInput) -> Facts:
  """Returns what was trained on what: labels and texts."""
  c, devices = run.config, run.manifest.get('devices') or {}
  if not c:
    return []
  model = c.get('init_from') or c.get('model.path') or 'random weights (model.random)'
  out = [
    ('model', str(model)),
    ('algorithm', str(c.get('algorithm', ''))),
    ('steps', run.status()),
    (
      'batch',
      f'{count(c.get("batch_size"))} per optimizer step, seq_len {count(c.get("seq_len"))}',
    ),
    ('trained parameters', _parameters(run)),
    ('optimizer', _optimizer(c)),
    (
      'precision',
      f'{c.get("model.param_dtype")} parameters, {c.get("model.compute_dtype")} compute',
    ),
  ]
  if devices:
    kind = f'{count(devices.get("count"))} x {devices.get("kind")}'
    out.append(('devices', f'{kind}, {count(devices.get("processes"))} process(es)'))
  out.append(('training data', _sources(c.get('data.train'))))
  out.append(('evaluation data', _sources(c.get('data.eval')) or _split(c)))
  tasks = c.get('eval.tasks') or ()
  out.append(('evaluation tasks', ', '.join(map(str, tasks)) or 'none (eval.tasks is empty)'))
  return [(label, text) for label, text in out if text]


def _parameters(run: ReportInput) -> str:
  found = run.manifest.get('parameters') or {}
  if is_finite(found.get('trained')) and is_finite(found.get('frozen')):
    return f'{count(found["trained"])} trained, {count(found["frozen"])} frozen'
  rank = run.config.get('lora.rank')
  if rank:
    base = ' on a 4-bit base' if run.config.get('lora.base') == 'nf4' else ''
    return f'a LoRA adapter of rank {rank}{base}'
  freeze = run.config.get('optim.freeze') or []
  frozen = [str(p) for p, f in freeze if f] if all(len(x) == 2 for x in freeze) else []
  return f'all but {", ".join(frozen)}' if frozen else 'all'


def _optimizer(c: Mapping[str, Any]) -> str:
  return (
    f'{c.get("optim.name")}, learning rate {number(c.get("optim.lr"))} ({c.get("optim.schedule")}, '
    f'{count(c.get("optim.warmup_steps"))} warm-up steps)'
  )


def _sources(value: Any) -> str:
  return ', '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value or '')


def _split(c: Mapping[str, Any]) -> str:
  fraction = c.get('data.eval_fraction')
  return f'{share(fraction)} of the training data, held out' if fraction else 'none'


def data(run: ReportInput) -> dict[str, Any]:
  """Returns the counts of each data source, and histograms of lengths where the manifest has
  them.
  """
  rows, drawings, notes = [], [], []
  for key, found in (run.manifest.get('data') or {}).items():
    if not isinstance(found, dict):
      continue
    used = found.get('examples_used', found.get('prompts'))
    tokens, examples = found.get('tokens'), found.get('examples')
    mean = number(tokens / examples) if is_finite(tokens) and examples else '-'
    supervised = found.get('supervised')
    part = share(supervised / tokens) if is_finite(supervised) and tokens else '-'
    left_out = sum(found[k] for k in _LEFT_OUT if is_finite(found.get(k)))
    use = 'train' if key.startswith('data') else 'eval'
    cells = [count(used), count(left_out), count(tokens), part, mean, count(found.get('truncated'))]
    rows.append([use, str(found.get('name', key)), *cells])
    notes += [f'{found.get("name", key)}: {_reason(r)}' for r in found.get('bad_reasons') or []]
    lengths = found.get('lengths') or {}
    name = f'Tokens of an example, {use}: {found.get("name", key)}'
    drawing = charts.histogram(name, lengths.get('edges') or [], lengths.get('counts') or [])
    if drawing:
      drawings.append((name, drawing))
  names = [row[1] for row in rows]
  is_split = len(set(names)) < len(names)
  return {'rows': rows, 'drawings': drawings, 'notes': notes, 'is_split': is_split}


def _reason(found: Any) -> str:
  """Returns why rows were left out; found: {"reason", "rows", "places"}."""
  if not isinstance(found, Mapping):
    return str(found)
  rows = found.get('rows')
  return f'{found.get("reason")} ({count(rows)} {"row" if rows == 1 else "rows"})'


def resources(log: MetricsLog) -> Facts:
  """Returns memory, time, speed, MFU and goodput of the training steps."""
  seconds = log.series('train', 'step_s')
  if seconds is None:
    return []
  values = [float(v) for v in seconds.values if is_finite(float(v))]
  out = [('time of a step', f'{duration(statistics.median(values))} (median)')] if values else []
  for name, label in (('tokens_per_s', 'tokens per second'), ('mfu', 'MFU')):
    found = log.series('train', name)
    known = [float(v) for v in found.values if is_finite(float(v))] if found is not None else []
    if known:
      middle = statistics.median(known)
      text = share(middle) if name == 'mfu' else count(middle)
      out.append((label, f'{text} (median of {count(len(known))} steps)'))
  goodput = log.last('train', 'goodput')
  if goodput is not None:
    out.append(('goodput', f'{share(goodput)} of the time since the start was spent in steps'))
  in_loop = log.last('eval', 'in_loop_share')
  if in_loop is not None:
    out.append(('evaluation in the loop', f'{share(in_loop)} of the time of training'))
  tokens = log.series('train', 'tokens')
  if tokens is not None:
    out.append(('tokens in logged steps', count(float(tokens.values.sum()))))
  for name, label in (
    ('device_memory_peak_gib', 'peak memory of a device'),
    ('host_memory_peak_gib', 'peak memory of the host process'),
  ):
    peak = log.series('train', name)
    if peak is not None and is_finite(float(peak.values.max())):
      out.append((label, f'{peak.values.max():.2f} GiB'))
  return out


def versions(manifest: Mapping[str, Any]) -> Facts:
  """Returns versions of the code and of what it ran on."""
  code = manifest.get('code') or {}
  commit = str(code.get('commit', ''))
  out = [
    ('ftjax', str(manifest.get('ftjax', ''))),
    ('commit', commit + (' with local changes' if code.get('modified') else '')),
    ('Python', str(manifest.get('python', ''))),
    *((str(k), str(v)) for k, v in (manifest.get('packages') or {}).items()),
    ('CPU cores', count(manifest.get('host_cores')) if manifest.get('host_cores') else ''),
    ('XLA_FLAGS', str(manifest.get('xla_flags') or '')),
  ]
  return [(label, text) for label, text in out if text]


def hashes(manifest: Mapping[str, Any]) -> Facts:
  """Returns the SHA-256 of config, compiled step, models and data."""
  found = {'config': manifest.get('config'), 'compiled step': manifest.get('executable')}
  found |= manifest.get('fingerprints') or {}
  return [(str(k), str(v)) for k, v in found.items() if v]


def commands(run: ReportInput) -> list[str]:
  """Returns the lines of a shell that repeat the run, with the config of `config_code`."""
  code = run.manifest.get('code') or {}
  packages = run.manifest.get('packages') or {}
  lines = []
  if code.get('commit'):
    lines.append(f'git checkout {str(code["commit"])[:_COMMIT]}')
  pinned = [f'{k}=={v}' for k, v in packages.items() if k in ('jax', 'flax', 'optax')]
  if pinned:
    lines.append(f'pip install {" ".join(pinned)}')
  lines.append('python -m ftjax.train --config=config.py --workdir=runs/again')
  if run.config.get('eval.tasks'):
    lines.append('python -m ftjax.evaluate --config=config.py --workdir=runs/again')
  return lines


def config_code(config: Mapping[str, Any]) -> str:
  """Returns a config file of Python that sets every key as the run had it."""
  lines = ['from ftjax import config', '', '', 'def get_config():', '  c = config.default()']
  lines += [f'  c.{key} = {_literal(value)}' for key, value in config.items()]
  return '\n'.join([*lines, '  return c'])


def _literal(value: Any) -> str:
  """Returns a JSON value as a Python literal in one line; lists become tuples."""
  if isinstance(value, list):
    return f'({", ".join(map(_literal, value))}{"," if len(value) == 1 else ""})'
  if isinstance(value, Mapping):
    return f'{{{", ".join(f"{k!r}: {_literal(v)}" for k, v in value.items())}}}'
  return repr(value)


def config_changes(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
  """Returns the keys whose values differ between configs: (key, a text for each)."""
  out = []
  for key in sorted({k for c in configs for k in c}):
    texts = [_literal(c[key]) if key in c else '-' for c in configs]
    if len(set(texts)) > 1:
      out.append((key, texts))
  return out
