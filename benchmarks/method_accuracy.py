"""Accuracy of the demo with each method of training, over several seeds.

  make assets
  .venv/bin/python benchmarks/method_accuracy.py OUT [--seeds=0,1,2] [KEY=VALUE ...]

Trains SmolLM2-135M on the sentences of demo/assets.py, with each method and seed in a process of
its own, one after another, in OUT/<method>_<seed>. The settings are those of configs/sft_sentiment
and configs/lora_sentiment: the same number of steps and of tokens, the same schedule, and a
learning rate ten times as large for adapters. A seed gives every method the same batches. Other
config keys may be given; they hold for all runs.

OUT/table.md and OUT/results.json are written after each run. A run that is done is read, not made
again; its weights are removed. One that was stopped with SIGTERM goes on from where it was. The
models before training are scored once for each form of the base; tokens and compiled programs are
shared too. About five minutes a run on two idle CPU cores.

In the table: the interval of a run is Wilson's, from its eval/summary.json. The interval of a mean
over seeds, and of the difference to full fine-tuning, is from the bootstrap of both factors:
examples and seeds are drawn with replacement, independently of each other, and all methods get the
same draw (Owen 2007, The pigeonhole bootstrap, Annals of Applied Statistics 1:386). It covers the
chance of the test set and of the seeds; of three seeds it is a rough guide, so each is shown.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TASK = 'sentiment'
LAST = 20  # steps whose mean is the final training loss
RESAMPLES, LEVEL = 10_000, 0.95
ADAPTER = ('lora.merge=False',)
# {method: (title, config, overrides)}
METHODS = {
  'full': ('full', 'sft_sentiment', ()),
  'lora': ('LoRA, bfloat16 base', 'lora_sentiment', ADAPTER),
  'dora': ('DoRA, bfloat16 base', 'lora_sentiment', (*ADAPTER, 'lora.dora=True')),
  'int8': ('QLoRA, int8', 'lora_sentiment', (*ADAPTER, 'lora.base=int8')),
  'nf4': ('QLoRA, nf4', 'lora_sentiment', (*ADAPTER, 'lora.base=nf4')),
  'moments_8bit': ('full, moments in 8 bits', 'sft_sentiment', ('optim.moments=8bit',)),
}
# Nothing that costs time and does not change what is trained.
USUAL = (
  *('checkpoint.every=0', 'eval.prompts=()', 'eval.every=0', 'eval.in_loop=()'),
  'eval.general=False',
)


def folder(out: Path, method: str, seed: int) -> Path:
  return out / f'{method}_{seed}'


def is_done(workdir: Path) -> bool:
  return (workdir / 'eval' / 'summary.json').exists()


def train(out: Path, method: str, seed: int, given: list[str]) -> int:
  """Runs a method, or the rest of it; returns the exit code. Its log is train.log of its folder."""
  workdir, (_, config, own) = folder(out, method, seed), METHODS[method]
  (workdir / 'eval').mkdir(parents=True, exist_ok=True)
  (out / 'base').mkdir(exist_ok=True)
  shared = workdir / 'eval' / 'base'  # scores of models before training, named by their content
  if not shared.is_symlink():
    shared.symlink_to(out / 'base')
  keys = (*USUAL, f'data.cache={out / "tokens"}', *own, *given, f'seed={seed}')
  command = [sys.executable, '-m', 'ftjax.train', f'--config={config}', f'--workdir={workdir}']
  command += [f'--config.{k}' for k in keys]
  environment = os.environ | {'JAX_COMPILATION_CACHE_DIR': str(out / 'programs')}
  with open(workdir / 'train.log', 'a', encoding='utf-8') as log:
    code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
  if code == 0:
    for name in ('checkpoints', 'export'):
      shutil.rmtree(workdir / name, ignore_errors=True)
  return code


def lines(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def read(workdir: Path) -> dict:
  """Returns what a run that is done has found.

  right: whether each example of the task is answered right. answer_loss: mean negative log
  probability of the right answer, nats. batches: a checksum of each step's batch.
  """
  summary = json.loads((workdir / 'eval' / 'summary.json').read_text())['tasks'][TASK]
  config = json.loads((workdir / 'config.json').read_text())
  steps = [r for r in lines(workdir / 'metrics.jsonl') if r['split'] == 'train']
  tuned = [r for r in lines(workdir / 'eval' / f'{TASK}.jsonl') if r['model'] == 'tuned']
  if any(len(r['scores']) != 2 for r in tuned):
    raise SystemExit(f'{workdir}: expected two choices in each row of the task')
  # The prediction is the choice with the larger score.
  right = [r['values']['right'] == [1.0] for r in tuned]
  own = [(max if is_right else min)(r['scores']) for is_right, r in zip(right, tuned, strict=True)]
  return {
    'base': summary['scores']['base']['accuracy'],
    'tuned': summary['scores']['tuned']['accuracy'],
    'test': summary['differences'][0]['test'],
    'answer_loss': -statistics.mean(own),
    'train_loss': statistics.mean(r['loss'] for r in steps[-LAST:]),
    'lr': config['optim.lr'],
    'steps': len(steps),
    'tokens': sum(r['tokens'] for r in steps),
    'ids': [r['id'] for r in tuned],
    'right': right,
    'batches': [r['batch_checksum'] for r in steps],
  }


def check_paired(runs: dict[str, dict]) -> None:
  """Raises SystemExit where the methods of one seed had other batches or another test set."""
  first, *others = runs
  for name in others:
    for what in ('batches', 'ids'):
      if runs[name][what] != runs[first][what]:
        raise SystemExit(f'{name} and {first} had different {what}: they cannot be compared')


def interval(right: np.ndarray) -> dict[str, float]:
  """Returns mean and interval of [S, n] scores of S seeds on the same n examples."""
  right, chance = np.asarray(right, np.float64), np.random.default_rng(0)
  num_seeds, n = right.shape
  means = np.empty(RESAMPLES)
  for i in range(RESAMPLES):
    by_example = right[chance.integers(num_seeds, size=num_seeds)].mean(0)
    means[i] = by_example[chance.integers(n, size=n)].mean()
  low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return {'value': right.mean(), 'low': float(low), 'high': float(high)}


def collect(out: Path, seeds: list[int]) -> dict:
  """Returns the results of all runs that are done, and of each method over its seeds."""
  runs = {
    m: {s: read(folder(out, m, s)) for s in seeds if is_done(folder(out, m, s))} for m in METHODS
  }
  for seed in seeds:
    check = {f'{m} of seed {seed}': of[seed] for m, of in runs.items() if seed in of}
    if check:
      check_paired(check)
  over = {}
  for method, of in runs.items():
    if not of:
      continue
    over[method] = {'mean': interval([r['right'] for r in of.values()])}
    both = [s for s in of if s in runs['full']]
    if method != 'full' and both:
      change = [np.subtract(of[s]['right'], runs['full'][s]['right'], dtype=float) for s in both]
      over[method]['minus_full'] = interval(change)
    for key in ('answer_loss', 'train_loss'):
      over[method][key] = statistics.mean(r[key] for r in of.values())
  return {'seeds': seeds, 'runs': runs, 'over_seeds': over}


def _percent(found: dict | None, sign: str = '') -> str:
  if found is None:
    return ''
  value, low, high = (f'{100 * found[k]:{sign}.1f}' for k in ('value', 'low', 'high'))
  return f'{value} [{low}, {high}]'


def table(found: dict) -> str:
  """Returns results of `collect` as Markdown, in percent of right answers."""
  seeds, rows = found['seeds'], []
  head = ['method', 'learning rate', 'before', *(f'seed {s}' for s in seeds), 'mean of seeds']
  head += ['minus full', 'answer loss, nats', 'training loss']
  for method, (title, *_) in METHODS.items():
    of = found['runs'][method]
    if not of:
      rows.append([title, *[''] * (len(head) - 1)])
      continue
    first, over = next(iter(of.values())), found['over_seeds'][method]
    rows.append(
      [
        title,
        f'{first["lr"]:g}',
        f'{100 * first["base"]["value"]:.1f}',
        *(_percent(of[s]['tuned'] if s in of else None) for s in seeds),
        _percent(over['mean']),
        _percent(over.get('minus_full'), '+'),
        f'{over["answer_loss"]:.3f}',
        f'{over["train_loss"]:.3f}',
      ]
    )
  return '\n'.join('| ' + ' | '.join(r) + ' |' for r in [head, ['---'] * len(head), *rows])


def write(out: Path, seeds: list[int]) -> str:
  """Writes results.json and table.md; returns the table."""
  found = collect(out, seeds)
  done = [r for of in found['runs'].values() for r in of.values()]
  text = table(found) + '\n'
  if done:
    total = len(METHODS) * len(seeds)
    text += (
      f'\n{len(done)} of {total} runs; {done[0]["steps"]} steps, {done[0]["tokens"]:,} tokens; '
      f'{len(done[0]["right"])} test examples.\n'
    )
  for name, content in (('results.json', json.dumps(found, indent=1) + '\n'), ('table.md', text)):
    (out / f'{name}.new').write_text(content, encoding='utf-8')
    (out / f'{name}.new').replace(out / name)
  return text


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('out', type=Path)
  parser.add_argument('--seeds', default='0,1,2', help='comma-separated')
  parser.add_argument('keys', nargs='*', metavar='KEY=VALUE', help='config keys of all runs')
  a = parser.parse_intermixed_args()
  out, seeds, failed = a.out.absolute(), [int(s) for s in a.seeds.split(',')], []
  for seed in seeds:  # all methods of a seed first: a table of part of the runs compares methods
    for method in METHODS:
      if is_done(folder(out, method, seed)):
        continue
      begin = time.perf_counter()
      code = train(out, method, seed, a.keys)
      took = f'{(time.perf_counter() - begin) / 60:.1f} min'
      print(f'{time.strftime("%H:%M")} {method}, seed {seed}: exit {code}, {took}', flush=True)
      if code:
        failed.append(f'{method}_{seed}')
      else:
        write(out, seeds)
  print(write(out, seeds))
  if failed:
    raise SystemExit(
      f'not done, see train.log in {out}/: {", ".join(failed)}. Start again to resume.'
    )


if __name__ == '__main__':
  main()
