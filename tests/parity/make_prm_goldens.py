"""What torch and transformers compute of a process reward model. Runs in the parity environment
(make parity), from the repository's root:

  PYTHONPATH=tests:. .venv-parity/bin/python tests/parity/make_prm_goldens.py FOLDER

FOLDER is tests/parity/golden to replace them. FOLDER/prm has the model, as transformers saves a
LlamaForTokenClassification of two labels with random weights, and numbers.npz:

- ids, labels: int32[B, T] of prm_cases.ROWS, joined as TRL's PRMTrainer did: the prompt, then each
  step and the separator, tokenized apart; -100 but at the last token of each separator; padding 0
- logits: float32[B, T, 2]. loss: of torch's CrossEntropyLoss over all step ends
- gradient/NAME: of the loss
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForTokenClassification

from ftjax.data import synthetic
from parity import prm_cases as cases


def joined(tokenizer: Tokenizer, row: dict) -> tuple[list[int], list[int]]:
  """Returns (ids, labels) of a row."""

  def encode(text):
    return tokenizer.encode(text, add_special_tokens=False).ids

  ids = encode(row['prompt'])
  labels = [-100] * len(ids)
  for step, label in zip(row['completions'], row['labels'], strict=True):
    piece = encode(step) + encode(cases.SEPARATOR)
    ids += piece
    labels += [-100] * (len(piece) - 1) + [int(label)]
  return ids, labels


def main(target: Path) -> None:
  torch.manual_seed(0)
  names = {0: 'incorrect', 1: 'correct'}
  config = LlamaConfig(**cases.SIZES, id2label=names, label2id={v: k for k, v in names.items()})
  model = LlamaForTokenClassification(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn(p.shape) * 0.2 + (1.0 if p.ndim == 1 and len(p) > 2 else 0.0))
  tokenizer = Tokenizer.from_str(synthetic.byte_tokenizer()['tokenizer.json'].decode())
  rows = [joined(tokenizer, row) for row in cases.ROWS]
  longest = max(len(ids) for ids, _ in rows)
  ids = np.array([i + [0] * (longest - len(i)) for i, _ in rows], np.int32)
  labels = np.array([x + [-100] * (longest - len(x)) for _, x in rows], np.int32)
  mask = np.array([[1] * len(i) + [0] * (longest - len(i)) for i, _ in rows])
  found = model(
    torch.from_numpy(ids.astype(np.int64)),
    attention_mask=torch.from_numpy(mask),
    labels=torch.from_numpy(labels.astype(np.int64)),
  )
  found.loss.backward()
  parameters = dict(model.named_parameters())
  folder = target / 'prm'
  folder.mkdir(parents=True, exist_ok=True)
  model.save_pretrained(folder)
  np.savez(
    folder / 'numbers.npz',
    ids=ids,
    labels=labels,
    logits=found.logits.detach().numpy(),
    loss=found.loss.detach().numpy(),
    **{f'gradient/{n}': parameters[n].grad.numpy() for n in cases.GRADIENTS},
  )


if __name__ == '__main__':
  main(Path(sys.argv[1]))
