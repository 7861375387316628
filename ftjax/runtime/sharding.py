"""Makes the mesh, and maps logical axes to mesh axes by one table.

Axes are Explicit: the sharding of every array is part of its type, a contraction over a sharded
axis must name the sharding of its result, and a mismatch is an error at trace time. Parameters
carry logical axis names where they are declared (`models/`); `spec` turns names into a
PartitionSpec by RULES. A name that is not in the table raises; None means replicated.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.runtime.errors import ConfigError

AXES = ('data', 'fsdp', 'context', 'tensor', 'expert')

# Batch rows are sharded over every axis on which devices compute other rows.
BATCH = ('data', 'fsdp', 'expert')

RULES: dict[str, str | tuple[str, ...] | None] = {
  # activations
  'batch': BATCH,
  'seq': 'context',
  'act_embed': None,
  # parameters
  'layers': None,
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'head_dim': None,
  'channels': None,  # of a delta net's head
  'taps': None,  # of a convolution
  'ffn': 'tensor',
  'expert': 'expert',
  'route': None,  # the experts that a router chooses from
  'vocab': 'tensor',
  'norm': None,
  'position': None,  # rows of a table of learned positions
  'token_type': None,  # rows of a table of token types
  'label': None,
  'rank': None,  # of an adapter
}


def spec(*names: str | None) -> P:
  """Returns the PartitionSpec of an array with these logical axes (None: replicated).

  Raises:
    KeyError: a name that RULES does not know.
    ValueError: two dimensions on one mesh axis.
  """
  parts = tuple(None if n is None else RULES[n] for n in names)
  used = [a for p in parts if p is not None for a in ((p,) if isinstance(p, str) else p)]
  if len(set(used)) != len(used):
    raise ValueError(f'{names} -> {parts}: a mesh axis is used twice')
  return P(*parts)


def gathered(*names: str | None) -> P:
  """Returns the `spec` of a parameter after its fsdp all-gather, as a block computes with it."""
  return spec(*(None if n == 'embed' else n for n in names))


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
  """Returns the sizes of AXES, -1 replaced so that they use all of `num_devices`.

  Raises:
    ConfigError: more than one -1, or a product that is not the device count.
  """
  shape = [sizes[a] for a in AXES]
  free = [i for i, s in enumerate(shape) if s == -1]
  fixed = math.prod(s for s in shape if s != -1)
  wanted = ', '.join(f'mesh.{a}={s}' for a, s in zip(AXES, shape, strict=True))
  if len(free) > 1 or any(s < 1 for s in shape if s != -1):
    raise ConfigError(f'{wanted}: sizes are positive, and at most one may be -1')
  if free:
    if num_devices % fixed:
      given = ' or '.join(f'mesh.{a}' for a, s in zip(AXES, shape, strict=True) if s > 1)
      raise ConfigError(
        f'{wanted}: {num_devices} devices are no multiple of {fixed}; change {given}'
      )
    shape[free[0]] = num_devices // fixed
  elif fixed != num_devices:
    raise ConfigError(
      f'{wanted} makes {fixed} devices, but there are {num_devices}; set one of them to -1'
    )
  return tuple(shape)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Creates a mesh with Explicit axes over all devices (or the given ones).

  Where the devices form several slices, the outermost axis of the mesh crosses them.

  Raises:
    ConfigError: sizes that do not make the devices, or an outermost axis that the slices do not
      divide.
  """
  devices = list(devices or jax.devices())
  shape = mesh_shape(sizes, len(devices))
  types = (AxisType.Explicit,) * len(AXES)
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if slices == 1:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  outer = next(i for i, size in enumerate(shape) if size > 1)
  if shape[outer] % slices:
    raise ConfigError(
      f'mesh.{AXES[outer]}={shape[outer]} is the outermost axis and crosses the {slices} slices: '
      f'it must be a multiple of {slices}; mesh.data={slices} is usual'
    )
  across = [slices if i == outer else 1 for i in range(len(shape))]
  within = [size // count for size, count in zip(shape, across, strict=True)]
  grid = mesh_utils.create_hybrid_device_mesh(
    within, across, devices, allow_split_physical_axes=True
  )
  return Mesh(grid, AXES, axis_types=types)


def shardings(mesh: Mesh, axes: Mapping) -> dict:
  """Returns a nested dict of NamedSharding for a nested dict of logical-axis tuples."""
  return {
    k: shardings(mesh, v) if isinstance(v, Mapping) else NamedSharding(mesh, spec(*v))
    for k, v in axes.items()
  }


def put(mesh: Mesh, array: np.ndarray, *names: str | None) -> jax.Array:
  """Shards a host array, equal in every process, over a mesh by logical axis names."""
  return jax.make_array_from_callback(
    array.shape, NamedSharding(mesh, spec(*names)), lambda part: array[part]
  )


def is_alone() -> bool:
  """Returns whether the current mesh is one device: `shard_map` then needs no collectives.

  XLA does not remove collectives of one member: each is a copy, and some transpose a table.
  """
  return jax.sharding.get_abstract_mesh().size == 1


def shard_map(
  local: Callable, in_specs: tuple, out_specs: Any, check_vma: bool = False
) -> Callable:
  """Returns `jax.shard_map` of a function over the current mesh.

  On one device it is the function itself, on arrays without sharded axes.
  """
  if not is_alone():
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)

  def whole(*args):
    out = local(*jax.tree.map(lambda a: jax.sharding.reshard(a, P()), args))
    return jax.tree.map(jax.sharding.reshard, out, out_specs)

  return whole


def gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
  """Gathers x from all shards of a mesh axis, concatenated along `dim`. Inside `shard_map`."""
  return x if is_alone() else jax.lax.all_gather(x, axis, axis=dim, tiled=True)


def scatter_sum(x: jax.Array, axis: str, dim: int) -> jax.Array:
  """Returns this shard's part, along `dim`, of the sum over a mesh axis. Inside `shard_map`."""
  return x if is_alone() else jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)


def total(x: Any, axes: str | tuple[str, ...]) -> Any:
  """Returns the sum over mesh axes of an array or a tree. Inside `shard_map`."""
  return x if is_alone() else jax.lax.psum(x, axes)


def index(axis: str) -> jax.Array:
  """Returns this shard's index on a mesh axis: int32[]. Inside `shard_map`."""
  return jnp.zeros((), jnp.int32) if is_alone() else jax.lax.axis_index(axis)


def batch_axis_size() -> int:
  """Returns the number of shards of the batch axis on the current mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[a] for a in BATCH)


def axis_size(axis: str) -> int:
  """Returns the size of an axis of the current mesh."""
  return jax.sharding.get_abstract_mesh().shape[axis]


def zigzag(length: int, shards: int) -> np.ndarray:
  """Returns the token index at each position of a row that `context` splits into shards: int32[T].

  Shard i of C holds chunks i and 2 C - 1 - i of the row's 2 C: under a causal mask every shard then
  has the same work. Dubey et al. 2024, "The Llama 3 herd of models", section 3.3.2. Rows are
  permuted on the host (training/prefetch.py), with their segments and positions.

  Raises:
    ValueError: a length that 2 C does not divide.
  """
  if shards == 1:
    return np.arange(length, dtype=np.int32)
  if length % (2 * shards):
    raise ValueError(f'rows of {length} tokens cannot be cut into {2 * shards} chunks')
  chunks = np.arange(length, dtype=np.int32).reshape(2, shards, -1)
  return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)


def unzigzag(x: jax.Array, shards: int) -> jax.Array:
  """Returns [B, T, ...] in natural order from the order of `zigzag`: two slices, no gather."""
  if shards == 1:
    return x
  halves = x.reshape(x.shape[0], shards, 2, -1, *x.shape[2:])
  return jnp.concatenate([halves[:, :, 0], halves[:, ::-1, 1]], axis=1).reshape(x.shape)


def rezigzag(x: jax.Array, shards: int) -> jax.Array:
  """Returns [B, T, ...] in the order of `zigzag` from natural order, the inverse of `unzigzag`."""
  if shards == 1:
    return x
  halves = x.reshape(x.shape[0], 2, shards, -1, *x.shape[2:])
  return jnp.stack([halves[:, 0], halves[:, 1, ::-1]], axis=2).reshape(x.shape)


def check_divides(
  axes: Mapping[str, tuple], shapes: Mapping[str, tuple[int, ...]], mesh: Mesh
) -> None:
  """Checks, before compiling, that mesh axes divide the dimensions that are sharded over them.

  Args:
    axes: flat {parameter name: logical axes}.
    shapes: flat {parameter name: shape}.
    mesh: the mesh.

  Raises:
    ConfigError: names parameter, dimension, size and mesh axis.
  """
  for name, names in axes.items():
    for size, logical, part in zip(shapes[name], names, spec(*names), strict=True):
      count = math.prod(mesh.shape[a] for a in ((part,) if isinstance(part, str) else part or ()))
      if size % count:
        pad = ''
        if logical == 'vocab':
          pad = f'set model.vocab_multiple={count} (or a multiple of it), or '
        raise ConfigError(
          f'{name}: its {logical} dimension of {size} cannot be split into {count} shards; '
          f'{pad}change mesh.{part} to a divisor of {size}'
        )
