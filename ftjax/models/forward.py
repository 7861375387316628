"""A batch through a model: what every algorithm's loss begins with.

A run's parameters are the model's, with other models beside it under names of their own:
`reference/` and `value/` (trainer.py)."""

import jax
import jax.numpy as jnp

from ftjax.models import head, kinds
from ftjax.models.architecture import Architecture
from ftjax.models.attention import Tokens

BESIDE = ('reference', 'value')


def model_of(params: dict) -> dict:
  """The model alone, without what stands beside it."""
  return {k: v for k, v in params.items() if k not in BESIDE}


def hidden_states(
  arch: Architecture, params: dict, batch: dict, dtype, remat='none', noise=None
) -> jax.Array:
  """dtype[B, T, D] of a batch of data/batches.py."""
  where = Tokens(batch['segments'], batch['positions'])
  return kinds.apply(arch, params, batch['tokens'], where, dtype=dtype, remat=remat, noise=noise)


def logprobs_and_entropy(
  arch: Architecture, params: dict, batch: dict, *, temperature: float, dtype, remat: str
) -> tuple[jax.Array, jax.Array]:
  """(log-probs, entropies) float32[B, T] of a batch's labels under the model of all parameters, in
  nats, at the sampler's temperature; 0 where weights are 0.
  """
  params = model_of(params)
  x = hidden_states(arch, params, batch, dtype, remat)
  table = kinds.head_weights(arch, params)
  return head.logprobs_and_entropies(x, table, batch['labels'], batch['weights'], temperature)


def token_scores(arch: Architecture, params: dict, batch: dict, dtype, remat: str) -> jax.Array:
  """float32[B, T]: what a model with a score for a head says after each token; a float32 product
  whatever the compute dtype is.
  """
  x = hidden_states(arch, params, batch, dtype, remat)
  w = jax.sharding.reshard(params['score']['w'].astype(jnp.float32)[0], jax.P(None))
  return jnp.einsum('btd,d->bt', x.astype(jnp.float32), w)


def sequence_rewards(
  arch: Architecture, params: dict, batch: dict, dtype, remat: str, segments: int
) -> list[jax.Array]:
  """float32[B] for each of the first `segments` segments of the rows: the score at the last token,
  found by its place in the segment and never by a token's id.

  A row without the segment has score 0.
  """
  found, out = token_scores(arch, params, batch, dtype, remat), []
  for segment in range(1, segments + 1):
    inside = batch['segments'] == segment
    last = jnp.where(inside, batch['positions'], -1).max(-1)
    at = inside & (batch['positions'] == last[:, None])
    # One token of each row is left: a sum of its score and of zeros is exact.
    out.append(jnp.where(at, found, 0.0).sum(-1))
  return out
