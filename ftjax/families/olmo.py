"""OLMo 2 and OLMo 3: norms on the outputs of attention and MLP, and of all queries of a token, and
all its keys, together.
"""

import dataclasses
from typing import Any

from ftjax.families import decoder, gguf, hf_rope, layer_types
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.families.gguf_file import GgufFile
from ftjax.families.gguf_rope import read_rope
from ftjax.families.hf_config import HfConfig
from ftjax.families.layer_types import FULL, SLIDING
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import Architecture, BlockSpec
from ftjax.models.rope_spec import Rope

KEYS = decoder.KEYS | {'attention_bias'}
_ATTENTION = 'model.layers.{l}.self_attn.'
_QK_NORMS = (
  Row(
    *(f'{_ATTENTION}q_norm.weight', 'NH', 'attn/q_norm/scale', 'NH'),
    gguf='blk.{l}.attn_q_norm.weight',
  ),
  Row(
    *(f'{_ATTENTION}k_norm.weight', 'KH', 'attn/k_norm/scale', 'KH'),
    gguf='blk.{l}.attn_k_norm.weight',
  ),
)
_NORMS = {
  'attn_out_norm': ('post_attention_layernorm', 'post_attention_norm'),
  'mlp_out_norm': ('post_feedforward_layernorm', 'post_ffw_norm'),
}


def _read_block(c: HfConfig, rope: Rope) -> BlockSpec:
  block = decoder.with_bias(c, decoder.read_block(c, rope))
  block = decoder.with_mixer(block, qk_norm=block.norm, qk_norm_width='all')
  return dataclasses.replace(block, norm_placement='after')


def _write_block(arch: Architecture) -> dict[str, Any]:
  return {'attention_bias': arch.layers()[0].mixer.out_bias} | decoder.NO_TOKENS


def _read_olmo2(c: HfConfig, family: str) -> Architecture:
  block = _read_block(c, hf_rope.read(c))
  return decoder.read_model(c, family, [block] * c.size('num_hidden_layers'))


def _write_olmo2(arch: Architecture) -> dict[str, Any]:
  written = decoder.write_model(arch, 'Olmo2', 'olmo2') | _write_block(arch)
  return written | decoder.write_rope(arch)


def _read_olmo3(c: HfConfig, family: str) -> Architecture:
  derived = [FULL if i % 4 == 3 else SLIDING for i in range(c.size('num_hidden_layers'))]
  types = layer_types.read(c, derived)
  ropes = hf_rope.read_by_layer_type(c, 'rope_theta')
  blocks = decoder.with_windows(c, _read_block(c, ropes[FULL]), types)
  layers = [
    decoder.with_mixer(block, rope=ropes[kind]) for block, kind in zip(blocks, types, strict=True)
  ]
  return decoder.read_model(c, family, layers)


def _write_olmo3(arch: Architecture) -> dict[str, Any]:
  types = layer_types.of(arch)
  found = {kind: b.mixer.rope for kind, b in zip(types, arch.layers(), strict=True)}
  usual = Rope(next(iter(found.values())).theta)  # of a type that no layer has
  ropes = {kind: found.get(kind, usual) for kind in (FULL, SLIDING)}
  # Transformers makes the mask of a window for every model of the class: a null is an error there.
  window = layer_types.window(arch)
  windows = {'layer_types': types} | ({} if window is None else {'sliding_window': window})
  written = decoder.write_model(arch, 'Olmo3', 'olmo3') | _write_block(arch) | windows
  return written | hf_rope.write_by_layer_type(ropes, arch.max_len, 'rope_theta')


# llama.cpp has one name for both; a file of OLMo 3 states a window.


def _read_gguf3(file: GgufFile) -> dict[str, Any]:
  ropes = {FULL: read_rope(file), SLIDING: Rope(file.theta())}
  windows = gguf.has_windows(file, 4)
  longest = file.count('context_length')
  return (
    gguf.read_sizes(file)
    | hf_rope.write_by_layer_type(ropes, longest, 'rope_theta')
    | {
      'sliding_window': file.count('attention.sliding_window'),
      'layer_types': [SLIDING if windowed else FULL for windowed in windows],
    }
  )


def _write_gguf3(arch: Architecture) -> dict[str, Any]:
  return gguf.write_decoder(arch) | gguf.write_windows(arch, 4)


_GGUF = Gguf(
  arch='olmo2',
  fixed=(('hidden_act', 'silu'), ('attention_bias', False)),
  square=True,
  tied=False,
)
OLMO2 = Family(
  model_types=('olmo2',),
  hf_class='Olmo2',
  keys=KEYS,
  read=_read_olmo2,
  write=_write_olmo2,
  rows=decoder.rows((*decoder.ATTENTION, *_QK_NORMS), norms=_NORMS),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf=_GGUF,
  tasks=('sequence',),
)
OLMO3 = dataclasses.replace(
  OLMO2,
  model_types=('olmo3',),
  hf_class='Olmo3',
  keys=KEYS | {'layer_types', 'sliding_window'},
  read=_read_olmo3,
  write=_write_olmo3,
  gguf=dataclasses.replace(
    _GGUF, read=_read_gguf3, write=_write_gguf3, mark='attention.sliding_window'
  ),
)
