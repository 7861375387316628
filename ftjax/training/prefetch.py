"""Batches on their way to the devices: built on the host one step ahead, in a thread. Where
`context` splits rows, this is the one place that brings them into its order.

The order of the data is a pure function of the step, so the thread holds nothing that a checkpoint
would need."""

import queue
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding

from ftjax.runtime.sharding import RULES, zigzag

Host = dict[str, np.ndarray]


def local_rows(sharding: NamedSharding, shape: tuple[int, ...], axis: int) -> set[int]:
  """Indices along `axis` that the devices of this process hold."""
  parts = sharding.addressable_devices_indices_map(shape).values()
  return {i for part in parts for i in range(*part[axis].indices(shape[axis]))}


def place(batch: Host, shardings: dict[str, NamedSharding]) -> dict[str, jax.Array]:
  """Global arrays from host arrays of the global shape, rows in their natural order; only the parts
  of this process's devices are looked at.

  Arrays [..., T] whose last axis is split over `context` lie in the order of sharding.zigzag.
  """
  laid = {k: _laid(v, shardings[k]) for k, v in batch.items()}
  return {
    k: jax.make_array_from_callback(v.shape, shardings[k], lambda part, v=v: v[part])
    for k, v in laid.items()
  }


def _laid(rows: np.ndarray, sharding: NamedSharding) -> np.ndarray:
  """`rows` as they lie under `sharding`."""
  spec = sharding.spec
  if len(spec) < rows.ndim or spec[rows.ndim - 1] != RULES['seq']:
    return rows
  ways = sharding.mesh.shape[RULES['seq']]
  return rows if ways == 1 else rows[..., zigzag(rows.shape[-1], ways)]


class Prefetch:
  """Gives the device batches of the steps from `start` to `stop`."""

  def __init__(
    self,
    make: Callable[[int], Host],
    shardings: dict[str, NamedSharding],
    start: int,
    stop: int,
    ahead: int = 2,
  ):
    self._queue: queue.Queue = queue.Queue(maxsize=ahead)
    self._stopping = threading.Event()

    def work():
      try:
        for step in range(start, stop):
          self._put((step, place(make(step), shardings)))
          if self._stopping.is_set():
            return
        self._put(ValueError(f'Prefetch: all steps up to {stop} were taken'))
      except BaseException as error:
        self._put(error)

    self._thread = threading.Thread(target=work, daemon=True, name='feed')
    self._thread.start()

  def _put(self, item):
    while not self._stopping.is_set():
      try:
        return self._queue.put(item, timeout=0.1)
      except queue.Full:
        continue

  def take(self, step: int) -> dict[str, jax.Array]:
    """The device batch of a step; steps are taken in order, each once."""
    item = self._queue.get()
    if isinstance(item, BaseException):
      raise item
    made, batch = item
    if made != step:
      raise ValueError(f'Prefetch: step {step} was asked for, the next one is {made}')
    return batch

  def close(self):
    self._stopping.set()
    self._thread.join(timeout=10)
