"""Granite 3 and the dense models of Granite 4: Llama with four multipliers."""

import dataclasses
import math
from typing import Any

from ftjax.families import decoder, gguf, gguf_rope, hf_rope, llama
from ftjax.families.family import Family
from ftjax.families.gguf import Gguf
from ftjax.families.gguf_file import GgufFile
from ftjax.families.hf_config import HfConfig
from ftjax.families.layer_types import FULL
from ftjax.families.tensor_map import Row
from ftjax.models.architecture import Architecture, BlockSpec
from ftjax.runtime.errors import DataError

_MULTIPLIERS = {
  'embedding_multiplier', 'attention_multiplier', 'residual_multiplier', 'logits_scaling',
}  # fmt: skip
_KEYS = decoder.KEYS | _MULTIPLIERS | {'attention_bias'}
_SHARED = 'model.layers.{l}.shared_mlp.'
_MLP = (  # of Granite 4
  Row(f'{_SHARED}input_linear.weight', '[F] D', 'mlp/gate/w', 'DF'),
  Row(f'{_SHARED}input_linear.weight', '[F] D', 'mlp/up/w', 'DF'),
  Row(f'{_SHARED}output_linear.weight', 'D F', 'mlp/down/w', 'FD'),
)


def _read_layers(c: HfConfig, family: str, block: BlockSpec) -> Architecture:
  """Returns the decoder of equal layers, with the multipliers of a config.json."""
  block = decoder.with_mixer(block, scale=c.number('attention_multiplier', of_class=True))
  residual = c.number('residual_multiplier', of_class=True)
  block = dataclasses.replace(block, residual_scale=residual)
  model = decoder.read_model(c, family, [block] * c.size('num_hidden_layers'))
  return dataclasses.replace(
    model,
    embed_scale=c.number('embedding_multiplier', of_class=True),
    logit_scale=1 / c.number('logits_scaling', of_class=True),
  )


def _write_multipliers(arch: Architecture) -> dict[str, float]:
  block = arch.layers()[0]
  near = 1 / arch.logit_scale
  divisors = (near, math.nextafter(near, 0), math.nextafter(near, math.inf))
  return {
    'embedding_multiplier': arch.embed_scale,
    'attention_multiplier': block.mixer.scale,
    'residual_multiplier': block.residual_scale,
    'logits_scaling': next(d for d in divisors if 1 / d == arch.logit_scale),
  }


def _read(c: HfConfig, family: str) -> Architecture:
  return _read_layers(c, family, llama.read_block(c, hf_rope.read(c)))


def _write(arch: Architecture) -> dict[str, Any]:
  written = decoder.write_model(arch, 'Granite', 'granite') | llama.write_biases(arch)
  return written | decoder.write_rope(arch) | _write_multipliers(arch)


def _read_gguf(file: GgufFile) -> dict[str, Any]:
  if file.get('rope.scaling.finetuned') is False:  # llama.cpp then rotates nothing
    raise DataError(
      f'{file.place}: {file.key("rope.scaling.finetuned")}=False, attention without positions, is '
      'not supported'
    )
  return gguf.read_biased(file) | {
    'embedding_multiplier': file.number('embedding_scale', 1.0),
    'attention_multiplier': file.number('attention.scale', file.head_dim() ** -0.5),
    'residual_multiplier': file.number('residual_scale', 1.0),
    'logits_scaling': file.number('logit_scale'),
  }


def _write_gguf(arch: Architecture) -> dict[str, Any]:
  found = _write_multipliers(arch)
  return gguf.write_decoder(arch) | {
    'embedding_scale': found['embedding_multiplier'],
    'attention.scale': found['attention_multiplier'],
    'residual_scale': found['residual_multiplier'],
    'logit_scale': found['logits_scaling'],
  }


GRANITE = Family(
  model_types=('granite',),
  hf_class='Granite',
  keys=_KEYS | {'mlp_bias'},
  read=_read,
  write=_write,
  rows=decoder.rows(),
  # That of Granite 4, whose GGUF files are of this family too.
  other_rows=decoder.rows(mlp=_MLP),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf=Gguf(
    arch='granite',
    fixed=(('hidden_act', 'silu'),),
    read=_read_gguf,
    write=_write_gguf,
    interleaved=gguf.INTERLEAVED,
    rope_tensors=(gguf_rope.FREQS,),
  ),
  tasks=('sequence',),
)

# Granite 4 dense: model_type granitemoehybrid without experts and without Mamba layers.

# They set sizes of the layers that such a model does not have.
_OF_OTHERS = {
  'intermediate_size', 'num_experts_per_tok', 'output_router_logits', 'router_aux_loss_coef',
  'mamba_n_heads', 'mamba_n_groups', 'mamba_d_state', 'mamba_d_head', 'mamba_d_conv',
  'mamba_expand', 'mamba_chunk_size', 'mamba_conv_bias', 'mamba_proj_bias', 'time_step_limit',
}  # fmt: skip
_HYBRID_KEYS = {
  'num_local_experts', 'layer_types', 'layers_block_type', 'position_embedding_type',
  'shared_intermediate_size',
}  # fmt: skip


def _check_dense(c: HfConfig) -> None:
  """Raises DataError where a layer is no attention with a dense MLP."""
  experts = c.count('num_local_experts', of_class=True, least=0)
  if experts:
    raise DataError(
      f'config.json: num_local_experts={experts} is not supported for '
      f'model_type={c.model_type!r}; expected 0, a dense model'
    )
  key = 'layers_block_type' if c.get('layer_types') is None else 'layer_types'
  types = c.get(key)
  layers = c.size('num_hidden_layers')
  names = ('attention', FULL)
  if not isinstance(types, list) or len(types) != layers or any(t not in names for t in types):
    raise DataError(
      f'config.json: {key}={types!r}; the {layers} layers of model_type={c.model_type!r} must be '
      "'attention': Mamba layers, which the class has by default, are not supported"
    )


def _read_hybrid(c: HfConfig, family: str) -> Architecture:
  _check_dense(c)
  kind = c.get('position_embedding_type')
  if kind not in (None, 'nope', 'rope'):
    raise DataError(
      f"config.json: position_embedding_type={kind!r}; expected 'rope', or null for no positions"
    )
  rope = hf_rope.read(c)
  block = decoder.with_bias(c, decoder.read_block(c, rope if kind == 'rope' else None))
  size = c.count('shared_intermediate_size', of_class=True)
  mlp = dataclasses.replace(block.mlp, ffn_dim=size)
  return _read_layers(c, family, dataclasses.replace(block, mlp=mlp))


def _write_hybrid(arch: Architecture) -> dict[str, Any]:
  block = arch.layers()[0]
  written = decoder.write_model(arch, 'GraniteMoeHybrid', 'granitemoehybrid')
  more = {
    'attention_bias': block.mixer.out_bias,
    'shared_intermediate_size': block.mlp.ffn_dim,
    'num_local_experts': 0,
    'num_experts_per_tok': 0,
    'position_embedding_type': None if block.mixer.rope is None else 'rope',
    'layer_types': ['attention'] * arch.num_layers,
    'mamba_n_heads': 1,  # transformers checks that it divides the width of the absent layers
  }
  return written | more | decoder.write_rope(arch) | _write_multipliers(arch)


GRANITE_HYBRID = Family(
  model_types=('granitemoehybrid',),
  hf_class='GraniteMoeHybrid',
  keys=_KEYS | _HYBRID_KEYS | _OF_OTHERS,
  read=_read_hybrid,
  write=_write_hybrid,
  rows=decoder.rows(mlp=_MLP),
  unused=decoder.UNUSED,
  tied=decoder.TIED,
  gguf_family='granite',
  tasks=('sequence',),
)
