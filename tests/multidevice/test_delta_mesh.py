"""The gated delta net on meshes of eight devices: outputs and gradients of packed rows are those of
one device, however rows, sequence and heads are split.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY, init, place

from ftjax.models import delta_net, kinds
from ftjax.models.architecture import DeltaNetSpec
from ftjax.models.attention import Tokens
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError

B, T = 4, 64
(_FULL,) = TINY.stacks[0][0]


def model(key_heads, value_heads):
  # With eps=1e-3 the norm of the outputs multiplies rounding errors elsewhere up to the tolerance.
  mixer = DeltaNetSpec(key_heads, 8, value_heads, 4, eps=1e-2)
  block = dataclasses.replace(_FULL, mixer=mixer)
  return dataclasses.replace(TINY, stacks=(((block,), 2),))


def rows():
  """Tokens, segments and positions int32[B, T] of packed documents, and factors [B, T, D]."""
  rng = np.random.default_rng(0)
  begins = rng.uniform(size=(B, T)) < 0.1
  segments = 1 + np.cumsum(begins, 1)
  segments[:, -3:] = 0
  positions = np.zeros_like(segments)
  for t in range(1, T):
    same = segments[:, t] == segments[:, t - 1]
    positions[:, t] = np.where(same, positions[:, t - 1] + 1, 0)
  tokens = rng.integers(0, TINY.vocab_size, (B, T))
  factors = rng.normal(size=(B, T, TINY.model_dim)).astype(np.float32)
  return *(np.int32(a) for a in (tokens, segments, positions)), factors * (segments > 0)[..., None]


def computed(arch, context=1):
  """Hidden states in natural order, and the gradient by all parameters, flat."""
  order = sharding.zigzag(T, context)
  tokens, segments, positions = (place(a[:, order], 'batch', 'seq') for a in rows()[:3])
  factors = place(rows()[3][:, order], 'batch', 'seq', 'act_embed')
  params = init(arch)

  @jax.jit
  def both(params):
    def loss(params):
      where = Tokens(segments, positions)
      x = kinds.apply(arch, params, tokens, where, dtype=jnp.float32, remat='full')
      return (x * factors).sum(), x

    return jax.value_and_grad(loss, has_aux=True)(params)

  (_, x), gradient = both(params)
  flat = {n: np.asarray(g) for n, g in trees.flatten(gradient).items()}
  return np.asarray(x)[:, np.argsort(order)], flat


@functools.cache
def expected(key_heads, value_heads):
  return computed(model(key_heads, value_heads))


# With context=4 the four key heads are split, the two are not: each device then computes both.
@pytest.mark.parametrize(
  ('heads', 'axes'),
  [
    pytest.param((2, 4), dict(data=2, fsdp=2, tensor=2), marks=pytest.mark.full),
    pytest.param((2, 4), dict(context=4, expert=2), marks=pytest.mark.full),
    pytest.param((4, 8), dict(context=4, fsdp=2), marks=pytest.mark.full),
    ((4, 8), dict(context=2, tensor=2, fsdp=2)),
  ],
)
def test_outputs_and_gradients_are_those_of_one_device(heads, axes, use_mesh, monkeypatch):
  monkeypatch.setattr(delta_net, 'CHUNK', 8)
  wanted, slopes = expected(*heads)
  use_mesh(**axes)
  found, gradient = computed(model(*heads), axes.get('context', 1))
  real = rows()[1] > 0
  np.testing.assert_allclose(found[real], wanted[real], atol=5e-5)
  for name, g in gradient.items():
    np.testing.assert_allclose(g, slopes[name], atol=5e-5 * np.abs(slopes[name]).max())


def test_heads_that_cannot_be_split(use_mesh):
  arch = model(2, 4)
  mesh = use_mesh(tensor=4, data=2)
  axes, shapes = trees.flatten(kinds.axes(arch)), trees.flatten(kinds.abstract(arch))
  with pytest.raises(ConfigError, match=r'attn/.*kv_heads dimension of 2 cannot be split into 4'):
    sharding.check_divides(axes, {n: s.shape for n, s in shapes.items()}, mesh)
