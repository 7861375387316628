"""A batch through a model: what every algorithm begins with."""

import jax

from ftjax.models import transformer
from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens


def hidden_states(
  arch: Architecture, params: dict, batch: dict, dtype, remat='none', noise=None
) -> jax.Array:
  """dtype[B, T, D] of a batch of data/batches.py."""
  where = Tokens(batch['segments'], batch['positions'])
  return transformer.apply(
    arch, params, batch['tokens'], where, dtype=dtype, remat=remat, noise=noise
  )
