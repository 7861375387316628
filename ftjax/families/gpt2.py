"""GPT-2: learned positions, layer norms and linear maps with biases, an MLP without a gate."""

import re
from typing import Any

from ftjax.families import decoder, gguf, layer_types
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.families.gguf_file import GgufFile
from ftjax.families.hf_config import HfConfig
from ftjax.families.label_head import is_task, linear
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import Architecture, AttentionSpec, BlockSpec, MlpSpec, Norm
from ftjax.runtime.errors import DataError

# The settings of `summary_` belong to a head that is not read here.
KEYS = frozenset((
  'vocab_size', 'n_embd', 'n_layer', 'n_head', 'n_positions', 'n_ctx', 'n_inner',
  'layer_norm_epsilon', 'activation_function', 'scale_attn_weights',
  'scale_attn_by_inverse_layer_idx', 'reorder_and_upcast_attn', 'add_cross_attention',
  'tie_word_embeddings', 'summary_type', 'summary_use_proj', 'summary_activation',
  'summary_proj_to_labels', 'summary_first_dropout',
))  # fmt: skip

_BLOCK = 'transformer.h.{l}.'
_QKV = f'{_BLOCK}attn.c_attn'
# Conv1D of transformers stores a matrix as [inputs, outputs].
ROWS = (
  Row('transformer.wte.weight', 'V D', 'embed/w', 'VD', gguf='token_embd.weight'),
  Row('transformer.wpe.weight', 'P D', 'positions/w', 'PD', gguf='position_embd.weight'),
  Row(f'{_BLOCK}ln_1.weight', 'D', 'attn_norm/scale', 'D', gguf='blk.{l}.attn_norm.weight'),
  Row(f'{_BLOCK}ln_1.bias', 'D', 'attn_norm/b', 'D', gguf='blk.{l}.attn_norm.bias'),
  Row(f'{_QKV}.weight', 'D [NH]', 'attn/q/w', 'DNH', gguf='blk.{l}.attn_qkv.weight'),
  Row(f'{_QKV}.weight', 'D [KH]', 'attn/k/w', 'DKH', gguf='blk.{l}.attn_qkv.weight'),
  Row(f'{_QKV}.weight', 'D [KH]', 'attn/v/w', 'DKH', gguf='blk.{l}.attn_qkv.weight'),
  Row(f'{_QKV}.bias', '[NH]', 'attn/q/b', 'NH', gguf='blk.{l}.attn_qkv.bias'),
  Row(f'{_QKV}.bias', '[KH]', 'attn/k/b', 'KH', gguf='blk.{l}.attn_qkv.bias'),
  Row(f'{_QKV}.bias', '[KH]', 'attn/v/b', 'KH', gguf='blk.{l}.attn_qkv.bias'),
  Row(f'{_BLOCK}attn.c_proj.weight', 'NH D', 'attn/o/w', 'NHD', gguf='blk.{l}.attn_output.weight'),
  Row(f'{_BLOCK}attn.c_proj.bias', 'D', 'attn/o/b', 'D', gguf='blk.{l}.attn_output.bias'),
  Row(f'{_BLOCK}ln_2.weight', 'D', 'mlp_norm/scale', 'D', gguf='blk.{l}.ffn_norm.weight'),
  Row(f'{_BLOCK}ln_2.bias', 'D', 'mlp_norm/b', 'D', gguf='blk.{l}.ffn_norm.bias'),
  Row(f'{_BLOCK}mlp.c_fc.weight', 'D F', 'mlp/up/w', 'DF', gguf='blk.{l}.ffn_up.weight'),
  Row(f'{_BLOCK}mlp.c_fc.bias', 'F', 'mlp/up/b', 'F', gguf='blk.{l}.ffn_up.bias'),
  Row(f'{_BLOCK}mlp.c_proj.weight', 'F D', 'mlp/down/w', 'FD', gguf='blk.{l}.ffn_down.weight'),
  Row(f'{_BLOCK}mlp.c_proj.bias', 'D', 'mlp/down/b', 'D', gguf='blk.{l}.ffn_down.bias'),
  Row('transformer.ln_f.weight', 'D', 'final_norm/scale', 'D', gguf='output_norm.weight'),
  Row('transformer.ln_f.bias', 'D', 'final_norm/b', 'D', gguf='output_norm.bias'),
  Row('lm_head.weight', 'V D', 'head/w', 'VD', decoder.untied, gguf='output.weight'),
  Row('score.weight', 'R D', 'score/w', 'RD', is_task('sequence')),
  *linear('classifier', 'score', 'RD', is_task('token')),
  *linear('qa_outputs', 'score', 'RD', is_task('span')),
)


def _scales(layers: int, head_dim: int, divided: bool, by_layer: bool) -> list[float | None]:
  """Returns the factor of the scores of each layer; None: the usual one.

  divided, by_layer: scale_attn_weights and scale_attn_by_inverse_layer_idx.
  """
  usual = head_dim**-0.5
  first = usual if divided else 1.0
  found = [first / (i + 1) if by_layer else first for i in range(layers)]
  return [None if scale == usual else scale for scale in found]


def _positions(c: HfConfig) -> int:
  positions = c.count('n_positions', of_class='n_positions' not in c.content)
  if c.get('n_ctx') is not None and c.count('n_ctx') != positions:
    raise DataError(
      f'config.json: n_positions={positions} and n_ctx={c.get("n_ctx")} differ; n_positions is the '
      'number of rows of wpe, and transformers reads n_ctx no longer: delete it'
    )
  return positions


def _read(c: HfConfig, family: str) -> Architecture:
  decoder.check_flag(c, 'add_cross_attention', False, of_class=True)
  c.flag('reorder_and_upcast_attn', of_class=True)  # the same numbers, computed in float32
  dim, heads, layers = c.size('n_embd'), c.size('n_head'), c.size('n_layer')
  if dim % heads:
    raise DataError(f'config.json: n_embd={dim} is no multiple of n_head={heads}')
  scales = _scales(
    layers,
    dim // heads,
    c.flag('scale_attn_weights', of_class=True),
    c.flag('scale_attn_by_inverse_layer_idx', of_class=True),
  )
  norm = Norm(c.number('layer_norm_epsilon', of_class=True), kind='layer', bias=True)
  activation = decoder.read_activation(c, 'activation_function')
  mlp = MlpSpec(c.count('n_inner', 4 * dim), activation, bias=True)
  mixers = [
    AttentionSpec(heads, heads, dim // heads, rope=None, qkv_bias=True, out_bias=True, scale=scale)
    for scale in scales
  ]
  positions = _positions(c)
  return Architecture(
    family=family,
    vocab_size=c.size('vocab_size'),
    model_dim=dim,
    stacks=layer_types.stacks([BlockSpec(mixer, mlp, norm) for mixer in mixers]),
    final_norm=norm,
    tied=c.flag('tie_word_embeddings', of_class=True),
    max_len=positions,
    learned_positions=positions,
  )


def _write_scales(arch: Architecture) -> dict[str, bool]:
  mixers = [block.mixer for block in arch.layers()]
  found = [m.scale for m in mixers]
  for divided in (True, False):
    for by_layer in (False, True):
      if found == _scales(len(found), mixers[0].head_dim, divided, by_layer):
        return {'scale_attn_weights': divided, 'scale_attn_by_inverse_layer_idx': by_layer}
  raise ValueError(f'a config.json of GPT-2 has no scales of the scores {found}')


def _write(arch: Architecture) -> dict[str, Any]:
  block = arch.layers()[0]
  return {
    'architectures': ['GPT2LMHeadModel'],
    'model_type': 'gpt2',
    'vocab_size': arch.vocab_size,
    'n_embd': arch.model_dim,
    'n_layer': arch.num_layers,
    'n_head': block.mixer.num_heads,
    'n_positions': arch.max_len,
    'n_inner': block.mlp.ffn_dim,
    'activation_function': decoder.activation_name(block.mlp.activation, 'gelu_new'),
    'layer_norm_epsilon': block.norm.eps,
    'tie_word_embeddings': arch.tied,
    'initializer_range': 0.02,
    'resid_pdrop': 0.0,
    'embd_pdrop': 0.0,
    'attn_pdrop': 0.0,
  } | _write_scales(arch)


def _read_gguf(file: GgufFile) -> dict[str, Any]:
  return {
    'n_positions': file.count('context_length'),
    'n_embd': file.count('embedding_length'),
    'n_layer': file.count('block_count'),
    'n_head': file.count('attention.head_count'),
    'n_inner': file.count('feed_forward_length'),
    'layer_norm_epsilon': file.number('attention.layer_norm_epsilon'),
  }


def _write_gguf(arch: Architecture) -> dict[str, Any]:
  out = gguf.write_decoder(arch)
  out['attention.layer_norm_epsilon'] = out.pop('attention.layer_norm_rms_epsilon')
  return out


GPT2 = Family(
  model_types=('gpt2',),
  hf_class='GPT2',
  keys=KEYS,
  read=_read,
  write=_write,
  rows=ROWS,
  # Masks of the attention, which older versions saved.
  unused=re.compile(r'transformer\.h\.\d+\.attn\.(bias|masked_bias)'),
  tied=('transformer.wte.weight', 'lm_head.weight'),
  prefix='transformer.',
  gguf=Gguf(
    arch='gpt2',
    fixed=(('activation_function', 'gelu_new'),),
    read=_read_gguf,
    write=_write_gguf,
    transposed=(
      '.attn.c_attn.weight',
      '.attn.c_proj.weight',
      '.mlp.c_fc.weight',
      '.mlp.c_proj.weight',
    ),
  ),
)
