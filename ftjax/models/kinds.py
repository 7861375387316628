"""Model kinds: what the rest of the program asks of a model, whatever computes it.

An architecture names its kind; 'decoder', 'encoder' and 'encoder_decoder' are transformer.py.
Callers use the functions below and never import the file that implements a kind. A kind outside the
package is named 'package.module:KIND'.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.models import embed_and_head, lora, transformer
from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens
from ftjax.models.cross_attention import Source
from ftjax.models.dropout import ModelDropout
from ftjax.models.kv_cache import Cache
from ftjax.models.layers import Declared, Dropout
from ftjax.models.logit_chunks import LowRank
from ftjax.models.routing import Routing
from ftjax.runtime import named_object, trees
from ftjax.runtime.errors import ConfigError
from ftjax.runtime.sharding import spec


def _nothing(arch: Architecture, params: Mapping) -> dict[str, jax.Array]:
  del arch, params
  return {}


def _none(arch, declared, params, names, key) -> dict[str, jax.Array]:
  del arch, declared, params, names, key
  return {}


def _same_states(arch, params, x, dropout_keys) -> jax.Array:
  del arch, params, dropout_keys
  return x


def _no_update(arch, params, x, dropout_keys) -> None:
  del arch, params, x, dropout_keys


def _as_it_is(arch, declared, name: str, leaf: jax.Array) -> dict[str, jax.Array]:
  del arch, declared
  return {name: leaf}


@dataclasses.dataclass(frozen=True)
class Kind:
  """The functions of a model kind.

  declared: (arch) -> {parameter name: Declared}. apply: hidden states of whole sequences, see
  transformer.apply; arguments that a call leaves at None are not passed on. decode: of new tokens
  with a cache, see transformer.decode; None where the kind generates no text. head_leaf: (arch) ->
  name of the leaf that maps hidden states to logits or scores. derive: (arch, params without
  derived leaves) -> {name: derived leaf}; computed when weights are loaded, and not while their
  sources train. linear_maps: (arch) -> names of the maps that may have an adapter. adapters: (arch,
  declared, params with base leaves, names, key) ->
  {name: initial value} of adapter leaves; those it leaves out are drawn like base leaves. pack:
  (arch, declared, name, leaf of files) -> {name: leaf as the base is held}. merged: (arch, params,
  name, layer) -> a leaf of the model after merging its adapter, see transformer.merged; None where
  the kind has no adapters. routed: as `apply`, with what the routers did, see transformer.routed;
  None where the kind has no experts. head_update: (arch, params, hidden states, dropout keys or
  None) -> what is added to the logits, or None; see embed_and_head.head_update. head_states: of the
  same arguments, what the head multiplies; see embed_and_head.head_states. label_logits: (arch,
  params, states, logical name of their second axis, dropout or None) -> the numbers of labels; see
  embed_and_head.label_logits; None where the kind has no label head. begin: of an encoder-decoder,
  the cache of its decoder before the first token, see transformer.begin; None for other kinds.
  """

  declared: Callable[[Architecture], Mapping[str, Declared]]
  apply: Callable[..., jax.Array]
  decode: Callable[..., tuple[jax.Array, Cache]] | None
  head_leaf: Callable[[Architecture], str]
  derive: Callable[[Architecture, Mapping], dict[str, jax.Array]] = _nothing
  linear_maps: Callable[[Architecture], tuple[str, ...]] = lambda arch: ()
  adapters: Callable[..., dict[str, jax.Array]] = _none
  pack: Callable[..., dict[str, jax.Array]] = _as_it_is
  merged: Callable[..., jax.Array] | None = None
  routed: Callable[..., tuple[jax.Array, Routing | None]] | None = None
  head_update: Callable[..., LowRank | None] = _no_update
  head_states: Callable[..., jax.Array] = _same_states
  label_logits: Callable[..., jax.Array] | None = None
  begin: Callable[..., Cache] | None = None


DECODER = Kind(
  transformer.declared,
  transformer.apply,
  transformer.decode,
  embed_and_head.head_leaf,
  lora.derive,
  transformer.linear_maps,
  lora.initial,
  lora.pack,
  transformer.merged,
  transformer.routed,
  embed_and_head.head_update,
  embed_and_head.head_states,
  embed_and_head.label_logits,
)
KINDS = {
  'decoder': DECODER,
  'encoder': dataclasses.replace(DECODER, decode=None),
  'encoder_decoder': dataclasses.replace(DECODER, begin=transformer.begin),
}


def of(arch: Architecture) -> Kind:
  """Returns the kind of an architecture.

  Raises:
    ConfigError: no kind of this name.
  """
  found = KINDS.get(arch.kind)
  return named_object.instance('the kind of a model', arch.kind, Kind) if found is None else found


def declared(arch: Architecture) -> Mapping[str, Declared]:
  """Returns flat {name: declaration} of all parameters."""
  return of(arch).declared(arch)


def linear_maps(arch: Architecture) -> tuple[str, ...]:
  """Returns the names of the linear maps that may have an adapter."""
  return of(arch).linear_maps(arch)


def names(arch: Architecture, *origins: str) -> list[str]:
  """Returns the names of the leaves of some origins; see layers.Declared."""
  return [n for n, p in declared(arch).items() if p.origin in origins]


def abstract(arch: Architecture, dtype: jnp.dtype = jnp.float32) -> dict:
  """Returns a nested dict of ShapeDtypeStruct; a leaf without a dtype of its own has `dtype`."""
  return trees.unflatten(
    {n: jax.ShapeDtypeStruct(p.shape, p.dtype or dtype) for n, p in declared(arch).items()}
  )


def axes(arch: Architecture) -> dict:
  """Returns a nested dict of logical-axis tuples, of the same structure."""
  return trees.unflatten({n: p.axes for n, p in declared(arch).items()})


def init(arch: Architecture, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> dict:
  """Returns random parameters: normal with variance 1 / fan_in (norm scales and biases start as
  declared), adapters as their kind begins them; a leaf depends on the key, its name and the leaves
  that it is computed from only. Derived leaves follow from the others.
  """
  plain, leaves = declared(arch.plain()), {}
  for name, p in plain.items():
    if p.origin == 'base':
      leaves |= packed(arch, name, _draw(name, p, key, jnp.float32), dtype)
  return _completed(arch, trees.unflatten(leaves), key, dtype)


def packed(
  arch: Architecture, name: str, leaf: jax.Array, dtype: jnp.dtype
) -> dict[str, jax.Array]:
  """Returns a leaf of the model's files as the base is held, {name: leaf}, in the dtypes that are
  declared, else `dtype`.
  """
  found = declared(arch)
  held = of(arch).pack(arch, found, name, leaf)
  return {n: x.astype(found[n].dtype or dtype) for n, x in held.items()}


def _draw(name: str, p: Declared, key: jax.Array, dtype: jnp.dtype) -> jax.Array:
  where, dtype = spec(*p.axes), p.dtype or dtype
  if not p.fan_in:
    return jnp.full(p.shape, p.constant, dtype, out_sharding=where)
  own = jax.random.fold_in(key, zlib.crc32(name.encode()))
  x = jax.random.normal(own, p.shape, jnp.float32, out_sharding=where)
  if p.padding:
    # A number depends on its flat index alone, so that padding does not change the other rows.
    row = jax.lax.broadcasted_iota(jnp.int32, p.shape, p.axes.index('vocab'), out_sharding=where)
    x = jnp.where(row < p.shape[p.axes.index('vocab')] - p.padding, x, 0.0)
  return (x * p.fan_in**-0.5).astype(dtype)


def with_derived(arch: Architecture, params: dict) -> dict:
  """Returns params with the derived leaves computed from the others, in their own dtypes."""
  if not names(arch, 'derived'):
    return params
  found, flat = declared(arch), trees.flatten(params)
  flat = {n: x for n, x in flat.items() if found[n].origin != 'derived'}
  derived = of(arch).derive(arch, trees.unflatten(flat))
  cast = {n: x.astype(found[n].dtype or x.dtype) for n, x in derived.items()}
  return trees.unflatten(flat | cast)


def _completed(arch: Architecture, params: dict, key: jax.Array, dtype: jnp.dtype) -> dict:
  """Returns params with adapters, where they have none, and derived leaves; see `completed`."""
  found, flat = declared(arch), trees.flatten(params)
  if new := [n for n in names(arch, 'adapter') if n not in flat]:
    made = of(arch).adapters(arch, found, params, new, key)
    made = {n: made[n] if n in made else _draw(n, found[n], key, jnp.float32) for n in new}
    flat |= {n: x.astype(found[n].dtype or dtype) for n, x in made.items()}
  return with_derived(arch, trees.unflatten(flat))


def completed(
  arch: Architecture,
  params: dict,
  sharding: Callable[[str], jax.sharding.Sharding],
  seed: int,
  dtype: jnp.dtype,
) -> dict:
  """Returns params with the leaves that model files do not hold: adapters as `init` makes them,
  where params have none, and derived leaves.

  Args:
    arch: the model.
    params: nested dict of base leaves, and perhaps of adapters.
    sharding: of a leaf, by its name.
    seed: of new adapters.
    dtype: of new adapters that declare none.
  """
  flat, found = trees.flatten(params), declared(arch)
  if not names(arch, 'derived') and all(n in flat for n in names(arch, 'adapter')):
    return params
  new = [n for n in found if n not in flat]

  # What is there stays where it is: as a result of the program it would be copied.
  def make(params):
    whole = _completed(arch, params, jax.random.key(seed), dtype)
    return {n: x for n, x in trees.flatten(whole).items() if n in new}

  made = jax.jit(make, out_shardings={n: sharding(n) for n in new})(params)
  whole = flat | made
  return trees.unflatten({n: whole[n] for n in sorted(whole)})


def of_model(arch: Architecture, params: dict, name: str) -> dict:
  """Returns the parameters of one of several models in `params`, a nested dict.

  Leaves under `name` are the model's own; those that are missing there it shares with the model
  whose leaves stand in `params` itself, such as the base under an adapter.

  Args:
    arch: of the model.
    params: all parameters of a state.
    name: of the model; '': the one in `params` itself.
  """
  shared = trees.flatten(params)
  own = trees.flatten(params.get(name, {})) if name else shared
  return trees.unflatten({n: own[n] if n in own else shared[n] for n in sorted(declared(arch))})


def with_merged(arch: Architecture, dtype: str) -> Architecture:
  """Returns the architecture that computes with the weights after merging its adapter, in `dtype`.

  The parameters stay base and adapter: each weight is merged where it is used.
  """
  return dataclasses.replace(arch, adapter=dataclasses.replace(arch.adapter, merged=dtype))


@functools.partial(jax.jit, static_argnums=(0, 2))
def merged(
  arch: Architecture, params: dict, name: str, layer: jax.Array | None = None
) -> jax.Array:
  """Returns a leaf of the model after merging; arch: of `with_merged`, layer: int32[] of a leaf
  with an L axis. See transformer.merged.
  """
  return of(arch).merged(arch, params, name, layer)


def apply(
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
) -> jax.Array:
  """Returns hidden states dtype[B, T, D] of tokens int32[B, T]; see transformer.apply."""
  more = {'dropout_keys': dropout_keys, 'token_types': token_types, 'inner': inner}
  more |= {'source': source}
  more = {k: v for k, v in more.items() if v is not None}
  return of(arch).apply(arch, params, tokens, where, dtype=dtype, remat=remat, noise=noise, **more)


def routed(
  arch: Architecture, params: dict, tokens: jax.Array, where: Tokens, **how: Any
) -> tuple[jax.Array, Routing | None]:
  """Returns (what `apply` returns, what the routers did; None for a model without experts).

  how: the named arguments of `apply`.
  """
  function = of(arch).routed
  if function is None:
    return apply(arch, params, tokens, where, **how), None
  return function(arch, params, tokens, where, **how)


def begin(
  arch: Architecture, params: dict, source: Source, capacity: int, *, dtype: jnp.dtype
) -> Cache:
  """Returns the cache of the decoder of an encoder-decoder; see transformer.begin."""
  return of(arch).begin(arch, params, source, capacity, dtype=dtype)


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
  """Returns (hidden states dtype[B, T, D], the extended cache), and with `routed` what the routers
  did; see transformer.decode.

  Raises:
    ConfigError: the kind generates no text.
  """
  function = of(arch).decode
  if function is None:
    raise ConfigError(no_text(arch))
  more = {'routed': True} if routed else {}
  return function(arch, params, tokens, where, cache, at, dtype=dtype, **more)


def no_text(arch: Architecture) -> str:
  """Returns why a model generates no text, and what to do."""
  text = f'a model of kind {arch.kind!r} (family {arch.family!r}) generates no text'
  if not arch.is_encoder:
    return text
  return (
    f'{text}: its tokens attend to later ones. Give a decoder (docs/families.md) to generate; an '
    'encoder scores or labels text'
  )


def head_weights(arch: Architecture, params: Mapping) -> jax.Array:
  """Returns the head's weights [V, D], which a tied model shares with its embedding; of a reward
  model the score's [R, D]. After merging an adapter of the head (`with_merged`) those with it.
  """
  name = of(arch).head_leaf(arch)
  if arch.adapter and arch.adapter.merged and arch.adapter.find(name.rpartition('/')[0]):
    whole = merged(arch, params, name)
    return jax.sharding.reshard(whole, spec(*declared(arch)[name].axes))
  leaf = params
  for part in name.split('/'):
    leaf = leaf[part]
  return leaf


def head_update(
  arch: Architecture, params: Mapping, x: jax.Array, dropout_keys: jax.Array | None = None
) -> LowRank | None:
  """Returns what an adapter of the head adds to the logits of hidden states x [B, T, D], or None.

  dropout_keys: key[B], of the rows, for the dropout of adapters; None: nothing is dropped.
  """
  return of(arch).head_update(arch, params, x, dropout_keys)


def head_states(
  arch: Architecture, params: Mapping, x: jax.Array, dropout_keys: jax.Array | None = None
) -> jax.Array:
  """Returns what the head multiplies, [B, T, D], of hidden states x; they are the same but for a
  masked language model. dropout_keys: as in `head_update`.
  """
  return of(arch).head_states(arch, params, x, dropout_keys)


def label_logits(
  arch: Architecture,
  params: Mapping,
  x: jax.Array,
  seq: str | None = 'seq',
  dropout: Dropout | None = None,
) -> jax.Array:
  """Returns the numbers of the labels, float32[B, T, R]; see score_head.Score.

  Raises:
    ConfigError: the kind has no label head.
  """
  function = of(arch).label_logits
  if function is None:
    raise ConfigError(f'a model of kind {arch.kind!r} gives no labels')
  return function(arch, params, x, seq, dropout)
