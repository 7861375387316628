"""How the next token is chosen: temperature, truncation, the draw, and its random key.

The key of a token is (seed, prompt id, completion index, position), so that a draw depends neither
on the slot of a sequence nor on its neighbours or padding.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ftjax.runtime.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen. temperature 0: the likeliest. top_k 0 and top_p 1: no truncation.

  After temperature, top_k keeps the k likeliest tokens; of what is left, renormalized, top_p keeps
  the smallest set of likeliest ones with at least that probability."""

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ConfigError(f'{self}: expected temperature >= 0, top_k >= 0, 0 < top_p <= 1')


# Tokens whose probabilities are added up in one go before the choice among blocks of them.
_BLOCK = 256


def sample(
  logits: jax.Array, keys: jax.Array, sampling: Sampling, vocab_size: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Chooses one token a row.

  Args:
    logits: float32[B, V].
    keys: one random key a row, [B].
    sampling: how tokens are chosen.
    vocab_size: ids from it on are never chosen; None: any may be.

  Returns:
    (int32[B] tokens; float32[B] their log-probabilities in nats under softmax(logits /
    temperature), before vocab_size, top_k and top_p; at temperature 0 those of temperature 1).
  """
  if sampling.temperature == 0:
    token = jnp.argmax(_known(logits, vocab_size), axis=-1).astype(jnp.int32)
    return token, _logprob(logits, token)
  logits = logits / sampling.temperature
  token = _draw(_truncate(_known(logits, vocab_size), sampling), keys)
  return token, _logprob(logits, token)


def _known(logits: jax.Array, vocab_size: int | None) -> jax.Array:
  """logits with -inf from vocab_size on."""
  if vocab_size is None or vocab_size >= logits.shape[-1]:
    return logits
  return jnp.where(jnp.arange(logits.shape[-1])[None] < vocab_size, logits, -jnp.inf)


def _truncate(logits: jax.Array, sampling: Sampling) -> jax.Array:
  """logits with -inf for what top_k and top_p leave out; of equally likely tokens at the border the
  first stay.
  """
  if not sampling.top_k and sampling.top_p == 1:
    return logits
  ordered = -jnp.sort(-logits, axis=-1)
  if sampling.top_k:
    among = jnp.arange(logits.shape[-1])[None] < sampling.top_k
    ordered = jnp.where(among, ordered, -jnp.inf)
  keep = ordered > -jnp.inf
  if sampling.top_p < 1:  # at 1 the sum's rounding would leave out the last ones
    probs = jax.nn.softmax(ordered, axis=-1)
    keep &= jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
  least = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
  above, equal = logits > least, logits == least
  room = keep.sum(-1, keepdims=True) - above.sum(-1, keepdims=True)
  return jnp.where(above | (equal & (jnp.cumsum(equal, axis=-1) <= room)), logits, -jnp.inf)


def _logprob(logits: jax.Array, token: jax.Array) -> jax.Array:
  # A where, not an indexing: the batch may be split.
  mine = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None] == token[:, None]
  return jnp.where(mine, logits, 0).sum(-1) - jax.nn.logsumexp(logits, axis=-1)


def _draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
  """int32[B], by inverting the distribution function at one uniform number a row: first over sums
  of blocks, then within the block. (Gumbel noise would take V random numbers a row, 20 ms a step on
  two cores for 16 rows of 49,152.)
  """
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  rows, vocab = weights.shape
  weights = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
  sums = weights.sum(-1)
  ends = jnp.cumsum(sums, axis=-1)
  uniform = jax.vmap(jax.random.uniform)(keys)
  goal = uniform[:, None] * jnp.max(ends, axis=-1, keepdims=True)
  block = _first(ends > goal, sums > 0)
  numbers = jnp.arange(sums.shape[1], dtype=jnp.int32)[None]
  goal = goal - jnp.where(numbers < block, sums, 0).sum(-1, keepdims=True)
  inside = jnp.where((numbers == block)[..., None], weights, 0).sum(1)
  return (block * _BLOCK + _first(jnp.cumsum(inside, axis=-1) > goal, inside > 0))[:, 0]


def _first(reached: jax.Array, possible: jax.Array) -> jax.Array:
  """int32[B, 1]: the first place that is reached and possible; where rounding leaves none, the last
  possible one.
  """
  places = jnp.arange(reached.shape[-1], dtype=jnp.int32)[None]
  first = jnp.where(reached & possible, places, reached.shape[-1]).min(-1, keepdims=True)
  return jnp.minimum(first, jnp.where(possible, places, 0).max(-1, keepdims=True))


def token_keys(
  seed: jax.Array | int, prompt: jax.Array, completion: jax.Array, position: jax.Array
) -> jax.Array:
  """One key a row, of (seed, prompt id, completion index, position of the token to be drawn); the
  last three int32[B].
  """
  base = jax.random.key(seed)

  def one(*numbers):
    return functools.reduce(jax.random.fold_in, numbers, base)

  return jax.vmap(one)(prompt, completion, position)


def is_stop(token: jax.Array, stop_ids: Sequence[int]) -> jax.Array:
  """bool[B]."""
  return functools.reduce(
    jnp.logical_or, [token == s for s in stop_ids], jnp.zeros_like(token, bool)
  )
