"""What PEFT computes with PEFT folders. Runs where torch and peft are installed:

  PYTHON tests/parity/open_with_peft.py FOLDER

FOLDER/jobs.json is {name: path of the base}: for each, the adapter in FOLDER/name and ids.npy,
int32[B, T], give FOLDER/name.npz: the logits, or of a reward model the scores at the last token;
the gradient of the mean next-token loss (of the summed scores) by every trained parameter, under
the names of the file; PEFT's warnings; the logits after PEFT's own merge.
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import torch
from peft import PeftModel
from transformers import (
  AutoModelForCausalLM,
  AutoModelForMaskedLM,
  AutoModelForSequenceClassification,
)


def open_base(folder: Path, base: str):
  """(model of the task that the adapter names, whether it scores)."""
  task = json.loads((folder / 'adapter_config.json').read_text())['task_type']
  if task in ('CAUSAL_LM', None):  # PEFT has no name for masked language models
    kind = AutoModelForCausalLM if task else AutoModelForMaskedLM
    return kind.from_pretrained(base, dtype=torch.float32), False
  kind = AutoModelForSequenceClassification
  model = kind.from_pretrained(base, dtype=torch.float32, num_labels=1)
  model.config.pad_token_id = 0
  return model, True


def compute(folder: Path, base: str, ids: torch.Tensor) -> dict[str, np.ndarray]:
  model, is_scorer = open_base(folder, base)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    model = PeftModel.from_pretrained(model.eval(), folder, is_trainable=True).eval()
  found = model(input_ids=ids) if is_scorer else model(input_ids=ids, labels=ids)
  (found.logits.sum() if is_scorer else found.loss).backward()
  out = {'logits': found.logits.detach().numpy()}
  for name, p in model.named_parameters():
    if p.requires_grad:
      plain = name.replace('.modules_to_save.default', '').replace('.default', '')
      if plain.endswith('lora_magnitude_vector.weight'):
        plain = plain.removesuffix('.weight')
      out[f'gradient/{plain}'] = p.grad.numpy().copy()
  with torch.no_grad():
    out['merged'] = model.merge_and_unload()(input_ids=ids).logits.numpy()
  # Deprecations of transformers are not about the folder, nor is what PEFT says of patterns that it
  # made itself for experts.
  texts = [str(w.message) for w in caught]
  texts = [t for t in texts if 'deprecated' not in t and 'gate_up_proj' not in t]
  return out | {'warnings': np.array(texts, dtype=str)}


if __name__ == '__main__':
  root = Path(sys.argv[1])
  ids = torch.from_numpy(np.load(root / 'ids.npy').astype(np.int64))
  for name, base in json.loads((root / 'jobs.json').read_text()).items():
    np.savez(root / f'{name}.npz', **compute(root / name, base, ids))
