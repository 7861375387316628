"""The decoder: blocks as their specs describe them, computed as a scan over stacked weights.

kinds.py presents it to the rest of the program. Parameters are a nested dict of arrays, every block
leaf with a leading L axis. Inside the scan body one layer's slice of that dict is merged into the
Block's definition. `apply` ends at the last norm: head.py computes losses and log-probs from there,
and never makes all logits."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.models import rope
from ftjax.models.architecture import Architecture, AttentionSpec, BlockSpec, GatedMlpSpec
from ftjax.models.attention import Tokens, attend
from ftjax.models.kv_cache import Cache
from ftjax.models.layers import Declared, Linear, Normalize, declare
from ftjax.models.mlp import GatedMlp
from ftjax.runtime import trees
from ftjax.runtime.sharding import gather, index, shard_map, spec, total

# (rotary embedding, head_dim) -> (cos, sin), each float32[B, T, H/2].
Angles = Mapping[tuple[rope.Rope, int], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Context:
  """What the blocks of one forward pass share: segments and positions of the queries and of the
  keys, and the rotary angles of the queries.
  """

  query: Tokens
  key: Tokens
  angles: Angles


def _context(arch: Architecture, query: Tokens, key: Tokens) -> Context:
  mixers = [block.mixer for _, block, _ in arch.blocks()]
  kinds = dict.fromkeys((m.rope, m.head_dim) for m in mixers if m.rope is not None)
  return Context(query, key, {k: rope.angles(*k, query.positions) for k in kinds})


class Attention(nnx.Module):
  """Grouped-query attention, with rotary positions where the spec has them."""

  def __init__(self, model_dim: int, spec: AttentionSpec):
    d, n, k, h = model_dim, spec.num_heads, spec.num_kv_heads, spec.head_dim
    heads, kv = ('batch', 'seq', 'heads', 'head_dim'), ('batch', 'seq', 'kv_heads', 'head_dim')
    bias = spec.qkv_bias
    self.spec = spec
    self.q = Linear((d,), (n, h), ('embed', 'heads', 'head_dim'), heads, bias)
    self.k = Linear((d,), (k, h), ('embed', 'kv_heads', 'head_dim'), kv, bias)
    self.v = Linear((d,), (k, h), ('embed', 'kv_heads', 'head_dim'), kv, bias)
    self.o = Linear((n, h), (d,), ('heads', 'head_dim', 'embed'), ('batch', 'seq', 'act_embed'))

  def __call__(self, x, context: Context, store):
    q, k = self.q(x), self.k(x)
    if self.spec.rope is not None:
      angles = context.angles[self.spec.rope, self.spec.head_dim]
      q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)
    k, v, memory = store(k, self.v(x))
    return self.o(attend(q, k, v, context.query, context.key)), memory


# The class of a spec is the kind; the module computes it.
MIXERS = {AttentionSpec: Attention}
MLPS = {GatedMlpSpec: GatedMlp}


class Block(nnx.Module):
  """A mixer and an MLP with residuals. x [B, T, D] in the compute dtype."""

  def __init__(self, arch: Architecture, spec: BlockSpec):
    dim = arch.model_dim
    if spec.norm_placement not in ('before', 'after', 'both'):
      raise ValueError(f'norm_placement={spec.norm_placement!r}; expected before, after or both')
    before, after = spec.norm_placement != 'after', spec.norm_placement != 'before'
    self.attn_norm = Normalize(dim, spec.norm) if before else None
    self.attn = MIXERS[type(spec.mixer)](dim, spec.mixer)
    self.attn_out_norm = Normalize(dim, spec.norm) if after else None
    self.mlp_norm = Normalize(dim, spec.norm) if before else None
    self.mlp = MLPS[type(spec.mlp)](dim, spec.mlp)
    self.mlp_out_norm = Normalize(dim, spec.norm) if after else None

  def __call__(self, x, context: Context, store):
    """Returns (x, memory). `store(k, v) -> (keys to attend to, values, memory)`: training returns
    its arguments, decoding writes the cache.
    """
    y, memory = self.attn(_normalized(self.attn_norm, x), context, store)
    x = x + _normalized(self.attn_out_norm, y)
    y = self.mlp(_normalized(self.mlp_norm, x))
    return x + _normalized(self.mlp_out_norm, y), memory


def _normalized(norm: Normalize | None, x: jax.Array) -> jax.Array:
  return x if norm is None else norm(x)


class EmbedAndHead(nnx.Module):
  """The parameters around the blocks: embedding table, last norm, and an untied head."""

  def __init__(self, arch: Architecture):
    shape, padding = (arch.vocab_rows, arch.model_dim), arch.vocab_rows - arch.vocab_size
    table = functools.partial(declare, shape, ('vocab', 'embed'), arch.model_dim, padding=padding)
    self.embed = nnx.Dict(w=table())
    self.final_norm = Normalize(arch.model_dim, arch.final_norm)
    if arch.num_labels:
      dim = arch.model_dim
      self.score = nnx.Dict(w=declare((arch.num_labels, dim), ('label', 'act_embed'), dim))
    elif not arch.tied:
      self.head = nnx.Dict(w=table())


@functools.cache
def _definition(module: type[nnx.Module], arch: Architecture, *more: BlockSpec):
  """Returns (graph definition, flat {name: Declared}) of a module."""
  definition, state = nnx.split(module(arch, *more))
  params = nnx.to_pure_dict(
    jax.tree.map(lambda p: p, state, is_leaf=_is_param), extract_fn=lambda p: p.declared
  )
  return definition, trees.flatten(params)


def _is_param(x) -> bool:
  return isinstance(x, nnx.Variable)


@functools.cache
def declared(arch: Architecture) -> dict[str, Declared]:
  """Returns flat {name: declaration} of the whole model, block leaves with their L axis."""
  out = dict(_definition(EmbedAndHead, arch)[1])
  for block, kind, repeats in arch.blocks():
    for name, p in _definition(Block, arch, kind)[1].items():
      stacked = p._replace(shape=(repeats, *p.shape), axes=('layers', *p.axes))
      out[f'{block}/{name}'] = stacked
  return out


def head_leaf(arch: Architecture) -> str:
  """Returns the name of the leaf that maps hidden states to logits [V, D] or to scores [R, D]."""
  if arch.num_labels:
    return 'score/w'
  return 'embed/w' if arch.tied else 'head/w'


def embed(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns rows of table [V, D] for tokens int32[B, T], as dtype[B, T, D].

  A shard_map region: each shard looks up the ids of its part of the vocabulary, and the parts are
  summed over `tensor`."""

  def local(table, tokens):
    # In its own dtype: the gradient adds up all occurrences of a token, too many for bfloat16.
    table = gather(table, 'fsdp', 1)
    ids = tokens - index('tensor') * table.shape[0]
    mine = (ids >= 0) & (ids < table.shape[0])
    rows = jnp.where(mine[..., None], table[jnp.where(mine, ids, 0)].astype(dtype), 0)
    return total(rows, 'tensor')

  specs = (spec('vocab', 'embed'), spec('batch', 'seq'))
  return shard_map(local, specs, spec('batch', 'seq', 'act_embed'), check_vma=True)(table, tokens)


def _remat(body, policy: str):
  if policy == 'none':
    return body
  if policy == 'dots':
    return jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
  return jax.checkpoint(body)


def apply(
  arch: Architecture,
  params: dict,
  tokens: jax.Array,
  where: Tokens,
  *,
  dtype: jnp.dtype,
  remat: str = 'none',
  noise: jax.Array | None = None,
) -> jax.Array:
  """Returns the hidden states after the last norm.

  Args:
    arch: the architecture.
    params: nested dict, block leaves stacked.
    tokens: int32[B, T].
    where: segments and positions of the tokens.
    dtype: compute dtype of activations and matrix products.
    remat: what the backward pass recomputes: 'none', 'dots' (all but projections), 'full'
      (whole blocks).
    noise: added to the embeddings, [B, T, D], or None.

  Returns:
    dtype[B, T, D].
  """
  x = embed(params['embed']['w'], tokens, dtype)
  if noise is not None:
    x = x + noise.astype(dtype)
  context = _context(arch, where, where)
  for i, (pattern, _) in enumerate(arch.stacks):

    def body(x, weights, pattern=pattern):
      for j, kind in enumerate(pattern):
        block = nnx.merge(_definition(Block, arch, kind)[0], weights[f'block{j}'])
        x, _ = block(x, context, lambda k, v: (k, v, None))
      return x, None

    x, _ = jax.lax.scan(_remat(body, remat), x, params[f'stack{i}'])
  return _norm(arch, params, x)


def _norm(arch: Architecture, params: dict, x: jax.Array) -> jax.Array:
  around = {n: params[n] for n in ('embed', 'final_norm', 'head', 'score') if n in params}
  return nnx.merge(_definition(EmbedAndHead, arch)[0], around).final_norm(x)


def decode(
  arch: Architecture,
  params: dict,
  tokens: jax.Array,
  where: Tokens,
  cache: Cache,
  at: jax.Array,
  *,
  dtype: jnp.dtype,
) -> tuple[jax.Array, Cache]:
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

  Returns:
    (dtype[B, T, D], the extended cache).
  """
  put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=1)
  key = Tokens(
    put(cache.tokens.segments, where.segments), put(cache.tokens.positions, where.positions)
  )
  context = _context(arch, where, key)
  x = embed(params['embed']['w'], tokens, dtype)
  keys, values = dict(cache.keys), dict(cache.values)
  for i, (pattern, repeats) in enumerate(arch.stacks):
    # The cache is a carry: as scan inputs and outputs it would be copied whole at every step.
    def body(carry, layer, i=i, pattern=pattern):
      x, ks, vs = carry
      weights, index = layer
      for j, kind in enumerate(pattern):
        name = f'stack{i}/block{j}'

        def store(k, v, name=name, ks=ks, vs=vs):
          zero = jnp.zeros((), jnp.int32)
          start = (index, zero, at, zero, zero)
          new_k = jax.lax.dynamic_update_slice(ks[name], k[None].astype(ks[name].dtype), start)
          new_v = jax.lax.dynamic_update_slice(vs[name], v[None].astype(vs[name].dtype), start)
          pick = functools.partial(
            jax.lax.dynamic_index_in_dim, index=index, axis=0, keepdims=False
          )
          return pick(new_k), pick(new_v), (new_k, new_v)

        block = nnx.merge(_definition(Block, arch, kind)[0], weights[f'block{j}'])
        x, (new_k, new_v) = block(x, context, store)
        ks, vs = ks | {name: new_k}, vs | {name: new_v}
      return (x, ks, vs), None

    mine = [f'stack{i}/block{j}' for j in range(len(pattern))]
    carry = (x, {n: keys[n] for n in mine}, {n: values[n] for n in mine})
    (x, ks, vs), _ = jax.lax.scan(
      body, carry, (params[f'stack{i}'], jnp.arange(repeats, dtype=jnp.int32))
    )
    keys, values = keys | ks, values | vs
  return _norm(arch, params, x), Cache(keys, values, key)
