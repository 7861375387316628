"""What the entries that read texts with one forward pass have in common: the device, the model and
the arrays of a batch."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.experiment.model import Model
from ftjax.generation.padding import bucket
from ftjax.runtime import sharding
from ftjax.runtime.errors import DataError
from ftjax.serving import loaded_model


def open_model(
  path: str, dtype: str, family: str, base: str, use: str
) -> tuple[Model, dict[str, Any]]:
  """Returns (model, parameters) of --model on one device, since texts are few and a batch of them
  is small. Sets the mesh of the process.

  Raises as loaded_model.load, whose arguments these are; dtype: by name.
  """
  jax.config.update('jax_default_matmul_precision', 'highest' if dtype == 'float32' else 'default')
  mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
  jax.set_mesh(mesh)
  return loaded_model.load(path, mesh, jnp.dtype(dtype), family, base, use)


def check_length(tokens: np.ndarray, place: str, most: int) -> None:
  """Raises DataError where a text has more tokens than the positions of its model."""
  if len(tokens) > most:
    raise DataError(f'{place}: {len(tokens)} tokens; the model was made for {most}')


def padded(texts: Sequence[np.ndarray], rows: int, most: int) -> dict[str, np.ndarray]:
  """Returns tokens, segments and positions int32[rows, T] of texts, one in a row from its start;
  T: the bucket of the longest one, at most `most`. A row beyond the texts has one token, so that
  nothing computed of it is NaN.
  """
  longest = max(map(len, texts))
  shape = (rows, min(bucket(longest), max(longest, most)))
  batch = {name: np.zeros(shape, np.int32) for name in ('tokens', 'segments', 'positions')}
  batch['segments'][:, 0] = 1
  for i, tokens in enumerate(texts):
    n = len(tokens)
    batch['tokens'][i, :n], batch['segments'][i, :n] = tokens, 1
    batch['positions'][i, :n] = np.arange(n)
  return batch
