"""The decoder: declared once as a Block, computed as a scan over stacked weights.

Seen from outside a model is `abstract` (shapes), `axes` (logical axes), `init` and `apply`;
parameters are a nested dict of arrays, every block leaf with a leading L axis. Inside the scan body
one layer's slice of that dict is merged into the Block's definition. `apply` ends at the last norm:
logits are the business of head.py, which never makes all of them."""

import dataclasses
import functools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.models import rope
from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens, attend
from ftjax.models.kv_cache import Cache
from ftjax.models.layers import Linear, RMSNorm, declare
from ftjax.models.mlp import GatedMlp
from ftjax.runtime import trees
from ftjax.runtime.sharding import gather, index, island, spec, total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What every block of one forward pass shares: token places and rotary angles (cos, sin
  float32[B, T, H/2]).
  """

  query: Tokens
  key: Tokens
  cos: jax.Array
  sin: jax.Array


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions."""

  def __init__(self, arch: Architecture):
    d, n, k, h = arch.model_dim, arch.num_heads, arch.num_kv_heads, arch.head_dim
    heads, kv = ('batch', 'seq', 'heads', 'head_dim'), ('batch', 'seq', 'kv_heads', 'head_dim')
    bias = arch.qkv_bias
    self.q = Linear((d,), (n, h), ('embed', 'heads', 'head_dim'), heads, bias)
    self.k = Linear((d,), (k, h), ('embed', 'kv_heads', 'head_dim'), kv, bias)
    self.v = Linear((d,), (k, h), ('embed', 'kv_heads', 'head_dim'), kv, bias)
    self.o = Linear((n, h), (d,), ('heads', 'head_dim', 'embed'), ('batch', 'seq', 'act_embed'))

  def __call__(self, x, context: Context, store):
    q, k = (rope.rotate(f(x), context.cos, context.sin) for f in (self.q, self.k))
    k, v, memory = store(k, self.v(x))
    return self.o(attend(q, k, v, context.query, context.key)), memory


class Block(nnx.Module):
  """Pre-norm attention and gated MLP with residuals. x [B, T, D] in the compute dtype."""

  def __init__(self, arch: Architecture):
    self.attn_norm = RMSNorm(arch.model_dim, arch.norm_eps)
    self.attn = Attention(arch)
    self.mlp_norm = RMSNorm(arch.model_dim, arch.norm_eps)
    self.mlp = GatedMlp(arch.model_dim, arch.ffn_dim)

  def __call__(self, x, context: Context, store):
    """`store(k, v) -> (keys to attend to, values, memory)`: training returns its arguments,
    decoding writes the cache.
    """
    y, memory = self.attn(self.attn_norm(x), context, store)
    x = x + y
    return x + self.mlp(self.mlp_norm(x)), memory


class EmbedAndHead(nnx.Module):
  """What stands around the blocks: embedding table, last norm, and the head when it is not tied."""

  def __init__(self, arch: Architecture):
    shape = (arch.vocab_size, arch.model_dim)
    self.embed = nnx.Dict(w=declare(shape, ('vocab', 'embed'), arch.model_dim))
    self.final_norm = RMSNorm(arch.model_dim, arch.norm_eps)
    if arch.num_labels:
      dim = arch.model_dim
      self.score = nnx.Dict(w=declare((arch.num_labels, dim), ('label', 'act_embed'), dim))
    elif not arch.tied:
      self.head = nnx.Dict(w=declare(shape, ('vocab', 'embed'), arch.model_dim))


@functools.cache
def _definition(module: type[nnx.Module], arch: Architecture):
  """(graph definition, flat {name: declared parameter}) of a module."""
  definition, state = nnx.split(module(arch))
  return definition, trees.flatten(
    nnx.to_pure_dict(jax.tree.map(lambda p: p, state, is_leaf=_is_param), extract_fn=lambda p: p)
  )


def _is_param(x) -> bool:
  return isinstance(x, nnx.Variable)


class Declared(NamedTuple):
  """A parameter of the whole model, with its L axis; see layers.declare."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  fan_in: int
  constant: float


@functools.cache
def declared(arch: Architecture) -> dict[str, Declared]:
  """Flat {name: what is declared} of the whole model."""
  out = {}
  for name, p in _definition(EmbedAndHead, arch)[1].items():
    out[name] = Declared(p.get_value().shape, p.axes, p.fan_in, p.constant)
  for i, (pattern, repeats) in enumerate(arch.stacks):
    for j in range(len(pattern)):
      for name, p in _definition(Block, arch)[1].items():
        out[f'stack{i}/block{j}/{name}'] = Declared(
          (repeats, *p.get_value().shape), ('layers', *p.axes), p.fan_in, p.constant
        )
  return out


def abstract(arch: Architecture, dtype: jnp.dtype = jnp.float32) -> dict:
  """Nested dict of ShapeDtypeStruct."""
  return trees.unflatten(
    {n: jax.ShapeDtypeStruct(p.shape, dtype) for n, p in declared(arch).items()}
  )


def axes(arch: Architecture) -> dict:
  """Nested dict of logical-axis tuples, of the same structure."""
  return trees.unflatten({n: p.axes for n, p in declared(arch).items()})


def init(arch: Architecture, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> dict:
  """Random parameters: normal with variance 1 / fan_in (norm scales are 1, biases 0); a leaf
  depends on the key and its name only.
  """
  leaves = {}
  for name, p in declared(arch).items():
    where = spec(*p.axes)
    if p.fan_in:
      own = jax.random.fold_in(key, zlib.crc32(name.encode()))
      x = jax.random.normal(own, p.shape, jnp.float32, out_sharding=where)
      leaves[name] = (x * p.fan_in**-0.5).astype(dtype)
    else:
      leaves[name] = jnp.full(p.shape, p.constant, dtype, out_sharding=where)
  return trees.unflatten(leaves)


def embed(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Rows of table [V, D] for tokens int32[B, T], as dtype[B, T, D].

  An island: each shard looks up the ids of its part of the vocabulary, and the parts are summed
  over `tensor`."""

  def local(table, tokens):
    # In its own dtype: the gradient adds up all occurrences of a token, too many for bfloat16.
    table = gather(table, 'fsdp', 1)
    ids = tokens - index('tensor') * table.shape[0]
    mine = (ids >= 0) & (ids < table.shape[0])
    rows = jnp.where(mine[..., None], table[jnp.where(mine, ids, 0)].astype(dtype), 0)
    return total(rows, 'tensor')

  specs = (spec('vocab', 'embed'), spec('batch', 'seq'))
  return island(local, specs, spec('batch', 'seq', 'act_embed'), check_vma=True)(table, tokens)


def head_weights(arch: Architecture, params: dict) -> jax.Array:
  """float32[V, D]: the head, which a tied model shares with its embedding."""
  return params['embed' if arch.tied else 'head']['w']


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
  """Hidden states after the last norm.

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
  context = Context(where, where, *rope.angles(arch, where.positions))
  for i, (pattern, _) in enumerate(arch.stacks):

    def body(x, weights, pattern=pattern):
      for j in range(len(pattern)):
        block = nnx.merge(_definition(Block, arch)[0], weights[f'block{j}'])
        x, _ = block(x, context, lambda k, v: (k, v, None))
      return x, None

    x, _ = jax.lax.scan(_remat(body, remat), x, params[f'stack{i}'])
  return _norm(arch, params, x)


def _norm(arch: Architecture, params: dict, x: jax.Array) -> jax.Array:
  frame = {n: params[n] for n in ('embed', 'final_norm', 'head', 'score') if n in params}
  return nnx.merge(_definition(EmbedAndHead, arch)[0], frame).final_norm(x)


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
  """Like `apply` for T new tokens that are written into `cache` at index `at`, and attend to all of
  it.

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
  context = Context(where, key, *rope.angles(arch, where.positions))
  x = embed(params['embed']['w'], tokens, dtype)
  keys, values = dict(cache.keys), dict(cache.values)
  for i, (pattern, repeats) in enumerate(arch.stacks):
    # The cache is a carry: as scan inputs and outputs it would be copied whole at every step.
    def body(carry, layer, i=i, pattern=pattern):
      x, ks, vs = carry
      weights, index = layer
      for j in range(len(pattern)):
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

        block = nnx.merge(_definition(Block, arch)[0], weights[f'block{j}'])
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
