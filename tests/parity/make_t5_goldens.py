"""What torch and transformers compute with the models of t5_cases.py. Runs in the parity
environment (make parity), from the repository's root:

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/make_t5_goldens.py FOLDER [CASE ...]

FOLDER is tests/parity/golden to replace them; FOLDER/t5/CASE.npz has

- config: the complete config.json as transformers writes it, text
- names, shapes: of the tensors in the files that it writes; shapes as texts '24 10'
- source int32[B, S], labels int32[B, T], logits float32[B, T, V]; loss: mean of -log p of each
  label that is no padding; gradient/NAME of the loss, in the layout of the files
- greedy int32[P, N], margins float32[P, N]: greedy tokens of transformers' `generate` after each
  prompt, -1 behind a stop token, and each one's lead over the second
- beams/I int32[P, N], scores/I float32[P]: those of beam search with settings I
- buckets_both, buckets_causal: of T5's own 32 buckets up to 128, for the distances -700 to 700

All in float32, with eager attention.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationConfig
from transformers.models.t5.modeling_t5 import T5Attention

from parity import t5_cases as cases
from parity.family_cases import draw

FILE = 'model.safetensors'


def stored(model, folder: Path) -> dict[str, np.ndarray]:
  """Returns the tensors of the file that transformers writes for a model."""
  model.save_pretrained(folder)
  return load_file(folder / FILE)


def open_case(case, folder: Path):
  """Writes a case as a HF folder and returns the model that transformers loads from it."""
  settings = dict(case.config)
  is_tied = settings.get('tie_word_embeddings', True)
  config = AutoConfig.for_model(settings.pop('model_type'), **settings)
  empty = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
  shapes = {n: x.shape for n, x in stored(empty, folder).items()}
  # transformers 5 ties all heads but those of files with another one.
  if not is_tied:
    shapes['lm_head.weight'] = shapes['shared.weight']
  tensors = {n: draw(case, n, s) for n, s in shapes.items()}
  save_file(tensors, folder / FILE, metadata={'format': 'pt'})
  model, info = AutoModelForSeq2SeqLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True
  )
  assert not any(info.values()), info
  same = torch.equal(model.lm_head.weight, model.shared.weight)
  assert same == is_tied
  return model.eval(), tensors


def tensor(x) -> torch.Tensor:
  """Returns an array of ids."""
  return torch.from_numpy(np.asarray(x, np.int64))


def losses(model, folder: Path) -> dict[str, np.ndarray]:
  """Returns rows, logits, loss and gradient; the parameters are the gradient afterwards."""
  source = cases.rows(cases.SOURCE_LENGTHS, cases.SOURCE, 0)
  labels = cases.rows(cases.TARGET_LENGTHS, cases.TARGET, 1)
  own = np.arange(cases.SOURCE)[None] < np.array(cases.SOURCE_LENGTHS)[:, None]
  target = np.arange(cases.TARGET)[None] < np.array(cases.TARGET_LENGTHS)[:, None]
  found = model(
    input_ids=tensor(source),
    attention_mask=tensor(own),
    labels=tensor(np.where(target, labels, -100)),
  )
  found.loss.backward()
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
  gradient = {f'gradient/{n}': x for n, x in stored(model, folder).items()}
  logits, loss = found.logits.detach().numpy(), found.loss.item()
  return {'source': source, 'labels': labels, 'logits': logits, 'loss': loss, **gradient}


def generated(model, prompt: list[int], **settings):
  """Returns what transformers generates after a prompt, without the first token."""
  model.generation_config = GenerationConfig(
    do_sample=False,
    max_new_tokens=cases.NEW_TOKENS,
    pad_token_id=0,
    eos_token_id=list(cases.STOPS),
    decoder_start_token_id=cases.START,
    return_dict_in_generate=True,
    output_logits=True,
    output_scores=True,
    **settings,
  )
  ids = tensor([prompt])
  return model.generate(ids, attention_mask=torch.ones_like(ids))


def padded(rows) -> np.ndarray:
  """Returns completions of different lengths, -1 behind each."""
  out = np.full((len(rows), cases.NEW_TOKENS), -1, np.int32)
  for i, row in enumerate(rows):
    out[i, : len(row)] = row
  return out


def completions(model) -> dict[str, np.ndarray]:
  out, tokens, margins = {}, [], np.zeros((cases.PROMPTS, cases.NEW_TOKENS), np.float32)
  for i, prompt in enumerate(cases.prompts()):
    found = generated(model, prompt)
    tokens.append(found.sequences[0, 1:].tolist())
    first, second = torch.stack(found.logits)[:, 0].topk(2).values.T
    margins[i, : len(first)] = (first - second).numpy()
  out |= {'greedy': padded(tokens), 'margins': margins}
  for i, (beams, penalty, early) in enumerate(cases.BEAMS):
    settings = {'num_beams': beams, 'length_penalty': penalty, 'early_stopping': early}
    found = [generated(model, p, **settings) for p in cases.prompts()]
    out[f'beams/{i}'] = padded([f.sequences[0, 1:].tolist() for f in found])
    out[f'scores/{i}'] = np.float32([f.sequences_scores.item() for f in found])
  return out


def buckets() -> dict[str, np.ndarray]:
  distance = torch.arange(-700, 701)
  find = T5Attention._relative_position_bucket
  both = find(distance, bidirectional=True, num_buckets=32, max_distance=128)
  causal = find(distance, bidirectional=False, num_buckets=32, max_distance=128)
  return {'buckets_both': np.int32(both), 'buckets_causal': np.int32(causal)}


def compute(name: str, folder: Path) -> dict[str, np.ndarray]:
  model, tensors = open_case(cases.CASES[name], folder)
  out = {
    'config': (folder / 'config.json').read_text(),
    'names': list(tensors),
    'shapes': [' '.join(map(str, x.shape)) for x in tensors.values()],
  }
  return out | completions(model) | buckets() | losses(model, folder)


def write(name: str, target: Path) -> None:
  with tempfile.TemporaryDirectory() as temp:
    found = compute(name, Path(temp))
  target.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(target / f'{name}.npz', **found)
  ends = [(found[f'beams/{i}'] >= 0).sum(1).tolist() for i in range(len(cases.BEAMS))]
  print(f'{name}: {(target / f"{name}.npz").stat().st_size:,} bytes, loss {found["loss"]:.3f},')
  print(f'  lengths of greedy {(found["greedy"] >= 0).sum(1).tolist()}, of beams {ends},')
  print(f'  smallest margin {found["margins"][found["greedy"] >= 0].min():.1e}')
  small = [n for n, x in found.items() if n.startswith('gradient/') and not x.any()]
  assert not small, f'no gradient: {small}'


if __name__ == '__main__':
  for case in sys.argv[2:] or cases.CASES:
    write(case, Path(sys.argv[1]) / 't5')
