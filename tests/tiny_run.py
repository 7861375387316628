"""Entries run as a user runs them, each in a process of its own; what they leave is compared bit by
bit.

The run of `arguments` trains 26 steps with packing, accumulation and EMA; an epoch has 8 steps, a
checkpoint is begun every 4, the loss is evaluated every 6.
"""

import functools
import json
import os
import pathlib
import shutil
import tempfile
import time

import entry_server
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS, EPOCH_STEPS, SAVE_EVERY, BATCH = 26, 8, 4, 8

# What jax reads of the session's compile cache; see conftest.py.
CACHE_VARIABLES = ('JAX_COMPILATION_CACHE_DIR', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS')

# What depends on the clock or the machine's load is left out.
TRAIN_KEYS = ('loss', 'nll', 'grad_norm', 'lr', 'ok', 'skipped', 'bad_streak', 'supervised_tokens')
KEYS = (*TRAIN_KEYS, 'batch_checksum', 'perplexity', 'gap')


def arguments(workdir, *overrides):
  """Of `ftjax.train`, for a run in `workdir`; `overrides` like 'steps=3' come last."""
  settings = [
    f'steps={STEPS}',
    f'batch_size={BATCH}',
    'grad_accum=2',
    'data.train=sums:108',
    'optim.ema_decay=0.9',
    f'checkpoint.every={SAVE_EVERY}',
    'eval.every=6',
    'eval.prompts=()',
    *overrides,
  ]
  return ['--config=tiny_sft', f'--workdir={workdir}', *(f'--config.{s}' for s in settings)]


def xla_flags(devices=1):
  """Those of this process, but for so many devices."""
  flags = os.environ.get('XLA_FLAGS', '').split()
  kept = [f for f in flags if 'device_count' not in f]
  return ' '.join([*kept, f'--xla_force_host_platform_device_count={devices}'])


@functools.cache
def _server(pid):
  """Of this process; a fork of it must not share the connection."""
  return entry_server.Server()


def launch(entry, arguments, log, *, folder=ROOT, devices=1, share_cache=False, **environment):
  """Starts `python -m ftjax.<entry>`; both its outputs go to the end of the file `log`.

  Args:
    devices: of the CPU backend.
    share_cache: whether compiled programs come from the cache of the whole test session. A run that
      is killed, one of several processes, and one whose own cache is looked at must not.
    environment: variables on top of this process's.
  """
  variables = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  variables |= {'XLA_FLAGS': xla_flags(devices)} | environment
  if not share_cache:
    variables = {k: v for k, v in variables.items() if k not in CACHE_VARIABLES}
  return _server(os.getpid()).launch(entry, arguments, log, variables, folder)


def run(entry, arguments, share_cache=True, folder=ROOT, devices=1):
  """(exit code, what it printed) of an entry run to its end; see `launch`."""
  with tempfile.TemporaryDirectory() as scratch:
    log = pathlib.Path(scratch) / 'log'
    settings = dict(folder=folder, share_cache=share_cache, devices=devices)
    process = launch(entry, arguments, log, **settings)
    try:
      code = process.wait(timeout=300)
    finally:
      process.kill()
    return code, log.read_text(errors='replace')


def share_programs(source, target):
  """Gives the workdir `target` the compiled programs of `source`."""
  pathlib.Path(target).mkdir(parents=True, exist_ok=True)
  programs = (pathlib.Path(w) / 'xla_cache' for w in (source, target))
  shutil.copytree(*programs, dirs_exist_ok=True)


def kill_when(process, is_time, delay=0.0, number=9, timeout=300.0):
  """Sends a signal `delay` seconds after `is_time()`; False where the process ended before."""
  end = time.monotonic() + timeout
  while not is_time():
    if process.poll() is not None:
      return False
    if time.monotonic() > end:
      process.kill()
      raise TimeoutError('the moment to kill did not come')
    time.sleep(0.001)
  time.sleep(delay)
  if process.poll() is not None:
    return False
  process.send_signal(number)
  process.wait()
  return True


def checksum(tokens):
  """batch_checksum of training/step.py, on the host."""
  total = 0
  for place, token in enumerate(np.asarray(tokens).reshape(-1).tolist()):
    x = (token + 1) * (2 * place + 1) % 2**32
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    total += x ^ (x >> 16)
  return total % 2**32


def metrics(workdir):
  """{(split, step): its row, without what depends on the clock}, in the order of the file."""
  rows = {}
  for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines():
    row = json.loads(line)
    key = row['split'], row['step']
    assert key not in rows, f'{key} stands twice in metrics.jsonl'
    rows[key] = {k: row[k] for k in KEYS if k in row}
  return rows


def logged(workdir):
  """The last step in metrics.jsonl, 0 where there is none."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  lines = path.read_bytes().split(b'\n')[:-1] if path.exists() else []
  return json.loads(lines[-1])['step'] if lines else 0


def results(workdir):
  """{file: bytes} of what a finished run leaves: the exported model, the scores of its tasks
  without what they cost.
  """
  workdir = pathlib.Path(workdir)
  found = [*(workdir / 'export').iterdir(), *(workdir / 'eval').glob('*.json*')]
  out = {str(p.relative_to(workdir)): p.read_bytes() for p in found}
  if (summary := out.get('eval/summary.json')) is not None:
    summary = json.loads(summary)
    for entry in summary['tasks'].values():
      del entry['cost']
    out['eval/summary.json'] = json.dumps(summary).encode()
  return out


def differences(workdir, reference):
  """What differs between two finished runs, as lines; none where they are equal bit by bit."""
  ours, theirs = metrics(workdir), metrics(reference)
  out = [] if list(ours) == list(theirs) else [f'rows {list(ours)} and {list(theirs)}']
  for key in ours.keys() & theirs.keys():
    for name in ours[key].keys() | theirs[key].keys():
      a, b = ours[key].get(name), theirs[key].get(name)
      if a != b:
        out.append(f'{key} {name}: {a!r} and {b!r}')
  ours, theirs = results(workdir), results(reference)
  out += [f'{n} is not in both' for n in ours.keys() ^ theirs.keys()]
  return out + [f'{n} differs' for n in ours.keys() & theirs.keys() if ours[n] != theirs[n]]
