"""Rotary embeddings in GGUF files: metadata, and tensors of divisors of the frequencies.

llama.cpp computes linear and yarn scaling for every architecture from metadata; `llama3` and
`longrope` from tensors, for some. It chooses between the two tensors of longrope by the size of its
context, where transformers and ftjax go by the length of the document.
"""

import math
from typing import Any

import numpy as np

from ftjax.families import rope_rule
from ftjax.families.gguf_file import GgufFile, shortest
from ftjax.models.rope_spec import (
  LinearScaling,
  LongScaling,
  QueryScaling,
  Rope,
  RopeScaling,
  Scaling,
  YarnScaling,
)
from ftjax.runtime.errors import DataError

FREQS = 'rope_freqs.weight'
LONG, SHORT = 'rope_factors_long.weight', 'rope_factors_short.weight'
TENSORS = (FREQS, LONG, SHORT)


def read_rope(file: GgufFile, *, partial: bool = False, scaled_queries: bool = False) -> Rope:
  """Returns the rotary embedding that a file states.

  partial: whether llama.cpp rotates a part of the head for this architecture. scaled_queries:
  whether it multiplies queries by a factor of their position, and reads yarn's `mscale_all_dim`.

  Raises:
    DataError: a rule that is not computed here or there.
  """
  head_dim = file.head_dim()
  size = file.count('rope.dimension_count', head_dim)
  if size != head_dim and not (partial and size < head_dim):
    raise DataError(
      f'{file.place}: rotary embedding of a part of the head '
      f'({file.key("rope.dimension_count")}={size} of {head_dim}) is not supported'
    )
  query = None
  if scaled_queries and file.has('attention.temperature_scale'):
    original = file.count('rope.scaling.original_context_length', file.count('context_length'))
    query = QueryScaling(file.number('attention.temperature_scale'), original)
  scaling = _read_scaling(file, size, scaled_queries)
  return Rope(file.theta(), scaling, size / head_dim, query)


def _read_scaling(file: GgufFile, size: int, log_multiplier: bool) -> Scaling | None:
  # Without a type llama.cpp takes the factor for that of linear scaling.
  kind = file.get('rope.scaling.type', 'linear')
  factor = file.get('rope.scaling.factor', file.get('rope.scale_linear', 0.0))
  if LONG in file.rope or SHORT in file.rope:
    return _read_long(file)
  if FREQS in file.rope:
    if kind not in ('none', 'linear', 'llama3') or factor not in (0.0, 1.0):
      raise DataError(
        f'{file.place}: {file.key("rope.scaling.type")}={kind!r} beside {FREQS} is not supported'
      )
    original = file.get('rope.scaling.original_context_length')
    return llama3_scaling(file.rope[FREQS], file.theta(), size, original, file.place)
  if kind == 'none' or (kind == 'linear' and factor in (0.0, 1.0)):
    return None
  if kind == 'linear':
    return LinearScaling(file.number('rope.scaling.factor', factor))
  if kind == 'yarn':
    return _read_yarn(file, log_multiplier)
  raise DataError(
    f'{file.place}: {file.key("rope.scaling.type")}={kind!r} is not supported; supported: none, '
    'linear, yarn, and those with tensors of divisors'
  )


def _read_yarn(file: GgufFile, log_multiplier: bool) -> YarnScaling:
  for name in ('rope.scaling.yarn_log_multiplier', 'rope.scaling.yarn_ext_factor'):
    if file.has(name) and not (log_multiplier and name.endswith('log_multiplier')):
      raise DataError(f'{file.place}: {file.key(name)}={file.get(name)!r} is not supported')
  factor = file.number('rope.scaling.factor')
  attention = file.number('rope.scaling.attn_factor', 1.0)
  if multiplier := file.get('rope.scaling.yarn_log_multiplier', 0.0):
    attention /= 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0
  return YarnScaling(
    factor=factor,
    original_len=file.count('rope.scaling.original_context_length', file.count('context_length')),
    attention_factor=attention * _yarn_attention(factor),
    beta_fast=file.number('rope.scaling.yarn_beta_fast', 32.0),
    beta_slow=file.number('rope.scaling.yarn_beta_slow', 1.0),
  )


def _yarn_attention(factor: float) -> float:
  """Returns the factor of rotated queries and keys that llama.cpp derives (Peng et al. 2023)."""
  return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def _read_long(file: GgufFile) -> LongScaling:
  both = [file.rope.get(name) for name in (SHORT, LONG)]
  if any(factors is None for factors in both):
    raise DataError(f'{file.place}: of {SHORT} and {LONG} one is missing')
  short, long = (tuple(shortest(x) for x in factors) for factors in both)  # type: ignore[union-attr]
  longest = file.count('context_length')
  original = file.count('rope.scaling.original_context_length', longest)
  attention = file.number('rope.scaling.attn_factor', 1.0)
  usual = rope_rule.long_attention(longest / original, original)
  if math.isclose(attention, usual, rel_tol=1e-6):  # stored in float32
    attention = usual
  return LongScaling(short, long, original, attention)


def write_rope(rope: Rope, head_dim: int, *, scaled_queries: bool = False) -> dict[str, Any]:
  """Returns the metadata of a rotary embedding, without the architecture's name; scaled_queries: as
  in `read_rope`.

  Raises:
    DataError: files cannot say it.
  """
  rule = rope.scaling
  out: dict[str, Any] = {
    'rope.dimension_count': rope.size(head_dim),
    'rope.freq_base': rope.theta,
  }
  known = isinstance(rule, RopeScaling | LinearScaling | YarnScaling | LongScaling | None)
  if not known or (rope.query is not None and not scaled_queries):
    raise DataError(f'{rope} has no form in GGUF files here; export a Hugging Face folder')
  if isinstance(rule, LinearScaling):
    out |= {'rope.scaling.type': 'linear', 'rope.scaling.factor': rule.factor}
  if isinstance(rule, YarnScaling):
    out |= {'rope.scaling.type': 'yarn', 'rope.scaling.factor': rule.factor}
    if (rule.beta_fast, rule.beta_slow) != (32.0, 1.0):
      out |= {
        'rope.scaling.yarn_beta_fast': rule.beta_fast,
        'rope.scaling.yarn_beta_slow': rule.beta_slow,
      }
    if scaled_queries and rule.attention_factor == 1:
      out['rope.scaling.yarn_log_multiplier'] = 1.0
  if rope.query is not None:
    out['attention.temperature_scale'] = rope.query.beta
    out['rope.scaling.original_context_length'] = rope.query.original_len
  if isinstance(rule, LongScaling):
    out |= {'rope.scaling.type': 'longrope', 'rope.scaling.attn_factor': rule.attention_factor}
  # The `llama3` rule has no type there: llama.cpp knows none of this name and applies the tensor
  # without it.
  if isinstance(rule, RopeScaling | YarnScaling | LongScaling):
    out['rope.scaling.original_context_length'] = rule.original_len
  return out


def tensors(rope: Rope | None, head_dim: int) -> dict[str, np.ndarray]:
  """Returns the tensors of a rotary embedding by name: float32[H/2], divisors of frequencies."""
  rule = None if rope is None else rope.scaling
  if isinstance(rule, RopeScaling):
    return {FREQS: llama3_factors(rule, rope.theta, head_dim).astype(np.float32)}  # type: ignore[union-attr]
  if isinstance(rule, LongScaling):
    long, short = (np.array(x, np.float32) for x in (rule.long_factors, rule.short_factors))
    return {LONG: long, SHORT: short}
  return {}


def llama3_factors(s: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
  """Returns float64[H/2]: the divisor of each rotary frequency under the `llama3` rule.

  Source: Llama 3.1's reference code; transformers, modeling_rope_utils.py.
  """
  wavelen = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
  smooth = (s.original_len / wavelen - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
  smooth = np.clip(smooth, 0.0, 1.0)
  return 1 / ((1 - smooth) / s.factor + smooth)


def llama3_scaling(
  factors: np.ndarray, theta: float, head_dim: int, original_len: int | None, place: str
) -> RopeScaling | None:
  """Recovers the `llama3` parameters from the divisors float32[H/2] that a GGUF file stores instead
  of them.

  On the ramp the inverse divisor is linear in 1/wavelength, which gives two numbers for three
  unknowns: multiplying original_len and both frequency factors by one number changes nothing. So
  the scale is a convention: the file's original_len where it has one, else low_freq_factor = 1,
  as all published Llama 3 models have it.

  Raises:
    DataError: the divisors do not follow the rule, or too few lie on the ramp.
  """
  factors = np.asarray(factors, np.float64)
  if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all():
    raise DataError(
      f'{place}: {FREQS} has shape {factors.shape}; expected ({head_dim // 2},) finite numbers'
    )
  if (factors == 1).all():
    return None
  factor = float(factors.max())
  ramp = (factors > 1 + 1e-6) & (factors < factor * (1 - 1e-6))
  refuse = DataError(
    f'{place}: {FREQS} does not determine a llama3 rope scaling; put the HF folder of '
    'this model in its place'
  )
  if ramp.sum() < 2 or factors[-1] != factor:
    raise refuse
  wavelen = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
  smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
  slope, offset = np.polyfit(
    1 / wavelen[ramp], smooth[ramp], 1
  )  # original/(high-low), -low/(high-low)
  if slope <= 0 or offset >= 0:
    raise refuse
  low = original_len * -offset / slope if original_len else 1.0
  span = low / -offset
  rounded = RopeScaling(shortest(factor), round(low, 3), round(low + span, 3), round(slope * span))
  error = np.abs(llama3_factors(rounded, theta, head_dim) / factors - 1).max()
  if error > 1e-5:
    raise refuse
  return rounded
