"""Measures tokens/s, model FLOPs utilization (formula and peak), input wait and memory.

The training loop calls `Throughput` and passes its figures to metrics_writer.py.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

# Peak bf16 FLOP/s without sparsity of one jax device, by the start of its device_kind; the first
# match wins. TPUs: cloud.google.com/tpu/docs, "Peak compute per chip (BF16)"; a TPU7x chip
# (2307e12) shows as two devices. GPUs: NVIDIA's data sheets, "BF16 Tensor Core", halved where they
# state it with sparsity.
_PEAK_BF16 = (
  ('TPU v4 lite', 137e12),
  ('TPU v4', 275e12),
  ('TPU v5 lite', 197e12),
  ('TPU v5e', 197e12),
  ('TPU v5', 459e12),
  ('TPU v6 lite', 918e12),
  ('TPU v6e', 918e12),
  ('TPU7x', 2307e12 / 2),
  ('NVIDIA H200 NVL', 835.5e12),
  ('NVIDIA H200', 989.4e12),
  ('NVIDIA H100 PCIe', 756e12),
  ('NVIDIA H100 NVL', 835.5e12),
  ('NVIDIA H100', 989.4e12),
  ('NVIDIA A100', 312e12),
)


@dataclasses.dataclass(frozen=True)
class Peak:
  """The peak that MFU is relative to: FLOP/s of all devices together, and the source of the
  figure."""

  flops_per_s: float
  source: str


def table_peak(device_kind: str, num_devices: int) -> Peak | None:
  """Returns the bf16 peak of an accelerator of the table; None for others, instead of a guess."""
  for kind, flops in _PEAK_BF16:
    if device_kind.startswith(kind):
      return Peak(flops * num_devices, f'{num_devices} x {kind} at {flops / 1e12:.4g} TFLOP/s bf16')
  return None


@functools.cache
def find_peak() -> Peak | None:
  """Returns the peak of this run's devices: from the table, or on CPU a float32 matmul rate,
  measured once.

  The measurement takes less than half a second.
  """
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    return table_peak(device.device_kind, jax.device_count())
  n = 1024
  with jax.set_mesh(Mesh(np.array([device]), ('one',))):  # the run's mesh may be of many
    a = jax.device_put(np.full((n, n), 1e-3, np.float32), device)
    multiply = jax.jit(functools.partial(jnp.matmul, precision='highest'))
    multiply(a, a).block_until_ready()
    seconds, start = [], time.perf_counter()
    while len(seconds) < 3 or (time.perf_counter() - start < 0.2 and len(seconds) < 20):
      t = time.perf_counter()
      multiply(a, a).block_until_ready()
      seconds.append(time.perf_counter() - t)
  # Simulated CPU devices share the cores of their process, so each process counts once.
  rate = 2 * n**3 / min(seconds) * jax.process_count()
  return Peak(
    rate, f'{rate / 1e9:.0f} GFLOP/s, measured: float32 matmul {n}x{n}x{n}, best of {len(seconds)}'
  )


class Throughput:
  """Measures tokens/s, MFU and input wait between two readings.

  Use: `start()` before the first step; `waiting()` around the wait for a batch; `paused()` around
  evaluation and saving; `step_done(...)` when the result of a step has been read; `read()` at each
  log line. The first step after `start` contains the compilation or its cache look-up, and is left
  out.

  Args:
    flops: (tokens, attended) -> model FLOPs of a step; see models/counts.py.
    peak: FLOP/s of all devices, None to leave MFU out.
    clock: seconds, monotonic.
  """

  def __init__(
    self,
    *,
    flops: Callable[[float, float], float],
    peak: Peak | None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self._flops = flops
    self._peak = peak
    self._clock = clock
    self.trained_s = 0.0  # seconds of counted steps without the wait for batches
    self.start()

  def start(self) -> None:
    """Starts measuring, at a fresh start or a resume; the next step is left out."""
    self._is_warm = False
    self._reset()

  def _reset(self) -> None:
    self._since = self._clock()
    self._paused = self._waited = 0.0
    self._steps = self._tokens = self._supervised = self._attended = 0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time inside as waiting for the next batch."""
    start = self._clock()
    try:
      yield
    finally:
      self._waited += self._clock() - start

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes the time inside, of evaluation or a save."""
    start = self._clock()
    try:
      yield
    finally:
      self._paused += self._clock() - start

  def step_done(self, *, tokens: int, supervised: int, attended: int) -> None:
    """Counts a step, summed over all devices and processes.

    Args:
      tokens: non-padding tokens.
      supervised: tokens with a loss.
      attended: (query, key) pairs within the attention mask, summed over tokens.
    """
    if not self._is_warm:
      self._is_warm = True
      self._reset()
      return
    self._steps += 1
    self._tokens += tokens
    self._supervised += supervised
    self._attended += attended

  def read(self) -> dict[str, float]:
    """Returns the figures since the last reading, empty without a counted step, and starts the next
    window.

    Returns:
      tokens_per_s: non-padding tokens per second.
      supervised_tokens_per_s: those with a loss.
      step_s: seconds per step.
      input_wait: share of the time spent waiting for a batch.
      mfu: model FLOPs (causal-aware attention) / seconds / peak.
      mfu_6n: the same without attention, 6 P tokens in full fine-tuning: the older convention.
      Both are left out where mfu would exceed 1: the peak was measured while the cores were busy.
    """
    seconds = self._clock() - self._since - self._paused
    if not self._steps or seconds <= 0:
      return {}
    out = {
      'tokens_per_s': self._tokens / seconds,
      'supervised_tokens_per_s': self._supervised / seconds,
      'step_s': seconds / self._steps,
      'input_wait': min(1.0, self._waited / seconds),
    }
    if self._peak is not None:
      full = seconds * self._peak.flops_per_s
      mfu = self._flops(self._tokens, self._attended) / full
      if mfu <= 1:
        out |= {'mfu': mfu, 'mfu_6n': self._flops(self._tokens, 0) / full}
    self.trained_s += max(seconds - self._waited, 0.0)
    self._reset()
    return out


def memory() -> dict[str, float]:
  """Returns GiB in use now and at the peak: of the first local device if it reports them, else of
  this process (resident set, Linux).
  """
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return {
      'device_memory_gib': stats['bytes_in_use'] / 2**30,
      'device_memory_peak_gib': stats['peak_bytes_in_use'] / 2**30,
    }
  if not os.path.exists('/proc/self/status'):
    return {}
  with open('/proc/self/status') as f:
    fields = dict(line.split(':', 1) for line in f)
  return {
    'host_memory_gib': int(fields['VmRSS'].split()[0]) / 2**20,
    'host_memory_peak_gib': int(fields['VmHWM'].split()[0]) / 2**20,
  }
