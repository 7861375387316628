"""The state of a training run: what is sharded, donated to every step, and saved."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.runtime import trees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """The state of a training run.

  step int32[]: optimizer updates tried so far. params: trained leaves; frozen: the others. opt: the
  optimizer's.

  ema: moving average of params, or an empty dict. skipped int32[]: non-finite steps so far;
  bad_streak int32[]: the last ones in a row. no_signal int32[]: steps so far whose batch held
  nothing to train on. Neither kind updates params, opt or ema."""

  step: jax.Array
  params: dict
  frozen: dict
  opt: optax.OptState
  ema: dict
  skipped: jax.Array
  bad_streak: jax.Array
  no_signal: jax.Array

  def parameters(self) -> dict:
    """Returns all parameters as they are in training, trained and frozen ones."""
    return trees.merge(self.params, self.frozen)

  def averaged(self) -> dict:
    """Returns all parameters, the trained ones by their moving average where there is one."""
    return trees.merge(self.ema or self.params, self.frozen)


def create(
  params: dict, frozen: dict, optimizer: optax.GradientTransformation, with_ema: bool
) -> State:
  """Returns a fresh state around parameters. Run it under jit with
  `out_shardings=state_shardings(...)`, donating nothing.
  """
  zero = jnp.zeros((), jnp.int32)
  ema = jax.tree.map(jnp.copy, params) if with_ema else {}
  return State(zero, params, frozen, optimizer.init(params), ema, zero, zero, zero)


def state_shardings(state: State, parameter_shardings: Mapping, mesh: Mesh) -> State:
  """Returns the shardings of an abstract state: leaves with a parameter's name and its shape, or
  its shape with dimensions merged or cut into blocks, are sharded like it; the rest is replicated.

  Args:
    state: from `jax.eval_shape(create, ...)`.
    parameter_shardings: nested dict over all parameters, trained and frozen.
    mesh: the mesh.
  """
  known = trees.flatten(parameter_shardings)
  shapes = {n: x.shape for n, x in trees.flatten(trees.merge(state.params, state.frozen)).items()}

  def place(path, leaf):
    keys = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
    for i in range(len(keys)):
      name = '/'.join(keys[i:])
      if name in known:
        found = _merged(known[name], shapes[name], leaf.shape)
        found = found or _blocked(known[name], shapes[name], leaf.shape)
        if found:
          return found
    return NamedSharding(mesh, P())

  return jax.tree_util.tree_map_with_path(place, state)


def _merged(
  where: NamedSharding, shape: tuple[int, ...], target: tuple[int, ...]
) -> NamedSharding | None:
  """Returns the sharding of an array of `shape` after merging adjacent dimensions to `target`, as
  muon does; None where `target` is another shape, or a shard would be split.
  """
  left = list(zip(shape, (*where.spec, *[None] * (len(shape) - len(where.spec))), strict=True))
  spec = []
  for size in target:
    merged, axis = left.pop(0) if left else (0, None)
    while merged < size and left and left[0][1] is None:
      merged *= left.pop(0)[0]
    if merged != size:
      return None
    spec.append(axis)
  return None if left else NamedSharding(where.mesh, P(*spec))


def _blocked(
  where: NamedSharding, shape: tuple[int, ...], target: tuple[int, ...]
) -> NamedSharding | None:
  """Returns the sharding of one number for each block of an array of `shape`: a dimension whose
  shards hold whole blocks is sharded like the array's; None where `target` is no such shape.
  """
  if len(shape) != len(target) or any(n % t for n, t in zip(shape, target, strict=True)):
    return None
  spec = []
  for blocks, axis in zip(target, (*where.spec, *[None] * len(shape)), strict=False):
    names = (axis,) if isinstance(axis, str) else axis or ()
    is_whole = blocks % math.prod(where.mesh.shape[a] for a in names) == 0
    spec.append(axis if is_whole else None)
  return NamedSharding(where.mesh, P(*spec))


def with_shardings(abstract, shardings):
  """Returns ShapeDtypeStructs with shardings, for ahead-of-time lowering and for restoring."""
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
  )
