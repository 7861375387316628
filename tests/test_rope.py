"""Rotary angles against float64, the llama3 rule against hand arithmetic, and rotation itself."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.models import rope
from ftjax.models.architecture import Rope, RopeScaling


def llama3(theta=10000.0, **changes):
  rule = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=8192) | changes
  return Rope(theta, RopeScaling(**rule))


@pytest.mark.parametrize('theta', [10000.0, 500000.0])
def test_frequencies_against_float64(theta):
  freq = rope.inverse_frequencies(Rope(theta), 64)
  assert freq.dtype == np.float32
  np.testing.assert_allclose(freq, theta ** (-np.arange(0, 64, 2) / 64), rtol=5e-7)


@pytest.mark.parametrize('spec', [Rope(), llama3(500000.0)])
def test_angles_up_to_position_8191_against_float64(spec):
  """cos and sin to 1e-6 of the float32 angle, which is position times frequency rounded once (what
  HF computes); that one rounding is up to half a unit in the last place of 8191, 2.4e-4.
  """
  positions = np.array([[0, 1, 2, 255, 257, 4095, 8190, 8191]], np.int32)
  cos, sin = (np.asarray(a) for a in rope.angles(spec, 64, jnp.asarray(positions)))
  assert cos.dtype == sin.dtype == np.float32 and cos.shape == (1, 8, 32)
  exact = positions[..., None].astype(np.float64) * rope.inverse_frequencies(spec, 64)
  rounded = exact.astype(np.float32).astype(np.float64)
  assert np.abs(cos - np.cos(rounded)).max() <= 1e-6
  assert np.abs(sin - np.sin(rounded)).max() <= 1e-6
  assert np.abs(cos - np.cos(exact)).max() <= 2.45e-4
  assert np.abs(sin - np.sin(exact)).max() <= 2.45e-4


def test_llama3_rule_by_hand():
  """H 8, theta 1000, original length 100: wavelengths 2 pi * 1000^(i/4) are 6.3, 35.3, 198.7, 1117.

  Below 100 / 4 = 25 one stays, above 100 / 1 the last two turn 8 times slower, and the one between
  is blended with (100 / 35.3 - 1) / (4 - 1) = 0.6103.
  """
  spec = llama3(1000.0, original_len=100)
  plain = 1000.0 ** (-np.arange(4) / 4)
  smooth = (100 / (2 * math.pi / plain[1]) - 1) / 3
  assert smooth == pytest.approx(0.6100, abs=5e-4)
  expected = [
    plain[0],
    (1 - smooth) * plain[1] / 8 + smooth * plain[1],
    plain[2] / 8,
    plain[3] / 8,
  ]
  np.testing.assert_allclose(rope.inverse_frequencies(spec, 8), expected, rtol=5e-7)


def test_llama3_rule_at_its_borders_and_limits():
  """Continuous where the branches meet, so nothing jumps with rounding; factor 1 is no scaling."""
  freq = np.float64(2 * math.pi) / 8192 * np.array([1.0, 4.0])
  plain = rope.inverse_frequencies(Rope(), 8)
  np.testing.assert_array_equal(
    rope.inverse_frequencies(llama3(factor=1.0), 8) / plain, np.ones(4, np.float32)
  )
  for f, scale in zip(freq, [1 / 8, 1.0], strict=True):
    for side in (1 - 1e-6, 1 + 1e-6):
      # H 4 has the frequencies 1 and theta^-1/2.
      at = llama3(float((f * side) ** -2))
      assert rope.inverse_frequencies(at, 4)[1] / (f * side) == pytest.approx(scale, abs=1e-5)


def vectors(seed, shape=(1, 6, 2, 8)):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rotated(x, positions):
  return rope.rotate(x, *rope.angles(Rope(), 8, jnp.asarray(positions, jnp.int32)[None]))


def test_pairs_are_halves_apart():
  """HF's layout: coordinate i turns with i + H/2, as complex numbers turn."""
  x, positions = vectors(0), np.array([0, 1, 2, 3, 50, 100])
  turn = np.exp(1j * positions[:, None] * rope.inverse_frequencies(Rope(), 8).astype(np.float64))
  z = (np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])) * turn[None, :, None]
  expected = np.concatenate([z.real, z.imag], -1)
  np.testing.assert_allclose(rotated(x, positions), expected, atol=2e-6)


def test_position_zero_is_the_identity():
  np.testing.assert_array_equal(rotated(vectors(1), [0] * 6), vectors(1))


def test_products_depend_on_the_distance_alone():
  q, k = vectors(2), vectors(3)
  near = (rotated(q, range(5, 11)) * rotated(k, range(1, 7))).sum(-1)
  far = (rotated(q, range(105, 111)) * rotated(k, range(101, 107))).sum(-1)
  np.testing.assert_allclose(near, far, atol=2e-5)
  other = (rotated(q, range(6, 12)) * rotated(k, range(1, 7))).sum(-1)
  assert np.abs(np.asarray(near - other)).max() > 0.1


def test_bfloat16_is_rotated_in_float32():
  """Positions 8190 and 8191 are both 8192 in bfloat16; the rotation is rounded once, at its end."""
  x = vectors(4).astype(jnp.bfloat16)
  out = rotated(x, range(8186, 8192))
  assert out.dtype == jnp.bfloat16
  expected = rotated(x.astype(jnp.float32), range(8186, 8192)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(out.astype(jnp.float32), expected.astype(jnp.float32))
