"""What AdamW8bit of bitsandbytes makes of the same gradients (golden/adamw_8bit.npz).

In the parity environment (make parity), `python tests/parity/adamw_8bit.py FOLDER` writes it.
"""

import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / 'golden' / 'adamw_8bit.npz'
SHAPE, STEPS = (16, 256), 200  # each row a block of bitsandbytes, and of ours
SETTINGS = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
# Standard deviations of the logarithm of the gradients' scales within a block.
SPREADS = (0.3, 1.5)


def gradients(spread: float) -> np.ndarray:
  """float32[steps, 16, 256]: noise around a constant, each number on a scale of its own."""
  rng = np.random.default_rng(5)
  scale = np.exp(spread * rng.normal(size=SHAPE)) * 1e-3
  drift = 0.3 * rng.normal(size=SHAPE)
  return np.stack([(drift + rng.normal(size=SHAPE)) * scale for _ in range(STEPS)]).astype('f4')


def read() -> dict[float, np.ndarray]:
  """{spread: parameters float32[16, 256] after all steps from 0}."""
  with np.load(GOLDEN) as found:
    return {s: found[str(s)] for s in SPREADS}


def main(target: Path):
  import bitsandbytes
  import torch

  out = {}
  for spread in SPREADS:
    p = torch.nn.Parameter(torch.zeros(SHAPE))
    optimizer = bitsandbytes.optim.AdamW8bit([p], **SETTINGS)
    for gradient in gradients(spread):
      p.grad = torch.tensor(gradient)
      optimizer.step()
    assert optimizer.state[p]['state1'].dtype == torch.uint8
    out[str(spread)] = p.detach().numpy()
  np.savez_compressed(target / GOLDEN.name, **out)


if __name__ == '__main__':
  main(Path(sys.argv[1]))
