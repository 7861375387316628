"""Two runs of a training, bit by bit, with the settings of `--deterministic` and without; and what
these settings cost.

Each run is a process of its own with compilations of its own, as two users' runs are: 50 steps of a
Qwen3-0.6B cut to 8 layers, 4 rows of 2,048 tokens, bfloat16. Compared are the losses of all steps
and the SHA-256 of the parameters after the last.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from accelerator.record import Record, check

COLUMNS = (
  ('equal', 'runs are equal bit by bit', ''),
  ('first', 'first step that differs', ''),
  ('tokens_per_s', 'tokens/s', ',.0f'),
  ('cost', 'slower than without, %', '.1f'),
  ('compile_s', 'compile, s', '.1f'),
)
STEPS, ROWS, SEQ_LEN, LAYERS = 50, 4, 2048, 8


def deterministic(environment: dict[str, str]) -> dict[str, str]:
  """Returns an environment with the settings of `--deterministic` added: on GPUs XLA neither picks
  kernels by timing them nor uses sums in the order in which threads arrive. Other platforms have no
  such flags; they would refuse to start with them.
  """
  flags = (
    '--xla_gpu_deterministic_ops=true --xla_gpu_exclude_nondeterministic_ops=true '
    '--xla_gpu_autotune_level=0'
  )
  own = environment.get('XLA_FLAGS', '')
  return environment | {'XLA_FLAGS': f'{own} {flags}'.strip(), 'NCCL_NVLS_ENABLE': '0'}


def train(tiny: bool) -> dict:
  """Trains in this process; returns losses as hexadecimal floats, the digest and speed."""
  import time

  import jax
  import numpy as np

  from accelerator import measuring, training
  from ftjax.runtime import trees

  measuring.one_device()
  arch = measuring.architecture(
    'Qwen3-0.6B', tiny, **({} if tiny else {'num_hidden_layers': LAYERS})
  )
  rows, length, steps = (2, 64, 4) if tiny else (ROWS, SEQ_LEN, STEPS)
  c = training.config('sft', rows, 'dots', tiny)
  c.seq_len = length
  own = training.trainer(c, arch)
  begin = time.perf_counter()
  compiled = own.compile()
  compile_s = time.perf_counter() - begin
  state, (batch, _) = own.fresh(), training.device_batch(own)
  jax.block_until_ready((state, batch))
  state, seconds, losses = training.timed(compiled, state, batch, steps - training.WARMUP)
  digest = hashlib.sha256()
  for name, leaf in sorted(trees.flatten(state.params).items()):
    digest.update(name.encode() + np.asarray(leaf).tobytes())
  step_s = statistics.median(seconds)
  return {
    'losses': [float(x).hex() for x in losses],
    'digest': digest.hexdigest(),
    'tokens_per_s': rows * length / step_s,
    'compile_s': compile_s,
  }


def _process(tiny: bool, environment: dict[str, str]) -> dict:
  command = [sys.executable, '-m', 'accelerator.bitwise', *(['--tiny'] if tiny else [])]
  root = str(Path(__file__).resolve().parents[1])
  paths = os.pathsep.join(filter(None, [root, environment.get('PYTHONPATH', '')]))
  done = subprocess.run(
    command,
    env=environment | {'PYTHONPATH': paths},
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def compare(row: dict, first: dict, second: dict) -> None:
  """Writes into a row whether two runs are equal."""
  pairs = enumerate(zip(first['losses'], second['losses'], strict=True), 1)
  steps = [step for step, (a, b) in pairs if a != b]
  row['equal'] = not steps and first['digest'] == second['digest']
  row['first'] = steps[0] if steps else '' if row['equal'] else 'parameters alone'
  row['tokens_per_s'] = statistics.mean(r['tokens_per_s'] for r in (first, second))
  row['compile_s'] = statistics.mean(r['compile_s'] for r in (first, second))


def run(record: Record, tiny: bool, *, is_gpu: bool) -> None:
  """Trains twice in each way; the four processes take turns.

  is_gpu: whether the platform has settings for it. Elsewhere both ways are the same, and the two
  runs must be equal without them.
  """
  plain = dict(os.environ)
  plain.pop('JAX_COMPILATION_CACHE_DIR', None)  # the second run must compile for itself
  found = {'with': [], 'without': []}
  environments = {'with': deterministic(plain) if is_gpu else plain, 'without': plain}
  order = ('without', 'with', 'with', 'without') if is_gpu else ('with', 'with')
  speed = None
  with record.row('with --deterministic') as row:
    for way in order:
      found[way].append(_process(tiny, environments[way]))
    compare(row, *found['with'])
    if is_gpu:
      speed = statistics.mean(r['tokens_per_s'] for r in found['without'])
      row['cost'] = 100 * (speed / row['tokens_per_s'] - 1)
    check(row, 'runs that differ', float(not row['equal']), 0.0)
  if is_gpu:
    with record.row('without') as row:
      compare(row, *found['without'])


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--tiny', action='store_true')
  print(json.dumps(train(parser.parse_args().tiny)))
