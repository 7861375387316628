"""A layer: a mixer and an MLP with residuals, as its spec describes them, and what the layers of a
forward pass have in common. transformer.py scans over them.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
from flax import nnx

from ftjax.models import lora, relative_bias, rope
from ftjax.models.architecture import (
  Architecture,
  AttentionSpec,
  BlockSpec,
  DeltaNetSpec,
  DisentangledSpec,
  GatedMlpSpec,
  MlpSpec,
  MoeSpec,
)
from ftjax.models.attention import Tokens, attend
from ftjax.models.cross_attention import CrossAttention, Source
from ftjax.models.delta_net import DeltaNet
from ftjax.models.disentangled import Disentangled
from ftjax.models.dropout import ModelDropout
from ftjax.models.kv_cache import Memory
from ftjax.models.layers import Dropout, Linear, Normalize, scaled
from ftjax.models.mlp import GatedMlp, Mlp
from ftjax.models.moe import Moe

# (rotary embedding, head_dim) -> (cos, sin), each float32[B, T, R/2], R: rotated coordinates.
Angles = Mapping[tuple[rope.Rope, int], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Context:
  """What the blocks of one forward pass share: segments and positions of the queries and of the
  keys, the rotary angles of the queries, the table of relative positions [P, D] where there is one,
  what is added to the scores by distance (relative_bias.by_distance), in a decoder what its encoder
  read, and in a training step the dropout of adapters and `inner`, that of the model.
  """

  query: Tokens
  key: Tokens
  angles: Angles
  relative: jax.Array | None = None
  biases: Mapping[AttentionSpec, jax.Array] = dataclasses.field(default_factory=dict)
  source: Source | None = None
  dropout: Dropout | None = None
  inner: ModelDropout | None = None


class Attention(nnx.Module):
  """Grouped-query attention with what its spec has of rotary positions, norms, gate and caps."""

  q_norm = k_norm = gate = None

  def __init__(self, model_dim: int, spec: AttentionSpec):
    d, n, k, h = model_dim, spec.num_heads, spec.num_kv_heads, spec.head_dim
    heads, kv = ('batch', 'seq', 'heads', 'head_dim'), ('batch', 'seq', 'kv_heads', 'head_dim')
    bias = spec.qkv_bias
    self.spec = spec
    self.q = Linear((d,), (n, h), ('embed', 'heads', 'head_dim'), heads, bias, spec.query_fan_in(d))
    self.k = Linear((d,), (k, h), ('embed', 'kv_heads', 'head_dim'), kv, bias)
    self.v = Linear((d,), (k, h), ('embed', 'kv_heads', 'head_dim'), kv, bias)
    out = ('batch', 'seq', 'act_embed')
    self.o = Linear((n, h), (d,), ('heads', 'head_dim', 'embed'), out, spec.out_bias)
    if spec.gate:
      self.gate = Linear((d,), (n, h), ('embed', 'heads', 'head_dim'), heads)
    if spec.qk_norm is not None and spec.qk_norm_width == 'all':
      self.q_norm = Normalize((n, h), spec.qk_norm, heads[2:])
      self.k_norm = Normalize((k, h), spec.qk_norm, kv[2:])
    elif spec.qk_norm is not None:
      self.q_norm, self.k_norm = (Normalize((h,), spec.qk_norm) for _ in 'qk')

  def __call__(self, x, context: Context, memory: Memory | None):
    spec, drop = self.spec, context.dropout
    q, k = _normalized(self.q_norm, self.q(x, drop)), _normalized(self.k_norm, self.k(x, drop))
    if spec.rope is not None:
      angles = context.angles[spec.rope, spec.head_dim]
      q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)
      q = rope.scale_queries(spec.rope, q, context.query.positions)
    if spec.scale is not None:  # attend divides by sqrt(head_dim)
      q = scaled(q, spec.scale * spec.head_dim**0.5)
    v = self.v(x, drop)
    if memory is not None:
      (k, v), memory = memory.append(keys=k, values=v)
    where = context.query, context.key
    if spec.relative is None:
      y = attend(q, k, v, *where, spec.window, spec.soft_cap, spec.causal, context.inner)
    else:
      y = relative_bias.attend(q, k, v, context.biases[spec], *where, spec.causal)
    if self.gate is not None:
      y = y * jax.nn.sigmoid(self.gate(x, drop))
    return self.o(y, drop), memory


# The class of a spec is the kind; the module computes it.
MIXERS = {AttentionSpec: Attention, DeltaNetSpec: DeltaNet, DisentangledSpec: Disentangled}
MLPS = {GatedMlpSpec: GatedMlp, MlpSpec: Mlp, MoeSpec: Moe}


class Block(nnx.Module):
  """A mixer and an MLP with residuals. x [B, T, D] in the compute dtype."""

  def __init__(self, arch: Architecture, spec: BlockSpec):
    dim = arch.model_dim
    if spec.norm_placement not in ('before', 'after', 'both', 'residual'):
      raise ValueError(
        f'norm_placement={spec.norm_placement!r}; expected before, after, both or residual'
      )
    before, after = spec.norm_placement in ('before', 'both'), spec.norm_placement != 'before'
    self.on_residual = spec.norm_placement == 'residual'
    self.residual_scale = spec.residual_scale
    self.attn_norm = Normalize((dim,), spec.norm) if before and spec.mixer_norm else None
    self.attn = MIXERS[type(spec.mixer)](dim, spec.mixer)
    self.attn_out_norm = Normalize((dim,), spec.norm) if after else None
    self.cross_norm = Normalize((dim,), spec.norm) if spec.cross else None
    self.cross = CrossAttention(dim, spec.cross) if spec.cross else None
    self.mlp_norm = Normalize((dim,), spec.norm) if before else None
    self.mlp = MLPS[type(spec.mlp)](dim, spec.mlp)
    self.mlp_out_norm = Normalize((dim,), spec.norm) if after else None

  def __call__(self, x, context: Context, memory: Memory | None):
    """Returns (x, memory, Routing; None without experts). memory: what the mixer has in the cache;
    None in training.
    """
    y, memory = self.attn(_normalized(self.attn_norm, x), context, memory)
    x = self._added(x, self.attn_out_norm, y, 'attn', context.inner)
    if self.cross is not None:
      y = self.cross(self.cross_norm(x), context, memory)
      x = x + (y if context.inner is None else context.inner.residual('cross', y))
    y = _normalized(self.mlp_norm, x)
    y, routing = self.mlp(y, context.query.segments, context.dropout)
    return self._added(x, self.mlp_out_norm, y, 'mlp', context.inner), memory, routing

  def _added(
    self,
    x: jax.Array,
    norm: Normalize | None,
    y: jax.Array,
    name: str,
    inner: ModelDropout | None,
  ) -> jax.Array:
    """Returns the residual stream x after the branch `name`, whose output is y."""
    y = y if self.on_residual else _normalized(norm, y)
    y = y if inner is None else inner.residual(name, y)
    x = x + (y if self.residual_scale == 1 else scaled(y, self.residual_scale))
    return _normalized(norm, x) if self.on_residual else x


def _normalized(norm: Normalize | None, x: jax.Array) -> jax.Array:
  return x if norm is None else norm(x)


@functools.cache
def layer_definition(arch: Architecture, slot: str, spec: BlockSpec) -> lora.Definition:
  """Returns (graph definition, {name: Declared}) of the block of a slot `stack{i}/block{j}`."""
  return lora.define(Block(arch, spec), f'{slot}/', arch)
