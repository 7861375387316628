"""Phi-3, Phi-3.5 and Phi-4: Llama with fused matrices, longrope and partial rotation."""

from typing import Any

from ftjax.families import decoder, gguf, gguf_rope, hf_rope, layer_types
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.families.gguf_file import GgufFile
from ftjax.families.gguf_rope import read_rope
from ftjax.families.hf_config import HfConfig
from ftjax.families.rope_rule import Reading
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import Architecture
from ftjax.models.rope_spec import LongScaling
from ftjax.runtime.errors import DataError

KEYS = decoder.KEYS | {'attention_bias', 'mlp_bias', 'lm_head_bias', 'sliding_window'}
_QKV = 'model.layers.{l}.self_attn.qkv_proj.weight'
_GATE_UP = 'model.layers.{l}.mlp.gate_up_proj.weight'
_ATTENTION = (
  Row(_QKV, '[NH] D', 'attn/q/w', 'DNH', gguf='blk.{l}.attn_qkv.weight'),
  Row(_QKV, '[KH] D', 'attn/k/w', 'DKH', gguf='blk.{l}.attn_qkv.weight'),
  Row(_QKV, '[KH] D', 'attn/v/w', 'DKH', gguf='blk.{l}.attn_qkv.weight'),
  *(row for row in decoder.ATTENTION if row.leaf == 'attn/o/w'),
)
_MLP = (
  Row(_GATE_UP, '[F] D', 'mlp/gate/w', 'DF', gguf='blk.{l}.ffn_up.weight'),
  Row(_GATE_UP, '[F] D', 'mlp/up/w', 'DF', gguf='blk.{l}.ffn_up.weight'),
  *(row for row in decoder.MLP if row.leaf == 'mlp/down/w'),
)


def _types(c: HfConfig) -> list[str]:
  """Returns the type of each layer. Released files have windows longer than the model's positions,
  which are none.
  """
  longest = c.count('max_position_embeddings', of_class=True)
  windowed = c.get('sliding_window') is not None and c.count('sliding_window') < longest
  kind = layer_types.SLIDING if windowed else layer_types.FULL
  return [kind] * c.size('num_hidden_layers')


def _read(c: HfConfig, family: str) -> Architecture:
  for key in ('attention_bias', 'mlp_bias', 'lm_head_bias'):
    decoder.check_flag(c, key, False, of_class=False)
  rope = hf_rope.read(c, Reading(partial=True))
  if not isinstance(rope.scaling, LongScaling | None):
    raise DataError(
      f'config.json: {rope.scaling} is not computed by model_type={c.model_type!r}; expected '
      "rope_type 'default' or 'longrope'"
    )
  block = decoder.read_block(c, rope)
  return decoder.read_model(c, family, decoder.with_windows(c, block, _types(c)))


def _write(arch: Architecture) -> dict[str, Any]:
  written = decoder.write_model(arch, 'Phi3', 'phi3') | decoder.write_rope(arch)
  return written | {'sliding_window': layer_types.window(arch)} | decoder.NO_TOKENS


def _read_gguf(file: GgufFile) -> dict[str, Any]:
  # llama.cpp reads a window and computes none.
  return gguf.read_sizes(file) | hf_rope.write(
    read_rope(file, partial=True), file.count('context_length')
  )


PHI3 = Family(
  model_types=('phi3',),
  hf_class='Phi3',
  keys=KEYS,
  read=_read,
  write=_write,
  rows=decoder.rows(_ATTENTION, _MLP),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf=Gguf(
    arch='phi3',
    fixed=(('hidden_act', 'silu'),),
    read=_read_gguf,
    rope_tensors=(gguf_rope.LONG, gguf_rope.SHORT),
    square=True,
  ),
  tasks=('sequence', 'token'),
)
