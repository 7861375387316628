"""Batches on their way to the devices: built on the host one step ahead, in a thread.

The order of the data is a pure function of the step, so the thread holds nothing that a checkpoint
would need."""

import queue
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding

Host = dict[str, np.ndarray]


def place(batch: Host, shardings: dict[str, NamedSharding]) -> dict[str, jax.Array]:
  """Global arrays from this process's rows."""
  return {k: jax.make_array_from_process_local_data(shardings[k], v) for k, v in batch.items()}


class Feed:
  """Iterates over (step, device batch, host batch) from `start` to `stop`."""

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
          host = make(step)
          self._put((step, place(host, shardings), host))
          if self._stopping.is_set():
            return
        self._put(None)
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

  def __iter__(self):
    while True:
      item = self._queue.get()
      if item is None:
        return
      if isinstance(item, BaseException):
        raise item
      yield item

  def close(self):
    self._stopping.set()
    self._thread.join(timeout=10)
