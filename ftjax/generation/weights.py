"""Weights for a rollout: brought once a phase into the compute dtype and a layout that needs no
gathering while decoding, and shown to be those of the trainer."""

import functools
import random

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

from ftjax.models import kinds
from ftjax.models.architecture import Architecture
from ftjax.runtime import checksum, sharding, trees
from ftjax.runtime.errors import ConfigError
from ftjax.runtime.sharding import AXES


def rollout_mesh(mesh: Mesh) -> Mesh:
  """The training mesh's devices for decoding: `tensor` as it was, all others side by side in
  `data`, so that every tensor group holds the whole model.
  """
  grid = mesh.devices  # [data, fsdp, context, tensor, expert]
  grid = grid.transpose(0, 1, 2, 4, 3).reshape(-1, 1, 1, mesh.shape['tensor'], 1)
  return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def check_decodable(mesh: Mesh) -> None:
  """Raises ConfigError where the sequence is split: a cache is written along it."""
  if mesh.shape['context'] > 1:
    raise ConfigError(f'mesh.context={mesh.shape["context"]}: decoding needs mesh.context=1')


def rollout_params(params: dict, arch: Architecture, mesh: Mesh, dtype: jnp.dtype) -> dict:
  """A copy of params in `dtype`, on `mesh`; the caller drops it before the update.

  Split over `tensor` where the rules say so, and over `fsdp` where `mesh` has it (rollout_mesh has
  not: then every step would gather the model).

  Args:
    params: nested dict on the training mesh.
    arch: their architecture.
    mesh: of the same devices, as `rollout_mesh` gives it.
    dtype: compute dtype of the rollout.
  """
  frozen, own = trees.select(params, _frozen_names(arch).__contains__)
  # Cast first, where the parameters lie: half the bytes travel. A frozen base has its dtype
  # already, and where it lies as it should it is not copied.
  with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
    small = trees.merge(_cast(own, jnp.dtype(dtype), arch), frozen)
  return jax.device_put(small, sharding.shardings(mesh, kinds.axes(arch)))


def _frozen_names(arch: Architecture) -> set[str]:
  """Returns the names of the base leaves under an adapter, which declare their dtypes."""
  return set(kinds.names(arch, 'base')) if arch.adapter else set()


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cast(params: dict, dtype: jnp.dtype, arch: Architecture) -> dict:
  declared = kinds.declared(arch)
  # Not astype alone: what stays as it is would be handed on, and share its fate when donated.
  return trees.map_named(lambda n, p: jnp.copy(p).astype(declared[n].dtype or dtype), params)


def checksums(params: dict, dtype: jnp.dtype, *, count: int, seed: int) -> dict[str, int]:
  """{name: checksum} of `count` leaves drawn by seed: trainer's and rollout's agree when each of
  their bits does, in `dtype`.

  See runtime/checksum.py.
  """
  flat = trees.flatten(params)
  names = random.Random(seed).sample(sorted(flat), min(count, len(flat)))
  with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
    sums = _checksums({n: flat[n] for n in names}, jnp.dtype(dtype))
  return {n: int(x) for n, x in sums.items()}


@functools.partial(jax.jit, static_argnums=1)
def _checksums(leaves: dict[str, jax.Array], dtype: jnp.dtype) -> dict[str, jax.Array]:
  return {n: checksum.of_array(leaf.astype(dtype)) for n, leaf in leaves.items()}
