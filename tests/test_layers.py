"""Projections and norms: against float64, and what is computed in which type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ftjax.models import layers
from ftjax.models.architecture import GatedMlpSpec, Norm
from ftjax.models.mlp import GatedMlp


def normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fill(module, seed=0):
  """The module with random weights, as transformer.py merges them."""
  definition, state = nnx.split(module)
  draw = np.random.default_rng(seed)
  leaves = jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), jnp.float32), state)
  return nnx.merge(definition, leaves), nnx.to_pure_dict(leaves)


@pytest.mark.parametrize(
  ('inputs', 'outputs', 'axes', 'out', 'einsum'),
  [
    ((6,), (4, 2), ('embed', 'heads', 'head_dim'), ('heads', 'head_dim'), 'BTD,DNH->BTNH'),
    ((4, 2), (6,), ('heads', 'head_dim', 'embed'), ('act_embed',), 'BTNH,NHD->BTD'),
    ((6,), (8,), ('embed', 'ffn'), ('ffn',), 'BTD,DF->BTF'),
  ],
)
@pytest.mark.parametrize('context', [1, 2])
def test_a_projection_is_an_einsum(inputs, outputs, axes, out, einsum, context, use_mesh):
  """In both of its forms: B and T merged where the mesh does not split T, apart where it does."""
  use_mesh(context=context)
  module, weights = fill(layers.Linear(inputs, outputs, axes, ('batch', 'seq', *out)))
  x = normal((2, 4, *inputs))
  y = jax.jit(module.__call__)(jnp.asarray(x))
  np.testing.assert_allclose(y, np.einsum(einsum, x, np.asarray(weights['w'])), atol=1e-5)


@pytest.mark.parametrize('context', [1, 2])
def test_a_bias_is_added_in_the_compute_dtype(context, use_mesh):
  use_mesh(context=context)
  out = ('batch', 'seq', 'heads', 'head_dim')
  module, weights = fill(
    layers.Linear((6,), (4, 2), ('embed', 'heads', 'head_dim'), out, bias=True)
  )
  assert module.b.declared[1:4] == (('heads', 'head_dim'), 0, 0)
  x, b = normal((2, 4, 6)), np.asarray(weights['b'])
  y = jax.jit(module.__call__)(jnp.asarray(x))
  np.testing.assert_allclose(
    y, np.einsum('BTD,DNH->BTNH', x, np.asarray(weights['w'])) + b, atol=1e-5
  )
  half = jax.jit(module.__call__)(jnp.zeros((2, 4, 6), jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  np.testing.assert_array_equal(half, np.broadcast_to(b.astype(jnp.bfloat16), half.shape))


def test_fan_in_counts_all_inputs():
  definition = layers.Linear((4, 2), (6,), ('heads', 'head_dim', 'embed'), ('batch', 'seq', 'norm'))
  assert definition.w.declared.fan_in == 8
  assert layers.Normalize((6,), Norm(1e-5)).scale.declared.fan_in == 0


@pytest.mark.parametrize('size', [1e-4, 1.0, 300.0])
def test_rms_norm_against_float64(size):
  module, weights = fill(layers.Normalize((32,), Norm(1e-5)))
  x = normal((2, 3, 32)) * np.float32(size)
  wide = x.astype(np.float64)
  expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(weights['scale'])
  np.testing.assert_allclose(module(jnp.asarray(x)), expected, rtol=2e-6, atol=1e-7)


def test_rms_norm_of_bfloat16_is_rounded_once():
  """Sums of squares in bfloat16 stop growing at 256 terms of one; here there are 4,096."""
  module, _ = fill(layers.Normalize((4096,), Norm(1e-5)))
  x = jnp.asarray(normal((1, 2, 4096)), jnp.bfloat16)
  y = module(x)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    np.asarray(y, np.float32),
    np.asarray(module(x.astype(jnp.float32)).astype(jnp.bfloat16), np.float32),
  )


def test_gated_mlp():
  module, w = fill(GatedMlp(6, GatedMlpSpec(10)))
  x = normal((2, 3, 6))
  gate, up = x @ np.asarray(w['gate']['w']), x @ np.asarray(w['up']['w'])
  expected = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(w['down']['w'])
  found, _ = jax.jit(module.__call__)(jnp.asarray(x), jnp.ones((2, 3), jnp.int32))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
