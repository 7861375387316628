"""Llama 2, 3, 3.1 and later, SmolLM2, TinyLlama: config.json in and out, and the tensor map.

Also what every Llama-like decoder shares: `read_sizes`, `write_sizes` and `ROWS`.
"""

import re
from typing import Any

from ftjax.families import hf_rope
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.families.hf_config import HfConfig, class_defaults
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import (
  Architecture,
  AttentionSpec,
  BlockSpec,
  GatedMlpSpec,
  Norm,
)
from ftjax.runtime.errors import DataError

KEYS = hf_rope.KEYS | {
  'vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads',
  'head_dim', 'intermediate_size', 'rms_norm_eps', 'tie_word_embeddings', 'max_position_embeddings',
  'hidden_act', 'attention_bias', 'mlp_bias', 'use_sliding_window', 'sliding_window', 'layer_types',
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


def _untied(arch: Architecture, spec: BlockSpec | None) -> bool:
  del spec
  return not (arch.tied or arch.num_labels)


def _scores(arch: Architecture, spec: BlockSpec | None) -> bool:
  del spec
  return bool(arch.num_labels)


def _biased(arch: Architecture, spec: BlockSpec | None) -> bool:
  del arch
  return spec is not None and spec.mixer.qkv_bias


_ATTENTION, _MLP = 'model.layers.{l}.self_attn.', 'model.layers.{l}.mlp.'
ROWS = (
  Row('model.embed_tokens.weight', 'V D', 'embed/w', 'VD', gguf='token_embd.weight'),
  Row(
    *('model.layers.{l}.input_layernorm.weight', 'D', 'attn_norm/scale', 'D'),
    gguf='blk.{l}.attn_norm.weight',
  ),
  Row(f'{_ATTENTION}q_proj.weight', 'NH D', 'attn/q/w', 'DNH', gguf='blk.{l}.attn_q.weight'),
  Row(f'{_ATTENTION}k_proj.weight', 'KH D', 'attn/k/w', 'DKH', gguf='blk.{l}.attn_k.weight'),
  Row(f'{_ATTENTION}v_proj.weight', 'KH D', 'attn/v/w', 'DKH', gguf='blk.{l}.attn_v.weight'),
  Row(
    *(f'{_ATTENTION}q_proj.bias', 'NH', 'attn/q/b', 'NH', _biased),
    gguf='blk.{l}.attn_q.bias',
  ),
  Row(
    *(f'{_ATTENTION}k_proj.bias', 'KH', 'attn/k/b', 'KH', _biased),
    gguf='blk.{l}.attn_k.bias',
  ),
  Row(
    *(f'{_ATTENTION}v_proj.bias', 'KH', 'attn/v/b', 'KH', _biased),
    gguf='blk.{l}.attn_v.bias',
  ),
  Row(f'{_ATTENTION}o_proj.weight', 'D NH', 'attn/o/w', 'NHD', gguf='blk.{l}.attn_output.weight'),
  Row(
    *('model.layers.{l}.post_attention_layernorm.weight', 'D', 'mlp_norm/scale', 'D'),
    gguf='blk.{l}.ffn_norm.weight',
  ),
  Row(f'{_MLP}gate_proj.weight', 'F D', 'mlp/gate/w', 'DF', gguf='blk.{l}.ffn_gate.weight'),
  Row(f'{_MLP}up_proj.weight', 'F D', 'mlp/up/w', 'DF', gguf='blk.{l}.ffn_up.weight'),
  Row(f'{_MLP}down_proj.weight', 'D F', 'mlp/down/w', 'FD', gguf='blk.{l}.ffn_down.weight'),
  Row('model.norm.weight', 'D', 'final_norm/scale', 'D', gguf='output_norm.weight'),
  Row('lm_head.weight', 'V D', 'head/w', 'VD', _untied, gguf='output.weight'),
  Row('score.weight', 'R D', 'score/w', 'RD', _scores),
)

# Rotary frequencies, which older exports hold; they follow from config.json.
UNUSED = re.compile(r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')
TIED = ('model.embed_tokens.weight', 'lm_head.weight')


def read_sizes(c: HfConfig, family: str, *, qkv_bias: bool) -> Architecture:
  """Returns the architecture of a decoder whose layers all are Llama's, after checking what the
  families share: activation, no window, one layer type.

  Raises:
    DataError: a value of another type, or a setting that this decoder does not compute.
  """
  act = c.text('hidden_act', of_class=True)
  if act not in ('silu', 'swish'):  # two names of one function in transformers
    raise DataError(f"config.json: hidden_act={act!r} is not supported; expected 'silu'")
  if c.flag('use_sliding_window', False):
    raise _unsupported(c, 'use_sliding_window', False)
  _check_layer_types(c)
  heads, dim = c.size('num_attention_heads'), c.size('hidden_size')
  if c.get('head_dim') is None and dim % heads:
    raise DataError(
      f'config.json: hidden_size={dim} is no multiple of num_attention_heads={heads}, and head_dim '
      'is not given'
    )
  head_dim = c.count('head_dim', dim // heads)
  if head_dim % 2:
    raise DataError(f'config.json: head_dim={head_dim} must be even')
  norm = Norm(c.number('rms_norm_eps', of_class=True))
  mixer = AttentionSpec(
    num_heads=heads,
    num_kv_heads=_kv_heads(c, heads),
    head_dim=head_dim,
    rope=hf_rope.read(c),
    qkv_bias=qkv_bias,
  )
  block = BlockSpec(mixer, GatedMlpSpec(c.size('intermediate_size')), norm)
  return Architecture(
    family=family,
    vocab_size=c.size('vocab_size'),
    model_dim=dim,
    stacks=(((block,), c.size('num_hidden_layers')),),
    final_norm=norm,
    tied=c.flag('tie_word_embeddings', of_class=True),
    max_len=c.count('max_position_embeddings', of_class=True),
    num_labels=c.num_labels(),
  )


def _kv_heads(c: HfConfig, heads: int) -> int:
  """Returns num_key_value_heads; null means as many as heads, and an absent key what
  transformers' class makes of it.
  """
  key = 'num_key_value_heads'
  if key in c.content:
    return c.count(key, heads)
  # The class checks that the heads divide hidden_size, whatever head_dim is.
  sizes = {'hidden_size': 64 * heads, 'num_attention_heads': heads}
  return class_defaults(str(c.model_type), **sizes).get(key, heads)


def _unsupported(c: HfConfig, key: str, expected: bool) -> DataError:
  return DataError(
    f'config.json: {key}={c.get(key)!r} is not supported for model_type={c.model_type!r}; expected '
    f'{expected!r}'
  )


def _check_layer_types(c: HfConfig) -> None:
  types = c.get('layer_types')
  if types is None:
    return
  if not isinstance(types, list):
    raise DataError(f"config.json: layer_types={types!r}; expected a list of 'full_attention'")
  for kind in types:
    if kind != 'full_attention':
      raise DataError(
        f'config.json: layer_types has {kind!r}, which is not supported here; expected '
        "'full_attention' in every layer"
      )
  layers = c.size('num_hidden_layers')
  if len(types) != layers:
    raise DataError(
      f'config.json: layer_types has {len(types)} entries and num_hidden_layers={layers}'
    )


def check_flag(c: HfConfig, key: str, expected: bool, *, of_class: bool) -> None:
  """Raises DataError where a flag has another value; `of_class` as in HfConfig, else an absent flag
  is as expected.
  """
  if c.flag(key, expected, of_class=of_class) != expected:
    raise _unsupported(c, key, expected)


def write_sizes(arch: Architecture, hf_class: str, model_type: str) -> dict[str, Any]:
  """Returns the keys of a config.json that Llama-like decoders share, but those of the rope."""
  block = arch.layers()[0]
  return {
    'architectures': [f'{hf_class}ForCausalLM'],
    'model_type': model_type,
    'vocab_size': arch.vocab_size,
    'hidden_size': arch.model_dim,
    'num_hidden_layers': arch.num_layers,
    'num_attention_heads': block.mixer.num_heads,
    'num_key_value_heads': block.mixer.num_kv_heads,
    'head_dim': block.mixer.head_dim,
    'intermediate_size': block.mlp.ffn_dim,
    'rms_norm_eps': block.norm.eps,
    'hidden_act': 'silu',
    'tie_word_embeddings': arch.tied,
    'max_position_embeddings': arch.max_len,
    'initializer_range': 0.02,
  }


def write_rope(arch: Architecture) -> dict[str, Any]:
  """Returns the keys of a config.json with the rotary embedding that all layers share."""
  return hf_rope.write(arch.layers()[0].mixer.rope, arch.max_len)


def _read(c: HfConfig, family: str) -> Architecture:
  # attention_bias puts a bias on the output projection too.
  check_flag(c, 'attention_bias', False, of_class=True)
  check_flag(c, 'mlp_bias', False, of_class=True)
  if c.get('sliding_window') is not None:
    window = c.count('sliding_window')
    longest = c.count('max_position_embeddings', of_class=True)
    # The class has no such key: whoever put it there may mean a window.
    if 'use_sliding_window' not in c.content and window < longest:
      raise DataError(
        f'config.json: sliding_window={window} is not supported for model_type={c.model_type!r}: '
        'every layer attends to all positions. If the model was trained so, delete the key'
      )
  return read_sizes(c, family, qkv_bias=False)


def _write(arch: Architecture) -> dict[str, Any]:
  flags = {'attention_bias': False, 'mlp_bias': False}
  return write_sizes(arch, 'Llama', 'llama') | flags | write_rope(arch)


LLAMA = Family(
  model_types=('llama',),
  hf_class='Llama',
  keys=KEYS,
  read=_read,
  write=_write,
  rows=ROWS,
  unused=UNUSED,
  tied=TIED,
  gguf=Gguf(
    arch='llama',
    fixed=(('hidden_act', 'silu'), ('attention_bias', False), ('mlp_bias', False)),
    interleaved=('.q_proj.weight', '.k_proj.weight'),
    scales_rope=True,
  ),
)
