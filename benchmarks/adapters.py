"""Memory and speed of full fine-tuning, LoRA, DoRA and QLoRA of one model on this machine.

  make assets
  .venv/bin/python benchmarks/adapters.py --json=adapters.jsonl

Each method is a process of its own: the steps that `ftjax.train` compiles, on rows of random tokens
that are all supervised. Times are of whole steps; on a machine that others use, CPU seconds (of all
threads) say more than seconds. Memory is what the compiler states for the step (the state in it:
parameters, moments), and the largest resident set of the process, which has the compiler and the
loading of the model in it too. The table is printed as Markdown; --json appends a line for each
method.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# {method: (title, overrides)}
METHODS = {
  'full': ('full, float32', {}),
  'full_8bit': ('full, moments in 8 bits', {'optim.moments': '8bit'}),
  'lora': ('LoRA, bfloat16 base', {'lora.rank': 16}),
  'lora_float32': ('LoRA, float32 base', {'lora.rank': 16, 'lora.base': 'float32'}),
  'dora': ('DoRA, bfloat16 base', {'lora.rank': 16, 'lora.dora': True}),
  'int8': ('QLoRA, int8', {'lora.rank': 16, 'lora.base': 'int8'}),
  'nf4': ('QLoRA, nf4', {'lora.rank': 16, 'lora.base': 'nf4'}),
}


def measure(method: str, args: argparse.Namespace) -> dict:
  """Returns the figures of one method, measured in this process."""
  import jax
  import numpy as np

  from ftjax.algorithms import sft
  from ftjax.config import keys, validation
  from ftjax.data import batches
  from ftjax.experiment import run as experiment
  from ftjax.experiment.trainer import Trainer
  from ftjax.models import counts
  from ftjax.planning import memory
  from ftjax.training.prefetch import place

  title, overrides = METHODS[method]
  c = keys.default()
  c.model.path, c.data.train = args.model, 'sums:20'
  c.batch_size, c.seq_len, c.remat = args.batch_size, args.seq_len, args.remat
  c.steps, c.compile_cache, c.optim.schedule = 10**6, False, 'constant'
  c.mesh.data, c.mesh.fsdp = -1, 1  # a block of nf4 is not split
  c.update_from_flattened_dict(overrides)
  validation.validate(c)
  with tempfile.TemporaryDirectory(prefix='ftjax-') as workdir:
    run = experiment.start(c, workdir, with_data=False)
    trainer = Trainer(run, sft.make_loss(run.forward, c))
    compiled, state = trainer.compile(), trainer.fresh()
    chance, host = np.random.default_rng(0), batches.empty(c.batch_size, c.seq_len)
    for i in range(c.batch_size):
      tokens = chance.integers(1, run.arch.vocab_size, c.seq_len)
      batches.fill_row(host, i, [(tokens, np.ones(c.seq_len, bool))])
    micro = {k: v.reshape(1, *v.shape) for k, v in host.items()}
    batch = place(micro, run.batch_shardings(micro=True))
    seconds, cpu = [], []
    for step in range(args.warmup + args.steps):
      begin, own = time.perf_counter(), time.process_time()
      state, metrics = compiled(state, batch)
      jax.block_until_ready((state, metrics))
      if step >= args.warmup:
        seconds.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - own)
  held = memory.memory(compiled, trainer.abstract)
  median = statistics.median(seconds)
  return {
    'method': method,
    'title': title,
    'trained': counts.num_trained(run.arch),
    'state_mib': (held.parameters + held.optimizer) / 2**20,
    'step_mib': held.peak / 2**20,
    'peak_rss_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    'step_s': median,
    'fastest_step_s': min(seconds),
    'cpu_s': statistics.median(cpu),
    'tokens_per_s': c.batch_size * c.seq_len / median,
    'settings': {k: getattr(args, k) for k in ('model', 'batch_size', 'seq_len', 'remat', 'steps')},
    'platform': jax.devices()[0].device_kind,
  }


def table(rows: list[dict]) -> str:
  """Returns rows of `measure` as Markdown."""
  head = (
    '| method | trained parameters | state, MiB | step by the compiler, MiB | peak RSS, MiB '
    '| step, s (fastest) | CPU s a step | tokens/s |\n' + '|---' * 8 + '|'
  )
  lines = [
    f'| {r["title"]} | {r["trained"]:,} | {r["state_mib"]:,.0f} | {r["step_mib"]:,.0f} '
    f'| {r["peak_rss_mib"]:,.0f} | {r["step_s"]:.2f} ({r["fastest_step_s"]:.2f}) '
    f'| {r["cpu_s"]:.2f} | {r["tokens_per_s"]:,.0f} |'
    for r in rows
  ]
  return '\n'.join([head, *lines])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--model', default='.cache/smollm2', help='folder of the model')
  parser.add_argument('--methods', default=','.join(METHODS), help='comma-separated')
  parser.add_argument('--batch-size', type=int, default=4)
  parser.add_argument('--seq-len', type=int, default=256)
  parser.add_argument('--remat', default='dots')
  parser.add_argument('--steps', type=int, default=5, help='measured, after --warmup')
  parser.add_argument('--warmup', type=int, default=1)
  parser.add_argument('--json', default='', help='file that gets a line for each method')
  parser.add_argument('--here', action='store_true', help='measure one method in this process')
  args = parser.parse_args()
  methods = args.methods.split(',')
  if unknown := set(methods) - set(METHODS):
    parser.error(f'--methods: no {", ".join(sorted(unknown))}; known: {", ".join(METHODS)}')
  if args.here:
    print(json.dumps(measure(methods[0], args)))
    return
  rows = []
  for method in methods:
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    command += [f'--methods={method}', '--here']
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows.append(json.loads(done.stdout.splitlines()[-1]))
    if args.json:
      with Path(args.json).open('a', encoding='utf-8') as file:
        file.write(json.dumps(rows[-1]) + '\n')
  print(table(rows))


if __name__ == '__main__':
  main()
