"""A model family outside the package: a Llama whose norms are LayerNorms (without biases) on the
outputs of attention and MLP, with tanh-GELU, and with gate and up fused in one tensor."""

import dataclasses
import re

from ftjax.families import llama
from ftjax.families.family import Family
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import GatedMlpSpec, Norm


def _read(c, family):
  arch = llama.read_sizes(c, family, qkv_bias=False)
  norm = Norm(c.number('layer_norm_eps'), kind='layer')
  arch = arch.with_blocks(
    lambda block: dataclasses.replace(
      block,
      norm=norm,
      norm_placement='after',
      mlp=GatedMlpSpec(block.mlp.ffn_dim, activation='gelu_tanh'),
    )
  )
  return dataclasses.replace(arch, final_norm=norm)


def _write(arch):
  more = {'layer_norm_eps': arch.final_norm.eps}
  return llama.write_sizes(arch, 'Toy', 'toy_llama') | more


_KEPT = [r for r in llama.ROWS if 'layernorm' not in r.hf and 'gate' not in r.hf]
_LAYER = 'model.layers.{l}.'
FAMILY = Family(
  model_types=('toy_llama',),
  hf_class='Toy',
  keys=llama.KEYS | {'layer_norm_eps'},
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
  tied=llama.TIED,
)
