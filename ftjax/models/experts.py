"""The linear maps of experts: a matrix for each expert, applied to rows that are sorted by expert.

The maps compute inside the shard_map of moe.py, on the experts and the columns that a shard holds;
`leaves` gives what goes in. With an adapter each expert has factors of its own, on the expert axis
before the rank."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.models import grouped, quantize
from ftjax.models.architecture import Adapter
from ftjax.models.layers import Linear, Param, declare, rounded, scaled
from ftjax.runtime.errors import ConfigError
from ftjax.runtime.sharding import gather, gathered, shard_map, spec, total

# Arrays of a map by name, and the axes of each: nested dicts.
Leaves = tuple[dict, dict]


class Rows(NamedTuple):
  """Where rows belong: of M rows sorted by expert, `sizes` int32[E] of each expert that the shard
  holds, and `owner` int32[M], the expert of each row; rows behind the last group have any owner.
  """

  sizes: jax.Array
  owner: jax.Array


class ExpertLinear(Linear):
  """A linear map of each expert: `w` float32[E, I, O], `lora_a` float32[E, R, I], `lora_b`
  float32[E, R, O].

  Args:
    experts: E.
    top_k: experts that a token is computed by.
    inputs, outputs: I and O.
    axes: logical names of I and O.
  """

  def __init__(self, experts: int, top_k: int, inputs: int, outputs: int, axes: tuple[str, str]):
    self.experts, self.share = experts, top_k / experts
    super().__init__((inputs,), (outputs,), axes, ())

  def leaf(
    self, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, *args, **more
  ) -> Param:
    """Declares a parameter of each expert; see layers.declare."""
    if not shape:  # the scale of an adapter
      return declare(shape, axes, fan_in, *args, **more)
    shape, axes = (self.experts, *shape), ('expert', *axes)
    return declare(shape, axes, fan_in, *args, share=self.share, **more)

  def adapt(self, name: str, rank: int, adapter: Adapter) -> None:
    """See Linear.adapt.

    Raises:
      ConfigError: the adapter drops inputs.
    """
    if adapter.dropout:
      raise ConfigError(
        f'lora.dropout={adapter.dropout} with an adapter on experts ({name}): not supported, as in '
        'PEFT; set lora.dropout=0, or leave the experts out of lora.targets'
      )
    super().adapt(name, rank, adapter)

  @property
  def shape(self) -> tuple[int, ...]:
    """See Linear.shape."""
    return (self.experts, *super().shape)

  @property
  def leaf_axes(self) -> tuple[str, ...]:
    """See Linear.leaf_axes."""
    return ('expert', *super().leaf_axes)

  def leaves(self) -> Leaves:
    """Returns the arrays of the map, and the logical axes of each."""
    (into, out), found, axes = self.axes, {}, {}
    if self.storage:
      found['w'] = {field: p[...] for field, p in self.w.items()}
      axes['w'] = {f: ('expert', *self.axes[3 - p.ndim :]) for f, p in found['w'].items()}
    else:
      found['w'], axes['w'] = self.w[...], ('expert', into, out)
    own = {
      'lora_a': ('expert', 'rank', into),
      'lora_b': ('expert', 'rank', out),
      'lora_a0': ('expert', 'rank', into),
      'lora_b0': ('expert', 'rank', out),
      'lora_m': ('expert', out),
      'lora_scale': (),
    }
    for name, names in own.items():
      leaf = getattr(self, name)
      if leaf is not None:
        found[name], axes[name] = leaf[...], names
    return found, axes

  # Inside a shard_map; p: of `leaves`, the shard's own.

  def multiply(self, p: dict, x: jax.Array, rows: Rows) -> jax.Array:
    """Returns the map of each row by its expert, [M, O] in x's dtype; 0 behind the last group.

    Where `tensor` splits I, it is this shard's part of a sum.
    """
    if self.merged:
      return grouped.dot(x, self._merged(p).astype(x.dtype), rows.sizes)
    y = self._base_product(p, x, rows)
    if self.adapter is None:
      return y
    for sign, a, b in self._signed(p, x.dtype):
      low = scaled(grouped.dot(x, a.swapaxes(1, 2), rows.sizes), sign * p['lora_scale'])
      y = y + grouped.dot(low, b, rows.sizes)
    if self.lora_m is not None:
      y = scaled(y, self._relative_lengths(p)[rows.owner])
    return y

  def _base_product(self, p: dict, x: jax.Array, rows: Rows) -> jax.Array:
    def product(x):
      return grouped.dot(x, self._weights(p, x.dtype), rows.sizes)

    # Both passes unpack: kept for the backward pass, the weights of all layers would be in memory.
    return jax.checkpoint(product)(x) if self.storage else product(x)

  def _whole(self, x: jax.Array, dim: int, name: str) -> jax.Array:
    """Returns x gathered over fsdp along `dim`, if its logical name says that it is split."""
    return gather(x, 'fsdp', dim) if name == 'embed' else x

  def _weights(self, p: dict, dtype: jnp.dtype) -> jax.Array:
    """Returns w as dtype[E, I, O], gathered over fsdp."""
    if not self.storage:
      w = p['w'].astype(dtype)
      for i, name in enumerate(self.axes):
        w = self._whole(w, 1 + i, name)
      return w
    packed = {}
    for field, x in p['w'].items():  # the packed bytes travel
      names = self.axes[3 - x.ndim :]
      for i, name in enumerate(names):
        x = self._whole(x, 1 + i, name)
      packed[field] = x
    return jax.vmap(functools.partial(quantize.unpack, self.storage, dtype=dtype))(packed)

  def _signed(self, p: dict, dtype: jnp.dtype) -> list[tuple[float, jax.Array, jax.Array]]:
    """Returns the factors of the update, (sign, A as dtype[E, R, I], B as dtype[E, R, O])."""
    names = [(1.0, 'lora_a', 'lora_b')]
    if self.lora_a0 is not None:
      names.append((-1.0, 'lora_a0', 'lora_b0'))
    into, out = self.axes
    return [
      (
        sign,
        self._whole(p[a].astype(dtype), 2, into),
        self._whole(p[b].astype(dtype), 2, out),
      )
      for sign, a, b in names
    ]

  def _updated(self, p: dict) -> jax.Array:
    """Returns w + scale * A B, float32[E, I, O]."""
    w = self._weights(p, jnp.float32)
    if self.adapter is None:
      return w
    found = (sign * jnp.einsum('eRI,eRO->eIO', a, b) for sign, a, b in self._signed(p, jnp.float32))
    return w + p['lora_scale'] * sum(found)

  def _relative_lengths(self, p: dict) -> jax.Array:
    """Returns m / |w + scale * A B|, float32[E, O]; see Linear."""
    w = self._updated(p)
    squares = jnp.einsum('eIO,eIO->eO', w, w)
    if self.axes[0] == 'ffn':
      squares = total(squares, 'tensor')
    lengths = jax.lax.stop_gradient(jnp.sqrt(squares))
    m = self._whole(p['lora_m'], 1, self.axes[1])
    is_adapted = (p['lora_scale'] > 0) & (lengths > 0)
    return jnp.where(is_adapted, m / jnp.where(lengths > 0, lengths, 1.0), 1.0)

  def _merged(self, p: dict) -> jax.Array:
    w = self._updated(p)
    if self.lora_m is not None:
      w = w * self._relative_lengths(p)[:, None]
    return rounded(w, self.merged)

  def merged_weights(self) -> jax.Array:
    """Returns the weights of the model after merging, [E, I, O] in its dtype."""
    found, axes = self.leaves()
    specs = jax.tree.map(lambda a: spec(*a), axes, is_leaf=lambda a: isinstance(a, tuple))
    return shard_map(self._merged, (specs,), gathered(*self.leaf_axes))(found)
