"""Weights of a model for a run: read from a model folder, or random."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax.experiment import vocabulary
from ftjax.families import table
from ftjax.hf import load as hf_load
from ftjax.hf.new_rows import NewRows
from ftjax.models import kinds
from ftjax.models.architecture import Architecture
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError

_random = jax.jit(kinds.init, static_argnums=(0, 2))


def load(
  source: str,
  arch: Architecture,
  mesh: Mesh,
  dtype: str,
  seed: int,
  family: str,
  new_rows: NewRows | None = None,
) -> dict:
  """Returns the parameters of a model as a nested dict of sharded arrays.

  Args:
    source: HF folder or GGUF file; '': random weights by `seed`.
    arch: the architecture wanted. A language model in `source` becomes a reward model where it has
      a score: its head goes, and a random score takes its place.
    mesh: the mesh.
    dtype: of all parameters.
    seed: of random weights.
    family: value of model.family.
    new_rows: of tokens that are added to the model, which `source` may hold already.

  Raises:
    ConfigError: `source` holds a model of another architecture or vocabulary.
  """
  dtype, key = jnp.dtype(dtype), jax.random.key(seed)
  if not source:
    return _random(arch, key, dtype)
  found = table.architecture(hf_load.read_config(source), family)
  missing = vocabulary.missing_rows(source, found.vocab_size, arch.vocab_size, new_rows)
  found = dataclasses.replace(
    found if arch.num_labels else arch,
    vocab_size=arch.vocab_size,
    vocab_multiple=arch.vocab_multiple,
  )
  if dataclasses.replace(found, num_labels=arch.num_labels) != arch:
    raise ConfigError(f'{source}: its architecture, {found}, is not the one expected, {arch}')
  where = sharding.shardings(mesh, kinds.axes(found))
  params = hf_load.load_params(source, found, where, dtype, seed, missing)
  if found.num_labels == arch.num_labels:
    return params
  make = jax.jit(lambda key: kinds.init(arch, key, dtype)['score'])
  return {k: v for k, v in params.items() if k != 'head'} | {'score': make(key)}
