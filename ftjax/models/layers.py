"""Parts of a block that own parameters: projections and norms, each a shape with logical axes.

Modules declare parameters; they are merged with plain arrays inside the traced function (see
transformer.py), so they carry no state and no randomness. Weights are cast to the compute dtype and
gathered over `fsdp` where they are used: under a scan that is one layer at a time, and the gather
moves the cast bytes."""

import dataclasses
import functools
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from ftjax.models import quantize
from ftjax.models.architecture import Adapter, Norm
from ftjax.runtime.sharding import axis_size, gather, gathered, shard_map, spec, zigzag


class Declared(NamedTuple):
  """What is declared of a parameter.

  shape: sizes. axes: their logical names. fan_in: see `declare`; 0 for a bias or a scale.
  constant: initial value of such a leaf. origin: 'base', from the model's files; 'adapter', added
  to it and trained; or 'derived', computed from other leaves by the model kind, never trained,
  saved or exported. dtype: name of its own dtype, '' for the run's model.param_dtype. is_fixed: an
  adapter leaf that keeps its initial value; it is saved. weights: numbers of the model that one
  number of the leaf stands for: 2 where two are packed into a byte, 0 where it belongs to others.
  padding: how many of the last rows along the axis 'vocab' belong to no token: they are 0, no
  gradient reaches them, and files do not hold them. share: of the leaf that a token is multiplied
  with, below 1 for experts.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  fan_in: int
  constant: float
  origin: str = 'base'
  dtype: str = ''
  is_fixed: bool = False
  weights: int = 1
  padding: int = 0
  share: float = 1.0

  @property
  def file_shape(self) -> tuple[int, ...]:
    """The shape without the padding, as files hold the parameter."""
    return tuple(
      n - self.padding if axis == 'vocab' else n
      for n, axis in zip(self.shape, self.axes, strict=True)
    )


class Param(nnx.Param):
  """A parameter with `declared: Declared` as metadata; see `declare`."""


def declare(
  shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, constant: float = 0.0, **more: Any
) -> Param:
  """Returns a declared, abstract parameter: float32[shape]; nothing is allocated.

  Args:
    shape: sizes.
    axes: logical names of them.
    fan_in: numbers that each result sums over, which sets the initial variance; 0 for a leaf that
      is no matrix: a bias, or a scale.
    constant: initial value of such a leaf.
    more: further fields of Declared.
  """
  start = jax.ShapeDtypeStruct(shape, jnp.float32)
  return Param(start, declared=Declared(shape, axes, fan_in, constant, **more))


@dataclasses.dataclass(frozen=True)
class Dropout:
  """Dropout of one layer's adapter inputs (Srivastava et al. 2014), in a training step.

  rate: share of the numbers that become 0. keys: key[B], of the rows in this layer.
  """

  rate: float
  keys: jax.Array

  def __call__(self, name: str, x: jax.Array, is_split: bool = True) -> jax.Array:
    """Returns x [B, T, I] with numbers dropped and the others scaled up.

    Args:
      name: of the linear map that reads x; each has numbers of its own.
      x: the numbers.
      is_split: whether T is an axis of tokens, in the order of sharding.zigzag.
    """
    own = zlib.crc32(name.encode())
    order = zigzag(x.shape[1], axis_size('context') if is_split else 1)

    def draw(key):
      return jax.random.bernoulli(jax.random.fold_in(key, own), 1 - self.rate, x.shape[1:])[order]

    kept = jax.sharding.reshard(jax.vmap(draw)(self.keys), jax.typeof(x).sharding.spec)
    return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


class Linear(nnx.Module):
  """A projection over the trailing axes of x: `w` float32[*inputs, *outputs], and `b`
  float32[*outputs] where there is a bias.

  With an adapter (`adapt`): y = x w + scale * (x A) B + b, with A, `lora_a` float32[R, *inputs],
  and B, `lora_b` float32[R, *outputs] (Hu et al. 2021, eq. 3).

  Args:
    inputs: sizes of the contracted axes, the last ones of x.
    outputs: sizes of the axes that replace them.
    axes: logical names of w's axes.
    out: logical names of the result's axes, batch and seq first.
    bias: whether `b` is added, in the compute dtype.
    fan_in: see `declare`; 0: the inputs.
  """

  lora_a = lora_b = lora_scale = lora_m = lora_a0 = lora_b0 = None

  def __init__(
    self,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    axes: tuple[str, ...],
    out: tuple[str, ...],
    bias: bool = False,
    fan_in: int = 0,
  ):
    self.inputs, self.outputs, self.axes, self.out = inputs, outputs, axes, out
    self.w = self.leaf((*inputs, *outputs), axes, fan_in or math.prod(inputs))
    self.b = self.leaf(outputs, out[2:], 0) if bias else None
    self.storage, self.name, self.adapter, self.merged = '', '', None, ''

  leaf = staticmethod(declare)

  @property
  def shape(self) -> tuple[int, ...]:
    """The sizes of w's axes."""
    return (*self.inputs, *self.outputs)

  @property
  def leaf_axes(self) -> tuple[str, ...]:
    """The logical names of w's axes."""
    return self.axes

  # What is declared beside w and b.

  def pack(self, storage: str, block: int) -> None:
    """Declares `w` as packed numbers; storage: 'int8' or 'nf4', block: see quantize.py."""
    self.storage = storage
    inputs, outputs = math.prod(self.inputs), math.prod(self.outputs)
    whole = jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)
    pack = functools.partial(quantize.PACK[storage], block=block)
    parts = jax.eval_shape(pack, whole)._asdict()
    self.w = nnx.Dict(
      {
        field: self.leaf(
          p.shape,
          self._packed_axes[2 - p.ndim :],
          inputs if field == 'codes' else 0,
          dtype=p.dtype.name,
          weights=inputs * outputs // p.size if field == 'codes' else 0,
        )
        for field, p in parts.items()
      }
    )

  def adapt(self, name: str, rank: int, adapter: Adapter) -> None:
    """Declares an adapter; see architecture.Adapter. name: of the map, for its dropout."""
    self.name, self.adapter = name, adapter
    own = {'origin': 'adapter', 'dtype': 'float32'}

    def factor(sizes, axes, **more):
      return self.leaf((rank, *sizes), ('rank', *axes), rank, **own, **more)

    self.lora_a = factor(self.inputs, self._in_axes)
    self.lora_b = factor(self.outputs, self._out_axes)
    self.lora_scale = self.leaf((), (), 0, 1.0, origin='derived', dtype='float32')
    if adapter.dora:
      self.lora_m = self.leaf(self.outputs, self._out_axes, 0, 1.0, **own)
    if adapter.pissa:
      self.lora_a0 = factor(self.inputs, self._in_axes, is_fixed=True)
      self.lora_b0 = factor(self.outputs, self._out_axes, is_fixed=True)

  @property
  def _in_axes(self) -> tuple[str, ...]:
    return self.axes[: len(self.inputs)]

  @property
  def _out_axes(self) -> tuple[str, ...]:
    return self.axes[len(self.inputs) :]

  @property
  def _packed_axes(self) -> tuple[str, str]:
    """Logical axes of w as a matrix: only the first of merged axes may be split over devices."""
    return self._in_axes[0], self._out_axes[0]

  # What is computed.

  def __call__(self, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
    """Maps x [B, T, *inputs] to [B, T, *outputs] in x's dtype. dropout: of the adapter's input."""
    lead, last = x.shape[:2], self.out[2]
    x = x.reshape(*lead, math.prod(self.inputs))
    if self.merged:
      y = product(x, self.merged_weights().astype(x.dtype), last)
    elif self.storage:
      y = self._packed_product(x, last)
    else:
      y = product(x, self._base(x.dtype), last)
    if self.adapter is not None and not self.merged:
      y = y + self._low_rank(dropout(self.name, x) if dropout else x)
      if self.lora_m is not None:
        y = scaled(y, self._lengths()[None, None])
    y = jax.lax.reshape(y, (*lead, *self.outputs), out_sharding=spec(*self.out))
    return y if self.b is None else y + self.b[...].astype(y.dtype)[None, None]

  def _base(self, dtype: jnp.dtype) -> jax.Array:
    """Returns w as dtype[I, O], gathered over fsdp."""
    if not self.storage:
      w = jax.sharding.reshard(self.w[...].astype(dtype), gathered(*self.axes))
      return w.reshape(math.prod(self.inputs), math.prod(self.outputs))
    return self._unpacked({field: p[...] for field, p in self.w.items()}, dtype)

  def _unpacked(self, packed: dict[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Returns the weights in `packed` as dtype[I, O], gathered over fsdp."""
    names = self._packed_axes
    axes = {field: names[2 - p.ndim :] for field, p in packed.items()}

    def unpack(packed):
      whole = {  # the packed bytes travel
        field: gather(p, 'fsdp', axes[field].index('embed')) if 'embed' in axes[field] else p
        for field, p in packed.items()
      }
      return quantize.unpack(self.storage, whole, dtype)

    specs = {field: spec(*a) for field, a in axes.items()}
    return shard_map(unpack, (specs,), gathered(*names))(packed)

  def _packed_product(self, x: jax.Array, last: str | None) -> jax.Array:
    """Returns x [B, T, I] @ w [I, O] for packed weights, which have no gradient. Both passes unpack
    them: kept for the backward pass, those of all layers would be in memory.
    """

    into, out = jax.typeof(x).sharding.spec, spec('batch', 'seq', last)

    def forward(x, packed):
      # As a plain product: the checkpoint policy of remat='dots' does not see into a custom_vjp.
      return _plain_product(x, self._unpacked(packed, x.dtype), out), packed

    def backward(packed, g):
      return _plain_product(g, self._unpacked(packed, g.dtype).T, into), None

    multiply = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    multiply.defvjp(forward, backward)
    return multiply(x, {field: p[...] for field, p in self.w.items()})

  def _factors(self, a: Param, b: Param, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Returns (A as dtype[I, R], B as dtype[R, O])."""
    a = jax.sharding.reshard(a[...].astype(dtype), gathered('rank', *self._in_axes))
    b = jax.sharding.reshard(b[...].astype(dtype), gathered('rank', *self._out_axes))
    return a.reshape(len(a), math.prod(self.inputs)).T, b.reshape(len(b), math.prod(self.outputs))

  def _pairs(self, dtype: jnp.dtype) -> list[tuple[float, tuple[jax.Array, jax.Array]]]:
    """Returns the signed factors of the update: those of training, less those of its start."""
    out = [(1.0, self._factors(self.lora_a, self.lora_b, dtype))]
    if self.lora_a0 is not None:
      out.append((-1.0, self._factors(self.lora_a0, self.lora_b0, dtype)))
    return out

  def _low_rank(self, x: jax.Array) -> jax.Array:
    """Returns scale * (x A) B, [B, T, O]."""
    return sum(
      product(scaled(product(x, a, None), sign * self.lora_scale[...]), b, self.out[2])
      for sign, (a, b) in self._pairs(x.dtype)
    )

  def _update(self) -> jax.Array:
    """Returns scale * A B, float32[I, O]."""
    where = gathered(*self._packed_axes)
    found = (
      sign * jnp.einsum('IR,RO->IO', a, b, out_sharding=where)
      for sign, (a, b) in self._pairs(jnp.float32)
    )
    return self.lora_scale[...] * sum(found)

  def _lengths(self) -> jax.Array:
    """Returns m / |w + scale * A B|, float32[O]: the length is a constant of the gradient (Liu et
    al. 2024, section 4.3). 1 in a layer without an adapter, whose scale
    is 0, and for an output whose weights are 0.
    """
    w = self._base(jnp.float32) + self._update()
    squares = jnp.einsum('IO,IO->O', w, w, out_sharding=gathered(self._out_axes[0]))
    lengths = jax.lax.stop_gradient(jnp.sqrt(squares))
    m = jax.sharding.reshard(self.lora_m[...], gathered(*self._out_axes))
    is_adapted = (self.lora_scale[...] > 0) & (lengths > 0)
    return jnp.where(is_adapted, m.reshape(-1) / jnp.where(lengths > 0, lengths, 1.0), 1.0)

  def whole_weights(self, dtype: jnp.dtype) -> jax.Array:
    """Returns the weights with what an adapter adds, as dtype[I, O], gathered over fsdp: for inputs
    that are no rows of the batch.
    """
    if self.adapter is None:
      return self._base(dtype)
    if self.merged:
      return self.merged_weights().astype(dtype)
    w = self._base(jnp.float32) + self._update()
    return (w if self.lora_m is None else w * self._lengths()[None]).astype(dtype)

  def merged_weights(self) -> jax.Array:
    """Returns the weights of the model after merging, [I, O] in its dtype: computed in float32 and
    rounded once.
    """
    w = self._base(jnp.float32)
    if self.adapter is not None:
      w = w + self._update()
    if self.lora_m is not None:
      w = w * self._lengths()[None]
    return rounded(w, self.merged)


# For the gradient x is kept as it came, and not its float32 copy.
@functools.partial(jax.checkpoint, prevent_cse=False)
def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns x times a float32 factor, in x's dtype. A factor that was rounded to bfloat16 first
  would be wrong by the same amount for all numbers, and one near 1 would change none.
  """
  return (x.astype(jnp.float32) * factor).astype(x.dtype)


def rounded(x: jax.Array, dtype: str) -> jax.Array:
  """Returns float32[...] as `dtype`, rounded. A compiler may leave out a rounding whose result
  becomes float32 again, but not a reduction of the precision.
  """
  kind = jnp.finfo(dtype)
  return jax.lax.reduce_precision(x, kind.nexp, kind.nmant).astype(dtype)


def product(x: jax.Array, w: jax.Array, last: str | None) -> jax.Array:
  """Returns x [B, T, I] @ w [I, O]; last: logical name of O."""
  if jax.sharding.get_abstract_mesh().shape['context'] == 1:
    # One matrix product: with B and T apart, the compiler transposes copies of x for the gradient
    # of w.
    y = _multiply(x.reshape(-1, x.shape[-1]), w, spec('batch', last))
    shape = (*x.shape[:2], w.shape[1])
    return jax.lax.reshape(y, shape, out_sharding=spec('batch', 'seq', last))
  # Merging two split axes would move the activations.
  return jnp.einsum('BTi,io->BTo', x, w, out_sharding=spec('batch', 'seq', last))


def _plain_product(x: jax.Array, w: jax.Array, out: P) -> jax.Array:
  """Returns x [B, T, I] @ w [I, O]; out: the result's layout. JAX derives its gradient."""
  if jax.sharding.get_abstract_mesh().shape['context'] > 1:
    return jnp.einsum('BTi,io->BTo', x, w, out_sharding=out)
  y = jnp.einsum('ni,io->no', x.reshape(-1, x.shape[-1]), w, out_sharding=P(out[0], out[2]))
  return jax.lax.reshape(y, (*x.shape[:2], w.shape[1]), out_sharding=out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x: jax.Array, w: jax.Array, out: P) -> jax.Array:
  """Returns x [n, i] @ w [i, o]. Its gradient asks for [i, o]: left alone it comes transposed."""
  return jnp.einsum('ni,io->no', x, w, out_sharding=out)


def _multiply_forward(x, w, out):
  # Not _multiply: the checkpoint policy of remat='dots' does not see into a custom_vjp.
  return jnp.einsum('ni,io->no', x, w, out_sharding=out), (x, w)


def _multiply_backward(out, saved, g):
  del out
  x, w = saved
  dx = jnp.einsum('no,io->ni', g, w, out_sharding=jax.typeof(x).sharding)
  return dx, jnp.einsum('ni,no->io', x, g, out_sharding=jax.typeof(w).sharding)


_multiply.defvjp(_multiply_forward, _multiply_backward)


class Normalize(nnx.Module):
  """(x - mean) / rms(x - mean) * (offset + scale) + bias over the last axes, in float32; without
  the mean for kind 'rms' (Zhang and Sennrich 2019, eq. 4; 'layer': Ba et al. 2016).

  Args:
    shape: sizes of the axes that are normalized together.
    norm: how.
    axes: their logical names.
  """

  b = None

  def __init__(self, shape: tuple[int, ...], norm: Norm, axes: tuple[str, ...] = ('norm',)):
    self.norm, self.over = norm, tuple(range(-len(shape), 0))
    self.scale = declare(shape, axes, 0, constant=1.0 - norm.offset)
    if norm.bias:
      self.b = declare(shape, axes, 0)

  def __call__(self, x: jax.Array) -> jax.Array:
    x32, lead = x.astype(jnp.float32), (None,) * (x.ndim - len(self.over))
    if self.norm.kind == 'layer':
      x32 = x32 - jnp.mean(x32, axis=self.over, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=self.over, keepdims=True) + self.norm.eps)
    scale = self.scale[...].astype(jnp.float32)
    if self.norm.offset:
      scale = scale + self.norm.offset
    y = x32 * inverse * scale[lead]
    if self.b is not None:
      y = y + self.b[...].astype(jnp.float32)[lead]
    return y.astype(x.dtype)
