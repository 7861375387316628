"""What torch and transformers compute with the models of family_cases.py. Runs in the parity
environment (make parity), from the repository's root:

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/make_family_goldens.py FOLDER [CASE ...]

FOLDER is tests/parity/golden to replace them; FOLDER/families/CASE.npz has

- config: the complete config.json as transformers writes it, text
- names, shapes: of the tensors in the files that it writes; shapes as texts '24 10'
- linear: the names of those that belong to a linear map, which PEFT's 'all-linear' adapts
- ids int32[B, T], logits float32[B, T, V]; loss: mean of -log p of each next token, by HF's labels;
  gradient/NAME of the loss, in the layout of the files
- hidden float32[L, T, D]: of the first row, after the last norm, of the model cut to its first 1,
  2, ... L layers
- of a decoder: continuations int32[P, N], margins float32[P, N]: greedy tokens of transformers'
  `generate` after each prompt, and each one's lead over the second

Of an encoder the loss is the mean of -log p of each token itself; of labels it is the sum of the
logits times family_cases.factors, and names, config, logits, loss and gradient are all there is.

All in float32, with eager attention.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
  AutoConfig,
  AutoModelForCausalLM,
  AutoModelForMaskedLM,
  AutoModelForQuestionAnswering,
  AutoModelForSequenceClassification,
  AutoModelForTokenClassification,
  GenerationConfig,
)
from transformers.pytorch_utils import Conv1D

from parity import family_cases as cases

FILE = 'model.safetensors'
CLASSES = {
  '': AutoModelForCausalLM,
  'masked': AutoModelForMaskedLM,
  'sequence': AutoModelForSequenceClassification,
  'token': AutoModelForTokenClassification,
  'span': AutoModelForQuestionAnswering,
}


def stored(model, folder: Path) -> dict[str, np.ndarray]:
  """Returns the tensors of the file that transformers writes for a model."""
  model.save_pretrained(folder)
  return load_file(folder / FILE)


def open_case(case: cases.Case, folder: Path):
  """Writes a case as a HF folder and returns the model that transformers loads from it."""
  settings = dict(case.config)
  config = AutoConfig.for_model(settings.pop('model_type'), **settings)
  empty = CLASSES[case.head].from_config(config, dtype=torch.float32)
  tensors = {n: cases.draw(case, n, x.shape) for n, x in stored(empty, folder).items()}
  save_file(tensors, folder / FILE, metadata={'format': 'pt'})
  model, info = CLASSES[case.head].from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True
  )
  assert not any(info.values()), info
  return model.eval(), tensors


def linear_names(model, tensors: Mapping[str, np.ndarray], folder: Path) -> list[str]:
  """Returns the names in the file of the weights of linear maps, but for the head's. Where loading
  renames or joins tensors, they are found by their values.
  """
  head = model.get_output_embeddings()
  with torch.no_grad():
    for p in model.parameters():
      p.zero_()
    for module in model.modules():
      if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
        module.weight.fill_(1.0)
  marked = stored(model, folder)
  assert marked.keys() == tensors.keys()
  return sorted(n for n, x in marked.items() if x.any())


def tensor(x: np.ndarray) -> torch.Tensor:
  """Returns an array of ids."""
  return torch.from_numpy(x.astype(np.int64))


def inputs(case: cases.Case, ids: np.ndarray) -> dict[str, torch.Tensor]:
  """Returns what a model reads."""
  types = cases.token_types(case)
  out = {'input_ids': tensor(ids)}
  return out if types is None else out | {'token_type_ids': tensor(types[: len(ids)])}


def logits_of(case: cases.Case, model, given) -> torch.Tensor:
  """Returns the logits of tokens or labels, with a last axis of begin and end for a span."""
  found = model(**given)
  if case.head != 'span':
    return found.logits
  return torch.stack([found.start_logits, found.end_logits], -1)


def losses(case: cases.Case, model, ids: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
  """Returns logits, loss and gradient; the parameters are the gradient afterwards."""
  given = inputs(case, ids)
  if case.head in ('', 'masked'):
    found = model(**given, labels=given['input_ids'])
    logits, loss = found.logits, found.loss
  else:
    logits = logits_of(case, model, given)
    loss = (logits * torch.from_numpy(cases.factors(tuple(logits.shape)))).sum()
  loss.backward()
  with torch.no_grad():
    for p in model.parameters():
      # Saving gives it the layout of the files. BERT has a bias that nothing reads.
      p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
  gradient = {f'gradient/{n}': x for n, x in stored(model, folder).items()}
  return {'logits': logits.detach().numpy(), 'loss': loss.item(), **gradient}


def hidden_states(case: cases.Case, model, row: np.ndarray) -> np.ndarray:
  """Returns the states after the last norm of the model cut to each number of layers."""
  base, count = model.base_model, model.config.get_text_config().num_hidden_layers
  lists = [
    (part, n)
    for part in base.modules()
    for n, m in part.named_children()
    if isinstance(m, torch.nn.ModuleList) and len(m) == count
  ]
  ((part, name),) = lists
  layers, out = getattr(part, name), []
  with torch.no_grad():
    for n in range(1, count + 1):
      setattr(part, name, layers[:n])
      out.append(base(**inputs(case, row[None])).last_hidden_state[0].numpy())
  setattr(part, name, layers)
  return np.stack(out)


def greedy(model, prompts: list[list[int]]) -> dict[str, np.ndarray]:
  """Returns the likeliest tokens one after the other, and each one's lead over the second."""
  model.generation_config = GenerationConfig(
    do_sample=False,
    max_new_tokens=cases.NEW_TOKENS,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_logits=True,
  )
  tokens, margins = [], []
  for prompt in prompts:
    # Without a mask all tokens are part of the text, those that equal pad_token_id too.
    ids = torch.tensor([prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids))
    tokens.append(found.sequences[0, len(prompt) :].numpy())
    first, second = torch.stack(found.logits)[:, 0].topk(2).values.T
    margins.append((first - second).numpy())
  return {'continuations': np.int32(tokens), 'margins': np.float32(margins)}


def compute(name: str, folder: Path) -> dict[str, np.ndarray]:
  case = (cases.CASES | cases.LABELED)[name]
  model, tensors = open_case(case, folder)
  config = (folder / 'config.json').read_text()
  json.loads(config)
  ids = cases.ids(case)
  out = {
    'config': config,
    'names': list(tensors),
    'shapes': [' '.join(map(str, x.shape)) for x in tensors.values()],
    'ids': ids,
  }
  if name in cases.LABELED:
    return out | losses(case, model, ids, folder)
  out['hidden'] = hidden_states(case, model, ids[0])
  if not case.head:
    out |= greedy(model, cases.prompts(case))
  out |= losses(case, model, ids, folder)
  return out | {'linear': linear_names(model, tensors, folder)}


def write(name: str, target: Path) -> None:
  with tempfile.TemporaryDirectory() as temp:
    found = compute(name, Path(temp))
  target.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(target / f'{name}.npz', **found)
  print(
    f'{name}: {(target / f"{name}.npz").stat().st_size:,} bytes, max |logit|',
    f'{np.abs(found["logits"]).max():.1f}',
  )
  if 'margins' in found:
    print(
      f'{name}: smallest margin {found["margins"].min():.1e},',
      f'{len({*found["continuations"].flat})} different tokens',
    )
  small = [n for n, x in found.items() if n.startswith('gradient/') and not x.any()]
  assert name == 'bert_untied' or not small, f'no gradient: {small}'


if __name__ == '__main__':
  for case in sys.argv[2:] or cases.CASES | cases.LABELED:
    write(case, Path(sys.argv[1]) / 'families')
