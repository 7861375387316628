"""What torch's ReduceLROnPlateau makes of sequences of a metric (golden/plateau.npz).

In the parity environment (make parity), `python tests/parity/plateau.py FOLDER` writes it.
"""

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

GOLDEN = Path(__file__).parent / 'golden' / 'plateau.npz'
LENGTH = 60


class Case(NamedTuple):
  """A rule: patience as ftjax counts it."""

  mode: str
  patience: int
  factor: float
  floor: float


CASES = [
  Case(mode, patience, *rest)
  for mode, patience, rest in itertools.product(
    ('min', 'max'), (1, 2, 5), ((0.5, 0.0), (0.1, 2e-3), (0.9, 0.75))
  )
]


def values(case: Case) -> np.ndarray:
  """float64[LENGTH]: a curve that flattens, with noise, ties, and values that are not finite."""
  rng = np.random.default_rng([CASES.index(case), 11])
  curve = np.exp(-np.arange(LENGTH) / 15) + 0.2 * rng.normal(size=LENGTH)
  curve = np.round(curve if case.mode == 'min' else -curve, 1)
  curve[rng.random(LENGTH) < 0.05] = np.nan
  curve[rng.random(LENGTH) < 0.03] = np.inf if case.mode == 'min' else -np.inf
  return curve


def read() -> list[tuple[Case, np.ndarray, np.ndarray]]:
  """(rule, metric float64[LENGTH], factor of the learning rate after each float64[LENGTH])."""
  with np.load(GOLDEN) as found:
    return list(zip(CASES, found['metric'], found['scale'], strict=True))


def main(target: Path):
  import torch

  scales = []
  for case in CASES:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
      optimizer,
      mode=case.mode,
      factor=case.factor,
      patience=case.patience - 1,
      threshold=0.0,
      threshold_mode='abs',
      cooldown=0,
      min_lr=case.floor,
      eps=0.0,
    )
    scales.append([])
    for value in values(case):
      scheduler.step(value)
      scales[-1].append(optimizer.param_groups[0]['lr'])
  metric = np.stack([values(case) for case in CASES])
  np.savez_compressed(target / GOLDEN.name, metric=metric, scale=np.array(scales))


if __name__ == '__main__':
  main(Path(sys.argv[1]))
