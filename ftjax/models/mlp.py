"""The gated MLP: down(activation(gate x) * up x) (Shazeer 2020; SwiGLU with silu)."""

import functools

import jax
from flax import nnx

from ftjax.models.architecture import GatedMlpSpec
from ftjax.models.layers import Dropout, Linear

# 'gelu_tanh' is transformers' gelu_pytorch_tanh, 'gelu' the exact one.
ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
}


class GatedMlp(nnx.Module):
  """x [B, T, D] -> [B, T, D] through F = ffn_dim."""

  def __init__(self, model_dim: int, spec: GatedMlpSpec):
    ffn_dim = spec.ffn_dim
    wide, narrow = ('batch', 'seq', 'ffn'), ('batch', 'seq', 'act_embed')
    self.activation = ACTIVATIONS[spec.activation]
    self.gate = Linear((model_dim,), (ffn_dim,), ('embed', 'ffn'), wide)
    self.up = Linear((model_dim,), (ffn_dim,), ('embed', 'ffn'), wide)
    self.down = Linear((ffn_dim,), (model_dim,), ('ffn', 'embed'), narrow)

  def __call__(self, x: jax.Array, dropout: Dropout | None = None) -> jax.Array:
    wide = self.activation(self.gate(x, dropout)) * self.up(x, dropout)
    return self.down(wide, dropout)
