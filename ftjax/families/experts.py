"""What families with experts share: their keys of config.json, and the tensors of their layers.

Files hold a matrix for each expert, or as transformers 5 computes them: `gate_up_proj` [E, 2 F, D]
and `down_proj` [E, D, F] of all experts. Both are read. The first form is written, as transformers
and vLLM do.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from ftjax.families.hf_config import HfConfig
from ftjax.families.tensor_map import Condition, Row
from ftjax.models.architecture import Architecture, BlockSpec, MoeSpec
from ftjax.runtime.errors import DataError

KEYS = frozenset(
  ('num_experts_per_tok', 'num_local_experts', 'router_aux_loss_coef', 'output_router_logits')
)


def has_experts(arch: Architecture, spec: BlockSpec | None) -> bool:
  """Returns whether a layer has experts."""
  del arch
  return spec is not None and isinstance(spec.mlp, MoeSpec)


def is_dense(arch: Architecture, spec: BlockSpec | None) -> bool:
  """Returns whether a layer has one MLP for all tokens."""
  return spec is not None and not has_experts(arch, spec)


def dense(rows: Sequence[Row]) -> tuple[Row, ...]:
  """Returns the rows of an MLP, of the layers that have no experts."""
  return tuple(
    dataclasses.replace(row, needs=functools.partial(_in_dense, row.needs)) for row in rows
  )


def _in_dense(needs: Condition, arch: Architecture, spec: BlockSpec | None) -> bool:
  return is_dense(arch, spec) and needs(arch, spec)


def rows(folder: str, names: tuple[str, str, str]) -> tuple[Row, ...]:
  """Returns the rows of a layer's router and of each expert's matrices.

  folder: of the tensors in a layer. names: of the gate, up and down matrices. GGUF files hold each
  kind of matrix of all experts in one tensor.
  """
  layer = f'model.layers.{{l}}.{folder}.'
  gate, up, down = (f'{layer}experts.{{e}}.{name}.weight' for name in names)
  return (
    Row(
      *(f'{layer}gate.weight', 'E D', 'mlp/router/w', 'DE', has_experts),
      gguf='blk.{l}.ffn_gate_inp.weight',
    ),
    Row(gate, 'F D', 'mlp/gate/w', 'EDF', has_experts, gguf='blk.{l}.ffn_gate_exps.weight'),
    Row(up, 'F D', 'mlp/up/w', 'EDF', has_experts, gguf='blk.{l}.ffn_up_exps.weight'),
    Row(down, 'D F', 'mlp/down/w', 'EFD', has_experts, gguf='blk.{l}.ffn_down_exps.weight'),
  )


_FUSED = 'model.layers.{l}.mlp.'
FUSED = (
  Row(f'{_FUSED}gate.weight', 'E D', 'mlp/router/w', 'DE', has_experts),
  Row(f'{_FUSED}experts.gate_up_proj', 'E [F] D', 'mlp/gate/w', 'EDF', has_experts),
  Row(f'{_FUSED}experts.gate_up_proj', 'E [F] D', 'mlp/up/w', 'EDF', has_experts),
  Row(f'{_FUSED}experts.down_proj', 'E D F', 'mlp/down/w', 'EFD', has_experts),
)


def read(c: HfConfig, activation: str, ffn_dim: int, renormalize: bool) -> MoeSpec:
  """Returns the experts of a layer.

  Raises:
    DataError: a value of another type, or more experts of a token than there are.
  """
  balance = c.number('router_aux_loss_coef', of_class=True, or_zero=True)
  c.flag('output_router_logits', False)  # whether transformers adds the loss, which is done here
  return MoeSpec(
    num_experts=_count(c),
    top_k=c.count('num_experts_per_tok', of_class=True),
    ffn_dim=ffn_dim,
    activation=activation,
    renormalize=renormalize,
    balance=balance,
  )


def _count(c: HfConfig) -> int:
  """Returns the number of experts: transformers 5 writes num_local_experts for Qwen3-MoE too."""
  found = {k: c.count(k) for k in ('num_experts', 'num_local_experts') if c.get(k) is not None}
  if len({*found.values()}) > 1:
    both = ' and '.join(f'{k}={v}' for k, v in found.items())
    raise DataError(f'config.json: {both}; delete the wrong one')
  return next(iter(found.values()), None) or c.count('num_local_experts', of_class=True)


def write(arch: Architecture, key: str = 'num_local_experts') -> dict[str, Any]:
  """Returns the keys of the experts, their number under `key`."""
  spec = arch.mixtures()[0]
  return {
    key: spec.num_experts,
    'num_experts_per_tok': spec.top_k,
    'router_aux_loss_coef': spec.balance,
    'output_router_logits': False,
  }
