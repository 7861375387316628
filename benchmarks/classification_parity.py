"""Fine-tunes MiniLM on the sentiment of movie reviews, here and with transformers' Trainer.

  make minilm eval-data parity
  .venv/bin/python benchmarks/classification_parity.py --out=DIR --seeds 0 1 2

Both sides train what configs/minilm_reviews.py names: the same sentences, passes, AdamW, peak rate,
linear schedule, dropout of the model's config.json, float32. The Trainer takes 38 sentences at a
time and pads them to the longest; ftjax packs as many on average into 8 rows of 128 tokens. The
sides take turns, a run of each for a seed. It prints a line of JSON for each run, and at the end
accuracies on the test sentences, their paired difference with its 95 % interval over sentences
(bootstrap) and the exact McNemar test of each seed, and the quotient of sentences per second of
training, the first step (compilation) left out.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
SENTENCES = 38


def read(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def run(command: list[str], **settings) -> str:
  env = os.environ | {'HF_HUB_OFFLINE': '1', 'TF_CPP_MIN_LOG_LEVEL': '3'}
  done = subprocess.run(
    command, cwd=ROOT, env=env, check=False, text=True, capture_output=True, **settings
  )
  if done.returncode:
    sys.exit(f'{" ".join(command)}: {done.stderr[-2000:]}')
  return done.stdout


def ours(args: argparse.Namespace, seed: int) -> dict:
  """Trains a model with ftjax; returns whether each test sentence is right, and the speed."""
  folder = args.out / f'ftjax-{seed}'
  command = [sys.executable, '-m', 'ftjax.train', '--config=configs/minilm_reviews.py']
  command += [f'--workdir={folder}', f'--config.seed={seed}', f'--config.epochs={args.epochs}']
  command += [f'--config.model.path={args.model}', '--config.eval.every=0']
  command += [f'--config.seq_len={args.seq_len}']
  command += [f'--config.data.train={args.data}/train.jsonl']
  run([*command, f'--config.data.eval={args.data}/test.jsonl'])
  steps = [row for row in read(folder / 'metrics.jsonl') if row['split'] == 'train']
  sentences = len(read(args.data / 'train.jsonl'))
  tokens = sum(row['tokens'] for row in steps)
  share = sum(row['tokens'] for row in steps[1:]) / tokens
  seconds = sum(row['step_s'] for row in steps[1:])
  command = [sys.executable, '-m', 'ftjax.generate', f'--model={folder}/export', '--classify']
  found = run([*command, f'--prompts={args.data}/test.jsonl', '--batch_size=32'])
  return {
    'right': [
      json.loads(line)['label'] == row['label']
      for line, row in zip(found.splitlines(), read(args.data / 'test.jsonl'), strict=True)
    ],
    'sentences_per_s': sentences * args.epochs * share / seconds,
  }


def theirs(args: argparse.Namespace, seed: int) -> dict:
  """Does the same with transformers' Trainer in a process of its own."""
  job = {
    'model': str(args.model),
    'data': str(args.data),
    'out': str(args.out / f'transformers-{seed}'),
    'seed': seed,
    'epochs': args.epochs,
    'sentences': SENTENCES,
    'seq_len': args.seq_len,
  }
  worker = Path(__file__).with_name('classification_parity_worker.py')
  return json.loads(run([args.python, str(worker), json.dumps(job)]).splitlines()[-1])


def compare(a: list[bool], b: list[bool]) -> dict:
  """Returns the difference of two accuracies on the same sentences."""
  gaps = np.array(a, float) - np.array(b, float)
  draws = np.random.default_rng(0).choice(gaps, (2000, len(gaps))).mean(1)
  won, lost = int((gaps > 0).sum()), int((gaps < 0).sum())
  p = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
  low, high = np.quantile(draws, [0.025, 0.975])
  return {'difference': gaps.mean(), 'low': low, 'high': high, 'mcnemar_p': p}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', type=Path, required=True)
  parser.add_argument('--python', default=str(ROOT / '.venv-parity' / 'bin' / 'python'))
  parser.add_argument('--model', type=Path, default=ROOT / '.cache' / 'minilm')
  parser.add_argument('--data', type=Path, default=ROOT / '.cache' / 'eval' / 'reviews')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--epochs', type=float, default=2.0)
  parser.add_argument('--seq-len', type=int, default=128)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  ratios, pairs = [], []
  for number, seed in enumerate(args.seeds):
    sides = [('ftjax', ours), ('transformers', theirs)]
    found = {}
    for name, side in sides if number % 2 == 0 else reversed(sides):
      found[name] = side(args, seed)
      shown = {'side': name, 'seed': seed, 'accuracy': np.mean(found[name]['right'])}
      shown |= {'sentences_per_s': round(found[name]['sentences_per_s'], 1)}
      print(json.dumps(shown), flush=True)
    ratios.append(found['ftjax']['sentences_per_s'] / found['transformers']['sentences_per_s'])
    pairs.append((found['ftjax']['right'], found['transformers']['right']))
    print(json.dumps({'seed': seed, 'ratio': ratios[-1]} | compare(*pairs[-1])), flush=True)
  whole = compare([x for a, _ in pairs for x in a], [x for _, b in pairs for x in b])
  del whole['mcnemar_p']  # the same sentences in each seed
  means = [float(np.mean([np.mean(p[i]) for p in pairs])) for i in (0, 1)]
  shown = {'ftjax': means[0], 'transformers': means[1], 'ratio': float(np.median(ratios))}
  print(json.dumps(shown | whole))


if __name__ == '__main__':
  main()
