"""Makes tests/parity/golden/rope.npz with torch and transformers: the frequencies of every rotary
embedding of rope_cases.py, and the logits of models with some of them. From the repository's root:

  PYTHONPATH=tests:. .venv-parity/bin/python tests/parity/make_rope_goldens.py FOLDER
"""

import copy
import importlib
import os
import sys
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftjax.families import hf_rope
from ftjax.families.hf_config import HfConfig
from parity.rope_cases import BY_LAYER_TYPE, CASES, LENGTHS, MODELS, PROMPT, ids, weights

# model_type -> folder and beginning of the class names in transformers.
NAMES = {
  'llama': ('llama', 'Llama'),
  'phi3': ('phi3', 'Phi3'),
  'ministral3': ('ministral3', 'Ministral3'),
  'qwen3_5_text': ('qwen3_5', 'Qwen3_5Text'),
  'gemma3_text': ('gemma3', 'Gemma3'),
  'olmo3': ('olmo3', 'Olmo3'),
  'gemma4_text': ('gemma4', 'Gemma4Text'),
}


def config_of(content: dict):
  content = copy.deepcopy(content)  # transformers writes into its objects
  return AutoConfig.for_model(content.pop('model_type'), **content)


def embedding(content: dict):
  """A new rotary embedding: it remembers the lengths that it has seen."""
  folder, name = NAMES[content['model_type']]
  module = importlib.import_module(f'transformers.models.{folder}.modeling_{folder}')
  return getattr(module, f'{name}RotaryEmbedding')(config_of(content))


def of_all_layers(content: dict) -> dict[str, np.ndarray]:
  """The frequencies of each length and the attention factor."""
  out = {}
  for length in LENGTHS:
    found = embedding(content)
    found(torch.zeros(1), torch.arange(length)[None])
    out[f'{length}'] = found.inv_freq.numpy().copy()
  return out | {'attention': np.float64(found.attention_scaling)}


def of_layer_types(content: dict) -> dict[str, np.ndarray]:
  """The frequencies of each layer type and the attention factors."""
  out, found = {}, embedding(content)
  for kind in (hf_rope.FULL, hf_rope.SLIDING):
    out[kind] = getattr(found, f'{kind}_inv_freq').numpy().copy()
    out[f'{kind}/attention'] = np.float64(getattr(found, f'{kind}_attention_scaling'))
  return out


def frequencies() -> dict[str, np.ndarray]:
  """Those of every case; transformers must read what ftjax writes as it reads the case."""
  out = {}
  for name, (content, reading) in CASES.items():
    rest = {k: v for k, v in content.items() if k not in hf_rope.KEYS}
    c = HfConfig(content)
    max_len = c.count('max_position_embeddings', of_class=True)
    written = hf_rope.write(hf_rope.read(c, reading), max_len, reading)
    found, again = of_all_layers(content), of_all_layers(rest | written)
    assert all(np.array_equal(found[k], again[k]) for k in found), (name, found, again)
    out |= {f'{name}/{k}': v for k, v in found.items()}
  for name, (content, local) in BY_LAYER_TYPE.items():
    rest = {k: v for k, v in content.items() if k not in (*hf_rope.KEYS, local)}
    written = hf_rope.write_by_layer_type(
      hf_rope.read_by_layer_type(HfConfig(content), local), 128, local
    )
    found, again = of_layer_types(content), of_layer_types(rest | written)
    assert all(np.array_equal(found[k], again[k]) for k in found), (name, found, again)
    out |= {f'{name}/{k}': v for k, v in found.items()}
  return out


def fused(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
  """The weights under the names of Phi-3."""
  out = dict(found)
  for name in found:
    if name.endswith('q_proj.weight'):
      parts = [out.pop(name.replace('q_proj', f'{n}_proj')) for n in 'qkv']
      out[name.replace('q_proj', 'qkv_proj')] = torch.cat(parts)
    if name.endswith('gate_proj.weight'):
      parts = [out.pop(name.replace('gate', n)) for n in ('gate', 'up')]
      out[name.replace('gate_proj', 'gate_up_proj')] = torch.cat(parts)
  return out


def logits() -> dict[str, np.ndarray]:
  """Of the whole text, and of its tokens after the prompt read one by one with a cache."""
  out = {}
  for name, content in MODELS.items():
    found = {n: torch.tensor(w) for n, w in weights(content).items()}
    found = fused(found) if content['model_type'] == 'phi3' else found
    found['lm_head.weight'] = found['model.embed_tokens.weight']
    text = torch.tensor(ids())
    with torch.no_grad():
      model = AutoModelForCausalLM.from_config(config_of(content)).eval()
      model.load_state_dict(found)
      out[f'logits/{name}'] = model(text).logits.numpy()
      model = AutoModelForCausalLM.from_config(config_of(content)).eval()
      model.load_state_dict(found)
      step, parts = model(text[:, :PROMPT], use_cache=True), []
      for t in range(PROMPT, text.shape[1]):
        step = model(text[:, t : t + 1], cache=step.cache, use_cache=True)
        parts.append(step.logits.numpy())
      out[f'decoded/{name}'] = np.concatenate(parts, 1)
  return out


if __name__ == '__main__':
  torch.set_num_threads(1)
  arrays = frequencies() | logits()
  np.savez_compressed(Path(sys.argv[1]) / 'rope.npz', **arrays)
  print(len(arrays), 'arrays')
