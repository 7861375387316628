"""Mixtral: Mistral's decoder with experts in every layer."""

import dataclasses
from typing import Any

from ftjax.families import decoder, experts, gguf, gguf_rope, hf_rope, layer_types
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.families.gguf_file import GgufFile
from ftjax.families.hf_config import HfConfig
from ftjax.models.architecture import Architecture

KEYS = decoder.KEYS | experts.KEYS | {'sliding_window'}


def _read(c: HfConfig, family: str) -> Architecture:
  block = decoder.read_block(c, hf_rope.read(c))
  mlp = experts.read(c, block.mlp.activation, block.mlp.ffn_dim, renormalize=True)
  kind = layer_types.FULL if c.get('sliding_window') is None else layer_types.SLIDING
  types = [kind] * c.size('num_hidden_layers')
  blocks = decoder.with_windows(c, dataclasses.replace(block, mlp=mlp), types)
  return decoder.read_model(c, family, blocks)


def _write(arch: Architecture) -> dict[str, Any]:
  written = decoder.write_model(arch, 'Mixtral', 'mixtral') | decoder.write_rope(arch)
  return written | experts.write(arch) | {'sliding_window': layer_types.window(arch)}


def _read_gguf(file: GgufFile) -> dict[str, Any]:
  # llama.cpp computes no window under this name.
  return gguf.read_decoder(file) | gguf.read_experts(file) | {'sliding_window': None}


MIXTRAL = Family(
  model_types=('mixtral',),
  hf_class='Mixtral',
  keys=KEYS,
  read=_read,
  write=_write,
  rows=decoder.rows(mlp=experts.rows('block_sparse_moe', ('w1', 'w3', 'w2'))),
  other_rows=decoder.rows(mlp=experts.FUSED),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf=Gguf(
    arch='llama',
    fixed=(('hidden_act', 'silu'),),
    read=_read_gguf,
    write=gguf.write_experts,
    mark='expert_count',
    interleaved=gguf.INTERLEAVED,
    rope_tensors=(gguf_rope.FREQS,),
  ),
)
