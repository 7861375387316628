"""Llama 2, 3, 3.1 and later, SmolLM2, TinyLlama."""

import dataclasses
from typing import Any

from ftjax.families import decoder, gguf, gguf_rope, hf_rope, layer_types
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.families.hf_config import HfConfig
from ftjax.models.architecture import Architecture, BlockSpec
from ftjax.models.rope_spec import Rope

KEYS = decoder.KEYS | {
  'attention_bias', 'mlp_bias', 'use_sliding_window', 'sliding_window', 'layer_types',
}  # fmt: skip
# The defaults of LlamaConfig in transformers, for a config.json that is made without it.
DEFAULTS = {
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000.0,
  'max_position_embeddings': 2048,
  'tie_word_embeddings': False,
  'attention_bias': False,
  'mlp_bias': False,
}


def _types(c: HfConfig) -> tuple[str, ...]:
  """Returns the type of each layer. transformers' class knows no window; a file that has one means
  it, unless it says use_sliding_window=false.
  """
  given = c.get('sliding_window') is not None and c.flag('use_sliding_window', True)
  longest = c.count('max_position_embeddings', of_class=True)
  windowed = given and c.count('sliding_window') < longest
  kind = layer_types.SLIDING if windowed else layer_types.FULL
  return layer_types.read(c, [kind] * c.size('num_hidden_layers'))


def read_block(c: HfConfig, rope: Rope | None) -> BlockSpec:
  """Returns the block of a config.json with its biases; rope: of the layer."""
  block = decoder.with_bias(c, decoder.read_block(c, rope))
  mlp = dataclasses.replace(block.mlp, bias=c.flag('mlp_bias', of_class=True))
  return dataclasses.replace(block, mlp=mlp)


def write_biases(arch: Architecture) -> dict[str, bool]:
  """Returns the keys of the biases of a decoder."""
  block = arch.layers()[0]
  return {'attention_bias': block.mixer.out_bias, 'mlp_bias': block.mlp.bias}


def _read(c: HfConfig, family: str) -> Architecture:
  block = read_block(c, hf_rope.read(c))
  return decoder.read_model(c, family, decoder.with_windows(c, block, _types(c)))


def write_windows(arch: Architecture) -> dict[str, Any]:
  """Returns the keys of the windows of a decoder; {} where it has none."""
  window = layer_types.window(arch)
  return {} if window is None else {'sliding_window': window, 'layer_types': layer_types.of(arch)}


def _write(arch: Architecture) -> dict[str, Any]:
  written = decoder.write_model(arch, 'Llama', 'llama') | write_biases(arch)
  return written | decoder.write_rope(arch) | write_windows(arch)


LLAMA = Family(
  model_types=('llama',),
  hf_class='Llama',
  keys=KEYS,
  read=_read,
  write=_write,
  rows=decoder.rows(),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf=Gguf(
    arch='llama',
    fixed=(('hidden_act', 'silu'),),
    read=gguf.read_biased,
    interleaved=gguf.INTERLEAVED,
    rope_tensors=(gguf_rope.FREQS,),
  ),
  span_prefix='transformer.',
)
