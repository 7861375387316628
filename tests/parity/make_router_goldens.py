"""What transformers computes of the load of experts, for the cases of family_cases.py that have
them. Runs in the parity environment (make parity), from the repository's root:

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/make_router_goldens.py FOLDER

FOLDER is tests/parity/golden to replace them. FOLDER/routers.npz has for each CASE, of rows with
padding on the right (attention_mask; -100 as labels):

- CASE/ids, CASE/mask: int32[B, T]
- CASE/balance: aux_loss. CASE/loss: with labels and output_router_logits, the mean of -log p and
  router_aux_loss_coef times aux_loss
- CASE/gradient/NAME: of aux_loss, of the routers and the embedding, in the layout of the files
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from parity import family_cases as cases
from parity import make_family_goldens as families

LENGTHS = (48, 31)


def compute(name: str) -> dict[str, np.ndarray]:
  case = cases.CASES[name]
  ids = cases.ids(case)
  mask = (np.arange(ids.shape[1]) < np.array(LENGTHS)[:, None]).astype(np.int32)
  with tempfile.TemporaryDirectory() as temp:
    model, _ = families.open_case(case, Path(temp))
    tokens, real = (torch.from_numpy(a.astype(np.int64)) for a in (ids, mask))
    labels = torch.where(real > 0, tokens, -100)
    found = model(tokens, attention_mask=real, labels=labels, output_router_logits=True)
    found.aux_loss.backward()
    wanted = {n: p for n, p in model.named_parameters() if 'gate.weight' in n or 'embed' in n}
    with torch.no_grad():
      for p in model.parameters():
        p.zero_() if p.grad is None else p.copy_(p.grad)
    stored = families.stored(model, Path(temp))
  kept = {f'gradient/{n}': x for n, x in stored.items() if 'gate.weight' in n or 'embed' in n}
  assert len(kept) == len(wanted)
  values = {'balance': found.aux_loss.item(), 'loss': found.loss.item()}
  return {'ids': ids, 'mask': mask} | values | kept


if __name__ == '__main__':
  mixtures = [n for n, c in cases.CASES.items() if 'num_experts_per_tok' in c.config]
  out = {f'{n}/{k}': v for n in mixtures for k, v in compute(n).items()}
  np.savez_compressed(Path(sys.argv[1]) / 'routers.npz', **out)
  print({k: float(v) for k, v in out.items() if np.ndim(v) == 0})
