"""Mistral with its window, Ministral, whose layers may differ, and Ministral 3, which multiplies
queries by a factor of their position.
"""

from typing import Any

from ftjax.families import decoder, gguf, hf_rope, layer_types, llama
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.families.gguf_file import GgufFile
from ftjax.families.gguf_rope import read_rope
from ftjax.families.hf_config import HfConfig, class_defaults
from ftjax.families.layer_types import FULL, SLIDING
from ftjax.families.rope_rule import Reading
from ftjax.models.architecture import Architecture, BlockSpec

WINDOW = 'sliding_window'
KEYS = decoder.KEYS | {WINDOW, 'layer_types'}
# Its class writes max_position_embeddings into the rule, where nothing reads it.
_MINISTRAL3 = Reading(scaled_queries=True, ignored=('max_position_embeddings',))


def _layers(c: HfConfig, block: BlockSpec) -> list[BlockSpec]:
  """Returns the layers: all have the window, unless layer_types says which. A null window is none,
  and an absent one that of transformers' class.
  """
  absent = WINDOW not in c.content
  window = class_defaults(str(c.model_type)).get(WINDOW) if absent else c.get(WINDOW)
  kind = FULL if window is None else SLIDING
  types = layer_types.read(c, [kind] * c.size('num_hidden_layers'))
  return decoder.with_windows(c, block, types)


def _read(c: HfConfig, family: str) -> Architecture:
  block = decoder.read_block(c, hf_rope.read(c))
  return decoder.read_model(c, family, _layers(c, block))


def _read_ministral3(c: HfConfig, family: str) -> Architecture:
  block = decoder.read_block(c, hf_rope.read(c, _MINISTRAL3), free_head=True)
  return decoder.read_model(c, family, _layers(c, block))


def _write_windows(arch: Architecture) -> dict[str, Any]:
  """Returns the keys of the windows. Where layers differ, layer_types makes transformers take
  'mistral' as 'ministral'.
  """
  types = layer_types.of(arch)
  kinds = {'layer_types': types} if len(set(types)) > 1 else {}
  return {WINDOW: layer_types.window(arch)} | kinds


def _write(arch: Architecture) -> dict[str, Any]:
  different = len(set(layer_types.of(arch))) > 1
  names = ('Ministral', 'ministral') if different else ('Mistral', 'mistral')
  written = decoder.write_model(arch, *names) | decoder.write_rope(arch)
  return written | _write_windows(arch)


def _write_ministral3(arch: Architecture) -> dict[str, Any]:
  written = decoder.write_model(arch, 'Ministral3', 'ministral3') | decoder.write_rope(arch)
  return written | _write_windows(arch)


# llama.cpp has Mistral's models under Llama's name, and computes no window.


def _read_gguf3(file: GgufFile) -> dict[str, Any]:
  rope = read_rope(file, scaled_queries=True)
  sizes = gguf.read_sizes(file) | {WINDOW: None}
  return sizes | hf_rope.write(rope, file.count('context_length'))


def _write_gguf3(arch: Architecture) -> dict[str, Any]:
  return gguf.write_decoder(arch, scaled_queries=True)


MISTRAL = Family(
  model_types=('mistral', 'ministral'),
  hf_class='Mistral',
  keys=KEYS,
  read=_read,
  write=_write,
  rows=decoder.rows(),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf=llama.LLAMA.gguf,
  tasks=('sequence', 'token'),
)
MINISTRAL3 = Family(
  model_types=('ministral3',),
  hf_class='Ministral3',
  keys=decoder.KEYS | {WINDOW},  # its class has no layer_types
  read=_read_ministral3,
  write=_write_ministral3,
  rows=decoder.rows(),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf=Gguf(
    arch='mistral3',
    fixed=(('hidden_act', 'silu'),),
    read=_read_gguf3,
    write=_write_gguf3,
    interleaved=gguf.INTERLEAVED,
  ),
)
