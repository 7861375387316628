"""What Llama-like decoders share: their keys of config.json in and out, and their tensor map.

A family reads Llama's block with `read_block`, changes the fields in which it differs, and gives
the layers to `read_model`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.families import hf_rope, layer_types
from ftjax.families.hf_config import HfConfig, class_defaults
from ftjax.families.label_head import is_task, linear
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import Architecture, AttentionSpec, BlockSpec, GatedMlpSpec, Norm
from ftjax.models.rope_spec import Rope
from ftjax.runtime.errors import DataError

KEYS = hf_rope.KEYS | {
  'vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads',
  'head_dim', 'intermediate_size', 'rms_norm_eps', 'tie_word_embeddings', 'max_position_embeddings',
  'hidden_act',
}  # fmt: skip
# Names of transformers, and the activation in mlp.ACTIVATIONS.
ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'relu': 'relu',
}
# For classes whose default is an id beyond a small vocabulary, which transformers refuses.
NO_TOKENS = {'pad_token_id': None, 'bos_token_id': None, 'eos_token_id': None}
# {norm of a block: (name of the HF module, name in GGUF files)}.
NORMS = {
  'attn_norm': ('input_layernorm', 'attn_norm'),
  'mlp_norm': ('post_attention_layernorm', 'ffn_norm'),
}


def untied(arch: Architecture, spec: BlockSpec | None) -> bool:
  """Whether a language model has a head of its own."""
  del spec
  return not (arch.tied or arch.num_labels)


def _qkv_bias(arch: Architecture, spec: BlockSpec | None) -> bool:
  del arch
  return spec is not None and spec.mixer.qkv_bias


def _out_bias(arch: Architecture, spec: BlockSpec | None) -> bool:
  del arch
  return spec is not None and spec.mixer.out_bias


def _mlp_bias(arch: Architecture, spec: BlockSpec | None) -> bool:
  del arch
  return spec is not None and isinstance(spec.mlp, GatedMlpSpec) and spec.mlp.bias


def _qk_norm(arch: Architecture, spec: BlockSpec | None) -> bool:
  del arch
  return spec is not None and spec.mixer.qk_norm is not None


_ATTENTION, _MLP = 'model.layers.{l}.self_attn.', 'model.layers.{l}.mlp.'
EMBEDDING = Row('model.embed_tokens.weight', 'V D', 'embed/w', 'VD', gguf='token_embd.weight')
ATTENTION = (
  Row(f'{_ATTENTION}q_proj.weight', 'NH D', 'attn/q/w', 'DNH', gguf='blk.{l}.attn_q.weight'),
  Row(f'{_ATTENTION}k_proj.weight', 'KH D', 'attn/k/w', 'DKH', gguf='blk.{l}.attn_k.weight'),
  Row(f'{_ATTENTION}v_proj.weight', 'KH D', 'attn/v/w', 'DKH', gguf='blk.{l}.attn_v.weight'),
  Row(f'{_ATTENTION}q_proj.bias', 'NH', 'attn/q/b', 'NH', _qkv_bias, gguf='blk.{l}.attn_q.bias'),
  Row(f'{_ATTENTION}k_proj.bias', 'KH', 'attn/k/b', 'KH', _qkv_bias, gguf='blk.{l}.attn_k.bias'),
  Row(f'{_ATTENTION}v_proj.bias', 'KH', 'attn/v/b', 'KH', _qkv_bias, gguf='blk.{l}.attn_v.bias'),
  Row(f'{_ATTENTION}o_proj.weight', 'D NH', 'attn/o/w', 'NHD', gguf='blk.{l}.attn_output.weight'),
  Row(f'{_ATTENTION}o_proj.bias', 'D', 'attn/o/b', 'D', _out_bias, gguf='blk.{l}.attn_output.bias'),
)
# Norms of each head; a family that normalizes all heads together has rows of its own.
QK_NORMS = (
  Row(
    *(f'{_ATTENTION}q_norm.weight', 'H', 'attn/q_norm/scale', 'H', _qk_norm),
    gguf='blk.{l}.attn_q_norm.weight',
  ),
  Row(
    *(f'{_ATTENTION}k_norm.weight', 'H', 'attn/k_norm/scale', 'H', _qk_norm),
    gguf='blk.{l}.attn_k_norm.weight',
  ),
)
MLP = (
  Row(f'{_MLP}gate_proj.weight', 'F D', 'mlp/gate/w', 'DF', gguf='blk.{l}.ffn_gate.weight'),
  Row(f'{_MLP}up_proj.weight', 'F D', 'mlp/up/w', 'DF', gguf='blk.{l}.ffn_up.weight'),
  Row(f'{_MLP}down_proj.weight', 'D F', 'mlp/down/w', 'FD', gguf='blk.{l}.ffn_down.weight'),
  Row(f'{_MLP}gate_proj.bias', 'F', 'mlp/gate/b', 'F', _mlp_bias, gguf='blk.{l}.ffn_gate.bias'),
  Row(f'{_MLP}up_proj.bias', 'F', 'mlp/up/b', 'F', _mlp_bias, gguf='blk.{l}.ffn_up.bias'),
  Row(f'{_MLP}down_proj.bias', 'D', 'mlp/down/b', 'D', _mlp_bias, gguf='blk.{l}.ffn_down.bias'),
)
HEAD = (
  Row('model.norm.weight', 'D', 'final_norm/scale', 'D', gguf='output_norm.weight'),
  Row('lm_head.weight', 'V D', 'head/w', 'VD', untied, gguf='output.weight'),
  Row('score.weight', 'R D', 'score/w', 'RD', is_task('sequence', 'token')),
  Row('score.bias', 'R', 'score/b', 'R', is_task('token')),
  *linear('qa_outputs', 'score', 'RD', is_task('span')),
)


def rows(
  attention: Sequence[Row] = ATTENTION,
  mlp: Sequence[Row] = MLP,
  norms: Mapping[str, tuple[str, str]] = NORMS,
) -> tuple[Row, ...]:
  """Returns the tensor map of a Llama-like decoder with these parts; norms: see NORMS."""
  scales = {
    leaf: Row(
      *(f'model.layers.{{l}}.{hf}.weight', 'D', f'{leaf}/scale', 'D'),
      gguf=f'blk.{{l}}.{gguf}.weight',
    )
    for leaf, (hf, gguf) in norms.items()
  }
  first = [row for leaf, row in scales.items() if leaf.startswith('attn')]
  second = [row for leaf, row in scales.items() if leaf.startswith('mlp')]
  return (EMBEDDING, *first, *attention, *second, *mlp, *HEAD)


# Rotary frequencies, which older exports hold; they follow from config.json.
UNUSED = re.compile(r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')
TIED = ('model.embed_tokens.weight', 'lm_head.weight')


def read_activation(c: HfConfig, key: str = 'hidden_act') -> str:
  """Returns the name in mlp.ACTIVATIONS of an activation.

  Raises:
    DataError: one that is not computed here.
  """
  act = c.text(key, of_class=True)
  if not isinstance(act, str) or act not in ACTIVATIONS:
    raise DataError(
      f'config.json: {key}={act!r} is not supported; supported: {", ".join(ACTIVATIONS)}'
    )
  return ACTIVATIONS[act]


def activation_name(ours: str, preferred: str = '') -> str:
  """Returns the name in transformers of an activation, the preferred one of several."""
  names = [theirs for theirs, mine in ACTIVATIONS.items() if mine == ours]
  return preferred if preferred in names else names[0]


def read_block(
  c: HfConfig, rope: Rope | None, *, activation: str = 'hidden_act', free_head: bool = False
) -> BlockSpec:
  """Returns Llama's block with the sizes of a config.json.

  Args:
    c: the config.json.
    rope: of the layer, from hf_rope.
    activation: the key of the activation.
    free_head: a missing head_dim is the number of transformers' class; else it is hidden_size /
      num_attention_heads.

  Raises:
    DataError: a value of another type, or a setting that is not computed here.
  """
  heads = c.size('num_attention_heads')
  head_dim = c.size('head_dim') if free_head else _derived_head_dim(c, heads)
  if head_dim % 2:
    raise DataError(f'config.json: head_dim={head_dim} must be even')
  mixer = AttentionSpec(
    num_heads=heads, num_kv_heads=_kv_heads(c, heads), head_dim=head_dim, rope=rope
  )
  mlp = GatedMlpSpec(c.size('intermediate_size'), read_activation(c, activation))
  return BlockSpec(mixer, mlp, Norm(c.number('rms_norm_eps', of_class=True)))


def _derived_head_dim(c: HfConfig, heads: int) -> int:
  dim = c.size('hidden_size')
  if c.get('head_dim') is None and dim % heads:
    raise DataError(
      f'config.json: hidden_size={dim} is no multiple of num_attention_heads={heads}, and head_dim '
      'is not given'
    )
  return c.count('head_dim', dim // heads)


def with_mixer(block: BlockSpec, **changes: Any) -> BlockSpec:
  """Returns a block with other fields of its mixer."""
  return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, **changes))


def with_bias(c: HfConfig, block: BlockSpec) -> BlockSpec:
  """Returns a block whose four projections of attention add a bias where attention_bias is true."""
  bias = c.flag('attention_bias', of_class=True)
  return with_mixer(block, qkv_bias=bias, out_bias=bias)


def with_windows(c: HfConfig, block: BlockSpec, types: Sequence[str]) -> list[BlockSpec]:
  """Returns a block for each layer, with sliding_window where its type is that."""
  window = layer_types.read_window(c, types)
  windowed = with_mixer(block, window=window)
  return [windowed if kind == layer_types.SLIDING else block for kind in types]


def read_model(c: HfConfig, family: str, layers: Sequence[BlockSpec]) -> Architecture:
  """Returns a decoder of these layers, with the sizes of a config.json around them.

  Raises:
    DataError: a value of another type.
  """
  return Architecture(
    family=family,
    vocab_size=c.size('vocab_size'),
    model_dim=c.size('hidden_size'),
    stacks=layer_types.stacks(layers),
    final_norm=layers[0].norm,
    tied=c.flag('tie_word_embeddings', of_class=True),
    max_len=c.count('max_position_embeddings', of_class=True),
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


def check_flag(c: HfConfig, key: str, expected: bool, *, of_class: bool) -> None:
  """Raises DataError where a flag has another value; `of_class` as in HfConfig, else an absent flag
  is as expected.
  """
  if c.flag(key, expected, of_class=of_class) != expected:
    raise DataError(
      f'config.json: {key}={c.get(key)!r} is not supported for model_type={c.model_type!r}; '
      f'expected {expected!r}'
    )


def write_model(arch: Architecture, hf_class: str, model_type: str) -> dict[str, Any]:
  """Returns the keys of a config.json that Llama-like decoders share, but those of the rope."""
  block = next(b for b in arch.layers() if isinstance(b.mixer, AttentionSpec))
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
    'hidden_act': activation_name(block.mlp.activation),
    'tie_word_embeddings': arch.tied,
    'max_position_embeddings': arch.max_len,
    'initializer_range': 0.02,
  }


def write_rope(arch: Architecture) -> dict[str, Any]:
  """Returns the keys of a config.json with the rotary embedding that all layers share, but for
  those that have none.
  """
  ropes = [b.mixer.rope for b in arch.layers() if b.mixer.rope is not None]
  return hf_rope.write(ropes[0], arch.max_len) if ropes else {}
