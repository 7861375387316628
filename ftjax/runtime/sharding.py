"""The mesh and the one table that says which logical axis lies on which mesh axis.

Axes are Explicit: the sharding of every array is part of its type, a contraction over a sharded
axis must say where its result lies, and a mismatch is an error at trace time. Parameters carry
logical axis names where they are declared (`models/`); `spec` turns names into a PartitionSpec by
RULES. A name that is not in the table raises; what is replicated is written down as None."""

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

# Batch rows are spread over every axis that holds whole copies of, or shards of, the model's rows.
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
  'ffn': 'tensor',
  'vocab': 'tensor',
  'norm': None,
  'label': None,
}


def spec(*names: str | None) -> P:
  """PartitionSpec of an array whose dimensions have these logical names (None: replicated).

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
  """`spec` of a parameter after its fsdp gather: what a block computes with."""
  return spec(*(None if n == 'embed' else n for n in names))


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
  """Sizes over AXES with -1 resolved to what is left of `num_devices`.

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
      raise ConfigError(
        f'{wanted}: {num_devices} devices are no multiple of {fixed}; change mesh.{AXES[free[0]]}'
      )
    shape[free[0]] = num_devices // fixed
  elif fixed != num_devices:
    raise ConfigError(
      f'{wanted} makes {fixed} devices, but there are {num_devices}; set one of them to -1'
    )
  return tuple(shape)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with Explicit axes over all devices (or the given ones).

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
  within = [size // ways for size, ways in zip(shape, across, strict=True)]
  grid = mesh_utils.create_hybrid_device_mesh(
    within, across, devices, allow_split_physical_axes=True
  )
  return Mesh(grid, AXES, axis_types=types)


def shardings(mesh: Mesh, axes: Mapping) -> dict:
  """Nested dict of NamedSharding from a nested dict of logical-axis tuples."""
  return {
    k: shardings(mesh, v) if isinstance(v, Mapping) else NamedSharding(mesh, spec(*v))
    for k, v in axes.items()
  }


def put(mesh: Mesh, array: np.ndarray, *names: str | None) -> jax.Array:
  """A host array, the same in every process, laid on a mesh by logical names."""
  return jax.make_array_from_callback(
    array.shape, NamedSharding(mesh, spec(*names)), lambda part: array[part]
  )


def is_alone() -> bool:
  """Whether the current mesh is one device: islands then need no collectives.

  XLA does not remove those among one member: each is a copy, and some turn a table's layout over.
  """
  return jax.sharding.get_abstract_mesh().size == 1


def island(local: Callable, in_specs: tuple, out_specs: Any, check_vma: bool = False) -> Callable:
  """`jax.shard_map` over the current mesh; on one device `local` itself, on arrays without axes."""
  if not is_alone():
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)

  def whole(*args):
    out = local(*(jax.sharding.reshard(a, P()) for a in args))
    return jax.tree.map(jax.sharding.reshard, out, out_specs)

  return whole


def gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
  """Inside an island: x of all members of a mesh axis, joined along `dim`."""
  return x if is_alone() else jax.lax.all_gather(x, axis, axis=dim, tiled=True)


def scatter_sum(x: jax.Array, axis: str, dim: int) -> jax.Array:
  """Inside an island: this member's part, along `dim`, of the sum over a mesh axis."""
  return x if is_alone() else jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)


def total(x: Any, axes: str | tuple[str, ...]) -> Any:
  """Inside an island: the sum over mesh axes, of an array or a tree."""
  return x if is_alone() else jax.lax.psum(x, axes)


def index(axis: str) -> jax.Array:
  """Inside an island: int32[], this member's place on a mesh axis."""
  return jnp.zeros((), jnp.int32) if is_alone() else jax.lax.axis_index(axis)


def batch_axis_size() -> int:
  """How many shards the batch axis has on the current mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[a] for a in BATCH)


def axis_size(axis: str) -> int:
  """Members of an axis of the current mesh."""
  return jax.sharding.get_abstract_mesh().shape[axis]


def zigzag(length: int, ways: int) -> np.ndarray:
  """int32[T]: which token of a row stands at each place when `context` splits it `ways` ways.

  Shard i of C holds chunks i and 2 C - 1 - i of the row's 2 C: under a causal mask every shard then
  has as much to compute. Dubey et al. 2024, "The Llama 3 herd of models", section 3.3.2. Rows are
  brought into this order on the host (training/prefetch.py); segments and positions tell the rest.

  Raises:
    ValueError: a length that 2 C does not divide.
  """
  if ways == 1:
    return np.arange(length, dtype=np.int32)
  if length % (2 * ways):
    raise ValueError(f'rows of {length} tokens cannot be cut into {2 * ways} chunks')
  chunks = np.arange(length, dtype=np.int32).reshape(2, ways, -1)
  return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)


def unzigzag(x: jax.Array, ways: int) -> jax.Array:
  """[B, T, ...] from the order of `zigzag` to the natural one: two slices, and no gather."""
  if ways == 1:
    return x
  halves = x.reshape(x.shape[0], ways, 2, -1, *x.shape[2:])
  return jnp.concatenate([halves[:, :, 0], halves[:, ::-1, 1]], axis=1).reshape(x.shape)


def check_divides(
  axes: Mapping[str, tuple], shapes: Mapping[str, tuple[int, ...]], mesh: Mesh
) -> None:
  """Fails before compiling when a mesh axis does not divide the dimension laid on it.

  Args:
    axes: flat {parameter name: logical axes}.
    shapes: flat {parameter name: shape}.
    mesh: the mesh.

  Raises:
    ConfigError: names parameter, dimension, size and mesh axis.
  """
  for name, names in axes.items():
    for size, logical, part in zip(shapes[name], names, spec(*names), strict=True):
      ways = math.prod(mesh.shape[a] for a in ((part,) if isinstance(part, str) else part or ()))
      if size % ways:
        raise ConfigError(
          f'{name}: its {logical} dimension of {size} cannot be split {ways} ways; '
          f'change mesh.{part} to a divisor of {size}'
        )
