"""Weights of a model for a run: read from a model folder, or random."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ftjax.experiment import vocabulary
from ftjax.families import table
from ftjax.hf import load as hf_load
from ftjax.hf import peft, peft_weights
from ftjax.hf.new_rows import NewRows
from ftjax.models import kinds
from ftjax.models.architecture import Architecture
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError

_random = jax.jit(kinds.init, static_argnums=(0, 2))


def random(
  arch: Architecture, key: jax.Array, dtype: np.dtype, places: Mapping[str, jax.sharding.Sharding]
) -> dict:
  """Returns random weights as a nested dict; places: sharding of each, by name."""
  make = jax.jit(kinds.init, static_argnums=(0, 2), out_shardings=trees.unflatten(places))
  return make(arch, key, dtype)


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
    source: HF folder, GGUF file, or PEFT folder with the adapter of `arch`, whose base is read too;
      '': random weights by `seed`.
    arch: the architecture wanted. Where the head in `source` is another one (a language model's,
      or of other labels) it goes, and a random one takes its place.
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
  if (adapter := peft.find(source)) is not None:
    return _adapted(adapter, arch, mesh, dtype, key)
  found = table.architecture(hf_load.read_config(source), family)
  missing = vocabulary.missing_rows(source, found.vocab_size, arch.vocab_size, new_rows)
  found = dataclasses.replace(
    found if arch.num_labels or arch.is_encoder else arch,
    vocab_size=arch.vocab_size,
    vocab_multiple=arch.vocab_multiple,
  )
  plain = arch.plain()
  if found.plain().with_head_of(arch) != plain:
    raise ConfigError(
      f'{source}: its architecture, {found.plain()}, is not the one expected, {plain}'
    )
  is_same = found == found.with_head_of(arch)
  if arch.is_encoder:
    # As transformers does, what its file has of the head is kept.
    where, own = sharding.shardings(mesh, kinds.axes(arch)), None if is_same else found
    return hf_load.load_params(source, arch, where, dtype, seed, missing, own)
  found = arch.with_head_of(found)
  where = sharding.shardings(mesh, kinds.axes(found))
  params = hf_load.load_params(source, found, where, dtype, seed, missing)
  if is_same:
    return params
  kept = {k: v for k, v in params.items() if k not in ('head', 'score')}
  return kept | _score(arch, key, dtype)


def _adapted(
  folder: peft.PeftFolder, arch: Architecture, mesh: Mesh, dtype: jnp.dtype, key: jax.Array
) -> dict:
  """Returns the parameters of the base that a PEFT folder names, with its adapter."""
  if arch.adapter is None:
    raise ConfigError(
      f'{folder.place} holds an adapter; set the keys of section lora as it was trained'
    )

  def shardings(arch):
    return sharding.shardings(mesh, kinds.axes(arch))

  if folder.base.path:
    return peft_weights.load_params(folder, folder.base.path, arch, shardings, dtype)
  flat = trees.flatten(_random(arch, key, dtype))
  places = trees.flatten(shardings(arch))
  return trees.unflatten(flat | peft_weights.load_adapter(folder, arch, places, flat))


def derived_from(first: dict, arch: Architecture, mesh: Mesh, dtype: str, seed: int) -> dict:
  """Returns the parameters of a model that starts from the weights of another one, a nested dict.
  Leaves that both have are the same arrays.

  Args:
    first: parameters of the other model, nested dict of sharded arrays.
    arch: the architecture wanted: that of `first`, perhaps with a score in place of the head, or
      without adapters.
    mesh: the mesh.
    dtype: of new parameters that declare none.
    seed: of new random weights.
  """
  dtype, flat, declared = jnp.dtype(dtype), trees.flatten(first), kinds.declared(arch)
  kept = {n: flat[n] for n, p in declared.items() if n in flat and p.origin != 'derived'}
  params = trees.unflatten(kept)
  if arch.num_labels and 'score' not in params:
    params |= _score(arch, jax.random.key(seed), dtype)
  places = trees.flatten(sharding.shardings(mesh, kinds.axes(arch)))
  return kinds.completed(arch, params, places.__getitem__, seed, dtype)


def _score(arch: Architecture, key: jax.Array, dtype: jnp.dtype) -> dict:
  """Returns a random score, {'score': ...}."""
  return {'score': jax.jit(lambda key: kinds.init(arch, key, dtype)['score'])(key)}
