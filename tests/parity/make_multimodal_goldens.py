"""What transformers computes for text with small models that also read images. Runs in the parity
environment (make parity), from the repository's root:

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/make_multimodal_goldens.py DIR [TYPE ...]

DIR is tests/parity/golden to replace them; DIR/multimodal/TYPE.npz has the config.json
that transformers writes, names and shapes of the tensors in its files, the names of the linear maps
of the text part in the class that opens it, and ids int32[B, T] with logits float32[B, T, V]. The
weights are drawn by their names as in family_cases.py.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from make_family_goldens import FILE, stored
from safetensors.numpy import save_file
from transformers import (
  MODEL_FOR_CAUSAL_LM_MAPPING,
  AutoConfig,
  AutoModelForCausalLM,
  AutoModelForImageTextToText,
)

from parity import family_cases as cases

VISION = {
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'image_size': 28,
  'patch_size': 14,
}
IMAGE = {'image_token_index': 66}
MODELS = {
  'gemma3': (
    *('gemma3', IMAGE | {'mm_tokens_per_image': 4}),
    VISION | {'model_type': 'siglip_vision_model'},
  ),
  'mistral3': ('ministral3', IMAGE, VISION | {'model_type': 'pixtral', 'head_dim': 8}),
  'qwen3_5': (
    *('qwen3_5', {'image_token_id': 66, 'tie_word_embeddings': True}),
    {
      'hidden_size': 16,
      'intermediate_size': 24,
      'depth': 1,
      'num_heads': 2,
      'patch_size': 4,
      'out_hidden_size': 24,
      'num_position_embeddings': 16,
    },
  ),
}


def linear_names(config) -> list[str]:
  """Returns the linear maps of the text part in the class that opens the model for text, but for
  the head; a class that opens text alone has no other parts.
  """
  kind = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None
  model = (kind or AutoModelForImageTextToText).from_config(config)
  found = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
  text = [n for n in found if '.language_model.' in n]
  return text or [n for n in found if n != 'lm_head']


def compute(name: str, folder: Path) -> dict[str, np.ndarray]:
  text, settings, vision = MODELS[name]
  case = cases.CASES[text]
  config = AutoConfig.for_model(
    *(name,), text_config=dict(case.config), vision_config=vision, **settings
  )
  empty = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
  tensors = {n: cases.draw(case, n, x.shape) for n, x in stored(empty, folder).items()}
  save_file(tensors, folder / FILE, metadata={'format': 'pt'})
  model, info = AutoModelForImageTextToText.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True
  )
  assert not any(info.values()), info
  ids = cases.ids(case) % 66  # 66 stands for an image
  with torch.no_grad():
    logits = model.eval()(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
  return {
    'config': (folder / 'config.json').read_text(),
    'names': list(tensors),
    'shapes': [' '.join(map(str, x.shape)) for x in tensors.values()],
    'linear': linear_names(config),
    'ids': ids,
    'logits': logits,
  }


if __name__ == '__main__':
  target = Path(sys.argv[1]) / 'multimodal'
  target.mkdir(parents=True, exist_ok=True)
  for model in sys.argv[2:] or MODELS:
    with tempfile.TemporaryDirectory() as temp:
      np.savez_compressed(target / f'{model}.npz', **compute(model, Path(temp)))
