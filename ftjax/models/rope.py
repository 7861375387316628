"""Rotary position embeddings in HF's half-rotation layout, float32 throughout (Su et al. 2021).

The rules are those of transformers, modeling_rope_utils.py. Two of them, `dynamic` and `longrope`,
depend on a length. transformers takes the largest position of the whole batch, so that a text is
computed otherwise beside a longer one. Here it is the length of the text's own document
(`document_lengths`), as if it stood alone in a batch of transformers."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.models.rope_spec import (
  DynamicScaling,
  LinearScaling,
  LongScaling,
  ProportionalScaling,
  Rope,
  RopeScaling,
  YarnScaling,
)
from ftjax.runtime.sharding import gather, shard_map, spec


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Returns float32[R/2]: radians per position of each rotated pair, after the scaling rule.

  R is the number of rotated coordinates, all H of the head or a fraction. Rules that depend on the
  length give the frequencies of short documents."""
  rule, period = rope.scaling, _periods(rope, head_dim)
  freq = (1.0 / period).astype(np.float32)
  if rule is None or isinstance(rule, DynamicScaling):
    return freq
  if isinstance(rule, RopeScaling):
    return _llama3(rule, freq)
  if isinstance(rule, LinearScaling):
    return freq / np.float32(rule.factor)
  if isinstance(rule, YarnScaling):
    return _yarn(rule, rope.theta, period)
  if isinstance(rule, LongScaling):
    return _divided(period, rule.short_factors)
  if isinstance(rule, ProportionalScaling):
    turning = int(rope.fraction * head_dim // 2)
    freq[turning:] = 0
    return freq / np.float32(rule.factor)
  raise TypeError(f'{rule!r} is not a scaling rule of architecture.py')


def _periods(rope: Rope, head_dim: int) -> np.ndarray:
  """Returns float32[R/2]: positions per radian of each pair, before the scaling rule."""
  size = rope.size(head_dim)
  exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
  if rope.scaling is None or isinstance(rope.scaling, RopeScaling):
    # numpy's float32 power is up to two units in the last place from torch's. These rules are older
    # than the others, and keep the bits with which their models were trained.
    return np.float32(rope.theta) ** exponent
  # HF rounds the exponent to float32 and computes the power with less than one unit of error.
  return (rope.theta ** exponent.astype(np.float64)).astype(np.float32)


def _llama3(rule: RopeScaling, freq: np.ndarray) -> np.ndarray:
  """Llama 3.1 model card: wavelengths above original_len / low_freq_factor turn `factor` times
  slower, those below original_len / high_freq_factor stay, and between them the two are blended
  linearly in original_len / wavelength.
  """
  wavelength = 2 * math.pi / freq
  smooth = (rule.original_len / wavelength - rule.low_freq_factor) / (
    rule.high_freq_factor - rule.low_freq_factor
  )
  blended = (1 - smooth) * freq / rule.factor + smooth * freq
  slow = wavelength > rule.original_len / rule.low_freq_factor
  fast = wavelength < rule.original_len / rule.high_freq_factor
  return np.where(slow, freq / rule.factor, np.where(fast, freq, blended)).astype(np.float32)


def _yarn(rule: YarnScaling, theta: float, period: np.ndarray) -> np.ndarray:
  """Peng et al. 2023, "YaRN", section 3.2: the ramp is linear in the number of the pair, between
  the pairs that turn beta_fast and beta_slow times in original_len tokens.
  """
  pairs = len(period)

  def pair(turns: float) -> float:
    return pairs * math.log(rule.original_len / (turns * 2 * math.pi)) / math.log(theta)

  low, high = pair(rule.beta_fast), pair(rule.beta_slow)
  if rule.truncate:
    low, high = math.floor(low), math.ceil(high)
  # 2 pairs - 1, although the last pair is pairs - 1: transformers and the paper's code do so.
  low, high = max(low, 0), min(high, 2 * pairs - 1)
  if low == high:
    high += 0.001
  ramp = (np.arange(pairs, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
  kept = 1 - np.clip(ramp, 0, 1)
  slow = 1 / (np.float32(rule.factor) * period)
  return (slow * (1 - kept) + (1 / period) * kept).astype(np.float32)


def _divided(period: np.ndarray, factors: tuple[float, ...]) -> np.ndarray:
  return (1 / (np.asarray(factors, np.float32) * period)).astype(np.float32)


def document_lengths(segments: jax.Array, positions: jax.Array) -> jax.Array:
  """Returns for each token the length of its document, the largest position in it plus 1:
  int32[B, T].

  In training that is the whole document, wherever it lies in the row and however the row is
  ordered or split over `context`. In decoding it is what has been written so far, up to the tokens
  that are computed now. Keys in the cache stay as they were rotated, as in transformers: once the
  text has grown past the original length, they differ from those of a forward pass over the whole
  text. A rollout leaves the last token of a prompt to the first step of decoding (engine.py), so
  the rest of the prompt has the length without it.

  Two habits of transformers are not followed. Its Phi-3 computes the whole cache again at the token
  that first goes beyond the original length. Its `dynamic` rule keeps the frequencies of the
  longest text that the process has seen, until one shorter than the original length comes.

  Args:
    segments: int32[B, T], of documents that are numbered from 1, so at most T.
    positions: int32[B, T] within them.
  """

  def local(segments, positions):
    of, at = (gather(a, 'context', 1) for a in (segments, positions))
    rows = jnp.arange(of.shape[0])[:, None]
    lengths = jnp.zeros((of.shape[0], of.shape[1] + 1), jnp.int32).at[rows, of].max(at + 1)
    return lengths[rows, segments]

  where = spec('batch', 'seq')
  return shard_map(local, (where, where), where)(segments, positions)


def frequencies_of(rope: Rope, head_dim: int, lengths: jax.Array) -> jax.Array:
  """Returns float32[B, T, R/2]: radians per position in documents of lengths int32[B, T], for a
  rope that uses them.
  """
  short, rule = inverse_frequencies(rope, head_dim)[None, None], rope.scaling
  if isinstance(rule, LongScaling):
    long = _divided(_periods(rope, head_dim), rule.long_factors)[None, None]
    return jnp.where((lengths > rule.original_len)[..., None], long, short)
  # The base grows by stretch ** (R / (R - 2)). As a factor of the plain frequencies the power stays
  # exact near 1, and is 1 in documents of the original length.
  longer = jnp.maximum(lengths, rule.original_len).astype(jnp.float32)
  stretch = rule.factor * longer / rule.original_len - (rule.factor - 1)
  size = rope.size(head_dim)
  exponent = np.arange(0, size, 2, dtype=np.float32)[None, None] / np.float32(size - 2)
  return short * jnp.exp(-exponent * jnp.log(stretch)[..., None])


def angles(
  rope: Rope, head_dim: int, positions: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns (cos, sin), float32[B, T, R/2], of positions int32[B, T], times the rule's attention
  factor.

  lengths: int32[B, T], `document_lengths`, for a rope that uses them.
  """
  if rope.uses_length:
    freq = frequencies_of(rope, head_dim, lengths)
  else:
    freq = inverse_frequencies(rope, head_dim)[None, None]
  theta = positions[..., None].astype(jnp.float32) * freq
  cos, sin = jnp.cos(theta), jnp.sin(theta)
  if isinstance(rope.scaling, YarnScaling | LongScaling) and rope.scaling.attention_factor != 1:
    cos, sin = cos * rope.scaling.attention_factor, sin * rope.scaling.attention_factor
  return cos, sin


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates pairs (x[i], x[i + R/2]) of x [B, T, heads, H] by angles in cos, sin [B, T, R/2];
  coordinates from R on stay.
  """
  size = 2 * cos.shape[-1]
  turned, kept = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
  first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(
    x.dtype
  )
  return out if kept is None else jnp.concatenate([out, kept], axis=-1)


def scale_queries(rope: Rope, q: jax.Array, positions: jax.Array) -> jax.Array:
  """Returns q [B, T, N, H] times the rope's factor of queries at positions int32[B, T]; q itself
  where it has none. Source: transformers, models/ministral3.
  """
  rule = rope.query
  if rule is None:
    return q
  steps = (positions // rule.original_len).astype(jnp.float32)
  scale = 1 + rule.beta * jnp.log1p(steps)
  return (q.astype(jnp.float32) * scale[..., None, None]).astype(q.dtype)
