"""Qwen3-MoE: Qwen3's decoder with experts in some of its layers, or in all."""

import dataclasses
from typing import Any

from ftjax.families import decoder, experts, gguf, hf_rope, layer_types
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.families.gguf_file import GgufFile
from ftjax.families.hf_config import HfConfig
from ftjax.models.architecture import Architecture, MoeSpec
from ftjax.runtime.errors import DataError

KEYS = decoder.KEYS | experts.KEYS | {
  'attention_bias', 'num_experts', 'norm_topk_prob', 'decoder_sparse_step', 'mlp_only_layers',
  'moe_intermediate_size', 'use_sliding_window', 'sliding_window', 'max_window_layers',
}  # fmt: skip


def _sparse(c: HfConfig) -> list[bool]:
  """Returns of each layer whether it has experts."""
  step = c.count('decoder_sparse_step', of_class=True)
  dense, layers = c.get('mlp_only_layers') or [], c.size('num_hidden_layers')
  if not isinstance(dense, list) or any(type(i) is not int for i in dense):
    raise DataError(f'config.json: mlp_only_layers={dense!r}; expected a list of layer numbers')
  if wrong := [i for i in dense if not 0 <= i < layers]:
    raise DataError(f'config.json: mlp_only_layers has {wrong[0]}; there are {layers} layers')
  return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


def _read(c: HfConfig, family: str) -> Architecture:
  block = decoder.with_bias(c, decoder.read_block(c, hf_rope.read(c)))
  block = decoder.with_mixer(block, qk_norm=block.norm)
  renormalize = c.flag('norm_topk_prob', of_class=True)
  width = c.count('moe_intermediate_size', of_class=True)
  mlp = experts.read(c, block.mlp.activation, width, renormalize)
  # In its class all layers have the window; max_window_layers is not read.
  windowed = c.flag('use_sliding_window', of_class=True)
  kind = layer_types.SLIDING if windowed else layer_types.FULL
  blocks = decoder.with_windows(c, block, [kind] * c.size('num_hidden_layers'))
  sparse = _sparse(c)
  if not any(sparse):
    raise DataError(
      'config.json: decoder_sparse_step and mlp_only_layers leave no layer with experts; such a '
      "model is of model_type='qwen3'"
    )
  layers = [
    dataclasses.replace(b, mlp=mlp) if s else b for b, s in zip(blocks, sparse, strict=True)
  ]
  return decoder.read_model(c, family, layers)


def _write(arch: Architecture) -> dict[str, Any]:
  blocks, spec = arch.layers(), arch.mixtures()[0]
  dense = [i for i, b in enumerate(blocks) if not isinstance(b.mlp, MoeSpec)]
  width = blocks[dense[0]].mlp.ffn_dim if dense else spec.ffn_dim
  written = decoder.write_model(arch, 'Qwen3Moe', 'qwen3_moe') | decoder.write_rope(arch)
  window = layer_types.window(arch)
  return (
    written
    | experts.write(arch)
    | {
      'use_sliding_window': window is not None,
      'sliding_window': window,
      'intermediate_size': width,
      'moe_intermediate_size': spec.ffn_dim,
      'norm_topk_prob': spec.renormalize,
      'decoder_sparse_step': 1,
      'mlp_only_layers': dense,
      'attention_bias': blocks[0].mixer.out_bias,
    }
  )


def _read_gguf(file: GgufFile) -> dict[str, Any]:
  # llama.cpp has experts in each layer and divides their weights by the sum.
  return (
    gguf.read_decoder(file)
    | gguf.read_experts(file)
    | {
      'moe_intermediate_size': file.count(
        'expert_feed_forward_length', file.count('feed_forward_length')
      ),
      'norm_topk_prob': True,
      'decoder_sparse_step': 1,
      'mlp_only_layers': [],
    }
  )


QWEN3_MOE = Family(
  model_types=('qwen3_moe',),
  hf_class='Qwen3Moe',
  keys=KEYS,
  read=_read,
  write=_write,
  rows=decoder.rows(
    attention=(*decoder.ATTENTION, *decoder.QK_NORMS),
    mlp=(
      *experts.dense(decoder.MLP),
      *experts.rows('mlp', ('gate_proj', 'up_proj', 'down_proj')),
    ),
  ),
  other_rows=decoder.rows(
    attention=(*decoder.ATTENTION, *decoder.QK_NORMS),
    mlp=(*experts.dense(decoder.MLP), *experts.FUSED),
  ),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf=Gguf(
    arch='qwen3moe',
    fixed=(('hidden_act', 'silu'), ('attention_bias', False), ('use_sliding_window', False)),
    read=_read_gguf,
    write=gguf.write_experts,
    normalizes=True,
  ),
  span_prefix='transformer.',
)
