"""What transformers computes with MiniLM's released weights on real sentences. Runs in the parity
environment (make parity), from the repository's root, after make minilm assets:

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/make_minilm_goldens.py \
    .cache tests/parity/golden

golden/minilm.npz has texts, of held-out movie reviews; ids int32[S, T] of transformers' tokenizer
with lengths int32[S]; embeddings float32[S, D], the mean of the last states of a text's tokens; and
states float32[T, D] of the first text. In float32, with eager attention, each text in a padded row.
"""

import json
import os
import sys
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

TEXTS = 24


def main(cache: Path, golden: Path) -> None:
  """Writes golden/minilm.npz."""
  rows = (cache / 'data' / 'sentiment' / 'test.jsonl').read_text().splitlines()[:TEXTS]
  messages = [json.loads(row)['messages'] for row in rows]
  found = (next(m['content'] for m in row if m['role'] == 'user') for row in messages)
  texts = [text.rpartition('\n')[2] for text in found]
  tokenizer = AutoTokenizer.from_pretrained(cache / 'minilm')
  model, info = AutoModel.from_pretrained(
    cache / 'minilm',
    dtype=torch.float32,
    attn_implementation='eager',
    output_loading_info=True,
  )
  assert not any(info.values()), info
  batch = tokenizer(texts, padding=True, return_tensors='pt')
  with torch.no_grad():
    states = model.eval()(**batch).last_hidden_state
  mask = batch['attention_mask'][..., None].float()
  lengths = batch['attention_mask'].sum(1).numpy().astype(np.int32)
  np.savez_compressed(
    golden / 'minilm.npz',
    texts=texts,
    ids=batch['input_ids'].numpy().astype(np.int32),
    lengths=lengths,
    embeddings=((states * mask).sum(1) / mask.sum(1)).numpy(),
    states=states[0, : lengths[0]].numpy(),
  )
  print(f'{len(texts)} texts of {lengths.min()} to {lengths.max()} tokens')


if __name__ == '__main__':
  main(Path(sys.argv[1]), Path(sys.argv[2]))
