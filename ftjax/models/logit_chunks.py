"""The tokens of a shard in chunks: those with a weight first, their logits, and the gradients that
are added up over the chunks. Inside a shard_map; head.py has the loops.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.losses import cross_entropy
from ftjax.models.architecture import LogitSpec
from ftjax.runtime.sharding import axis_size, gather, index, is_alone, scatter_sum, total

# Bytes of one chunk's float32 logits, per device: large enough for full-speed matrix products.
CHUNK_BYTES = 96 * 2**20


class LowRank(NamedTuple):
  """What an adapter adds to a head: the logits are gain * (x w^T + u b).

  u: [..., R] in x's dtype, scale * (x A). b: [R, V] in x's dtype. gain: float32[V], of DoRA; None
  for 1.
  """

  u: jax.Array
  b: jax.Array
  gain: jax.Array | None = None


def chunk_tokens(vocab: int, tokens: int) -> int:
  """Tokens per chunk: a multiple of 128 whose logits fill about CHUNK_BYTES, no more than there are
  tokens.
  """
  return min(max(128, CHUNK_BYTES // (4 * vocab) // 128 * 128), tokens)


def vocab_axis() -> str | None:
  """Returns the mesh axis over which the vocabulary is split; None on one device."""
  return None if is_alone() else 'tensor'


def padded_from(vocab: int | None, rows: int) -> int | None:
  """Returns the first id of the padding of a table of `rows` rows; None where there is none."""
  return None if vocab == rows else vocab


def shaped(product: jax.Array, spec: LogitSpec) -> jax.Array:
  """Returns the logits of products of hidden states and head weights, float32[..., V]."""
  if spec.scale != 1:
    product = product * spec.scale
  if spec.soft_cap is None:
    return product
  return spec.soft_cap * jnp.tanh(product / spec.soft_cap)


class Tables(NamedTuple):
  """The weights of a head, or their gradients: w [V', D]; b [R, V'] and gain [V'] of an adapter."""

  w: jax.Array
  b: jax.Array | None
  gain: jax.Array | None


class ChunkTokens(NamedTuple):
  """The n tokens of a chunk, or of a shard: x [n, D], u [n, R] or None, labels int32[n], weights
  float32[n], more arrays [n, ...].
  """

  x: jax.Array
  u: jax.Array | None
  labels: jax.Array
  weights: jax.Array
  more: tuple[jax.Array, ...]


class ChunkLogits(NamedTuple):
  """Of a chunk, float32[n, V']: x w^T + u b before an adapter's gain, and the logits."""

  product: jax.Array
  logits: jax.Array


class Chunks:
  """One shard's tokens [B, T], flattened to n, weighted ones first, padded to whole chunks. `more`:
  arrays [B, T, ...] that go along.

  A state of gradients is (those of x [n, D] and of u [n, R], Tables); None without an adapter.
  """

  def __init__(self, spec, x, w, labels, weights, update, *more):
    self.shape, self.num_tokens = x.shape, labels.size
    b, gain = (None, None) if update is None else (update.b, update.gain)
    self.tables = Tables(gather(w.astype(x.dtype), 'fsdp', 1), b, gain)
    rows = self.tables.w.shape[0]
    self.offset = index('tensor') * rows
    self.spec = spec
    self.vocab = padded_from(spec.vocab, rows * axis_size('tensor'))
    self.size = chunk_tokens(rows, self.num_tokens)
    flat = weights.reshape(-1)
    self.order = jnp.argsort(flat == 0, stable=True)
    self.count = -(-(flat != 0).sum() // self.size)
    states = (x, None if update is None else update.u)
    states = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), states)
    others = tuple(m.reshape(-1, *m.shape[2:]) for m in more)
    tokens = ChunkTokens(*states, labels.reshape(-1), flat, others)
    pad = -self.num_tokens % self.size
    self.tokens = jax.tree.map(
      lambda a: jnp.pad(a[self.order], ((0, pad),) + ((0, 0),) * (a.ndim - 1)), tokens
    )

  def take(self, i) -> tuple[ChunkTokens, ChunkLogits]:
    """Returns chunk i."""
    tokens = jax.tree.map(
      lambda a: jax.lax.dynamic_slice_in_dim(a, i * self.size, self.size), self.tokens
    )
    found = jnp.einsum('nD,VD->nV', tokens.x, self.tables.w, preferred_element_type=jnp.float32)
    if tokens.u is not None:
      found += jnp.einsum('nR,RV->nV', tokens.u, self.tables.b, preferred_element_type=jnp.float32)
    logits = found if self.tables.gain is None else found * self.tables.gain[None]
    logits = cross_entropy.without_padding(shaped(logits, self.spec), self.offset, self.vocab)
    return tokens, ChunkLogits(found, logits)

  def zeros(self):
    """Returns the state of gradients that the first chunk's are added to."""
    states = jax.tree.map(jnp.zeros_like, self.tokens[:2])
    return states, jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), self.tables)

  def add(self, state, i, tokens: ChunkTokens, found: ChunkLogits, g: jax.Array):
    """Returns the state with the gradients of chunk i; g: of its logits, float32[n, V']."""
    (dx, du), (dw, db, dgain) = state
    w, b, gain = self.tables
    if self.spec.soft_cap is not None:
      slope = 1 - jnp.square(found.logits / self.spec.soft_cap)
      g = jnp.where(jnp.isfinite(found.logits), g * slope, 0.0)  # not where a logit is -inf
    g = g if self.spec.scale == 1 else g * self.spec.scale
    if gain is not None:
      dgain, g = dgain + (g * found.product).sum(0), g * gain[None]
    g = g.astype(tokens.x.dtype)
    more = jnp.einsum('nV,VD->nD', g, w, preferred_element_type=jnp.float32)
    dx = self.put(dx, i, total(more, 'tensor'))
    dw = dw + jnp.einsum('nV,nD->VD', g, tokens.x, preferred_element_type=jnp.float32)
    if b is not None:
      more = jnp.einsum('nV,RV->nR', g, b, preferred_element_type=jnp.float32)
      du = self.put(du, i, total(more, 'tensor'))
      db = db + jnp.einsum('nR,nV->RV', tokens.u, g, preferred_element_type=jnp.float32)
    return (dx, du), Tables(dw, db, dgain)

  def gradients(self, state, dtype: jnp.dtype):
    """Returns the gradients of x [B, T, D], of this shard's w [V', D] in dtype, and of the update,
    summed over the devices that share them.
    """
    (dx, du), (dw, db, dgain) = state
    dw = scatter_sum(dw, 'fsdp', 1)
    db, dgain = total((db, dgain), 'fsdp')
    dw, db, dgain = total((dw, db, dgain), ('data', 'expert', 'context'))
    dx, dw = self.scatter(dx), dw.astype(dtype)
    if du is None:
      return dx, dw, None
    return dx, dw, LowRank(self.scatter(du), db.astype(self.tables.b.dtype), dgain)

  def put(self, buffer, i, values):
    return jax.lax.dynamic_update_slice_in_dim(
      buffer, values.astype(buffer.dtype), i * self.size, 0
    )

  def scatter(self, buffer):
    """Back from weighted-first order to [B, T, ...]."""
    buffer = buffer[: self.num_tokens]
    return (
      jnp.zeros_like(buffer).at[self.order].set(buffer).reshape(*self.shape[:2], *buffer.shape[1:])
    )
