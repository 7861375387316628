"""Finds the collectives of a compiled step and their traffic in its HLO module."""

import collections
import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

from ftjax.planning import hlo

_CHANNEL = re.compile(r'channel_id=(\d+)')
# Between TPU slices a collective consists of transfers by the hosts; an attribute names it.
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
# A TPU's reduce-scatter is written as a fusion of an all-reduce and the slice of it that is kept.
_SCATTERED = 'all-reduce-scatter'


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind over the same mesh axes.

  axes: names joined by '+'. group_size: members of a group. count: executions in a step. bytes: of
  the whole arrays, summed over executions. sent: bytes that each device sends, with a ring
  algorithm. network: whether members are in several slices, or on several GPU hosts, so that it
  uses the data-center network.
  """

  kind: str
  axes: str
  group_size: int
  count: int
  bytes: float
  sent: float
  network: bool = False


def collectives(
  module: hlo.Module, mesh: Mesh, unknown_trips: int = 1, domains: np.ndarray | None = None
) -> list[Collective]:
  """Returns the collectives of an optimized module.

  Args:
    module: of the step.
    mesh: its flat device order numbers the partitions.
    unknown_trips: assumed executions of a loop of unknown trip count.
    domains: int[devices], the slice or host of each device of the mesh in flat order; None: one.

  Returns:
    One entry for each (kind, axes, network), the most bytes sent first.
  """
  domains = np.zeros(mesh.size, int) if domains is None else np.asarray(domains)
  times = module.executions(unknown_trips)
  sums: dict[tuple, list[float]] = collections.defaultdict(lambda: [0, 0.0])
  seen = set()
  for name, body in module:
    fused = name in module.fusions
    for instruction in body if times[name] else ():
      found = _collective(instruction, name, mesh, domains)
      if found is None:
        continue
      *key, size = found
      # Start, steps and end of an asynchronous transfer are fusions that all contain its text.
      channel = _CHANNEL.search(instruction.rest) if fused else None
      again = channel is not None and channel[1] in seen
      if channel:
        seen.add(channel[1])
      if key[2] > 1 and not again:
        total = sums[tuple(key)]
        total[0] += times[name]
        total[1] += times[name] * size
  out = [
    Collective(kind, axes, group_size, round(count), size, _sent(kind, group_size, size), network)
    for (kind, axes, group_size, network), (count, size) in sums.items()
  ]
  return sorted(out, key=lambda c: -c.sent)


def _collective(
  instruction: hlo.Instruction, computation: str, mesh: Mesh, domains: np.ndarray
) -> tuple[str, str, int, bool, float] | None:
  """Returns (kind, axes, group size, whether over the network, bytes of the whole array); None for
  another instruction.
  """
  if instruction.kind == 'send' and (between := _BETWEEN.search(instruction.rest)):
    return _between(between[1], instruction.first_bytes, mesh, domains)
  kind = instruction.operation
  if kind not in hlo.COLLECTIVES:
    return None
  axes, group_size, network = _axes(groups(instruction.rest), mesh, domains)
  size = instruction.bytes
  is_start = instruction.kind != kind
  if is_start and kind in ('all-gather', 'reduce-scatter'):  # (inputs, outputs)
    size *= group_size / (group_size + 1)
  elif is_start and kind == 'collective-permute':
    size /= 2
  elif kind == 'reduce-scatter':
    size *= group_size
  if kind == 'all-reduce' and computation.startswith(_SCATTERED):
    kind = 'reduce-scatter'
  return kind, axes, group_size, network, size


def _between(kind: str, size: float, mesh: Mesh, domains: np.ndarray) -> tuple:
  """Returns what `_collective` does, for `size` bytes that a device sends to the other slices.

  The array is that of all slices: each sends its part, and gets the other parts or their sum."""
  places = domains.reshape(mesh.devices.shape)
  names = [
    a
    for i, a in enumerate(mesh.axis_names)
    if (places != places.take(range(1), axis=i)).any() and mesh.shape[a] > 1
  ]
  kind, group_size = kind.lower().replace('_', '-'), len(set(domains.tolist()))
  return kind, '+'.join(names), group_size, True, size * (group_size if kind == 'all-gather' else 1)


def _sent(kind: str, group_size: int, size: float) -> float:
  """Returns the bytes that a member sends for a whole array of `size` bytes, with a ring
  algorithm."""
  if kind == 'collective-permute':
    return size
  return size * (group_size - 1) / group_size * (2 if kind == 'all-reduce' else 1)


_IOTA = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'
_LISTED = re.compile(r'replica_groups=\[(\d+),(\d+)\]<=' + _IOTA)
_NAMED = re.compile(
  r'replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\((?:' + _IOTA + r'|([\d,]+))\))? ?\{([^}]*)\}'
)
_WRITTEN = re.compile(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}')


def _ints(text: str) -> list[int]:
  return [int(i) for i in text.split(',')]


def _iota(dims: str, order: str | None) -> np.ndarray:
  ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
  return ids.transpose(_ints(order)) if order else ids


def groups(text: str) -> np.ndarray | None:
  """Parses the groups of a collective.

  Args:
    text: attributes of an HLO instruction: groups written out, as a transposed iota, or as axes of
      a mesh (`{'a':(2)4}`: the middle factor 4 of an axis split into 2, 4 and the rest).

  Returns:
    int[groups, members] of device numbers; pairs of a permute; None where none was found.
  """
  if found := _LISTED.search(text):
    return _iota(found[3], found[4]).reshape(int(found[1]), int(found[2]))
  if found := _WRITTEN.search(text):
    rows = [_ints(g) for g in re.findall(r'\{([\d,]+)\}', found[1])]
    return np.array(rows) if len({len(r) for r in rows}) == 1 else None
  if found := _NAMED.search(text):
    return _of_axes(*found.groups())
  return None


def _of_axes(axes: str, dims: str | None, order: str | None, ids: str | None, named: str):
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
  used = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)
  shape, members = [], {}
  for name, size in sizes.items():
    cuts, at = [], 1
    parts = sorted((int(pre), int(n)) for a, pre, n in used if a == name and pre)
    for pre, n in parts:
      cuts += [pre // at, n]
      members[name, pre] = len(shape) + len(cuts) - 1
      at = pre * n
    members[name, 0] = len(shape) + len(cuts)
    shape += [*cuts, size // at]
  if ids:
    devices = np.array(_ints(ids))
  else:
    devices = _iota(dims, order) if dims else np.arange(math.prod(shape))
  last = [members[name, int(pre or 0)] for name, pre, _ in used]
  first = [i for i in range(len(shape)) if i not in last]
  group_size = math.prod(shape[i] for i in last)
  return devices.reshape(shape).transpose([*first, *last]).reshape(-1, group_size)


def _axes(found: np.ndarray | None, mesh: Mesh, domains: np.ndarray) -> tuple[str, int, bool]:
  """Returns (mesh axes along which the members of a group differ, group size, whether members are
  in several domains).
  """
  if found is None:
    return 'all', mesh.size, bool((domains != domains[0]).any())
  apart = domains[found]
  coordinates = np.stack(np.unravel_index(found, mesh.devices.shape), -1)
  varies = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
  names = [a for a, v in zip(mesh.axis_names, varies, strict=True) if v]
  return '+'.join(names) or 'none', found.shape[1], bool((apart != apart[:, :1]).any())
