"""The MLPs: down(activation(gate x) * up x) (Shazeer 2020; SwiGLU with silu), and without a gate
down(activation(up x)) (Vaswani et al. 2017, section 3.3).

All MLPs are called alike, those of moe.py too: with x [B, T, D], segments int32[B, T] and the
dropout of adapters, and return (y [B, T, D], Routing; None without experts).
"""

import functools

import jax
from flax import nnx

from ftjax.models.architecture import GatedMlpSpec, MlpSpec
from ftjax.models.layers import Dropout, Linear

# 'gelu_tanh' is transformers' gelu_pytorch_tanh, 'gelu' the exact one.
ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
  'relu': jax.nn.relu,
  'tanh': jax.numpy.tanh,
}


def _to_wide(model_dim: int, spec: GatedMlpSpec | MlpSpec) -> Linear:
  wide = ('batch', 'seq', 'ffn')
  return Linear((model_dim,), (spec.ffn_dim,), ('embed', 'ffn'), wide, spec.bias)


def _to_narrow(model_dim: int, spec: GatedMlpSpec | MlpSpec) -> Linear:
  narrow = ('batch', 'seq', 'act_embed')
  return Linear((spec.ffn_dim,), (model_dim,), ('ffn', 'embed'), narrow, spec.bias)


class GatedMlp(nnx.Module):
  """x [B, T, D] -> [B, T, D] through F = ffn_dim."""

  def __init__(self, model_dim: int, spec: GatedMlpSpec):
    self.activation = ACTIVATIONS[spec.activation]
    self.gate, self.up = _to_wide(model_dim, spec), _to_wide(model_dim, spec)
    self.down = _to_narrow(model_dim, spec)

  def __call__(
    self, x: jax.Array, segments: jax.Array, dropout: Dropout | None = None
  ) -> tuple[jax.Array, None]:
    del segments
    wide = self.activation(self.gate(x, dropout)) * self.up(x, dropout)
    return self.down(wide, dropout), None


class Mlp(nnx.Module):
  """x [B, T, D] -> [B, T, D] through F = ffn_dim, without a gate."""

  def __init__(self, model_dim: int, spec: MlpSpec):
    self.activation = ACTIVATIONS[spec.activation]
    self.up, self.down = _to_wide(model_dim, spec), _to_narrow(model_dim, spec)

  def __call__(
    self, x: jax.Array, segments: jax.Array, dropout: Dropout | None = None
  ) -> tuple[jax.Array, None]:
    del segments
    return self.down(self.activation(self.up(x, dropout)), dropout), None
