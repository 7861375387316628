"""A model family outside the package: a Llama whose norms are LayerNorms (without biases) on the
outputs of attention and MLP, with tanh-GELU, and with gate and up fused in one tensor."""

import dataclasses
import re

from ftjax.families import decoder, hf_rope
from ftjax.families.family import Family
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import GatedMlpSpec, Norm


def _read(c, family):
  block = decoder.read_block(c, hf_rope.read(c))
  block = dataclasses.replace(
    block,
    norm=Norm(c.number('layer_norm_eps'), kind='layer'),
    norm_placement='after',
    mlp=GatedMlpSpec(block.mlp.ffn_dim, activation='gelu_tanh'),
  )
  return decoder.read_model(c, family, [block] * c.size('num_hidden_layers'))


def _write(arch):
  more = {'layer_norm_eps': arch.final_norm.eps}
  return decoder.write_model(arch, 'Toy', 'toy_llama') | decoder.write_rope(arch) | more


_KEPT = [r for r in decoder.rows() if 'layernorm' not in r.hf and 'gate' not in r.hf]
_LAYER = 'model.layers.{l}.'
FAMILY = Family(
  model_types=('toy_llama',),
  hf_class='Toy',
  keys=decoder.KEYS | {'layer_norm_eps'},
  read=_read,
  write=_write,
  rows=(
    *(r for r in _KEPT if 'up_proj' not in r.hf),
    Row(f'{_LAYER}attention_norm.weight', 'D', 'attn_out_norm/scale', 'D'),
    Row(f'{_LAYER}mlp_norm.weight', 'D', 'mlp_out_norm/scale', 'D'),
    Row(f'{_LAYER}mlp.gate_up_proj.weight', '[F] D', 'mlp/gate/w', 'DF'),
    Row(f'{_LAYER}mlp.gate_up_proj.weight', '[F] D', 'mlp/up/w', 'DF'),
  ),
  unused=re.compile('nothing'),
  tied=decoder.TIED,
)
