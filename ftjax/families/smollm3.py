"""SmolLM3: some layers have no rotary embedding."""

from typing import Any

from ftjax.families import decoder, gguf, hf_rope, layer_types, llama, qwen
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.families.gguf_file import GgufFile
from ftjax.families.hf_config import HfConfig
from ftjax.models.architecture import Architecture
from ftjax.runtime.errors import DataError

KEYS = llama.KEYS | {'no_rope_layers', 'no_rope_layer_interval'}


def _rotated(c: HfConfig) -> list[bool]:
  """Returns for each layer whether it has a rotary embedding: in no_rope_layers 1 says that."""
  layers, given = c.size('num_hidden_layers'), c.get('no_rope_layers')
  if given is None:
    interval = c.count('no_rope_layer_interval', of_class=True)
    return [(i + 1) % interval != 0 for i in range(layers)]
  is_list = isinstance(given, list) and all(type(x) in (int, bool) and x in (0, 1) for x in given)
  if not is_list or len(given) != layers:
    raise DataError(
      f'config.json: no_rope_layers={given!r}; expected a list of num_hidden_layers={layers} '
      'numbers, 1 for a layer with a rotary embedding and 0 for one without'
    )
  return [bool(x) for x in given]


def _types(c: HfConfig, rotated: list[bool]) -> tuple[str, ...]:
  """Returns the type of each layer: with use_sliding_window those without a rotary embedding have a
  window, where there is one.
  """
  windowed = c.flag('use_sliding_window', of_class=True)
  has_window = windowed and c.get('sliding_window') is not None
  derived = [
    layer_types.FULL if is_rotated or not has_window else layer_types.SLIDING
    for is_rotated in rotated
  ]
  found = layer_types.read(c, derived)
  if layer_types.SLIDING in found and not windowed:
    raise DataError(
      f'config.json: layer_types has {layer_types.SLIDING!r} and use_sliding_window=false; set one '
      'of them as the model was trained'
    )
  return found


def _read(c: HfConfig, family: str) -> Architecture:
  rotated = _rotated(c)
  block = llama.read_block(c, hf_rope.read(c))
  blocks = decoder.with_windows(c, block, _types(c, rotated))
  layers = [
    block if is_rotated else decoder.with_mixer(block, rope=None)
    for block, is_rotated in zip(blocks, rotated, strict=True)
  ]
  return decoder.read_model(c, family, layers)


def _write(arch: Architecture) -> dict[str, Any]:
  rotated = {'no_rope_layers': [int(b.mixer.rope is not None) for b in arch.layers()]}
  written = decoder.write_model(arch, 'SmolLM3', 'smollm3') | decoder.write_rope(arch)
  written |= llama.write_biases(arch) | rotated | qwen.write_windows(arch)
  return written | decoder.NO_TOKENS


def _read_gguf(file: GgufFile) -> dict[str, Any]:
  # llama.cpp rotates no queries and keys in each fourth layer, whatever the file says.
  layers = range(file.count('block_count'))
  return gguf.read_decoder(file) | {'no_rope_layers': [int((i + 1) % 4 != 0) for i in layers]}


SMOLLM3 = Family(
  model_types=('smollm3',),
  hf_class='SmolLM3',
  keys=KEYS,
  read=_read,
  write=_write,
  rows=decoder.rows(),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf=Gguf(
    arch='smollm3',
    fixed=(('hidden_act', 'silu'), ('attention_bias', False), ('mlp_bias', False)),
    read=_read_gguf,
    interleaved=gguf.INTERLEAVED,
  ),
  span_prefix='transformer.',
)
