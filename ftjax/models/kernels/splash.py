"""Attention by the splash kernel that ships with jax, for TPUs: no scores in memory, and blocks of
keys that no query may see are skipped.

Its mask goes by index in the row, which is the rule of attention.py within a segment, where
positions rise by one along the row. Under a split sequence a device holds the queries of two chunks
(runtime/sharding.py, `zigzag`), so its mask is given their indices. Arrays are one device's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from ftjax.runtime import sharding

_SIZES = (512, 256, 128)


def _sees(q_index, k_index, window: int | None, causal: bool):
  """Arrays of int32 -> bool; numpy's when the mask is made, the kernel's when it runs."""
  behind = q_index - k_index
  if causal:
    mask = behind >= 0
    return mask if window is None else mask & (behind < window)
  if window is None:
    return behind >= -(2**30)  # all
  return (behind < window) & (behind > -window)


@dataclasses.dataclass(frozen=True)
class _Visible(masks.Mask):
  """The mask [length, length] whose rows lie in the order of `ways` shards.

  Splash looks for `q_sequence` (the rows' indices) and `mask_function`: with them the kernel
  computes the mask, and reads none.
  """

  length: int
  ways: int
  window: int | None
  causal: bool

  @property
  def shape(self) -> tuple[int, int]:
    return self.length, self.length

  @property
  def q_sequence(self) -> np.ndarray:
    return sharding.zigzag(self.length, self.ways)

  @property
  def mask_function(self):
    return functools.partial(_sees, window=self.window, causal=self.causal)

  def __getitem__(self, index) -> np.ndarray:
    rows, columns = index
    keys = np.arange(self.length, dtype=np.int32)[columns]
    return _sees(self.q_sequence[rows][:, None], keys[None, :], self.window, self.causal)


def _block(size: int) -> int:
  return next(n for n in _SIZES if size % n == 0)


def _kernel(
  length: int,
  heads: int,
  window: int | None,
  soft_cap: float | None,
  causal: bool,
  interpret: bool,
):
  """(q [G, T, H], k [S, H], v [S, H], segments) -> [G, T, H], for the G heads of one key head and
  this device's T queries.
  """
  ways = sharding.axis_size('context')
  queries = length // ways
  # A block that holds queries of both chunks would skip little.
  block_q = _block(queries // 2 if ways > 1 and queries % 256 == 0 else queries)
  q_names = ('block_q', 'block_q_dkv', 'block_q_dq')
  k_names = ('block_kv', 'block_kv_compute', 'block_kv_dkv', 'block_kv_dkv_compute', 'block_kv_dq')
  sizes = dict.fromkeys(q_names, block_q) | dict.fromkeys(k_names, _block(length))
  kernel = kernels.make_splash_mqa(
    masks.MultiHeadMask([_Visible(length, ways, window, causal)] * heads),
    block_sizes=kernels.BlockSizes(**sizes),
    head_shards=1,
    q_seq_shards=ways,
    attn_logits_soft_cap=soft_cap,
    interpret=interpret,
  )
  if ways == 1:
    return kernel

  def mine(array):
    """Returns this device's part of a mask array [1, query blocks, key blocks] or [queries]."""
    axis = 1 if array.ndim == 3 else 0
    size = array.shape[axis] // ways
    return jax.lax.dynamic_slice_in_dim(array, sharding.index('context') * size, size, axis)

  return jax.tree.map(mine, kernel)


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: tuple[jax.Array, jax.Array],
  *,
  window: int | None,
  soft_cap: float | None,
  causal: bool = True,
  interpret: bool = False,
) -> jax.Array:
  """softmax(cap(q k^T / sqrt(H))) v within segments. Inside `shard_map`.

  Args:
    q: [B, T, N, H], T a multiple of 128; this device's tokens in the order of runtime/sharding.py.
    k: [B, S, K, H], of the whole row in its natural order; N a multiple of K.
    v: [B, S, K, H].
    segments: int32[B, T] of the queries, int32[B, S] of the keys.
    window: as in attention.attend.
    soft_cap: as there.
    causal: as there.
    interpret: run the kernel step by step on any device, for tests.

  Returns:
    [B, T, N, H] in q's dtype; scores and softmax are float32.
  """
  b, t, n, h = q.shape
  num_kv = k.shape[2]
  kernel = _kernel(k.shape[1], n // num_kv, window, soft_cap, causal, interpret)
  scaled = (q.astype(jnp.float32) * h**-0.5).astype(q.dtype)
  rows = scaled.transpose(0, 2, 1, 3).reshape(b, num_kv, n // num_kv, t, h)
  keys, values = (a.transpose(0, 2, 1, 3) for a in (k, v))
  over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
  out = jax.vmap(over_heads)(rows, keys, values, kernels.SegmentIds(*segments))
  return out.reshape(b, n, t, h).transpose(0, 2, 1, 3)
