"""Plans the rollouts of an algorithm: memory per device in addition to the state, and a lower bound
of the decoding time.

Prefill and decode are compiled like the step, for the same devices."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.generation.weights import rollout_mesh
from ftjax.models import kinds
from ftjax.models.architecture import Architecture
from ftjax.models.layers import Declared
from ftjax.planning import memory
from ftjax.runtime import sharding, trees


@dataclasses.dataclass(frozen=True)
class Size:
  """Size of a rollout: prompts with `group` completions each, of at most prompt_tokens and
  max_tokens; `slots` completions are decoded at once.
  """

  prompts: int
  group: int
  prompt_tokens: int
  max_tokens: int
  slots: int


@dataclasses.dataclass(frozen=True)
class RolloutPlan:
  """Bytes per device, and seconds.

  auxiliary: models that stay in memory during the step too: a reference, a reward model. weights:
  the copy for sampling. cache: its keys and values. peak: all of these with the state and the
  temporaries. seconds: of decoding only, if all completions have the maximal length and every step
  reads weights and cache once at the peak memory bandwidth.
  """

  auxiliary: int
  weights: int
  cache: int
  peak: int
  seconds: float


def make(
  arch: Architecture,
  mesh: Mesh,
  size: Size,
  sampling: Sampling,
  *,
  dtype: jnp.dtype,
  state: int,
  auxiliary: int,
  bandwidth: float,
) -> RolloutPlan:
  """Compiles the programs of a rollout.

  Args:
    arch: of the policy.
    mesh: of training.
    size: of a rollout.
    sampling: how tokens are chosen.
    dtype: compute dtype.
    state: bytes per device of the train state.
    auxiliary: bytes per device of other models.
    bandwidth: bytes/s of a device's memory.

  Raises:
    jax.errors.JaxRuntimeError: the compiler ran out of the device's memory.
  """
  where = rollout_mesh(mesh)
  engine = Engine(arch, dtype, (), 0, slots=size.slots)
  params = _sharded(kinds.declared(arch), where, dtype)
  with jax.set_mesh(where):
    first = min(size.prompts, -(-size.slots // size.group))
    found = engine.compile(
      params,
      prompts=first,
      longest=size.prompt_tokens,
      max_tokens=size.max_tokens,
      sampling=sampling,
    )
  weights, cache = memory.shard_bytes(params), memory.shard_bytes(found.cache)
  read = math.ceil(first / found.run) * _made(found.prefill)
  most = max(
    leaf_bytes(kinds.declared(arch), mesh, dtype),  # in the trainer's layout, before it is moved
    cache + read + _temporary(found.prefill),
    cache + _temporary(found.decode),
  )
  steps = math.ceil(size.prompts * size.group / found.slots) * size.max_tokens
  return RolloutPlan(
    auxiliary,
    weights,
    cache,
    peak=state + auxiliary + weights + most,
    seconds=steps * (weights + cache) / bandwidth,
  )


def leaf_bytes(leaves: Mapping[str, Declared], mesh: Mesh, dtype: jnp.dtype) -> int:
  """Returns the bytes per device of {name: declaration} on a mesh; dtype: of those that declare
  none.
  """
  return memory.shard_bytes(_sharded(leaves, mesh, dtype))


def _sharded(leaves: Mapping[str, Declared], mesh: Mesh, dtype: jnp.dtype) -> dict:
  """Returns a nested dict of ShapeDtypeStruct."""
  flat = {
    n: jax.ShapeDtypeStruct(
      p.shape, p.dtype or dtype, sharding=NamedSharding(mesh, sharding.spec(*p.axes))
    )
    for n, p in leaves.items()
  }
  return trees.unflatten(flat)


def _made(compiled: jax.stages.Compiled) -> int:
  found = compiled.memory_analysis()
  return found.output_size_in_bytes - found.alias_size_in_bytes


def _temporary(compiled: jax.stages.Compiled) -> int:
  return compiled.memory_analysis().temp_size_in_bytes
