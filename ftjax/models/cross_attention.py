"""Attention of a decoder to the states of its encoder (Vaswani et al. 2017, section 3.2.3): a query
sees all tokens that the encoder read of its own document.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.models.architecture import AttentionSpec
from ftjax.models.attention import Tokens, attend
from ftjax.models.kv_cache import Memory
from ftjax.models.layers import Linear, scaled
from ftjax.runtime.sharding import spec

# Arrays of the cache, in which they are states: what the encoder read does not grow.
KEYS, VALUES = 'source_keys', 'source_values'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
  """What the encoder of an encoder-decoder reads.

  tokens: int32[B, S], None where only its states are needed. where: their segments and positions.
  states: dtype[B, S, D], what the encoder gives; None before it has read, and in decoding, where
  the cache holds the keys and values.
  """

  tokens: jax.Array | None
  where: Tokens
  states: jax.Array | None = None


class CrossAttention(nnx.Module):
  """Queries of x [B, T, D], keys and values of what the encoder gives."""

  def __init__(self, model_dim: int, own: AttentionSpec):
    d, n, k, h = model_dim, own.num_heads, own.num_kv_heads, own.head_dim
    heads, kv = ('batch', 'seq', 'heads', 'head_dim'), ('batch', 'seq', 'kv_heads', 'head_dim')
    self.spec = own
    axes, fan_in = ('embed', 'heads', 'head_dim'), own.query_fan_in(d)
    self.q = Linear((d,), (n, h), axes, heads, own.qkv_bias, fan_in)
    self.k = Linear((d,), (k, h), ('embed', 'kv_heads', 'head_dim'), kv, own.qkv_bias)
    self.v = Linear((d,), (k, h), ('embed', 'kv_heads', 'head_dim'), kv, own.qkv_bias)
    out = ('batch', 'seq', 'act_embed')
    self.o = Linear((n, h), (d,), ('heads', 'head_dim', 'embed'), out, own.out_bias)

  def __call__(self, x: jax.Array, context, memory: Memory | None) -> jax.Array:
    """Returns the output for x. memory: holds keys and values in decoding; None in training."""
    own, drop, source = self.spec, context.dropout, context.source
    q = self.q(x, drop)
    if own.scale is not None:  # attend divides by sqrt(head_dim)
      q = scaled(q, own.scale * own.head_dim**0.5)
    if memory is None:
      k, v = self.keys_and_values(source.states, drop)
    else:
      k, v = memory.read(KEYS), memory.read(VALUES)
    query = _with_a_key(context.query, source.where)
    return self.o(attend(q, k, v, query, source.where, causal=False), drop)

  def keys_and_values(self, states: jax.Array, drop=None) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values [B, S, K, H] of the encoder's states [B, S, D]."""
    return self.k(states, drop), self.v(states, drop)


def _with_a_key(query: Tokens, source: Tokens) -> Tokens:
  """Returns the queries, with padding in the segment of the first token that the encoder read: a
  query that sees no key at all is NaN in some kernels, also in the gradients of the others.
  """
  first = jax.sharding.reshard(source.segments, spec('batch', None))[:, :1]
  first = jnp.broadcast_to(first, query.segments.shape)
  first = jax.sharding.reshard(first, spec('batch', 'seq'))
  return dataclasses.replace(query, segments=jnp.where(query.segments == 0, first, query.segments))
