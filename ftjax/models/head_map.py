"""The linear map of hidden states to logits, whose weights are a table. head.py computes losses and
log-probs with it.
"""

import jax
import jax.numpy as jnp

from ftjax.models.layers import Dropout, Linear, Param, declare, product, scaled
from ftjax.models.logit_chunks import LowRank
from ftjax.runtime.sharding import gathered


class Head(Linear):
  """The head: `w` float32[V, D], `lora_a` float32[R, D], `lora_b` float32[R, V].

  Args:
    vocab: rows of the table, with its padding.
    model_dim: D.
    padding: rows of the table that belong to no token.
  """

  def __init__(self, vocab: int, model_dim: int, padding: int):
    self.padding = padding
    super().__init__((model_dim,), (vocab,), ('embed', 'vocab'), ('batch', 'seq', 'vocab'))

  def leaf(
    self, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, *args, **more
  ) -> Param:
    """Declares a parameter, `w` as a table; see `declare`."""
    if axes == self.axes:
      shape, axes = shape[::-1], axes[::-1]
    padding = self.padding if 'vocab' in axes else 0
    return declare(shape, axes, fan_in, *args, padding=padding, **more)

  @property
  def shape(self) -> tuple[int, ...]:
    """See Linear.shape."""
    return super().shape[::-1]

  @property
  def leaf_axes(self) -> tuple[str, ...]:
    """See Linear.leaf_axes."""
    return super().leaf_axes[::-1]

  def pack(self, storage: str, block: int) -> None:
    """Leaves the table as it is: few bytes beside the blocks, and its rounding counts most."""

  def _base(self, dtype: jnp.dtype) -> jax.Array:
    return jax.sharding.reshard(self.w[...].astype(dtype), gathered(*self.leaf_axes)).T

  def merged_weights(self) -> jax.Array:
    """Returns the table of the model after merging, [V, D] in its dtype."""
    return super().merged_weights().T

  def update(self, x: jax.Array, dropout: Dropout | None = None) -> LowRank | None:
    """Returns what the adapter adds to the logits of hidden states x [B, T, D]; None without one.

    dropout: of the adapter's input.
    """
    if self.adapter is None or self.merged:
      return None
    x = dropout(self.name, x) if dropout else x
    pairs = self._pairs(x.dtype)
    lows = [scaled(product(x, a, None), sign * self.lora_scale[...]) for sign, (a, _) in pairs]
    u, b = jnp.concatenate(lows, -1), jnp.concatenate([b for _, (_, b) in pairs])
    return LowRank(u, b, None if self.lora_m is None else self._lengths())
