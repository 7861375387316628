"""Qwen2 and Qwen2.5: Llama's decoder with biases on queries, keys and values."""

from typing import Any

from ftjax.families import llama
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.families.hf_config import HfConfig
from ftjax.models.architecture import Architecture


def _read(c: HfConfig, family: str) -> Architecture:
  # Keys that its class does not have: it always adds biases to q, k and v, and no others.
  llama.check_flag(c, 'attention_bias', True, of_class=False)
  llama.check_flag(c, 'mlp_bias', False, of_class=False)
  if c.get('sliding_window') is not None:
    c.count('sliding_window')  # its class reads it only with use_sliding_window
  return llama.read_sizes(c, family, qkv_bias=True)


def _write(arch: Architecture) -> dict[str, Any]:
  more = {'use_sliding_window': False}
  return llama.write_sizes(arch, 'Qwen2', 'qwen2') | more | llama.write_rope(arch)


QWEN2 = Family(
  model_types=('qwen2',),
  hf_class='Qwen2',
  keys=llama.KEYS,
  read=_read,
  write=_write,
  rows=llama.ROWS,
  unused=llama.UNUSED,
  tied=llama.TIED,
  gguf=Gguf(arch='qwen2', fixed=(('hidden_act', 'silu'),), normalizes=True),
)
