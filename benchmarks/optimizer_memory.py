"""Loss curves of full tuning with less memory for the optimizer: float32, 8-bit moments, and
bfloat16 parameters with stochastic and with nearest rounding.

python benchmarks/optimizer_memory.py OUT [--steps=N] [KEY=VALUE ...]

Trains the demo (SmolLM2-135M on the sentences of demo/assets.py) once for each setting, on the same
batches at a constant learning rate, in OUT/<setting>; other config keys may be given. Prints a
table in Markdown, and draws OUT/curves.svg where matplotlib is installed. About two minutes a run
on two CPU cores. A run that is done is read, not made again.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

BF16 = ('model.param_dtype=bfloat16',)
SETTINGS = {
  'float32': (),
  '8-bit moments': ('optim.moments=8bit',),
  'bfloat16, stochastic': (*BF16, 'optim.rounding=stochastic'),
  'bfloat16, nearest': BF16,
}
USUAL = (
  'optim.lr=1e-5',
  'optim.schedule=constant',
  'optim.warmup_steps=0',
  'eval.tasks=()',
  'eval.in_loop=()',
  'eval.every=0',
  'eval.general=False',
  'eval.prompts=()',
  'data.eval_fraction=0.02',
)


def folder(out: Path, setting: str) -> Path:
  return out / re.sub(r'[^a-z0-9]+', '_', setting)


def train(out: Path, setting: str, given: list[str]) -> None:
  """Runs a setting; what it says goes to train.log of its folder."""
  workdir = folder(out, setting)
  workdir.mkdir(parents=True, exist_ok=True)
  if (workdir / 'export').exists():
    return
  keys = [f'--config.{k}' for k in (*USUAL, *given, *SETTINGS[setting])]
  command = [sys.executable, '-m', 'ftjax.train', '--config=sft_sentiment', f'--workdir={workdir}']
  with open(workdir / 'train.log', 'w') as log:
    code = subprocess.run([*command, *keys], stdout=log, stderr=log, check=False).returncode
  if code:
    raise SystemExit(f'{setting} ended with {code}:\n{(workdir / "train.log").read_text()[-2000:]}')


def rows(workdir: Path, split: str) -> dict[int, dict]:
  """{step: what was logged}."""
  found = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {r['step']: r for r in found if r['split'] == split}


def row(out: Path, setting: str) -> str:
  """A row of the table."""
  workdir = folder(out, setting)
  train_rows, evals = rows(workdir, 'train'), rows(workdir, 'eval')
  last = [r['loss'] for r in train_rows.values()][-10:]
  held = evals[max(evals)]['loss']
  peak = re.search(r'peak memory of a step: ([\d.]+ \w+)', (workdir / 'train.log').read_text())
  speed = statistics.median(r['tokens_per_s'] for r in train_rows.values() if r['tokens_per_s'])
  cells = (
    setting,
    f'{statistics.mean(last):.4f}',
    f'{held:.4f}',
    peak[1] if peak else '?',
    f'{speed:.0f}',
  )
  return f'| {" | ".join(cells)} |'


def draw(out: Path) -> None:
  """Draws the losses, each the mean of the last five steps."""
  import matplotlib

  matplotlib.use('svg')
  import matplotlib.pyplot as plt

  matplotlib.rcParams.update({'svg.hashsalt': 'ftjax', 'svg.fonttype': 'none', 'font.size': 9})
  figure, ax = plt.subplots(figsize=(7, 3.5), layout='constrained')
  styles = ('-', '--', '-', '-')
  for setting, style in zip(SETTINGS, styles, strict=True):
    found = rows(folder(out, setting), 'train')
    losses = [r['loss'] for r in found.values()]
    means = [statistics.mean(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
    ax.plot(list(found), means, style, label=setting, linewidth=1.4)
  ax.set_xlabel('step')
  ax.set_ylabel('training loss, mean of 5 steps')
  ax.grid(alpha=0.3)
  ax.legend()
  figure.savefig(out / 'curves.svg', metadata={'Date': None})


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('out', type=Path)
  parser.add_argument('--steps', type=int, default=40)
  parser.add_argument('keys', nargs='*', metavar='KEY=VALUE')
  a = parser.parse_intermixed_args()
  given = [f'steps={a.steps}', f'eval.every={a.steps}', f'checkpoint.every={a.steps}', *a.keys]
  for setting in SETTINGS:
    train(a.out, setting, given)
  print('| setting | loss, last 10 steps | held-out loss | peak memory of a step | tokens/s |')
  print('|---|---|---|---|---|')
  for setting in SETTINGS:
    print(row(a.out, setting))
  try:
    draw(a.out)
  except ModuleNotFoundError:
    print('no curves.svg: matplotlib is not installed')


if __name__ == '__main__':
  main()
