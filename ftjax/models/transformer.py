"""Decoders and encoders: blocks as their specs describe them, computed as a scan over stacked
weights.

kinds.py presents it to the rest of the program. Parameters are a nested dict of arrays, every block
leaf with a leading L axis. Inside the scan body one layer's slice of that dict is merged into the
Block's definition. `apply` ends at the last norm: head.py computes losses and log-probs from there,
and never makes all logits."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.models import embed_and_head, lora, rope
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
from ftjax.models.delta_net import DeltaNet
from ftjax.models.disentangled import Disentangled
from ftjax.models.dropout import ModelDropout
from ftjax.models.embed_and_head import fold
from ftjax.models.kv_cache import Cache, Memory
from ftjax.models.layers import Declared, Dropout, Linear, Normalize, rounded, scaled
from ftjax.models.mlp import GatedMlp, Mlp
from ftjax.models.moe import Moe
from ftjax.models.routing import Routing
from ftjax.runtime.sharding import gathered

# (rotary embedding, head_dim) -> (cos, sin), each float32[B, T, R/2], R: rotated coordinates.
Angles = Mapping[tuple[rope.Rope, int], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Context:
  """What the blocks of one forward pass share: segments and positions of the queries and of the
  keys, the rotary angles of the queries, the table of relative positions [P, D] where there is one,
  and in a training step the dropout of adapters and `inner`, that of the model.
  """

  query: Tokens
  key: Tokens
  angles: Angles
  relative: jax.Array | None = None
  dropout: Dropout | None = None
  inner: ModelDropout | None = None


def _context(arch: Architecture, query: Tokens, key: Tokens) -> Context:
  mixers = [b.mixer for _, b, _ in arch.blocks() if isinstance(b.mixer, AttentionSpec)]
  kinds = dict.fromkeys((m.rope, m.head_dim) for m in mixers if m.rope is not None)
  lengths = None
  if any(kind.uses_length for kind, _ in kinds):
    lengths = rope.document_lengths(query.segments, query.positions)
  return Context(query, key, {k: rope.angles(*k, query.positions, lengths) for k in kinds})


class Attention(nnx.Module):
  """Grouped-query attention with what its spec has of rotary positions, norms, gate and caps."""

  q_norm = k_norm = gate = None

  def __init__(self, model_dim: int, spec: AttentionSpec):
    d, n, k, h = model_dim, spec.num_heads, spec.num_kv_heads, spec.head_dim
    heads, kv = ('batch', 'seq', 'heads', 'head_dim'), ('batch', 'seq', 'kv_heads', 'head_dim')
    bias = spec.qkv_bias
    self.spec = spec
    self.q = Linear((d,), (n, h), ('embed', 'heads', 'head_dim'), heads, bias)
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
    y = attend(q, k, v, *where, spec.window, spec.soft_cap, spec.causal, context.inner)
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
    self.mlp_norm = Normalize((dim,), spec.norm) if before else None
    self.mlp = MLPS[type(spec.mlp)](dim, spec.mlp)
    self.mlp_out_norm = Normalize((dim,), spec.norm) if after else None

  def __call__(self, x, context: Context, memory: Memory | None):
    """Returns (x, memory, Routing; None without experts). memory: what the mixer has in the cache;
    None in training.
    """
    y, memory = self.attn(_normalized(self.attn_norm, x), context, memory)
    x = self._added(x, self.attn_out_norm, y, 'attn', context.inner)
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
def _block(arch: Architecture, slot: str, spec: BlockSpec) -> lora.Definition:
  """Returns (graph definition, {name: Declared}) of the block of a slot `stack{i}/block{j}`."""
  return lora.define(Block(arch, spec), f'{slot}/', arch)


@functools.cache
def declared(arch: Architecture) -> dict[str, Declared]:
  """Returns flat {name: declaration} of the whole model, block leaves with their L axis."""
  out = dict(embed_and_head.definition(arch)[1])
  for slot, kind, repeats in arch.blocks():
    for name, p in _block(arch, slot, kind)[1].items():
      stacked = p._replace(shape=(repeats, *p.shape), axes=('layers', *p.axes))
      out[f'{slot}/{name}'] = stacked
  return out


@functools.cache
def linear_maps(arch: Architecture) -> tuple[str, ...]:
  """Returns the names of the maps that may have an adapter, `stack{i}/block{j}/attn/q`: those of
  the blocks, and those around them; see embed_and_head.linear_maps.
  """
  names = (f'{s}/{n}' for s, kind, _ in arch.blocks() for n in lora.linear_maps(Block(arch, kind)))
  return *names, *embed_and_head.linear_maps(arch)


def _remat(body, policy: str):
  if policy == 'none':
    return body
  if policy == 'dots':
    return jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
  return jax.checkpoint(body)


def routed(
  arch: Architecture,
  params: dict,
  tokens: jax.Array,
  where: Tokens,
  *,
  dtype: jnp.dtype,
  remat: str = 'none',
  noise: jax.Array | None = None,
  dropout_keys: jax.Array | None = None,
  token_types: jax.Array | None = None,
  inner: ModelDropout | None = None,
) -> tuple[jax.Array, Routing | None]:
  """Returns the hidden states after the last norm, and what the routers did.

  Args:
    arch: the architecture.
    params: nested dict, block leaves stacked.
    tokens: int32[B, T].
    where: segments and positions of the tokens.
    dtype: compute dtype of activations and matrix products.
    remat: what the backward pass recomputes: 'none', 'dots' (all but projections), 'full'
      (whole blocks).
    noise: added to the embeddings, [B, T, D], or None.
    dropout_keys: key[B], of the rows, for the dropout of adapters; None: nothing is dropped.
    token_types: int32[B, T], of a model that has them; None: all 0.
    inner: dropout of the model, with key[B] of the rows; None: nothing is dropped.

  Returns:
    (dtype[B, T, D], Routing with a leading axis of the layers that have experts, in order; None for
    a model without).
  """
  x = embed_and_head.embedded(arch, params, tokens, where, dtype, token_types)
  if noise is not None:
    x = x + noise.astype(dtype)
  x = x if inner is None else inner.embedding(x)
  context, routings = _context(arch, where, where), []
  context = dataclasses.replace(context, relative=embed_and_head.relative(arch, params, dtype))
  for i, (pattern, repeats) in enumerate(arch.stacks):

    def body(x, layer, i=i, pattern=pattern):
      (weights, keys, own_keys), found = layer, []
      for j, kind in enumerate(pattern):
        slot = f'stack{i}/block{j}'
        block = nnx.merge(_block(arch, slot, kind)[0], weights[f'block{j}'])
        drop = None if keys is None else Dropout(arch.adapter.dropout, fold(keys, slot))
        own = None if own_keys is None else inner.with_keys(fold(own_keys, slot))
        here = dataclasses.replace(context, dropout=drop, inner=own)
        x, _, routing = block(x, here, None)
        found += [] if routing is None else [routing]
      return x, found

    keys = None if dropout_keys is None else _layer_keys(dropout_keys, repeats)
    own_keys = None if inner is None else _layer_keys(inner.keys, repeats)
    x, found = jax.lax.scan(_remat(body, remat), x, (params[f'stack{i}'], keys, own_keys))
    routings += [_in_order(found)] if found else []
  return embed_and_head.normed(arch, params, x), _joined(routings)


def apply(*arguments: Any, **named: Any) -> jax.Array:
  """Returns the hidden states of `routed` alone, dtype[B, T, D]."""
  return routed(*arguments, **named)[0]


def _in_order(found: list[Routing]) -> Routing:
  """Returns the routing of a stack's layers in order; found: of each block of the pattern, with an
  axis of repeats.
  """
  if len(found) == 1:
    return found[0]
  return jax.tree.map(lambda *a: jnp.stack(a, 1).reshape(-1, *a[0].shape[1:]), *found)


def _joined(routings: list[Routing]) -> Routing | None:
  if len(routings) < 2:
    return routings[0] if routings else None
  return jax.tree.map(lambda *a: jnp.concatenate(a), *routings)


def merged(arch: Architecture, params: dict, name: str, layer: jax.Array | None) -> jax.Array:
  """Returns a leaf of the model after merging its adapter, float[...] in that model's dtype.

  Args:
    arch: with the dtype of the merged model in its adapter.
    params: nested dict of base and adapter.
    name: of the leaf in the plain model.
    layer: int32[], of a leaf with an L axis; None for another leaf.
  """
  if layer is None:
    module, path = embed_and_head.merge(arch, params), name.split('/')
  else:
    stack, block, *path = name.split('/')
    spec_of = {slot: kind for slot, kind, _ in arch.blocks()}[f'{stack}/{block}']
    weights = jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False), params[stack][block]
    )
    module = nnx.merge(_block(arch, f'{stack}/{block}', spec_of)[0], weights)
  *folders, last = path
  for folder in folders:
    module = module[folder] if isinstance(module, nnx.Dict) else getattr(module, folder)
  if isinstance(module, Linear) and last == 'w':
    found = module.merged_weights()
    return jax.lax.reshape(found, module.shape, out_sharding=gathered(*module.leaf_axes))
  leaf = module[last] if isinstance(module, nnx.Dict) else getattr(module, last)
  return rounded(leaf[...].astype(jnp.float32), arch.adapter.merged)


def _layer_keys(keys: jax.Array, repeats: int) -> jax.Array:
  """Returns key[L, B]: those of the rows in each layer."""
  return jax.vmap(lambda layer: jax.vmap(lambda k: jax.random.fold_in(k, layer))(keys))(
    jnp.arange(repeats)
  )


def decode(
  arch: Architecture,
  params: dict,
  tokens: jax.Array,
  where: Tokens,
  cache: Cache,
  at: jax.Array,
  *,
  dtype: jnp.dtype,
  routed: bool = False,
) -> tuple[jax.Array, Cache] | tuple[jax.Array, Cache, Routing | None]:
  """Computes `apply` for T new tokens that are written into `cache` at index `at` and attend to all
  of it.

  Args:
    arch: the architecture.
    params: nested dict.
    tokens: int32[B, T]; T is the prompt's length at first, then 1.
    where: segments (0: left padding) and positions of the tokens.
    cache: to be extended; the caller donates it.
    at: int32[], the common index of the first new token.
    dtype: compute dtype.
    routed: whether what the routers did is returned too.

  Returns:
    (dtype[B, T, D], the extended cache), and with `routed` what the function of that name returns.
  """
  put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=1)
  key = Tokens(
    put(cache.tokens.segments, where.segments), put(cache.tokens.positions, where.positions)
  )
  context = _context(arch, where, key)
  x = embed_and_head.embedded(arch, params, tokens, where, dtype)
  slots = [slot for slot, _, _ in arch.blocks()]
  kept = {n: cache.entries.get(n, {}) | cache.states.get(n, {}) for n in slots}
  routings = []
  for i, (pattern, repeats) in enumerate(arch.stacks):
    # The cache is a carry: as scan inputs and outputs it would be copied whole at every step.
    def body(carry, layer, i=i, pattern=pattern):
      x, kept = carry
      (weights, index), found = layer, []
      for j, kind in enumerate(pattern):
        name = f'stack{i}/block{j}'
        block = nnx.merge(_block(arch, name, kind)[0], weights[f'block{j}'])
        x, memory, routing = block(x, context, Memory(kept[name], index, at))
        kept = kept | {name: memory.arrays}
        found += [] if routing is None or not routed else [routing]
      return (x, kept), found

    mine = {n: kept[n] for n in (f'stack{i}/block{j}' for j in range(len(pattern)))}
    layers = params[f'stack{i}'], jnp.arange(repeats, dtype=jnp.int32)
    (x, new), found = jax.lax.scan(body, (x, mine), layers)
    kept = kept | new
    routings += [_in_order(found)] if found else []
  entries, states = (
    {slot: {n: kept[slot][n] for n in names} for slot, names in arrays.items()}
    for arrays in (cache.entries, cache.states)
  )
  out = embed_and_head.normed(arch, params, x), Cache(entries, states, key)
  return (*out, _joined(routings)) if routed else out
