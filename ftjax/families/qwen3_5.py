"""Qwen3.5, Qwen3.6 and Qwen3.8, the dense models: three gated delta nets to one full attention.

Of multimodal folders the text model is read (multimodal.py). The head that predicts further tokens
(`mtp`) is left out.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from ftjax.families import decoder, gguf, hf_rope, layer_types, tensor_map
from ftjax.families.family import Family
from ftjax.families.gguf import Form, Gguf
from ftjax.families.gguf_file import GgufFile
from ftjax.families.gguf_rope import read_rope
from ftjax.families.hf_config import HfConfig
from ftjax.families.rope_rule import PARTIAL, Reading
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import (
  Architecture,
  AttentionSpec,
  BlockSpec,
  DeltaNetSpec,
)
from ftjax.runtime.errors import DataError

LINEAR = 'linear_attention'
_SIZE_KEYS = {
  'num_key_heads': 'linear_num_key_heads',
  'key_dim': 'linear_key_head_dim',
  'num_value_heads': 'linear_num_value_heads',
  'value_dim': 'linear_value_head_dim',
  'conv_width': 'linear_conv_kernel_dim',
}
KEYS = decoder.KEYS | {*_SIZE_KEYS.values()} | {
  'attention_bias', 'layer_types', 'full_attention_interval', 'attn_output_gate',
  'mamba_ssm_dtype', 'mtp_num_hidden_layers', 'mtp_use_dedicated_embeddings',
}  # fmt: skip
# Positions of images, which text does not have: its three positions are equal.
ROPE = Reading(partial=True, ignored=('mrope_section', 'mrope_interleaved'))
UNUSED = re.compile(rf'{decoder.UNUSED.pattern}|mtp\..*')


def _types(c: HfConfig) -> tuple[str, ...]:
  """Returns the type of each layer: every full_attention_interval-th is full attention."""
  interval = c.count('full_attention_interval', 4)
  layers = range(1, c.size('num_hidden_layers') + 1)
  derived = [LINEAR if i % interval else layer_types.FULL for i in layers]
  return layer_types.read(c, derived, (LINEAR, layer_types.FULL))


def _read(c: HfConfig, family: str) -> Architecture:
  decoder.check_flag(c, 'attention_bias', False, of_class=True)
  decoder.check_flag(c, 'attn_output_gate', True, of_class=False)
  for key, expected in (('hidden_act', 'silu'), ('mamba_ssm_dtype', 'float32')):
    if c.text(key, expected) != expected:
      raise DataError(f'config.json: {key}={c.get(key)!r} is not supported; expected {expected!r}')
  full = decoder.read_block(c, hf_rope.read(c, ROPE), free_head=True)
  norm = dataclasses.replace(full.norm, offset=1.0)
  full = dataclasses.replace(decoder.with_mixer(full, gate=True, qk_norm=norm), norm=norm)
  net = DeltaNetSpec(**{field: c.size(key) for field, key in _SIZE_KEYS.items()}, eps=norm.eps)
  types = _types(c)
  if layer_types.FULL not in types:
    raise DataError(f'config.json: layer_types has no {layer_types.FULL!r} layer; expected one')
  of_type = {layer_types.FULL: full, LINEAR: dataclasses.replace(full, mixer=net)}
  return decoder.read_model(c, family, [of_type[kind] for kind in types])


def _write(arch: Architecture) -> dict[str, Any]:
  mixers = [block.mixer for block in arch.layers()]
  full = next(m for m in mixers if isinstance(m, AttentionSpec))
  nets = [m for m in mixers if isinstance(m, DeltaNetSpec)]
  own = dataclasses.asdict(nets[0]) if nets else {}
  return {
    **decoder.write_model(arch, 'Qwen3_5', 'qwen3_5_text'),
    **hf_rope.write(full.rope, arch.max_len),
    PARTIAL: full.rope.fraction,
    **{key: own[field] for field, key in _SIZE_KEYS.items() if own},
    'layer_types': [LINEAR if m in nets else layer_types.FULL for m in mixers],
    'attention_bias': False,
  }


def _only(kind: type, row: Row) -> Row:
  """Returns a row of layers with this kind of mixer."""

  def needs(arch: Architecture, spec: BlockSpec | None) -> bool:
    return spec is not None and isinstance(spec.mixer, kind) and row.needs(arch, spec)

  return dataclasses.replace(row, needs=needs)


@functools.cache
def _order(spec: BlockSpec) -> tuple[int, ...]:
  """Returns the rows of HF's joint projection, all queries before all keys before all values, in
  our order: those of a key head together.
  """
  net = spec.mixer
  keys, width = net.num_key_heads, net.num_value_heads // net.num_key_heads * net.value_dim
  starts = (0, keys * net.key_dim, 2 * keys * net.key_dim)
  out: list[int] = []
  for head in range(keys):
    for start, size in zip(starts, (net.key_dim, net.key_dim, width), strict=True):
      out += range(start + head * size, start + (head + 1) * size)
  return tuple(out)


def _sizes(arch: Architecture, spec: BlockSpec | None) -> Mapping[str, int]:
  """Returns the sizes of tensor_map.decoder_sizes; of a delta net N value heads of H, K key heads
  with C channels each, and W taps.
  """
  if spec is None or isinstance(spec.mixer, AttentionSpec):
    return tensor_map.decoder_sizes(arch, spec)
  net, outer = spec.mixer, tensor_map.decoder_sizes(arch, None)
  return {
    **outer,
    **{'N': net.num_value_heads, 'H': net.value_dim, 'K': net.num_key_heads, 'C': net.channels},
    **{'W': net.conv_width, 'F': spec.mlp.ffn_dim},
  }


_FULL, _NET = 'model.layers.{l}.self_attn.', 'model.layers.{l}.linear_attn.'
_BLOCK = 'blk.{l}.'  # of GGUF files
_GATED = (
  Row(f'{_FULL}q_proj.weight', 'N[H] D', 'attn/q/w', 'DNH', gguf=f'{_BLOCK}attn_q.weight'),
  Row(f'{_FULL}q_proj.weight', 'N[H] D', 'attn/gate/w', 'DNH', gguf=f'{_BLOCK}attn_q.weight'),
)
_REST = tuple(
  row for row in (*decoder.ATTENTION, *decoder.QK_NORMS) if row.hf != f'{_FULL}q_proj.weight'
)
_LINEAR = (
  Row(
    f'{_NET}in_proj_qkv.weight',
    'KC D',
    'attn/qkv/w',
    'DKC',
    order=_order,
    gguf=f'{_BLOCK}attn_qkv.weight',
  ),
  Row(f'{_NET}in_proj_z.weight', 'NH D', 'attn/z/w', 'DNH', gguf=f'{_BLOCK}attn_gate.weight'),
  Row(f'{_NET}in_proj_b.weight', 'N D', 'attn/b/w', 'DN', gguf=f'{_BLOCK}ssm_beta.weight'),
  Row(f'{_NET}in_proj_a.weight', 'N D', 'attn/a/w', 'DN', gguf=f'{_BLOCK}ssm_alpha.weight'),
  Row(
    f'{_NET}conv1d.weight',
    'KC 1 W',
    'attn/conv',
    'WKC',
    order=_order,
    gguf=f'{_BLOCK}ssm_conv1d.weight',
  ),
  Row(f'{_NET}A_log', 'N', 'attn/a_log', 'N', gguf=f'{_BLOCK}ssm_a'),
  Row(f'{_NET}dt_bias', 'N', 'attn/dt_bias', 'N', gguf=f'{_BLOCK}ssm_dt.bias'),
  Row(f'{_NET}norm.weight', 'H', 'attn/norm', 'H', gguf=f'{_BLOCK}ssm_norm.weight'),
  Row(f'{_NET}out_proj.weight', 'D NH', 'attn/out/w', 'NHD', gguf=f'{_BLOCK}ssm_out.weight'),
)
_MIXERS = (
  *(_only(AttentionSpec, row) for row in (*_GATED, *_REST)),
  *(_only(DeltaNetSpec, row) for row in _LINEAR),
)


def _read_gguf(file: GgufFile) -> dict[str, Any]:
  size, heads = file.count('ssm.state_size'), file.count('ssm.time_step_rank')
  if file.count('ssm.inner_size') != size * heads:
    raise DataError(
      f'{file.place}: {file.key("ssm.inner_size")}={file.count("ssm.inner_size")}; llama.cpp '
      f'requires that values are as wide as keys: {heads} value heads of {size}'
    )
  sizes = gguf.read_sizes(file)
  # Blocks at the end that predict further tokens.
  layers = sizes['num_hidden_layers'] - len(gguf.surplus(file, _GGUF))
  rope = read_rope(file, partial=True)
  return (
    sizes
    | hf_rope.write(rope, sizes['max_position_embeddings'])
    | {
      PARTIAL: rope.fraction,
      'num_hidden_layers': layers,
      'layer_types': _file_types(file, layers),
      'linear_num_key_heads': file.count('ssm.group_count'),
      'linear_key_head_dim': size,
      'linear_num_value_heads': heads,
      'linear_value_head_dim': size,
      'linear_conv_kernel_dim': file.count('ssm.conv_kernel'),
    }
  )


def _file_types(file: GgufFile, layers: int) -> list[str]:
  """Returns the type of each layer."""
  stated = file.get('attention.recurrent_layers')
  if stated is None:
    interval = file.count('full_attention_interval', 4)
    stated = [(i + 1) % interval != 0 for i in range(layers)]
  elif not isinstance(stated, list) or len(stated) < layers:
    raise DataError(
      f'{file.place}: {file.key("attention.recurrent_layers")} is {stated!r}; expected a list of '
      f'{layers} flags'
    )
  return [LINEAR if is_linear else layer_types.FULL for is_linear in stated[:layers]]


def _net(arch: Architecture) -> DeltaNetSpec | None:
  """Returns the delta nets' spec, which is one; None without any."""
  return next((b.mixer for b in arch.layers() if isinstance(b.mixer, DeltaNetSpec)), None)


def _write_gguf(arch: Architecture) -> dict[str, Any]:
  mixers = [block.mixer for block in arch.layers()]
  linear = [isinstance(m, DeltaNetSpec) for m in mixers]
  net = _net(arch)
  if net is None:
    raise DataError('a Qwen3.5 without a delta net has no form in GGUF files')
  out = gguf.write_decoder(arch)
  # Which of three equal positions a pair of coordinates takes; llama.cpp requires the numbers.
  pairs = out['rope.dimension_count'] // 2
  out |= {
    'rope.dimension_sections': [-(-(pairs - i) // 3) for i in range(3)] + [0],
    'ssm.conv_kernel': net.conv_width,
    'ssm.state_size': net.key_dim,
    'ssm.group_count': net.num_key_heads,
    'ssm.time_step_rank': net.num_value_heads,
    'ssm.inner_size': net.num_value_heads * net.value_dim,
  }
  first = linear.index(False) + 1
  if linear == [(i + 1) % first != 0 for i in range(len(linear))]:
    return out | {'full_attention_interval': first}
  return out | {'attention.recurrent_layers': linear}


def _forms(arch: Architecture) -> Mapping[str, Form]:
  """Returns how the tensors of delta nets are stored: the value heads that key heads serve not by
  key head, but the first of each, then the second of each.
  """
  net = _net(arch)
  if net is None:
    return {}
  each = net.num_value_heads // net.num_key_heads
  heads = [(i % each) * net.num_key_heads + i // each for i in range(net.num_value_heads)]
  values = [h * net.value_dim + i for h in heads for i in range(net.value_dim)]
  keys = 2 * net.num_key_heads * net.key_dim
  joint = (*range(keys), *(keys + i for i in values))
  place = '.linear_attn.'
  return {
    f'{place}in_proj_qkv.weight': Form(order=joint),
    f'{place}in_proj_z.weight': Form(order=tuple(values)),
    f'{place}in_proj_b.weight': Form(order=tuple(heads)),
    f'{place}in_proj_a.weight': Form(order=tuple(heads)),
    f'{place}conv1d.weight': Form(order=joint, squeezed=True),
    f'{place}A_log': Form(order=tuple(heads), decay=True),
    f'{place}dt_bias': Form(order=tuple(heads)),
    f'{place}out_proj.weight': Form(axis=1, order=tuple(values)),
  }


_NORMS = {
  'attn_norm': ('input_layernorm', 'attn_norm'),
  'mlp_norm': ('post_attention_layernorm', 'post_attention_norm'),
}
_GGUF = Gguf(
  arch='qwen35',
  fixed=(('hidden_act', 'silu'), ('attention_bias', False)),
  read=_read_gguf,
  write=_write_gguf,
  # That of a delta net's output is stored as it is.
  shifted=('layernorm.weight', 'q_norm.weight', 'k_norm.weight', 'model.norm.weight'),
  forms=_forms,
  surplus='nextn_predict_layers',
  normalizes=True,
)
QWEN3_5 = Family(
  model_types=('qwen3_5_text',),
  hf_class='Qwen3_5',
  keys=KEYS,
  read=_read,
  write=_write,
  rows=decoder.rows(attention=_MIXERS, norms=_NORMS),
  unused=UNUSED,
  tied=decoder.TIED,
  sizes=_sizes,
  gguf=_GGUF,
  tasks=('sequence', 'token'),
)
