"""The label head: maps hidden states to the numbers of labels, for whole sequences or each token.

Its weights are no targets of adapters: under an adapter the head is trained whole.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from ftjax.models.architecture import Architecture
from ftjax.models.layers import Dropout, Normalize, declare
from ftjax.models.mlp import ACTIVATIONS
from ftjax.runtime.sharding import spec


class Score(nnx.Module):
  """`w` float32[R, D], and where architecture.ScoreHead has them `b` float32[R], `dense/w`
  float32[D, D] as [inputs, outputs], `dense/b` float32[D] and `norm`.
  """

  b = dense = norm = None

  def __init__(self, arch: Architecture):
    head, dim = arch.score_head, arch.model_dim
    self.head = head
    self.w = declare((arch.num_labels, dim), ('label', 'act_embed'), dim)
    if head.bias:
      self.b = declare((arch.num_labels,), ('label',), 0)
    if head.dense:
      leaves = {'w': declare((dim, dim), ('embed', 'act_embed'), dim)}
      if head.dense_bias:
        leaves['b'] = declare((dim,), ('act_embed',), 0)
      self.dense = nnx.Dict(leaves)
    if head.norm is not None:
      self.norm = Normalize((dim,), head.norm)

  def __call__(self, x: jax.Array, seq: str | None, dropout: Dropout | None = None) -> jax.Array:
    """Maps x [B, T, D] to float32[B, T, R]. The last product is float32, whatever x is.

    Args:
      x: hidden states; T may count tokens or sequences.
      seq: logical name of T.
      dropout: of what the last product reads.
    """
    if self.dense is not None:
      w = jax.sharding.reshard(self.dense['w'][...].astype(x.dtype), jax.P(None, None))
      x = jnp.einsum('BTD,DE->BTE', x, w, out_sharding=spec('batch', seq, 'act_embed'))
      if self.head.dense_bias:
        x = x + self.dense['b'][...].astype(x.dtype)[None, None]
      x = ACTIVATIONS[self.head.activation](x)
    if self.norm is not None:
      x = self.norm(x)
    if dropout is not None:
      x = dropout('score', x, is_split=seq is not None)
    w = jax.sharding.reshard(self.w[...].astype(jnp.float32), jax.P(None, None))
    where = spec('batch', seq, 'label')
    y = jnp.einsum('BTD,RD->BTR', x.astype(jnp.float32), w, out_sharding=where)
    return y if self.b is None else y + self.b[...].astype(jnp.float32)[None, None]


def usual_pool(arch: Architecture) -> str:
  """Returns what a vector of a text is made of where nothing names it: the mean of an encoder's
  states, or the last state of a decoder, which alone has read the whole text.
  """
  return 'mean' if arch.is_encoder else 'last'


def pooled(
  x: jax.Array, segments: jax.Array, positions: jax.Array, count: int, pool: str
) -> tuple[jax.Array, jax.Array]:
  """Returns one state for each of the first `count` segments of the rows, found by segment and
  position and never by a token's id.

  Args:
    x: hidden states [B, T, D].
    segments: int32[B, T], from 1; 0 is padding.
    positions: int32[B, T], from 0 within a segment.
    count: S.
    pool: 'first' or 'last' token of a segment, or the 'mean' of its tokens.

  Returns:
    ([B, S, D] in x's dtype, 0 where a row has no such segment; bool[B, S], whether it has one).
  """
  numbers = jnp.arange(1, count + 1, dtype=jnp.int32)
  inside = segments[:, None, :] == numbers[None, :, None]  # [B, S, T]
  sizes = inside.sum(-1)
  places = jnp.where(inside, positions[:, None, :], -1)
  if pool == 'first':
    weights = (places == 0).astype(jnp.float32)
  elif pool == 'last':
    weights = ((places == places.max(-1)[..., None]) & inside).astype(jnp.float32)
  elif pool == 'mean':
    weights = inside / jnp.maximum(sizes, 1)[..., None].astype(jnp.float32)
  else:
    raise ValueError(f'pool={pool!r}; expected first, last or mean')
  # One token's weight is 1 and the others' 0: then the sum is exact.
  states = jnp.einsum(
    'BST,BTD->BSD',
    weights,
    x.astype(jnp.float32),
    precision='highest',
    out_sharding=spec('batch', None, 'act_embed'),
  )
  return states.astype(x.dtype), sizes > 0
