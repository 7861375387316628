"""Makes tests/parity/golden/ with torch and transformers, in the parity environment (make parity),
from the repository's root:

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/make_goldens.py FOLDER [TASK ...]

FOLDER is tests/parity/golden to replace them, TASK folders, tokenizers or smollm2, which needs
.cache/SmolLM2-135M-Instruct.Q4_1.gguf (demo/assets.py). The tests read the files and never import
torch. What families compute is in make_family_goldens.py.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

os.environ['HF_HUB_OFFLINE'] = '1'

from tokenizers import pre_tokenizers
from transformers import (
  AutoModelForCausalLM,
  AutoTokenizer,
  LlamaConfig,
  LlamaForCausalLM,
  Qwen2Config,
  Qwen2ForCausalLM,
)

from parity.mixed_strings import mixed_strings
from parity.toy_gguf import Toy, write_toy

GGUF_FOLDER, GGUF = '.cache', 'SmolLM2-135M-Instruct.Q4_1.gguf'

LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 10000.0,
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
# Random models as HF folders: files to read, and the bases of PEFT's adapters.
FOLDERS = {
  'llama_tied': {'tie_word_embeddings': True, 'num_key_value_heads': 4},
  'llama_untied_gqa': {
    'tie_word_embeddings': False,
    'num_key_value_heads': 2,
    'num_hidden_layers': 3,
  },
  'llama3_rope': {'tie_word_embeddings': True, 'num_key_value_heads': 1, 'rope_parameters': LLAMA3},
  # Published models have theta 1e6, epsilon 1e-6 and grouped keys.
  'qwen2_tied': {'tie_word_embeddings': True, 'num_key_value_heads': 2},
  'qwen2_untied': {
    'tie_word_embeddings': False,
    'num_key_value_heads': 1,
    'num_hidden_layers': 3,
  },
}
CLASSES = {
  'llama': (LlamaForCausalLM, LlamaConfig, {'head_dim': 8, 'rms_norm_eps': 1e-5}),
  'qwen2': (Qwen2ForCausalLM, Qwen2Config, {'rope_theta': 1e6, 'rms_norm_eps': 1e-6}),
}
PROMPTS = (
  'The capital of France is',
  'Once upon a time',
  'def fibonacci(n):',
  'Water boils at',
  'The opposite of hot is',
  'My favourite colour is',
  '1, 2, 3, 4,',
  'In 1969, humans',
  'To make bread, you need',
  'The sun rises in the',
)
QUESTIONS = (
  'What is the capital of Italy?',
  'Name three fruits.',
  'Write a haiku about rain.',
  'What is 2 + 2?',
  'Who wrote Hamlet?',
  'Is the sentiment positive or negative?\n\nA dull film.',
  'Translate "good morning" into French.',
  'Why is the sky blue?',
  'Give me a synonym of happy.',
  'List the planets.',
)


SETTINGS = {
  'vocab_size': 128,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 128,
  'bos_token_id': 1,
  'eos_token_id': 2,
}


def folders(target: Path):
  """Random HF models in HF folders, norms around 1."""
  for name, changes in FOLDERS.items():
    torch.manual_seed(len(name))
    model, config, more = CLASSES['qwen2' if name.startswith('qwen2') else 'llama']
    model = model(config(**(SETTINGS | more | changes)))
    with torch.no_grad():
      for key, value in model.named_parameters():
        value.copy_(torch.randn(value.shape) * 0.25 + (1.0 if 'norm' in key else 0.0))
    model.save_pretrained(target / name)


def pack(rows: list[list[int]]) -> dict[str, np.ndarray]:
  """Ragged ids as flat ids and lengths."""
  return {
    'ids': np.array([i for row in rows for i in row], np.uint16),
    'lengths': np.array([len(r) for r in rows], np.uint16),
  }


def encode(folder: str, file: str, texts: list[str], special: bool) -> list[list[int]]:
  """Ids by transformers' own conversion of a GGUF file."""
  tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
  return [tokenizer.encode(text, add_special_tokens=special) for text in texts]


def tokenizers(target: Path):
  """Ids of the mixed strings for toy GGUF files of each kind, by transformers' conversion."""
  out = {}
  with tempfile.TemporaryDirectory() as folder:
    for kind, pre in [('gpt2', 'gpt-2'), ('gpt2', 'qwen2'), ('gpt2', 'llama-bpe'), ('llama', '')]:
      name = f'{kind}-{pre}' if pre else kind
      write_toy(Path(folder) / f'{name}.gguf', Toy(), kind, pre)
      rows = encode(folder, f'{name}.gguf', mixed_strings(300), special=False)
      out |= {f'{name}_{key}': value for key, value in pack(rows).items()}
      print(name, len(out[f'{name}_ids']), 'ids')
  np.savez_compressed(target / 'toy_tokenizers.npz', **out)


def smollm2(target: Path):
  """Logits, greedy continuations and token ids of SmolLM2 as transformers loads the GGUF file."""
  tokenizer = AutoTokenizer.from_pretrained(GGUF_FOLDER, gguf_file=GGUF)
  texts = mixed_strings()
  hf = pack([tokenizer.encode(text, add_special_tokens=False) for text in texts])
  # transformers 5.23 does not know tokenizer.ggml.pre = smollm and leaves out its first step,
  # single digits.
  backend = tokenizer.backend_tokenizer
  whole = backend.pre_tokenizer
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), whole]
  )
  digits = pack([backend.encode(text, add_special_tokens=False).ids for text in texts])
  np.savez_compressed(
    target / 'smollm2_tokenizer.npz',
    **{f'hf_{k}': v for k, v in hf.items()},
    **{f'digits_{k}': v for k, v in digits.items()},
  )
  model = AutoModelForCausalLM.from_pretrained(
    GGUF_FOLDER, gguf_file=GGUF, dtype=torch.float32
  ).eval()
  ends = np.cumsum(digits['lengths'])
  prompts = [backend.encode(p).ids for p in PROMPTS]
  chat = '<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n'
  prompts += [backend.encode(chat.format(q)).ids for q in QUESTIONS]
  with torch.no_grad():
    continuations, margins = zip(*[greedy(model, p, 24) for p in prompts], strict=True)
    # Half the model's own prose, half mixed strings.
    torch.manual_seed(0)
    prose = model.generate(
      torch.tensor([prompts[1]]),
      do_sample=True,
      temperature=0.8,
      min_new_tokens=256,
      max_new_tokens=256,
    )
    ids = np.concatenate([prose[0].numpy()[:256], digits['ids'][: ends[-1]][:256]]).astype(np.int32)
    logits = model(torch.tensor(ids[None])).logits[0].float().numpy()
  top = np.argsort(-logits, axis=-1, kind='stable')[:, :5]
  rng = np.random.default_rng(0)
  points = np.stack([rng.integers(0, n, 200) for n in logits.shape], 1)
  gap = np.take_along_axis(logits, top, 1)
  np.savez_compressed(
    target / 'smollm2_logits.npz',
    ids=ids,
    top_ids=top.astype(np.int32),
    top_logits=gap,
    max_abs=np.abs(logits).max(),
    points=points,
    point_logits=logits[tuple(points.T)],
  )
  print(
    '512 tokens: max |logit|',
    np.abs(logits).max(),
    'smallest gap of the first two',
    (gap[:, 0] - gap[:, 1]).min(),
  )
  np.savez_compressed(
    target / 'smollm2_greedy.npz',
    **{f'prompt_{k}': v for k, v in pack(prompts).items()},
    continuations=np.array(continuations),
    margins=np.array(margins),
  )
  print(
    'greedy: smallest gap',
    np.min(margins),
    repr(tokenizer.decode(continuations[0])),
    repr(tokenizer.decode(continuations[10])),
  )


def greedy(model, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
  """The most likely tokens one after the other, and each one's lead over the second."""
  ids, gaps, cache, new = [], [], None, prompt
  for _ in range(count):
    found = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
    top = found.logits[0, -1].topk(2)
    cache, new = found.past_key_values, [int(top.indices[0])]
    ids += new
    gaps.append(float(top.values[0] - top.values[1]))
  return ids, gaps


if __name__ == '__main__':
  tasks = {'folders': folders, 'tokenizers': tokenizers, 'smollm2': smollm2}
  for task in sys.argv[2:] or tasks:
    tasks[task](Path(sys.argv[1]))
