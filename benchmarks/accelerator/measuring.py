"""What the sections of accelerator_check.py share: one device, times, memory, differences, and rows
of packed documents.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ftjax.data import batches
from ftjax.families import table
from ftjax.models.architecture import Architecture
from ftjax.planning import known_models
from ftjax.runtime import sharding

# The environment variable with the platform that the runner found.
EXPECTED = 'FTJAX_CHECK_PLATFORM'
# A model of the same family for CPUs.
TINY = {
  'hidden_size': 64,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 16,
  'intermediate_size': 128,
  'vocab_size': 512,
}


def one_device(device: jax.Device | None = None) -> Mesh:
  """Sets and returns a mesh of one device: the first that is attached, or the given one.

  Raises:
    RuntimeError: jax found another platform than the runner. With JAX_PLATFORMS=cuda,cpu it goes on
      with the CPU where the GPU does not start.
  """
  expected = os.environ.get(EXPECTED)
  if device is None and expected not in (None, jax.default_backend()):
    raise RuntimeError(f'expected {expected}, and jax has started on {jax.default_backend()}')
  mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), [device or jax.devices()[0]])
  jax.set_mesh(mesh)
  jax.config.update('jax_default_matmul_precision', 'default')
  return mesh


def platform() -> str:
  """Returns 'gpu', 'tpu' or 'cpu' of the current mesh, whose device need not be attached."""
  return jax.sharding.get_mesh().devices.flat[0].platform


def architecture(name: str, tiny: bool, **changes: int | bool) -> Architecture:
  """Returns the architecture of a released model, or with `tiny` a small one of its family.

  name: of planning/known_models.py. changes: keys of its config.json with other values.
  """
  config = known_models.SHAPES[name] | (TINY if tiny else {}) | changes
  return table.architecture(config)


def seconds(call: Callable[[], object], times: int = 5, warmup: int = 2) -> list[float]:
  """Returns the seconds of each of `times` calls, each until its arrays are ready."""
  out = []
  for number in range(warmup + times):
    begin = time.perf_counter()
    jax.block_until_ready(call())
    if number >= warmup:
      out.append(time.perf_counter() - begin)
  return out


def median_seconds(call: Callable[[], object], times: int = 5, warmup: int = 2) -> float:
  """Returns the median of `seconds`."""
  return statistics.median(seconds(call, times, warmup))


def memory() -> dict[str, int | None]:
  """Returns the device's bytes `in_use`, at the `peak` since the process began, and the `limit` of
  its allocator; None where the platform does not report them, as on CPUs.
  """
  stats = jax.devices()[0].memory_stats() or {}
  keys = {'in_use': 'bytes_in_use', 'peak': 'peak_bytes_in_use', 'limit': 'bytes_limit'}
  return {name: stats.get(key) for name, key in keys.items()}


def gib(size: float | None) -> float | None:
  """Returns bytes in GiB; None stays None."""
  return None if size is None else size / 2**30


def error(found, expected, where: np.ndarray | None = None) -> float:
  """Returns the largest difference of two arrays, relative to the largest entry of `expected`; NaN
  where either is not finite.

  where: bool, broadcast over the last axes: entries that count.
  """
  a, b = (np.asarray(x).astype(np.float32) for x in (found, expected))
  if where is not None:
    a, b = a[where], b[where]
  return float(np.abs(a - b).max() / np.abs(b).max())


def difference(before, after, where: np.ndarray | None = None) -> float:
  """Returns the largest difference of two arrays, 0 only where all bits are equal but for the sign
  of 0; NaN where one is not a number.
  """
  a, b = (np.asarray(x).astype(np.float32) for x in (before, after))
  if where is not None:
    a, b = a[where], b[where]
  return float(np.abs(a - b).max()) if a.size else 0.0


def largest(values: Iterable[float]) -> float:
  """Returns the largest value; NaN where one is NaN, which Python's max may lose."""
  return float(np.max([*values]))


def document_lengths(seq_len: int, seed: int) -> list[int]:
  """Returns lengths of documents that fill a row: log-normal, median seq_len / 8, the last cut."""
  chance, out = np.random.default_rng(seed), []
  while (room := seq_len - sum(out)) > 0:
    length = int(chance.lognormal(np.log(seq_len / 8), 0.8))
    out.append(min(room, max(2, length)))
  return out


def packed_batch(
  rows: int, seq_len: int, vocab: int, *, one_document: bool = False, seed: int = 0
) -> tuple[dict[str, np.ndarray], int]:
  """Returns (a host batch of full rows of random tokens, all supervised; the (query, key) pairs
  within its documents).
  """
  chance = np.random.default_rng(seed)
  batch, pairs = batches.empty(rows, seq_len), 0
  for row in range(rows):
    lengths = [seq_len] if one_document else document_lengths(seq_len, seed + row)
    pairs += sum(n * (n + 1) // 2 for n in lengths)
    documents = [(chance.integers(1, vocab, n), np.ones(n, bool)) for n in lengths]
    batches.fill_row(batch, row, documents)
  return batch, pairs


def on_device(array: np.ndarray, dtype: jnp.dtype | None = None) -> jax.Array:
  """Returns a host array on the mesh's device."""
  return jnp.asarray(array, dtype)
