"""Reward curves of runs, as an SVG: python benchmarks/reward_curves.py OUT.svg WORKDIR ...

Needs matplotlib, which ftjax does not (`pip install matplotlib`). A line is one run, named by its
folder: the mean reward of each rollout, faint, and the mean of the last five; below, the share of
completions that were cut off, and how many tokens they had: what a policy does to its form while it
is paid."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt

matplotlib.rcParams.update({'svg.hashsalt': 'ftjax', 'svg.fonttype': 'none', 'font.size': 9})
PANELS = (('reward', 'reward'), ('truncated', 'cut off'), ('length', 'tokens'))


def rollouts(workdir: Path) -> list[dict]:
  """Log rows of rollouts; of a number that was logged twice, after a resume, the last."""
  rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return list({r['step']: r for r in rows if r['split'] == 'rollout'}.values())


def smooth(values: list[float], width: int = 5) -> list[float]:
  """Means of the last `width` values."""
  parts = [values[max(0, i - width + 1) : i + 1] for i in range(len(values))]
  return [sum(p) / len(p) for p in parts]


def main(out: Path, workdirs: list[Path]) -> None:
  figure, axes = plt.subplots(
    len(PANELS), sharex=True, figsize=(7, 6), height_ratios=(3, 1, 1), layout='constrained'
  )
  for workdir in workdirs:
    rows = rollouts(workdir)
    for ax, (key, label) in zip(axes, PANELS, strict=True):
      values, at = [r[key] for r in rows], [r['step'] for r in rows]
      (line,) = ax.plot(at, smooth(values), label=workdir.name, linewidth=1.6)
      if key == 'reward':
        ax.plot(at, values, color=line.get_color(), alpha=0.3, linewidth=0.8)
      ax.set_ylabel(label)
      ax.grid(alpha=0.3)
  axes[0].legend()
  axes[-1].set_xlabel('step')
  figure.savefig(out, metadata={'Date': None})
  print(f'{out}: {len(workdirs)} runs')


if __name__ == '__main__':
  main(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]])
