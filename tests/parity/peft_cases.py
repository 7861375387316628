"""The adapters that PEFT and ftjax both compute with. Reads no torch: the writer of the golden
numbers (make_peft_goldens.py) and the tests share it.

Each case has a folder golden/peft/NAME: the adapter as PEFT saves it, and found.npz.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

GOLDEN = Path(__file__).parent / 'golden'
FOLDER = GOLDEN / 'peft'
VOCAB = 128


class Case(NamedTuple):
  """An adapter. base: a model in golden/. peft: arguments of PEFT's LoraConfig. lora: the same as
  ftjax's config section `lora`.
  """

  base: str
  peft: dict
  lora: dict


_RANKS = {'peft': {'layers.1.self_attn.q_proj': 7, 'down_proj': 3}}
_RANKS['lora'] = (('layer1/attn/q', 7), ('.*/mlp/down', 3))
_ALPHAS = {'peft': {'k_proj': 20, 'layers.0.mlp.up_proj': 3}}
_ALPHAS['lora'] = (('.*/attn/k', 20.0), ('layer0/mlp/up', 3.0))
_PLAIN = ({'r': 4, 'lora_alpha': 8}, {'rank': 4, 'alpha': 8.0})
_PATTERNS = (
  {'r': 5, 'lora_alpha': 6, 'rank_pattern': _RANKS['peft'], 'alpha_pattern': _ALPHAS['peft']},
  {'rank': 5, 'alpha': 6.0, 'rank_pattern': _RANKS['lora'], 'alpha_pattern': _ALPHAS['lora']},
)

# The 3 layers of llama_untied_gqa and qwen2_untied have untied heads, qwen2_tied has not.
CASES = {
  'llama_lora': Case('llama_untied_gqa', *_PLAIN),
  'llama_rslora': Case(
    'llama_untied_gqa', {**_PATTERNS[0], 'use_rslora': True}, {**_PATTERNS[1], 'rslora': True}
  ),
  'llama_dora': Case(
    'llama_untied_gqa', {**_PATTERNS[0], 'use_dora': True}, {**_PATTERNS[1], 'dora': True}
  ),
  # A few maps; embedding, head and norms trained whole: `norm` is the end of all norms' names.
  'llama_modules': Case(
    'llama_untied_gqa',
    {
      'r': 4,
      'lora_alpha': 8,
      'target_modules': ['q_proj', 'v_proj'],
      'modules_to_save': ['embed_tokens', 'lm_head', 'norm'],
    },
    {
      'rank': 4,
      'alpha': 8.0,
      'targets': '.*/attn/[qv]',
      'train': 'embed/w|head/w|.*norm/scale',
    },
  ),
  'qwen2_lora': Case('qwen2_tied', *_PATTERNS),
  'qwen2_rslora': Case(
    'qwen2_tied', {**_PLAIN[0], 'use_rslora': True}, {**_PLAIN[1], 'rslora': True}
  ),
  'qwen2_dora': Case('qwen2_tied', {**_PLAIN[0], 'use_dora': True}, {**_PLAIN[1], 'dora': True}),
  # The head is the embedding table: PEFT trains it once where it is told so.
  'qwen2_modules': Case(
    'qwen2_tied',
    {**_PLAIN[0], 'modules_to_save': ['embed_tokens'], 'ensure_weight_tying': True},
    {**_PLAIN[1], 'train': 'embed/w'},
  ),
}
_HEAD = (
  {'target_modules': ['q_proj', 'lm_head'], 'rank_pattern': {'lm_head': 6}},
  {'targets': '.*/attn/q|head', 'rank_pattern': (('head', 6),)},
)
CASES |= {
  'llama_head': Case('llama_untied_gqa', {**_PLAIN[0], **_HEAD[0]}, {**_PLAIN[1], **_HEAD[1]}),
  'llama_head_dora': Case(
    'llama_untied_gqa',
    {**_PLAIN[0], **_HEAD[0], 'use_dora': True},
    {**_PLAIN[1], **_HEAD[1], 'dora': True},
  ),
}
# Adapters of modules whose matrix is several linear maps of ftjax; base: of family_cases.py.
FUSED = {
  'gpt2_lora': Case('gpt2', {**_PLAIN[0], 'rank_pattern': {'h.1.attn.c_attn': 3}}, {}),
  'gpt2_dora': Case('gpt2', {**_PLAIN[0], 'use_dora': True}, {}),
  'phi3_lora': Case(
    'phi3', {**_PLAIN[0], 'target_modules': ['qkv_proj', 'down_proj'], 'use_rslora': True}, {}
  ),
  'phi3_dora': Case('phi3', {**_PLAIN[0], 'use_dora': True}, {}),
}
PISSA = Case(
  'qwen2_tied', {**_PLAIN[0], 'init_lora_weights': 'pissa'}, {**_PLAIN[1], 'init': 'pissa'}
)
TRAINED = Case('llama_untied_gqa', *_PLAIN)

# AdamW of the twenty steps. LoRA+'s has the rate of B times the ratio.
STEPS = 20
ADAMW = {'lr': 2e-3, 'weight_decay': 0.05, 'b1': 0.9, 'b2': 0.99, 'eps': 1e-8}
PLUS_RATIO = 4.0

DPO_BETA = 0.1


def ids(name: str, *shape: int) -> np.ndarray:
  """Returns random token ids, int32[shape], of this name."""
  return _rng(name).integers(0, VOCAB, shape, np.int32)


def adapter_tensor(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns what a case's tensor is set to, float32[shape]: a factor of LoRA, or a factor around 1
  of DoRA's magnitude and of a module that is trained whole. B is not 0.
  """
  x = _rng(f'{case} {name}').normal(size=shape).astype(np.float32)
  return x * np.float32(0.15) if 'lora_A' in name or 'lora_B' in name else 1 + x * np.float32(0.1)


def first_factor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the value of A before the twenty steps, float32[R, I]: uniform, as PEFT draws it."""
  bound = shape[1] ** -0.5
  return _rng(f'first {name}').uniform(-bound, bound, shape).astype(np.float32)


def nf4_weights() -> np.ndarray:
  """Returns a matrix, float32[O 16, I 256], whose blocks of 64 inputs hold what is hard to round:
  nothing but zeros, some zeros, an outlier, equal sizes, a tiny scale.
  """
  w = _rng('nf4').normal(size=(16, 256)).astype(np.float32)
  w[0, :64] = 0.0
  w[1, 64:128:3] = 0.0
  w[2, 5], w[3, 130] = 300.0, -1e4  # all others of the block are near 0
  w[4, :64] = 0.25
  w[5, 64:128] = np.where(np.arange(64) % 2, -3.0, 3.0)
  w[6] *= 1e-30
  w[7, :64] = np.linspace(-1, 1, 64, dtype=np.float32)
  w[8, :64] = 0.0
  w[8, 17] = -0.5  # one number alone
  return w


def nf4_ties(table: np.ndarray) -> np.ndarray:
  """Returns numbers float32[1, 64] of absmax 1 that lie midway between values of the table and one
  float32 to each side.
  """
  middles = ((table[1:].astype(np.float64) + table[:-1]) / 2).astype(np.float32)
  up, down = np.nextafter(middles, np.float32(2)), np.nextafter(middles, np.float32(-2))
  rest = np.array([1.0, -1.0, -0.0], np.float32)
  return np.concatenate([middles, up, down, table.astype(np.float32), rest])[None]


def read_config(name: str) -> dict:
  """Returns adapter_config.json of a case."""
  return json.loads((FOLDER / name / 'adapter_config.json').read_text())


def _rng(name: str) -> np.random.Generator:
  return np.random.default_rng(list(name.encode()))
