"""Rotary position embeddings in HF's half-rotation layout, float32 throughout (Su et al. 2021)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.models.architecture import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Returns float32[H/2]: radians per position of each rotated pair, after the scaling rule.

  `llama3` (Llama 3.1 model card): wavelengths above original_len / low_freq_factor turn `factor`
  times slower, those below original_len / high_freq_factor stay, and between them the two are
  blended linearly in original_len / wavelength."""
  # HF computes the exponent and the power in float32; so do we, to agree to the last bit.
  exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  freq = (1.0 / (np.float32(rope.theta) ** exponent)).astype(np.float32)
  rule = rope.scaling
  if rule is None:
    return freq
  wavelength = 2 * math.pi / freq
  smooth = (rule.original_len / wavelength - rule.low_freq_factor) / (
    rule.high_freq_factor - rule.low_freq_factor
  )
  blended = (1 - smooth) * freq / rule.factor + smooth * freq
  slow = wavelength > rule.original_len / rule.low_freq_factor
  fast = wavelength < rule.original_len / rule.high_freq_factor
  return np.where(slow, freq / rule.factor, np.where(fast, freq, blended)).astype(np.float32)


def angles(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (cos, sin), float32[B, T, H/2], of positions int32[B, T]."""
  theta = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)[None, None]
  return jnp.cos(theta), jnp.sin(theta)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates pairs (x[i], x[i + H/2]) of x [B, T, heads, H] by angles in cos, sin [B, T, H/2]."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(
    x.dtype
  )
