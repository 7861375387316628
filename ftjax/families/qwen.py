"""Qwen2, Qwen2.5 and the dense Qwen3."""

from typing import Any

from ftjax.families import decoder, hf_rope, layer_types, llama
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.families.hf_config import HfConfig
from ftjax.models.architecture import Architecture

KEYS = llama.KEYS | {'max_window_layers'}


def types(c: HfConfig) -> tuple[str, ...]:
  """Returns the type of each layer: with use_sliding_window those from max_window_layers on have a
  window.
  """
  first = layers = c.size('num_hidden_layers')
  if c.flag('use_sliding_window', of_class=True):
    first = c.count('max_window_layers', of_class=True, least=0)
  derived = [layer_types.FULL if i < first else layer_types.SLIDING for i in range(layers)]
  return layer_types.read(c, derived)


def write_windows(arch: Architecture) -> dict[str, Any]:
  """Returns the keys of the windows of a decoder."""
  window = layer_types.window(arch)
  if window is None:
    return {'use_sliding_window': False}
  return {
    'use_sliding_window': True,
    'sliding_window': window,
    'layer_types': layer_types.of(arch),
  }


def _read(c: HfConfig, family: str) -> Architecture:
  # Keys that its class does not have: it always adds biases to q, k and v, and no others.
  decoder.check_flag(c, 'attention_bias', True, of_class=False)
  decoder.check_flag(c, 'mlp_bias', False, of_class=False)
  block = decoder.with_mixer(decoder.read_block(c, hf_rope.read(c)), qkv_bias=True)
  return decoder.read_model(c, family, decoder.with_windows(c, block, types(c)))


def _write(arch: Architecture) -> dict[str, Any]:
  written = decoder.write_model(arch, 'Qwen2', 'qwen2') | decoder.write_rope(arch)
  return written | write_windows(arch)


QWEN2 = Family(
  model_types=('qwen2',),
  hf_class='Qwen2',
  keys=KEYS,
  read=_read,
  write=_write,
  rows=decoder.rows(),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf=Gguf(arch='qwen2', fixed=(('hidden_act', 'silu'),), square=True, normalizes=True),
  span_prefix='transformer.',
)


def _read_qwen3(c: HfConfig, family: str) -> Architecture:
  decoder.check_flag(c, 'mlp_bias', False, of_class=False)
  block = decoder.with_bias(c, decoder.read_block(c, hf_rope.read(c), free_head=True))
  block = decoder.with_mixer(block, qk_norm=block.norm)
  return decoder.read_model(c, family, decoder.with_windows(c, block, types(c)))


def _write_qwen3(arch: Architecture) -> dict[str, Any]:
  bias = {'attention_bias': arch.layers()[0].mixer.out_bias}
  written = decoder.write_model(arch, 'Qwen3', 'qwen3') | bias | decoder.write_rope(arch)
  return written | write_windows(arch)


QWEN3 = Family(
  model_types=('qwen3',),
  hf_class='Qwen3',
  keys=KEYS,
  read=_read_qwen3,
  write=_write_qwen3,
  rows=decoder.rows((*decoder.ATTENTION, *decoder.QK_NORMS)),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf=Gguf(
    arch='qwen3', fixed=(('hidden_act', 'silu'), ('attention_bias', False)), normalizes=True
  ),
  span_prefix='transformer.',
)
