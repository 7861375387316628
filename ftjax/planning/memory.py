"""Reads the memory per device of a compiled step from the compiler, and where its HLO module
gathers sharded weights.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from ftjax.planning import hlo
from ftjax.runtime import trees


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per device. arguments: state and batch. temporaries: everything else alive in the step,
  including gradients and activations. peak: as the compiler reports it.
  """

  parameters: int
  optimizer: int
  gradients: int
  arguments: int
  temporaries: int
  peak: int

  @property
  def activations(self) -> int:
    """Returns the temporaries without the gradients of the parameters."""
    return max(0, self.temporaries - self.gradients)


def shard_bytes(tree) -> int:
  """Returns the bytes per device of arrays or ShapeDtypeStructs with shardings."""
  return sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
  )


def replicated(params: Mapping, mesh: Mesh) -> dict[str, int]:
  """Returns {name: bytes} of parameters that are replicated on every device."""
  flat = trees.flatten(params) if mesh.size > 1 else {}
  return {
    n: math.prod(a.shape) * a.dtype.itemsize
    for n, a in flat.items()
    if a.sharding.is_fully_replicated
  }


def memory(compiled: jax.stages.Compiled, state) -> Memory:
  """Returns the memory of a compiled step.

  Args:
    compiled: the step; the compiler's analysis is read.
    state: the abstract train state, with shardings.
  """
  found = compiled.memory_analysis()
  everything = (
    found.argument_size_in_bytes
    + found.temp_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes
  )
  return Memory(
    parameters=shard_bytes((state.params, state.frozen, state.ema)),
    optimizer=shard_bytes(state.opt),
    gradients=shard_bytes(state.params),
    arguments=found.argument_size_in_bytes,
    temporaries=found.temp_size_in_bytes,
    peak=max(getattr(found, 'peak_memory_in_bytes', 0), everything),
  )


@dataclasses.dataclass(frozen=True)
class Gathering:
  """How a step gathers the sharded weights of its layers; names of stacked parameters.

  layered: gathered one layer at a time, inside a loop. whole: a buffer has the size of all layers
  gathered, which an fsdp step must not need; saved activations may have that size by chance.
  unseen: no such gather was found; for small weights a compiler may use a sum instead.
  """

  layered: tuple[str, ...]
  whole: tuple[str, ...]
  unseen: tuple[str, ...]


def gathering(module: hlo.Module, params: Mapping, mesh: Mesh, axis: str = 'fsdp') -> Gathering:
  """Returns where an optimized module gathers weights that are sharded over `axis`.

  Buffers are recognized by their number of elements (a compiler merges and transposes dimensions),
  those of whole stacks also by a dimension equal to the number of layers.

  Args:
    module: of the step.
    params: nested dict of ShapeDtypeStruct with NamedSharding; stacked ones are named stackI/...
    mesh: of those shardings.
    axis: mesh axis that is gathered.
  """
  inside, buffers = set(), set()
  for name, body in module:
    for instruction in body:
      arrays = {(math.prod(dims), dims) for dims in instruction.arrays}
      buffers |= arrays
      if instruction.operation == 'all-gather' and name in module.looped:
        inside |= {size for size, _ in arrays}
  out = {'layered': [], 'whole': [], 'unseen': []}
  for name, leaf in trees.flatten(params).items():
    parts = [(p,) if isinstance(p, str) else p or () for p in leaf.sharding.spec]
    if not name.startswith('stack') or (axis,) not in parts or mesh.shape[axis] == 1:
      continue
    size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * mesh.shape[axis]
    layers = leaf.shape[0]
    if any(n == size and layers in dims for n, dims in buffers):
      out['whole'].append(name)
    out['layered' if size // layers in inside else 'unseen'].append(name)
  return Gathering(**{k: tuple(v) for k, v in out.items()})
