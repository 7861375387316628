"""What the processes of a run tell each other at every step: the wish to stop, and how long each
host made the step wait.

A small array travels beside the batch and comes back whole to everybody, so that all hosts decide
the same after the same step. A process alone needs no array."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.cluster import processes


@dataclasses.dataclass(frozen=True)
class Seen:
  """stop: somebody wishes it. host_s: seconds of each process between the end of a step and the
  start of the next, float64[processes].
  """

  stop: bool
  host_s: np.ndarray

  def host_metrics(self) -> dict[str, float]:
    """For the log of a run of several: the quickest and the slowest host's seconds, and which the
    slowest is.
    """
    if len(self.host_s) == 1:
      return {}
    return {
      'host_s_min': float(self.host_s.min()),
      'host_s_max': float(self.host_s.max()),
      'host_slowest': int(self.host_s.argmax()),
    }


class StepSync:
  """The exchange over all devices of a mesh; every process calls in the same order."""

  def __init__(self, mesh: Mesh):
    self._mesh = mesh
    self._alone = processes.is_alone()
    where = P(mesh.axis_names)
    self._sharding = NamedSharding(mesh, where)
    owners = [d.process_index for d in mesh.devices.flat]
    self._first = np.array([owners.index(p) for p in range(jax.process_count())])
    self._share = jax.jit(lambda x: jax.sharding.reshard(x, P()))

  def send(self, stop: bool, host_s: float) -> jax.Array | None:
    """Begins an exchange; `receive` gives the result."""
    if self._alone:
      return None
    own = np.array([[float(stop), host_s]], np.float32)
    shape = (self._mesh.size, own.shape[1])
    return self._share(jax.make_array_from_callback(shape, self._sharding, lambda _: own))

  def receive(self, sent: jax.Array | None, stop: bool) -> Seen:
    """Waits for what `send` gave; `stop` is this process's wish now, which counts where it is
    alone.
    """
    if sent is None:
      return Seen(stop, np.zeros(1))
    told = np.asarray(sent, np.float64)[self._first]
    return Seen(bool(told[:, 0].any()), told[:, 1])

  def is_wanted(self, stop: bool) -> bool:
    """Whether anybody wishes to stop."""
    return self.receive(self.send(stop, 0.0), stop).stop
