"""Model kinds: what the rest of the program asks of a model, whatever computes it.

An architecture names its kind; 'decoder' is transformer.py. Callers use the functions below and
never import the file that implements a kind. A kind outside the package is named
'package.module:KIND'.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from ftjax.models import transformer
from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens
from ftjax.models.kv_cache import Cache
from ftjax.models.layers import Declared
from ftjax.runtime import named_object, trees
from ftjax.runtime.errors import ConfigError
from ftjax.runtime.sharding import spec


def _nothing(arch: Architecture, params: Mapping) -> dict[str, jax.Array]:
  del arch, params
  return {}


@dataclasses.dataclass(frozen=True)
class Kind:
  """The functions of a model kind.

  declared: (arch) -> {parameter name: Declared}. apply: hidden states of whole sequences, see
  transformer.apply. decode: of new tokens with a cache, see transformer.decode; None where the kind
  generates no text. head_leaf: (arch) -> name of the leaf that maps hidden states to logits or
  scores. derive: (arch, params without derived leaves) -> {name: derived leaf}; computed when
  weights are loaded, and not while their sources train.
  """

  declared: Callable[[Architecture], Mapping[str, Declared]]
  apply: Callable[..., jax.Array]
  decode: Callable[..., tuple[jax.Array, Cache]] | None
  head_leaf: Callable[[Architecture], str]
  derive: Callable[[Architecture, Mapping], dict[str, jax.Array]] = _nothing


DECODER = Kind(transformer.declared, transformer.apply, transformer.decode, transformer.head_leaf)
KINDS = {'decoder': DECODER}


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
  declared); a leaf depends on the key and its name only. Derived leaves follow from the others.
  """
  leaves = {n: _draw(n, p, key, dtype) for n, p in declared(arch).items() if p.origin != 'derived'}
  return with_derived(arch, trees.unflatten(leaves))


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
  new = [n for n in names(arch, 'adapter') if n not in flat]
  if not new and not names(arch, 'derived'):
    return params

  def make(params: dict) -> dict:
    key = jax.random.key(seed)
    flat = trees.flatten(params) | {n: _draw(n, found[n], key, dtype) for n in new}
    return with_derived(arch, trees.unflatten(flat))

  out_shardings = trees.unflatten({n: sharding(n) for n in found})
  return jax.jit(make, out_shardings=out_shardings)(params)


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
  """Returns hidden states dtype[B, T, D] of tokens int32[B, T]; see transformer.apply."""
  return of(arch).apply(arch, params, tokens, where, dtype=dtype, remat=remat, noise=noise)


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
  """Returns (hidden states dtype[B, T, D], the extended cache); see transformer.decode.

  Raises:
    ConfigError: the kind generates no text.
  """
  function = of(arch).decode
  if function is None:
    raise ConfigError(f'a model of kind {arch.kind!r} generates no text')
  return function(arch, params, tokens, where, cache, at, dtype=dtype)


def head_weights(arch: Architecture, params: Mapping) -> jax.Array:
  """Returns the head's weights [V, D], which a tied model shares with its embedding; of a reward
  model the score's [R, D].
  """
  leaf = params
  for part in of(arch).head_leaf(arch).split('/'):
    leaf = leaf[part]
  return leaf
