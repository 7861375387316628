"""Synchronizes the processes of a run at every step: whether one was asked to stop, and the host
time of each.

A small array is gathered on all devices with every step, so that all processes take the same
decision after the same step. A single process needs no array."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.cluster import processes


@dataclasses.dataclass(frozen=True)
class Seen:
  """stop: whether any process was asked to stop. host_s: float64[processes], seconds of each
  between the end of a step and the start of the next.
  """

  stop: bool
  host_s: np.ndarray

  def host_metrics(self) -> dict[str, float]:
    """Returns the least and the greatest host seconds and the number of the slowest process; empty
    for a single process.
    """
    if len(self.host_s) == 1:
      return {}
    return {
      'host_s_min': float(self.host_s.min()),
      'host_s_max': float(self.host_s.max()),
      'host_slowest': int(self.host_s.argmax()),
    }


class StepSync:
  """Exchanges stop requests over all devices of a mesh; all processes call it in the same order."""

  def __init__(self, mesh: Mesh):
    self._mesh = mesh
    self._alone = processes.is_alone()
    self._sharding = NamedSharding(mesh, P(mesh.axis_names))
    owners = [d.process_index for d in mesh.devices.flat]
    self._first = np.array([owners.index(p) for p in range(jax.process_count())])
    self._share = jax.jit(lambda x: jax.sharding.reshard(x, P()))

  def send(self, stop: bool, host_s: float) -> jax.Array | None:
    """Starts an exchange; `receive` returns its result."""
    if self._alone:
      return None
    own = np.array([[float(stop), host_s]], np.float32)
    shape = (self._mesh.size, own.shape[1])
    return self._share(jax.make_array_from_callback(shape, self._sharding, lambda _: own))

  def receive(self, sent: jax.Array | None, stop: bool) -> Seen:
    """Returns the result of an exchange.

    Args:
      sent: from `send`.
      stop: whether this process was asked to stop; only read in a single-process run.
    """
    if sent is None:
      return Seen(stop, np.zeros(1))
    values = np.asarray(sent, np.float64)[self._first]
    return Seen(bool(values[:, 0].any()), values[:, 1])

  def is_wanted(self, stop: bool) -> bool:
    """Returns whether any process was asked to stop."""
    return self.receive(self.send(stop, 0.0), stop).stop
