"""Dropout inside a model in a training step (Srivastava et al. 2014): of the embeddings, of the
output of each branch before it is added to the residual stream, and of attention probabilities.

Random numbers are a function of the key of a row, the layer, the place in the row and, in
attention, the head: neither the other rows nor micro-batches nor the mesh change them. Without keys
nothing is dropped, so an evaluation cannot drop anything."""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from ftjax.models.layers import Dropout
from ftjax.runtime.sharding import axis_size, spec, zigzag


@dataclasses.dataclass(frozen=True)
class Rates:
  """Shares of the numbers that a training step drops, each from 0 to below 1.

  attention: of the probabilities of softmax attention. residual: of the output of a mixer or of an
  MLP. embedding: of what the first block reads.
  """

  attention: float = 0.0
  residual: float = 0.0
  embedding: float = 0.0

  def __bool__(self) -> bool:
    return bool(self.attention or self.residual or self.embedding)


class Drawn(NamedTuple):
  """What the kept attention probabilities are drawn from.

  heads: uint32[B, N, 2], the key data of each row and head. queries: int32[T], the place of each
  query in its row in natural order. keys: int32[S], that of each key; None: they are in order.
  """

  heads: jax.Array
  queries: jax.Array
  keys: jax.Array | None


@dataclasses.dataclass(frozen=True)
class ModelDropout:
  """Rates with the keys of the rows, or of the rows in one layer, key[B]."""

  rates: Rates
  keys: jax.Array

  def with_keys(self, keys: jax.Array) -> Self:
    """Returns the same rates with other keys."""
    return dataclasses.replace(self, keys=keys)

  def embedding(self, x: jax.Array) -> jax.Array:
    """Returns x [B, T, D], what the first block reads, with numbers dropped."""
    return self._dropped(self.rates.embedding, 'embedding', x)

  def source_embedding(self, x: jax.Array) -> jax.Array:
    """Returns x [B, S, D], what the first block of an encoder-decoder's encoder reads."""
    return self._dropped(self.rates.embedding, 'source_embedding', x)

  def residual(self, name: str, x: jax.Array) -> jax.Array:
    """Returns x [B, T, D], the output of the branch `name`, with numbers dropped."""
    return self._dropped(self.rates.residual, name, x)

  def _dropped(self, rate: float, name: str, x: jax.Array) -> jax.Array:
    return Dropout(rate, self.keys)(name, x) if rate else x

  def attention(self, num_heads: int, queries: int, keys: int) -> Drawn | None:
    """Returns what the kept probabilities of a layer are drawn from; None where all are kept."""
    if not self.rates.attention:
      return None
    heads = jnp.arange(num_heads, dtype=jnp.uint32)

    def of_row(key):
      return jax.vmap(lambda head: jax.random.key_data(jax.random.fold_in(key, head)))(heads)

    data = jax.sharding.reshard(jax.vmap(of_row)(self.keys), spec('batch', 'heads', None))
    ways = axis_size('context')
    order = None if ways == 1 else jnp.asarray(zigzag(keys, ways))
    places = jax.sharding.reshard(jnp.asarray(zigzag(queries, ways)), spec('seq'))
    return Drawn(data, places, order)


def _threshold(rate: float) -> int:
  """Returns how many of the 2^16 values of a draw keep a probability, at least 1."""
  return max(1, round((1 - rate) * 2**16))


def kept_share(rate: float) -> float:
  """Returns the share of the attention probabilities that is kept: 1 - rate in steps of 2^-16."""
  return _threshold(rate) / 2**16


def kept(drawn: Drawn, rate: float, size: int) -> jax.Array:
  """Returns which attention probabilities are kept, bool[B, N, T, S]; size: S.

  Each query has numbers of its own, 16 bits for each key, so that a block of queries draws what
  the whole row would.
  """
  below = _threshold(rate)

  def of_query(data, place):
    key = jax.random.fold_in(jax.random.wrap_key_data(data), place)
    bits = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
    return jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(-1)[:size] < below

  by_query = jax.vmap(of_query, (None, 0))
  by_head = jax.vmap(by_query, (0, None))
  found = jax.vmap(by_head, (0, None))(drawn.heads, drawn.queries)
  return found if drawn.keys is None else jnp.take(found, drawn.keys, axis=3)
