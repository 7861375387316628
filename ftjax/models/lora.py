"""Low-rank adapters and packed weights of a model: which linear maps have them, and their initial
values (Hu et al. 2021, "LoRA").

What a linear map computes with them is in layers.py. Ranks may differ by layer: the factors of a
stack have the largest rank, and the rows beyond a layer's own are zero; they have no gradient, so
they stay zero.
"""

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ftjax.models import quantize
from ftjax.models.architecture import AdaptedMap, Architecture
from ftjax.models.layers import Declared, Linear
from ftjax.runtime import trees
from ftjax.runtime.sharding import spec

# (graph definition, {name: Declared}) of a module.
Definition = tuple[Any, Mapping[str, Declared]]
QUANTIZED = ('int8', 'nf4')


def linear_maps(module: nnx.Module) -> list[str]:
  """Returns the names of the linear maps in a module."""
  found = nnx.iter_graph(module)
  return ['/'.join(map(str, path)) for path, node in found if isinstance(node, Linear)]


def define(module: nnx.Module, prefix: str, arch: Architecture) -> Definition:
  """Returns the definition of a module whose parameters' names begin with `prefix`, with the
  adapters of its linear maps and its base as `arch` holds it.
  """
  adapter = arch.adapter
  for path, node in nnx.iter_graph(module):
    if not isinstance(node, Linear):
      continue
    name = '/'.join(map(str, path))
    if arch.base in QUANTIZED:
      node.pack(arch.base, arch.block)
    if adapter and (found := adapter.find(prefix + name)):
      node.adapt(name, max(found.ranks), adapter)
    if adapter:
      node.merged = adapter.merged
  definition, state = nnx.split(module)
  params = nnx.to_pure_dict(
    jax.tree.map(lambda p: p, state, is_leaf=lambda x: isinstance(x, nnx.Variable)),
    extract_fn=lambda p: p.declared,
  )
  return definition, {n: _held(p, prefix + n, arch) for n, p in trees.flatten(params).items()}


def _held(p: Declared, name: str, arch: Architecture) -> Declared:
  """Returns a declaration with the origin and dtype that the adapter and the base give it."""
  if p.origin != 'base':
    return p
  adapter = arch.adapter
  if adapter and (name in adapter.trained or name.startswith('score/')):
    return p._replace(origin='adapter', dtype='float32')
  plain = 'bfloat16' if arch.base in QUANTIZED else arch.base
  return p._replace(dtype=p.dtype or plain)


def derive(arch: Architecture, params: Mapping) -> dict[str, jax.Array]:
  """Returns the scales of all adapters, {`.../lora_scale`: float32[L]}, of the head float32[]."""
  del params
  maps = arch.adapter.maps if arch.adapter else ()
  return {
    f'{m.name}/lora_scale': jnp.asarray(m.scales if m.is_stacked else m.scales[0], jnp.float32)
    for m in maps
  }


def pack(
  arch: Architecture, declared: Mapping[str, Declared], name: str, leaf: jax.Array
) -> dict[str, jax.Array]:
  """Returns a leaf of the model's files as the base is held: {name: leaf}, or its packed parts
  {name/codes: ..., ...}, matrix by matrix.
  """
  codes = declared.get(f'{name}/codes')
  if codes is None:
    return {name: leaf}
  *lead, inputs, outputs = codes.shape
  inputs *= codes.weights
  rows = jax.lax.reshape(leaf, (*lead, inputs, outputs), out_sharding=spec(*codes.axes))

  def one(w):
    return quantize.PACK[arch.base](w, arch.block)._asdict()

  if len(lead) > 1:  # experts
    one = jax.vmap(one)
  found = jax.lax.map(one, rows) if lead else one(rows)
  return {f'{name}/{field}': part for field, part in found.items()}


# Initial values.


def initial(
  arch: Architecture,
  declared: Mapping[str, Declared],
  params: Mapping,
  names: Sequence[str],
  key: jax.Array,
) -> dict[str, jax.Array]:
  """Returns the initial values of adapter leaves, in a computation under jit.

  A is uniform within +-1 / sqrt(inputs) and B is zero, as in PEFT; with pissa both are the
  principal components of the base's weights. DoRA starts with the lengths of the base's weights.

  Args:
    arch: the model.
    declared: of `arch`.
    params: nested dict with the base leaves.
    names: of the leaves wanted.
    key: of the random numbers.
  """
  out, flat = {}, trees.flatten(params)
  for m in arch.adapter.maps if arch.adapter else ():
    own = [n for n in names if n.rpartition('/')[0] == m.name]
    if not own:
      continue
    made = _factors(m, arch, declared, flat, key)
    if arch.adapter.dora:
      made['lora_m'] = _lengths(m, arch, declared, flat)
    out |= {n: _placed(made[n.rpartition('/')[2]], declared[n]) for n in own}
  return out


def _placed(x: jax.Array, p: Declared) -> jax.Array:
  """Returns x as the leaf that is declared, with zeros where it is padding."""
  if p.padding:
    ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    x = jnp.where(ids < x.shape[-1] - p.padding, x, 0.0)
  return jax.lax.reshape(x, p.shape, out_sharding=spec(*p.axes))


def _own_key(key: jax.Array, name: str) -> jax.Array:
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


class _Sizes(NamedTuple):
  """Sizes of an adapted map: experts () or (E,). The head is one layer."""

  layers: int
  experts: tuple[int, ...]
  rank: int
  inputs: int
  outputs: int


def _sizes(m, declared) -> _Sizes:
  a, b = (declared[f'{m.name}/lora_{x}'] for x in 'ab')
  at = a.axes.index('rank')
  inputs, outputs = math.prod(a.shape[at + 1 :]), math.prod(b.shape[at + 1 :])
  layers = a.shape[0] if at else 1
  return _Sizes(layers, a.shape[1:at], a.shape[at], inputs, outputs)


def _factors(m, arch, declared, flat, key) -> dict[str, jax.Array]:
  """Returns lora_a and lora_b as [L, R, I] and [L, R, O], with pissa also lora_a0 and lora_b0; an
  axis of experts follows L where there is one.
  """
  size = _sizes(m, declared)
  kept = np.arange(size.rank) < np.asarray(m.ranks)[:, None]  # rows of the layer's own rank
  kept = kept.reshape(size.layers, *(1 for _ in size.experts), size.rank)
  own = _own_key(key, m.name)
  if arch.adapter.pissa:
    a, b = _principal(m, arch, declared, flat, size.rank, own)
    a, b = (jnp.where(kept[..., None], x, 0.0) for x in (a, b))
    return {'lora_a': a, 'lora_b': b, 'lora_a0': a, 'lora_b0': b}
  lead = (size.layers, *size.experts, size.rank)
  a = jax.random.uniform(own, (*lead, size.inputs), minval=-1.0) / math.sqrt(size.inputs)
  a = jnp.where(kept[..., None], a, 0.0)
  return {'lora_a': a, 'lora_b': jnp.zeros((*lead, size.outputs))}


def base_weights(
  m: AdaptedMap, arch: Architecture, flat: Mapping[str, jax.Array], layer: jax.Array | int
) -> jax.Array:
  """Returns the base's weights of one layer of a linear map, float32[*inputs, *outputs], or
  float32[I, O] where they are packed, after an axis of experts if there is one; of the head
  float32[D, V]; not split over devices.
  """

  def pick(leaf):
    one = leaf
    if m.is_stacked:
      one = jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)
    return jax.sharding.reshard(one, jax.P())

  if f'{m.name}/w' not in flat:
    prefix = f'{m.name}/w/'
    packed = {n[len(prefix) :]: pick(x) for n, x in flat.items() if n.startswith(prefix)}
    unpack = functools.partial(quantize.unpack, arch.base, dtype=jnp.float32)
    return jax.vmap(unpack)(packed) if packed['codes'].ndim == 3 else unpack(packed)
  w = pick(flat[f'{m.name}/w']).astype(jnp.float32)
  return w.T if m.name == 'head' else w


def _by_layer(m, arch, declared, flat, function) -> Any:
  """Returns function(weights float32[I, O], layer, expert) of every layer, and of every expert in
  it, stacked.
  """
  size = _sizes(m, declared)

  def one(layer):
    w = base_weights(m, arch, flat, layer)
    w = w.reshape(*size.experts, size.inputs, size.outputs)
    if not size.experts:
      return function(w, layer, 0)
    numbers = jnp.arange(*size.experts)
    return jax.lax.map(lambda item: function(item[0], layer, item[1]), (w, numbers))

  return jax.lax.map(one, jnp.arange(len(m.ranks)))


def _lengths(m, arch, declared, flat) -> jax.Array:
  """Returns the length of each output's weights, float32[L, O]."""
  return _by_layer(m, arch, declared, flat, lambda w, layer, expert: jnp.sqrt((w * w).sum(0)))


# Of the range finder: columns beyond the rank, and passes over the matrix.
_OVERSAMPLED, _PASSES = 8, 8


def _principal(m, arch, declared, flat, rank, key) -> tuple[jax.Array, jax.Array]:
  """Returns (A [L, R, I], B [L, R, O]) whose product times the scale is the part of the weights
  with the largest singular values (Meng et al. 2024, eq. 2 and 3), by randomized subspace iteration
  (Halko et al. 2011, algorithm 4.4).
  """
  scales = jnp.asarray(m.scales, jnp.float32)

  def one(w, layer, expert):
    width = min(rank + _OVERSAMPLED, *w.shape)
    own = jax.random.fold_in(key, layer + len(m.ranks) * expert)
    q = jax.random.normal(own, (w.shape[1], width))
    for _ in range(_PASSES):
      q, _ = jnp.linalg.qr(w @ q)
      q, _ = jnp.linalg.qr(w.T @ q)
    u, s, v = jnp.linalg.svd(w @ q, full_matrices=False)
    each = jnp.sqrt(s[:rank] / scales[layer])
    a, b = u[:, :rank].T * each[:, None], (v @ q.T)[:rank] * each[:, None]
    short = rank - a.shape[0]  # a rank above that of the matrix
    return tuple(jnp.pad(x, ((0, short), (0, 0))) for x in (a, b))

  return _by_layer(m, arch, declared, flat, one)
