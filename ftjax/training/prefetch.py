"""Batches on their way to the devices: built on the host ahead of the step, in a thread. Where the
mesh axis `context` splits rows, this is the one place that brings their tokens into its order.

The order of the data is a pure function of the step, so the thread holds nothing that a checkpoint
would need."""

import queue
import threading
from collections.abc import Collection, Mapping
from typing import Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from ftjax.runtime.sharding import RULES, zigzag

Host = dict[str, np.ndarray]


def local_rows(sharding: NamedSharding, shape: tuple[int, ...], axis: int) -> set[int]:
  """Returns the indices along `axis` that the devices of this process hold."""
  parts = sharding.addressable_devices_indices_map(shape).values()
  return {i for part in parts for i in range(*part[axis].indices(shape[axis]))}


def place(batch: Host, shardings: dict[str, NamedSharding]) -> dict[str, jax.Array]:
  """Returns global device arrays of host arrays. The host arrays have the global shape, with tokens
  in their natural order; only the parts of this process's devices are read.

  Arrays with an axis of tokens that is split over `context` get the order of sharding.zigzag.
  """
  ordered = {k: _ordered(v, shardings[k]) for k, v in batch.items()}
  return {
    k: jax.make_array_from_callback(v.shape, shardings[k], lambda part, v=v: v[part])
    for k, v in ordered.items()
  }


def _ordered(rows: np.ndarray, sharding: NamedSharding) -> np.ndarray:
  """`rows` with their tokens in the order of `sharding`."""
  size, spec = sharding.mesh.shape[RULES['seq']], tuple(sharding.spec)
  if size == 1 or RULES['seq'] not in spec:
    return rows
  axis = spec.index(RULES['seq'])
  return rows.take(zigzag(rows.shape[axis], size), axis)


class Stream(Protocol):
  """Training batches by step number; data/batches.py has the one of files."""

  def batch(self, step: int, rows: Collection[int]) -> Host:
    """Returns arrays [R, ...] of a step's R rows; those that are not in `rows` may be padding."""


def host_batch(stream: Stream, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> Host:
  """Returns the batch of a step as `abstract` describes it: A micro-batches of M rows, arrays
  [A, M, ...]. Rows of other processes' devices are not read.
  """
  tokens = abstract['tokens']
  own = local_rows(tokens.sharding, tokens.shape, 1)
  count, size = tokens.shape[:2]
  batch = stream.batch(step, [a * size + m for a in range(count) for m in own])
  return {k: v.reshape(count, size, *v.shape[1:]) for k, v in batch.items()}


class Prefetch:
  """Gives the device batches of the steps from `start` to `stop`.

  Args:
    stream: of batches, read in a thread.
    abstract: shapes [A, M, ...] and shardings of a batch's arrays.
    start: the first step.
    stop: the step after the last one.
    ahead: batches that wait on the devices.
  """

  def __init__(
    self,
    stream: Stream,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    start: int,
    stop: int,
    ahead: int = 2,
  ):
    self._queue: queue.Queue = queue.Queue(maxsize=ahead)
    self._stopping = threading.Event()
    shardings = {k: v.sharding for k, v in abstract.items()}

    def work():
      try:
        for step in range(start, stop):
          self._put((step, place(host_batch(stream, step, abstract), shardings)))
          if self._stopping.is_set():
            return
        self._put(ValueError(f'Prefetch: all steps up to {stop} were taken'))
      except BaseException as error:
        self._put(error)

    self._thread = threading.Thread(target=work, daemon=True, name='prefetch')
    self._thread.start()

  def _put(self, item):
    while not self._stopping.is_set():
      try:
        return self._queue.put(item, timeout=0.1)
      except queue.Full:
        continue

  def take(self, step: int) -> dict[str, jax.Array]:
    """Returns the device batch of a step; steps are taken in order, each once."""
    item = self._queue.get()
    if isinstance(item, BaseException):
      raise item
    made, batch = item
    if made != step:
      raise ValueError(f'Prefetch: step {step} was asked for, the next one is {made}')
    return batch

  def close(self):
    """Ends the thread."""
    self._stopping.set()
    self._thread.join(timeout=10)
