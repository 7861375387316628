"""Parts of a block that own parameters: projections and norms, each a shape with logical axes.

Modules declare parameters; they are merged with plain arrays inside the traced function (see
transformer.py), so they carry no state and no randomness. Weights are cast to the compute dtype and
gathered over `fsdp` where they are used: under a scan that is one layer at a time, and the gather
moves the cast bytes."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from ftjax.models.architecture import Norm
from ftjax.runtime.sharding import gathered, spec


class Declared(NamedTuple):
  """What is declared of a parameter.

  shape: sizes. axes: their logical names. fan_in: see `declare`; 0 for a bias or a scale.
  constant: initial value of such a leaf. origin: 'base', from the model's files; 'adapter', added
  to it and trained; or 'derived', computed from other leaves by the model kind, never trained,
  saved or exported. dtype: name of its own dtype, '' for the run's model.param_dtype. padding: how
  many of the last rows along the axis 'vocab' belong to no token: they are 0, no gradient reaches
  them, and files do not hold them.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  fan_in: int
  constant: float
  origin: str = 'base'
  dtype: str = ''
  padding: int = 0

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
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  fan_in: int,
  constant: float = 0.0,
  padding: int = 0,
) -> Param:
  """Returns a declared, abstract parameter: float32[shape]; nothing is allocated.

  Args:
    shape: sizes.
    axes: logical names of them.
    fan_in: numbers that each result sums over, which sets the initial variance; 0 for a leaf that
      is no matrix: a bias, or a scale.
    constant: initial value of such a leaf.
    padding: of the vocabulary, see Declared.
  """
  start = jax.ShapeDtypeStruct(shape, jnp.float32)
  return Param(start, declared=Declared(shape, axes, fan_in, constant, padding=padding))


class Linear(nnx.Module):
  """A projection over the trailing axes of x: `w` float32[*inputs, *outputs], and `b`
  float32[*outputs] where there is a bias.

  Args:
    inputs: sizes of the contracted axes, the last ones of x.
    outputs: sizes of the axes that replace them.
    axes: logical names of w's axes.
    out: logical names of the result's axes, batch and seq first.
    bias: whether `b` is added, in the compute dtype.
  """

  def __init__(
    self,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    axes: tuple[str, ...],
    out: tuple[str, ...],
    bias: bool = False,
  ):
    self.inputs, self.outputs, self.axes, self.out = inputs, outputs, axes, out
    self.w = declare((*inputs, *outputs), axes, math.prod(inputs))
    self.b = declare(outputs, out[2:], 0) if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, T, *inputs] to [B, T, *outputs] in x's dtype."""
    w = jax.sharding.reshard(self.w[...].astype(x.dtype), gathered(*self.axes))
    w = w.reshape(math.prod(self.inputs), math.prod(self.outputs))
    lead = x.shape[:2]
    x = x.reshape(*lead, math.prod(self.inputs))
    last = self.out[2]
    if jax.sharding.get_abstract_mesh().shape['context'] == 1:
      # One matrix product: with B and T apart, the compiler transposes copies of x for the gradient
      # of w.
      y = _multiply(x.reshape(-1, x.shape[-1]), w, spec('batch', last))
    else:  # merging two split axes would move the activations
      y = jnp.einsum('BTi,io->BTo', x, w, out_sharding=spec('batch', 'seq', last))
    y = jax.lax.reshape(y, (*lead, *self.outputs), out_sharding=spec(*self.out))
    return y if self.b is None else y + self.b[...].astype(y.dtype)[None, None]


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
  """(x - mean) / rms(x - mean) * (offset + scale) over the last axis, in float32; without the mean
  for kind 'rms' (Zhang and Sennrich 2019, eq. 4; 'layer': Ba et al. 2016, without a bias).
  """

  def __init__(self, dim: int, norm: Norm):
    self.norm = norm
    self.scale = declare((dim,), ('norm',), 0, constant=1.0 - norm.offset)

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    if self.norm.kind == 'layer':
      x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.norm.eps)
    scale = self.scale[...].astype(jnp.float32)
    if self.norm.offset:
      scale = scale + self.norm.offset
    return (x32 * inverse * scale[None, None]).astype(x.dtype)
