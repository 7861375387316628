"""The gated MLP: down(silu(gate x) * up x) (Shazeer 2020, SwiGLU)."""

import jax
from flax import nnx

from ftjax.models.layers import Linear


class GatedMlp(nnx.Module):
  """x [B, T, D] -> [B, T, D] through F = ffn_dim."""

  def __init__(self, model_dim: int, ffn_dim: int):
    wide, narrow = ('batch', 'seq', 'ffn'), ('batch', 'seq', 'act_embed')
    self.gate = Linear((model_dim,), (ffn_dim,), ('embed', 'ffn'), wide)
    self.up = Linear((model_dim,), (ffn_dim,), ('embed', 'ffn'), wide)
    self.down = Linear((ffn_dim,), (model_dim,), ('ffn', 'embed'), narrow)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
