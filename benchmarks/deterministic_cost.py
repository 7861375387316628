"""What `--deterministic` costs: training speed with and without it, in turn on one machine.

  python benchmarks/deterministic_cost.py --out=DIR [--config=tiny_sft] [--repetitions=6]
      [--steps=600] [--config.KEY=VALUE ...]

Each repetition is two runs of `ftjax.train`, one with the flag and one without; which comes first
alternates, so that a load that rises or falls meets both alike. The speed of a run is the median of
1 / `step_s` over its log rows; the first row, of the compilation, has no time. Prints a JSON line
for each run and one for all: the ratio of speeds (with / without) of each repetition, their
median and range; whether all runs had the same loss bits; and the load of the machine before and
after. On a CPU the flag sets nothing (docs/replay.md), and the ratio shows the noise.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys


def train(out: pathlib.Path, name: str, words: list[str]) -> tuple[float, list[float]]:
  """Trains in an empty folder; returns (steps per second, losses of the log rows)."""
  workdir = out / name
  shutil.rmtree(workdir, ignore_errors=True)
  with (out / f'{name}.log').open('w') as log:
    subprocess.run(
      [sys.executable, '-m', 'ftjax.train', f'--workdir={workdir}', *words],
      check=True,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
    )
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  rows = [row for row in rows if row['split'] == 'train']
  speeds = [1 / row['step_s'] for row in rows if 'step_s' in row]
  if not speeds:
    raise SystemExit(f'no row of {workdir} has a step time; expected more --steps or log.every=1')
  return statistics.median(speeds), [row['loss'] for row in rows]


def main() -> None:
  """Measures, and prints JSON lines."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', required=True, type=pathlib.Path)
  parser.add_argument('--config', default='tiny_sft')
  parser.add_argument('--repetitions', type=int, default=6)
  parser.add_argument('--steps', type=int, default=600)
  flags, keys = parser.parse_known_args()
  if flags.repetitions < 1:
    parser.error(f'--repetitions={flags.repetitions}: expected 1 or more')
  flags.out.mkdir(parents=True, exist_ok=True)
  words = [f'--config={flags.config}', f'--config.steps={flags.steps}', *keys]
  load, ratios, losses = os.getloadavg(), [], []
  for repetition in range(flags.repetitions):
    speeds = {}
    for kind in ('with', 'without') if repetition % 2 else ('without', 'with'):
      own = [*words, '--deterministic'] if kind == 'with' else words
      speeds[kind], seen = train(flags.out, kind, own)
      losses.append(seen)
      row = {'repetition': repetition, 'deterministic': kind == 'with'}
      print(json.dumps(row | {'steps_per_s': round(speeds[kind], 3)}), flush=True)
    ratios.append(speeds['with'] / speeds['without'])
  summary = {
    'ratio': round(statistics.median(ratios), 4),
    'ratios': [round(ratio, 4) for ratio in sorted(ratios)],
    'same_loss_bits': all(seen == losses[0] for seen in losses),
    'cores': len(os.sched_getaffinity(0)),
    'load_before': [round(x, 1) for x in load],
    'load_after': [round(x, 1) for x in os.getloadavg()],
  }
  print(json.dumps(summary))


if __name__ == '__main__':
  main()
