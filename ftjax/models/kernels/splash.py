"""Attention by the splash kernel that ships with jax, for TPUs: no scores in memory, and blocks of
keys that no query may see are skipped.

Its mask is causal by index, which is the rule of attention.py where positions rise along the row:
everywhere but under a split sequence. Arrays are one device's.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

_BLOCK = 512


def _kernel(length: int, heads: int, interpret: bool):
  """(q [G, T, H], k [T, H], v [T, H], segments) -> [G, T, H], for the G heads of one key head."""
  block = next(size for size in (_BLOCK, 256, 128) if length % size == 0)
  names = ('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv')
  names += ('block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq')
  return kernels.make_splash_mqa_single_device(
    masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
    block_sizes=kernels.BlockSizes(**dict.fromkeys(names, block)),
    interpret=interpret,
  )


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, interpret: bool = False
) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v within segments, causal.

  Args:
    q: [B, T, N, H], T a multiple of 128.
    k: [B, T, K, H], N a multiple of K.
    v: [B, T, K, H].
    segments: int32[B, T].
    interpret: run the kernel step by step on any device, for tests.

  Returns:
    [B, T, N, H] in q's dtype; scores and softmax are float32.
  """
  b, t, n, h = q.shape
  num_kv = k.shape[2]
  kernel = _kernel(t, n // num_kv, interpret)
  scaled = (q.astype(jnp.float32) * h**-0.5).astype(q.dtype)
  rows = scaled.transpose(0, 2, 1, 3).reshape(b, num_kv, n // num_kv, t, h)
  keys, values = (a.transpose(0, 2, 1, 3) for a in (k, v))
  over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
  out = jax.vmap(over_heads)(rows, keys, values, kernels.SegmentIds(segments, segments))
  return out.reshape(b, n, t, h).transpose(0, 2, 1, 3)
