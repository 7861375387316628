"""Decoders, encoders and encoder-decoders: blocks as their specs describe them, computed as a scan
over stacked weights.

kinds.py presents it to the rest of the program. Parameters are a nested dict of arrays, every block
leaf with a leading L axis. Inside the scan body one layer's slice of that dict is merged into the
Block's definition. `apply` ends at the last norm: head.py computes losses and log-probs from there,
and never makes all logits."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.models import cross_attention, embed_and_head, kv_cache, lora, relative_bias, rope
from ftjax.models.architecture import Architecture, AttentionSpec
from ftjax.models.attention import Tokens
from ftjax.models.block import Block, Context, layer_definition
from ftjax.models.cross_attention import Source
from ftjax.models.dropout import ModelDropout
from ftjax.models.embed_and_head import fold
from ftjax.models.kv_cache import Cache, Memory
from ftjax.models.layers import Declared, Dropout, Linear, rounded
from ftjax.models.routing import Routing
from ftjax.runtime.sharding import gathered


def _context(arch: Architecture, query: Tokens, key: Tokens, stacks: Sequence[int]) -> Context:
  """Returns the context of some stacks, without tables of parameters."""
  blocks = (b for i in stacks for b in arch.stacks[i][0])
  mixers = [b.mixer for b in blocks if isinstance(b.mixer, AttentionSpec)]
  kinds = dict.fromkeys((m.rope, m.head_dim) for m in mixers if m.rope is not None)
  lengths = None
  if any(kind.uses_length for kind, _ in kinds):
    lengths = rope.document_lengths(query.segments, query.positions)
  return Context(query, key, {k: rope.angles(*k, query.positions, lengths) for k in kinds})


@functools.cache
def declared(arch: Architecture) -> dict[str, Declared]:
  """Returns flat {name: declaration} of the whole model, block leaves with their L axis."""
  out = dict(embed_and_head.definition(arch)[1])
  for slot, kind, repeats in arch.blocks():
    for name, p in layer_definition(arch, slot, kind)[1].items():
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
  source: Source | None = None,
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
    source: what the encoder of an encoder-decoder reads; the other tokens are its decoder's.

  Returns:
    (dtype[B, T, D], Routing with a leading axis of the layers that have experts, in order; None for
    a model without).
  """
  x = embed_and_head.embedded(arch, params, tokens, where, dtype, token_types)
  if noise is not None:
    x = x + noise.astype(dtype)
  x = x if inner is None else inner.embedding(x)
  more = {'remat': remat, 'dropout_keys': dropout_keys, 'inner': inner}
  stacks, read = arch.side(is_encoder=False), None
  if source is not None:
    read = dataclasses.replace(source, states=encode(arch, params, source, dtype=dtype, **more))
  context = _context(arch, where, where, stacks)
  context = _with_tables(arch, params, context, stacks, x.shape[1], dtype)
  x, routing = _through(arch, params, x, dataclasses.replace(context, source=read), stacks, **more)
  return embed_and_head.normed(arch, params, x), routing


def encode(
  arch: Architecture,
  params: dict,
  source: Source,
  *,
  dtype: jnp.dtype,
  remat: str = 'none',
  dropout_keys: jax.Array | None = None,
  inner: ModelDropout | None = None,
) -> jax.Array:
  """Returns the states that the encoder of an encoder-decoder gives its decoder, dtype[B, S, D];
  for the arguments see `routed`.
  """
  x = embed_and_head.embedded(arch, params, source.tokens, source.where, dtype)
  x = x if inner is None else inner.source_embedding(x)
  stacks, where = arch.side(is_encoder=True), source.where
  context = _context(arch, where, where, stacks)
  context = _with_tables(arch, params, context, stacks, x.shape[1], dtype)
  more = {'remat': remat, 'dropout_keys': dropout_keys, 'inner': inner}
  x, _ = _through(arch, params, x, context, stacks, **more)
  return embed_and_head.encoder_normed(arch, params, x)


def _with_tables(
  arch: Architecture,
  params: dict,
  context: Context,
  stacks: Sequence[int],
  length: int,
  dtype: jnp.dtype,
) -> Context:
  """Returns the context with what the blocks of some stacks need of tables of positions.

  length: above every position.
  """
  mixers = (b.mixer for i in stacks for b in arch.stacks[i][0])
  own = dict.fromkeys(m for m in mixers if isinstance(m, AttentionSpec) and m.relative)
  tables = {m: params['relative_bias'][m.relative.name] for m in own}
  biases = {
    m: relative_bias.by_distance(t, length, m.relative, m.causal) for m, t in tables.items()
  }
  relative = embed_and_head.relative(arch, params, dtype)
  return dataclasses.replace(context, relative=relative, biases=biases)


def _through(
  arch: Architecture,
  params: dict,
  x: jax.Array,
  context: Context,
  stacks: Sequence[int],
  *,
  remat: str,
  dropout_keys: jax.Array | None,
  inner: ModelDropout | None,
) -> tuple[jax.Array, Routing | None]:
  """Returns x dtype[B, T, D] after some stacks, and what their routers did; see `routed`."""
  routings = []
  for i in stacks:
    pattern, repeats = arch.stacks[i]

    def body(x, layer, i=i, pattern=pattern):
      (weights, keys, own_keys), found = layer, []
      for j, kind in enumerate(pattern):
        slot = f'stack{i}/block{j}'
        block = nnx.merge(layer_definition(arch, slot, kind)[0], weights[f'block{j}'])
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
  return x, _joined(routings)


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
    module = nnx.merge(layer_definition(arch, f'{stack}/{block}', spec_of)[0], weights)
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


def begin(
  arch: Architecture, params: dict, source: Source, capacity: int, *, dtype: jnp.dtype
) -> Cache:
  """Returns the cache of the decoder of an encoder-decoder before its first token, with the keys
  and values of what its encoder read.

  Args:
    arch: the architecture.
    params: nested dict.
    source: what the encoder reads, [B, S].
    capacity: tokens of the decoder that the cache has room for.
    dtype: compute dtype.
  """
  states = encode(arch, params, source, dtype=dtype)
  cache = kv_cache.empty(arch, len(states), capacity, dtype)
  found = {}
  for slot, kind, _ in arch.blocks():
    if kind.cross is None:
      continue
    definition, (stack, block) = layer_definition(arch, slot, kind)[0], slot.split('/')

    def keys_and_values(_, weights, definition=definition):
      return None, nnx.merge(definition, weights).cross.keys_and_values(states)

    _, (keys, values) = jax.lax.scan(keys_and_values, None, params[stack][block])
    found[slot] = {cross_attention.KEYS: keys, cross_attention.VALUES: values}
  return Cache(cache.entries, cache.states | found, cache.tokens, source.where)


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
  stacks = arch.side(is_encoder=False)
  context = _context(arch, where, key, stacks)
  context = _with_tables(arch, params, context, stacks, key.positions.shape[1], dtype)
  if cache.source is not None:
    context = dataclasses.replace(context, source=Source(None, cache.source))
  x = embed_and_head.embedded(arch, params, tokens, where, dtype)
  slots = [*cache.entries.keys() | cache.states.keys()]
  kept = {n: cache.entries.get(n, {}) | cache.states.get(n, {}) for n in slots}
  routings = []
  for i in stacks:
    pattern, repeats = arch.stacks[i]

    # The cache is a carry: as scan inputs and outputs it would be copied whole at every step.
    def body(carry, layer, i=i, pattern=pattern):
      x, kept = carry
      (weights, index), found = layer, []
      for j, kind in enumerate(pattern):
        name = f'stack{i}/block{j}'
        block = nnx.merge(layer_definition(arch, name, kind)[0], weights[f'block{j}'])
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
  out = embed_and_head.normed(arch, params, x), Cache(entries, states, key, cache.source)
  return (*out, _joined(routings)) if routed else out
