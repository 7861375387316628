"""What PEFT, torch, bitsandbytes and TRL compute with the adapters of peft_cases.py. Runs in the
parity environment (make parity), from the repository's root:

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/make_peft_goldens.py FOLDER

Writes FOLDER/peft. `make parity` writes into a temporary one and compares (reproduce.py).
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'

import bitsandbytes.functional as bnb
import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM
from trl import DPOTrainer
from trl.trainer.dpo_trainer import add_fused_lm_head

from parity import family_cases
from parity import peft_cases as cases
from parity.from_trl import make
from parity.make_family_goldens import open_case


def open_base(name: str):
  return AutoModelForCausalLM.from_pretrained(cases.GOLDEN / name, dtype=torch.float32).eval()


def adapt(case: cases.Case, base=None):
  settings = {'target_modules': 'all-linear', 'task_type': 'CAUSAL_LM'} | case.peft
  return get_peft_model(base or open_base(case.base), LoraConfig(**settings))


def saved_names(model) -> dict[str, torch.nn.Parameter]:
  """{name in adapter_model.safetensors: parameter} of what is trained."""
  by_address = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
  state = get_peft_model_state_dict(model)
  found = {
    name: by_address[t.data_ptr()] for name, t in state.items() if t.data_ptr() in by_address
  }
  assert {id(p) for p in found.values()} == {id(p) for p in by_address.values()}
  return found


def drawn(name: str, case: cases.Case, base=None):
  """The model of a case with its random adapter; base: the model to adapt, else the case's."""
  model, done = adapt(case, base), set()
  for key, p in saved_names(model).items():
    if id(p) in done:  # a tied head's second name
      continue
    done.add(id(p))
    x = torch.from_numpy(cases.adapter_tensor(name, key, tuple(p.shape)))
    p.data = x if 'lora_A' in key or 'lora_B' in key else p.data * x
  return model


def tensors(model, prefix: str) -> dict[str, np.ndarray]:
  named = saved_names(model).items()
  return {f'{prefix}/{name}': p.detach().numpy().copy() for name, p in named}


def loss_of(model, ids: np.ndarray):
  ids = torch.from_numpy(ids.astype(np.int64))
  return model(ids, labels=ids)


def adapters(folder: Path) -> None:
  """Of each case the adapter's folder; in found.npz ids int32[B, T], logits float32[B, T, V], the
  loss (mean of -log p of each next token) and its gradient by every tensor of the adapter.
  """
  for name, case in cases.CASES.items():
    model = drawn(name, case)
    ids = cases.ids(name, 2, 24)
    found = loss_of(model, ids)
    found.loss.backward()
    gradient = {f'gradient/{key}': p.grad.numpy() for key, p in saved_names(model).items()}
    # The path from the repository's root, not that of this checkout.
    model.peft_config['default'].base_model_name_or_path = f'tests/parity/golden/{case.base}'
    model.save_pretrained(folder / name)
    (folder / name / 'README.md').unlink()  # PEFT's empty model card
    save(folder / name / 'found.npz', ids=ids, logits=found.logits, loss=found.loss, **gradient)


def fused(folder: Path) -> None:
  """Of each of cases.FUSED the adapter's folder, with ids int32[B, T] and logits in found.npz."""
  for name, case in cases.FUSED.items():
    with tempfile.TemporaryDirectory() as temp:
      base, _ = open_case(family_cases.CASES[case.base], Path(temp))
    model, ids = drawn(name, case, base), family_cases.ids(family_cases.CASES[case.base])
    model.peft_config['default'].base_model_name_or_path = case.base
    model.save_pretrained(folder / name)
    (folder / name / 'README.md').unlink()
    save(folder / name / 'found.npz', ids=ids, logits=loss_of(model, ids).logits)


def pissa(folder: Path) -> None:
  """Logits after PiSSA's initialization, and of each map scale * B A, float32[O, I]."""
  model, ids = adapt(cases.PISSA), cases.ids('pissa', 2, 24)
  found = {'ids': ids, 'logits': loss_of(model, ids).logits}
  for name, module in model.base_model.model.named_modules():
    if hasattr(module, 'lora_A'):
      a, b = module.lora_A['default'].weight, module.lora_B['default'].weight
      found[f'product/{name}'] = module.scaling['default'] * b @ a
  save(folder / 'pissa.npz', **found)


def steps(folder: Path) -> None:
  """Twenty steps of AdamW, of LoRA and of LoRA+: ids int32[N, B, T], the loss of each step before
  its update, and the tensors after the last one; LoRA+'s learning rate of each tensor.
  """
  c, ids = cases.ADAMW, cases.ids('steps', cases.STEPS, 2, 24)
  common = {'lr': c['lr'], 'betas': (c['b1'], c['b2']), 'eps': c['eps']}
  for name in ('adamw', 'lora_plus'):
    model = adapt(cases.TRAINED)
    for key, p in saved_names(model).items():
      if 'lora_A' in key:
        p.data = torch.from_numpy(cases.first_factor(key, tuple(p.shape)))
    start = tensors(model, 'start')
    if name == 'adamw':
      trained = [p for p in model.parameters() if p.requires_grad]
      optimizer = torch.optim.AdamW(trained, weight_decay=c['weight_decay'], **common)
    else:
      optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        loraplus_lr_ratio=cases.PLUS_RATIO,
        loraplus_weight_decay=c['weight_decay'],
        **common,
      )
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    losses = []
    for batch in ids:
      loss = loss_of(model, batch).loss
      losses.append(loss.item())
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
    rates = {f'rate/{key}': rates[id(p)] for key, p in saved_names(model).items()}
    ends = tensors(model, 'end')
    save(folder / f'{name}.npz', ids=ids, losses=np.array(losses), **start, **ends, **rates)


def nf4(folder: Path) -> None:
  """Codes uint8[O, I], absmax float32[O, I / 64] and dequantized weights float32[O, I] of matrices
  by bitsandbytes on the CPU; its table float32[16].
  """
  table = bnb.get_4bit_type('nf4', device='cpu').numpy()
  found = {'table': table}
  for name, w in (('weights', cases.nf4_weights()), ('ties', cases.nf4_ties(table))):
    packed, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type='nf4')
    packed = packed.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(w.shape)
    found |= {
      name: w,
      f'{name}_codes': codes,
      f'{name}_absmax': state.absmax.reshape(len(w), -1),
      f'{name}_dequantized': bnb.dequantize_4bit(packed, state).reshape(w.shape),
    }
  save(folder / 'nf4.npz', **found)


def dpo(folder: Path) -> None:
  """TRL's DPO loss of pairs, with the adapter as the policy and the base as the reference: ids
  int32[2 P, T], chosen ones first, mask of the answers, the means that TRL reports, the gradient.
  """
  model = drawn('llama_lora', cases.CASES['llama_lora'])
  outputs = ('log_probs', 'entropy', 'mean_logits', 'is_top1')
  add_fused_lm_head(model.get_base_model(), outputs=outputs)
  ids = cases.ids('dpo', 4, 20)
  answer = np.zeros(ids.shape, np.int32)
  for row, (start, end) in zip(answer, ((6, 20), (9, 17), (6, 13), (9, 20)), strict=True):
    row[start:end] = 1
  trainer = make(
    DPOTrainer,
    model=model,
    ref_model=None,
    ld_alpha=None,
    precompute_ref_logps=False,
    f_divergence_type='reverse_kl',
    loss_weights=[1.0],
    loss_types=['sigmoid'],
    use_weighting=False,
    beta=cases.DPO_BETA,
    label_smoothing=0.0,
  )
  trainer.args = type('Args', (), {'gradient_checkpointing_kwargs': None})
  trainer.accelerator.unwrap_model = lambda model: model
  inputs = {
    'input_ids': torch.from_numpy(ids.astype(np.int64)),
    'attention_mask': torch.ones(ids.shape, dtype=torch.int64),
    'completion_mask': torch.from_numpy(answer.astype(np.int64)),
  }
  loss = trainer._compute_loss(model, inputs, False)
  loss.backward()
  metrics = trainer._metrics['train' if model.training else 'eval']
  kept = {
    key: np.float32(metrics[key][0])
    for key in ('rewards/chosen', 'rewards/rejected', 'rewards/margins', 'rewards/accuracies')
  }
  gradient = {f'gradient/{key}': p.grad for key, p in saved_names(model).items()}
  save(folder / 'dpo.npz', ids=ids, answer=answer, loss=loss, **kept, **gradient)


def save(path: Path, **arrays) -> None:
  plain = {
    key: a.detach().numpy() if isinstance(a, torch.Tensor) else np.asarray(a)
    for key, a in arrays.items()
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(path, **plain)
  print(path, f'{path.stat().st_size:,} bytes')


if __name__ == '__main__':
  target = Path(sys.argv[1]) / 'peft'
  torch.manual_seed(0)
  for write in (adapters, fused, pissa, steps, nf4, dpo):
    write(target)
