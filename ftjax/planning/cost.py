"""Estimates the step time by a roofline: the maximum of compute, memory traffic and communication,
each at the peak rate of the chip. Uncalibrated: no device was measured, and a real step is slower.
"""

import dataclasses
from collections.abc import Sequence

from ftjax.models import counts
from ftjax.models.architecture import Architecture
from ftjax.planning.collectives import Collective
from ftjax.planning.memory import Memory
from ftjax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Cost:
  """flops: model FLOPs of a step on all devices. tokens: of a step. compute, traffic, links,
  network:
  seconds of a step. mfu: flops / (seconds x peak).
  """

  flops: float
  tokens: int
  compute: float
  traffic: float
  links: float
  network: float
  mfu: float

  @property
  def seconds(self) -> float:
    return max(self.compute, self.traffic, self.links + self.network)

  @property
  def bound(self) -> str:
    """Returns what limits the step time."""
    parts = {
      'matrix products': self.compute,
      'memory': self.traffic,
      'communication': self.links + self.network,
    }
    return max(parts, key=parts.get)


# A model that a step computes, with 3 for forward and backward or 1 for forward only.
Pass = tuple[Architecture, int]


def model_flops(models: Sequence[Pass], rows: int, length: int) -> float:
  """Computes the FLOPs of models over full rows of one document each; see models/counts.py."""
  tokens, pairs = rows * length, rows * length * (length + 1) / 2
  of = {3: counts.train_flops, 1: counts.forward_flops}
  return sum(of[times](arch)(tokens, pairs) for arch, times in models if times)


def recomputed(arch: Architecture, rows: int, length: int, remat: str) -> float:
  """Computes the FLOPs that the backward pass repeats: with 'dots' attention, with 'full' all
  blocks."""
  forward = counts.forward_flops(arch)
  attention = forward.pair * rows * length * (length + 1) / 2
  blocks = counts.matmul_params(arch) - counts.head_params(arch)
  return {'none': 0.0, 'dots': attention, 'full': attention + 2.0 * blocks * rows * length}[remat]


def estimate(
  models: Sequence[Pass],
  topology: Topology,
  held: Memory,
  moved: Sequence[Collective],
  *,
  rows: int,
  length: int,
  remat: str,
  micro_batches: int,
) -> Cost:
  """Estimates seconds and MFU of a step of `rows` rows of `length` tokens.

  Memory traffic: the state is read and written once, and the temporaries once for each
  micro-batch. Communication: between slices or hosts over the network, the rest over the links.
  """
  chip = topology.chip
  flops = model_flops(models, rows, length)
  again = sum(recomputed(arch, rows, length, remat) for arch, times in models if times == 3)
  peak = chip.flops * topology.num_devices
  network = sum(c.sent for c in moved if c.network) / chip.network
  links = sum(c.sent for c in moved if not c.network) / chip.link
  compute = (flops + again) / peak
  traffic = 2.0 * (held.arguments + micro_batches * held.temporaries) / chip.bandwidth
  seconds = max(compute, traffic, links + network)
  return Cost(flops, rows * length, compute, traffic, links, network, flops / (seconds * peak))
