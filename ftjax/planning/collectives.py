"""Who sends what to whom in a compiled step, from its HLO module."""

import collections
import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

from ftjax.planning import hlo

_CHANNEL = re.compile(r'channel_id=(\d+)')
# Between slices of TPUs a collective is made of transfers by the hosts, and named in an attribute.
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
# A TPU's reduce-scatter is written as a fusion of an all-reduce and the slice of it that is kept.
_SCATTERED = 'all-reduce-scatter'


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind over the same mesh axes.

  axes: names joined by '+'. count: executions in a step. bytes: of the whole arrays, summed over
  executions. sent: bytes that each device sends, by a ring. ways: members of a group. network:
  members stand in several slices, or on several hosts of GPUs, so that it goes over the
  data-centre network.
  """

  kind: str
  axes: str
  ways: int
  count: int
  bytes: float
  sent: float
  network: bool = False


def collectives(
  module: hlo.Module, mesh: Mesh, unknown_trips: int = 1, islands: np.ndarray | None = None
) -> list[Collective]:
  """Reads them from an optimized module.

  Args:
    module: of the step.
    mesh: whose flat device order numbers the partitions.
    unknown_trips: how often a loop is counted whose trips nothing tells.
    islands: int[devices], the slice or host of each device of the mesh in flat order; None: one.

  Returns:
    One entry for each (kind, axes, network), the most bytes sent first.
  """
  islands = np.zeros(mesh.size, int) if islands is None else np.asarray(islands)
  times = module.executions(unknown_trips)
  sums: dict[tuple, list[float]] = collections.defaultdict(lambda: [0, 0.0])
  seen = set()
  for name, body in module:
    fused = name in module.fusions
    for instruction in body if times[name] else ():
      found = _collective(instruction, name, mesh, islands)
      if found is None:
        continue
      *key, size = found
      # Start, steps and end of one asynchronous transfer are fusions that each hold its text.
      channel = _CHANNEL.search(instruction.rest) if fused else None
      again = channel is not None and channel[1] in seen
      if channel:
        seen.add(channel[1])
      if key[2] > 1 and not again:
        total = sums[tuple(key)]
        total[0] += times[name]
        total[1] += times[name] * size
  out = [
    Collective(kind, axes, ways, round(count), size, _sent(kind, ways, size), network)
    for (kind, axes, ways, network), (count, size) in sums.items()
  ]
  return sorted(out, key=lambda c: -c.sent)


def _collective(
  instruction: hlo.Instruction, computation: str, mesh: Mesh, islands: np.ndarray
) -> tuple[str, str, int, bool, float] | None:
  """(kind, axes, ways, over the network, bytes of the whole array); None: it is none."""
  if instruction.kind == 'send' and (between := _BETWEEN.search(instruction.rest)):
    return _between(between[1], instruction.first_bytes, mesh, islands)
  kind = instruction.operation
  if kind not in hlo.COLLECTIVES:
    return None
  axes, ways, network = _axes(groups(instruction.rest), mesh, islands)
  size = instruction.bytes
  is_start = instruction.kind != kind
  if is_start and kind in ('all-gather', 'reduce-scatter'):  # (inputs, outputs)
    size *= ways / (ways + 1)
  elif is_start and kind == 'collective-permute':
    size /= 2
  elif kind == 'reduce-scatter':
    size *= ways
  if kind == 'all-reduce' and computation.startswith(_SCATTERED):
    kind = 'reduce-scatter'
  return kind, axes, ways, network, size


def _between(kind: str, size: float, mesh: Mesh, islands: np.ndarray) -> tuple:
  """Like `_collective`, of the `size` bytes that a device sends to the other slices.

  The array is that of all slices: each sends its own, and gets the others' or their sum."""
  places = islands.reshape(mesh.devices.shape)
  names = [
    a
    for i, a in enumerate(mesh.axis_names)
    if (places != places.take(range(1), axis=i)).any() and mesh.shape[a] > 1
  ]
  kind, ways = kind.lower().replace('_', '-'), len(set(islands.tolist()))
  return kind, '+'.join(names), ways, True, size * (ways if kind == 'all-gather' else 1)


def _sent(kind: str, ways: int, size: float) -> float:
  """Bytes that a member sends for a whole array of `size` bytes, by a ring."""
  if kind == 'collective-permute':
    return size
  return size * (ways - 1) / ways * (2 if kind == 'all-reduce' else 1)


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
  """Reads who takes part in a collective.

  Args:
    text: attributes of an HLO instruction: groups written out, as a transposed iota, or as axes of
      a mesh (`{'a':(2)4}`: the 4 middle ways of an axis cut into 2, 4 and the rest).

  Returns:
    int[groups, members] of device numbers; pairs of a permute; None where nothing was found.
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
  ways = math.prod(shape[i] for i in last)
  return devices.reshape(shape).transpose([*first, *last]).reshape(-1, ways)


def _axes(found: np.ndarray | None, mesh: Mesh, islands: np.ndarray) -> tuple[str, int, bool]:
  """(mesh axes along which the members of a group differ, members, whether islands do)."""
  if found is None:
    return 'all', mesh.size, bool((islands != islands[0]).any())
  apart = islands[found]
  coordinates = np.stack(np.unravel_index(found, mesh.devices.shape), -1)
  varies = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
  names = [a for a, v in zip(mesh.axis_names, varies, strict=True) if v]
  return '+'.join(names) or 'none', found.shape[1], bool((apart != apart[:, :1]).any())
