"""Gemma 2, and the text models of Gemma 3.

They store norm weights around 0, normalize the output of each branch too, multiply the embeddings
by sqrt(hidden_size), and most of their layers attend to a window.
"""

import dataclasses
from typing import Any

from ftjax.families import decoder, gguf, hf_rope, layer_types
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.families.gguf_file import GgufFile
from ftjax.families.gguf_rope import read_rope
from ftjax.families.hf_config import HfConfig, class_defaults
from ftjax.families.layer_types import FULL, SLIDING
from ftjax.models.architecture import Architecture, BlockSpec
from ftjax.models.rope_spec import Rope
from ftjax.runtime.errors import DataError

SCALAR = 'query_pre_attn_scalar'
CAP, LOGIT_CAP = 'attn_logit_softcapping', 'final_logit_softcapping'
BIDIRECTIONAL = 'use_bidirectional_attention'
WINDOW, OLD_WINDOW = 'sliding_window', 'sliding_window_size'
PATTERN, LOCAL_THETA = 'sliding_window_pattern', 'rope_local_base_freq'
KEYS = decoder.KEYS | {
  *('hidden_activation', 'attention_bias', 'layer_types', SCALAR, CAP, LOGIT_CAP),
  *(BIDIRECTIONAL, WINDOW, OLD_WINDOW),
}
NORMS = {
  'attn_norm': ('input_layernorm', 'attn_norm'),
  'attn_out_norm': ('post_attention_layernorm', 'post_attention_norm'),
  'mlp_norm': ('pre_feedforward_layernorm', 'ffn_norm'),
  'mlp_out_norm': ('post_feedforward_layernorm', 'post_ffw_norm'),
}


def _read_block(c: HfConfig, rope: Rope) -> BlockSpec:
  """Returns what the layers of Gemma 2 and 3 share."""
  if c.flag(BIDIRECTIONAL, False):
    raise DataError(
      f'config.json: {BIDIRECTIONAL}=true: each token attends to later ones too, which is neither '
      'trained nor sampled here'
    )
  own, old = c.get(WINDOW), c.get(OLD_WINDOW)
  if old is not None and own != old:
    raise DataError(
      f'config.json: {WINDOW}={own!r} and {OLD_WINDOW}={old!r}; transformers reads the first. '
      'Delete the second, or set both alike'
    )
  activation = decoder.read_activation(c, 'hidden_activation')
  if c.get('hidden_act') is not None and decoder.read_activation(c) != activation:
    raise DataError(
      f'config.json: hidden_act={c.get("hidden_act")!r} differs from hidden_activation='
      f'{c.text("hidden_activation", of_class=True)!r}, which transformers reads; delete the '
      'first, or state the second'
    )
  block = decoder.read_block(c, rope, activation='hidden_activation', free_head=True)
  scalar = c.count(SCALAR, of_class=True)
  scale = None if scalar == block.mixer.head_dim else scalar**-0.5
  block = decoder.with_mixer(decoder.with_bias(c, block), scale=scale)
  norm = dataclasses.replace(block.norm, offset=1.0)
  return dataclasses.replace(block, norm=norm, norm_placement='both')


def _read_cap(c: HfConfig, key: str) -> float | None:
  """Returns a soft cap; null means none, and an absent key what transformers' class has."""
  given = key in c.content or class_defaults(str(c.model_type)).get(key) is not None
  off = key in c.content and c.get(key) is None
  return c.number(key, of_class=True) if given and not off else None


def _read_model(c: HfConfig, family: str, layers: list[BlockSpec]) -> Architecture:
  arch = decoder.read_model(c, family, layers)
  return dataclasses.replace(
    arch, embed_scale=arch.model_dim**0.5, logit_soft_cap=_read_cap(c, LOGIT_CAP)
  )


def _read_gemma2(c: HfConfig, family: str) -> Architecture:
  block = decoder.with_mixer(_read_block(c, hf_rope.read(c)), soft_cap=_read_cap(c, CAP))
  derived = [FULL if i % 2 else SLIDING for i in range(c.size('num_hidden_layers'))]
  types = layer_types.read(c, derived)
  return _read_model(c, family, decoder.with_windows(c, block, types))


def _read_gemma3(c: HfConfig, family: str) -> Architecture:
  if c.get(CAP) is not None:
    raise DataError(
      f'config.json: {CAP}={c.get(CAP)!r} is not computed for model_type={c.model_type!r}; '
      'transformers does not apply it either. Set it to null'
    )
  every, layers = c.count(PATTERN, 6), c.size('num_hidden_layers')
  types = layer_types.read(c, [SLIDING if (i + 1) % every else FULL for i in range(layers)])
  window = layer_types.read_window(c, types)
  blocks = {}
  for kind, rope in hf_rope.read_by_layer_type(c, LOCAL_THETA).items():
    block = _read_block(c, rope)
    own = window if kind == SLIDING else None
    blocks[kind] = decoder.with_mixer(block, qk_norm=block.norm, window=own)
  return _read_model(c, family, [blocks[kind] for kind in types])


def _write(arch: Architecture, hf_class: str, model_type: str) -> dict[str, Any]:
  """Returns the keys that Gemma 2 and 3 share, but those of the rope."""
  mixer = arch.layers()[0].mixer
  written = decoder.write_model(arch, hf_class, model_type)
  written['hidden_activation'] = written.pop('hidden_act')
  window = layer_types.window(arch)
  return (
    written
    | {
      SCALAR: mixer.head_dim if mixer.scale is None else round(mixer.scale**-2),
      LOGIT_CAP: arch.logit_soft_cap,
      CAP: mixer.soft_cap,
      'attention_bias': mixer.out_bias,
      'layer_types': layer_types.of(arch),
    }
    | ({} if window is None else {WINDOW: window})
  )


def _write_gemma2(arch: Architecture) -> dict[str, Any]:
  return _write(arch, 'Gemma2', 'gemma2') | decoder.write_rope(arch)


def _write_gemma3(arch: Architecture) -> dict[str, Any]:
  found = {kind: b.mixer.rope for kind, b in zip(layer_types.of(arch), arch.layers(), strict=True)}
  ropes = {kind: found.get(kind, arch.layers()[0].mixer.rope) for kind in (FULL, SLIDING)}
  written = _write(arch, 'Gemma3', 'gemma3_text')
  return written | hf_rope.write_by_layer_type(ropes, arch.max_len, LOCAL_THETA)


# In GGUF files. llama.cpp divides the scores of a model of 46 layers (Gemma 2 27B) or 62 (Gemma 3
# 27B) by the root of hidden_size / num_attention_heads, and those of others by that of head_dim.


def _read_gguf(file: GgufFile, layers_27b: int, period: int) -> dict[str, Any]:
  """Returns the keys that both families share, but those of the rope and the caps."""
  sizes = gguf.read_sizes(file)
  scalar = sizes['head_dim']
  if sizes['num_hidden_layers'] == layers_27b:
    scalar = sizes['hidden_size'] // sizes['num_attention_heads']
  windows = gguf.has_windows(file, period)
  return sizes | {
    'hidden_activation': 'gelu_pytorch_tanh',
    SCALAR: scalar,
    'layer_types': [SLIDING if windowed else FULL for windowed in windows],
  }


def _read_gguf2(file: GgufFile) -> dict[str, Any]:
  return (
    _read_gguf(file, 46, 2)
    | hf_rope.write(read_rope(file), file.count('context_length'))
    | {
      WINDOW: file.count('attention.sliding_window', 4096),
      CAP: file.number('attn_logit_softcapping', 50.0),
      LOGIT_CAP: file.number('final_logit_softcapping', 30.0),
    }
  )


def _read_gguf3(file: GgufFile) -> dict[str, Any]:
  ropes = {FULL: read_rope(file), SLIDING: Rope(file.number('rope.freq_base_swa', 10000.0))}
  found = _read_gguf(file, 62, 6)
  if file.get('attention.sliding_window', 0):
    found[WINDOW] = file.count('attention.sliding_window')
  else:
    found['layer_types'] = [FULL] * file.count('block_count')
  capped = file.get('final_logit_softcapping', 0.0)
  found[LOGIT_CAP] = file.number('final_logit_softcapping') if capped else None
  return found | hf_rope.write_by_layer_type(ropes, file.count('context_length'), LOCAL_THETA)


def _write_caps(arch: Architecture) -> dict[str, Any]:
  caps = {
    'attn_logit_softcapping': arch.layers()[0].mixer.soft_cap,
    'final_logit_softcapping': arch.logit_soft_cap,
  }
  return {name: cap for name, cap in caps.items() if cap is not None}


def _write_gguf2(arch: Architecture) -> dict[str, Any]:
  return gguf.write_decoder(arch) | _write_caps(arch) | gguf.write_windows(arch, 2)


def _write_gguf3(arch: Architecture) -> dict[str, Any]:
  windowed = (b.mixer.rope for b in arch.layers() if b.mixer.window is not None)
  local = next(windowed, None)
  theta = {} if local is None or local.theta == 10000 else {'rope.freq_base_swa': local.theta}
  return gguf.write_decoder(arch) | _write_caps(arch) | gguf.write_windows(arch, 6) | theta


GEMMA2 = Family(
  model_types=('gemma2',),
  hf_class='Gemma2',
  keys=KEYS,
  read=_read_gemma2,
  write=_write_gemma2,
  rows=decoder.rows(norms=NORMS),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf=Gguf(
    arch='gemma2',
    fixed=(('attention_bias', False),),
    read=_read_gguf2,
    write=_write_gguf2,
    shifted=('norm.weight',),
    tied=True,
  ),
  tasks=('sequence', 'token'),
)
GEMMA3 = Family(
  model_types=('gemma3_text',),
  hf_class='Gemma3',
  score_class='Gemma3Text',
  keys=KEYS | {PATTERN, LOCAL_THETA},
  read=_read_gemma3,
  write=_write_gemma3,
  rows=decoder.rows((*decoder.ATTENTION, *decoder.QK_NORMS), norms=NORMS),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf=Gguf(
    arch='gemma3',
    fixed=(('attention_bias', False),),
    read=_read_gguf3,
    write=_write_gguf3,
    shifted=('norm.weight',),
    tied=True,
  ),
  tasks=('sequence',),
)
