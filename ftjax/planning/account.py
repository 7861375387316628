"""What a compiled step holds and moves, for each device: memory from the compiler, collectives from
the HLO text, with the trips of the loops they stand in.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax.runtime import trees

_BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 'bf16': 2}
_KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.$-]+) \(.*\{\s*$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?[\w.$-]+ = (.*?)\s([a-z][a-z0-9-]*)\((.*)$')
_SHAPE = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|async_execution_thread_calls)=%?([\w.$-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_CHANNEL = re.compile(r'channel_id=(\d+)')
# Between slices of TPUs a collective is made of transfers by the hosts, and named in an attribute.
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


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


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device. `arguments` are state and batch; `temporaries` everything else alive in
  the step, gradients and activations among it; `peak` is the compiler's.
  """

  parameters: int
  optimizer: int
  gradients: int
  arguments: int
  temporaries: int
  peak: int

  @property
  def activations(self) -> int:
    """Temporaries but the gradients of the parameters."""
    return max(0, self.temporaries - self.gradients)


def shard_bytes(tree) -> int:
  """Bytes that one device holds of arrays or ShapeDtypeStructs with shardings."""
  return sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
  )


def replicated(params: Mapping, mesh: Mesh) -> dict[str, int]:
  """{name: bytes} of parameters that every device holds whole."""
  flat = trees.flatten(params) if mesh.size > 1 else {}
  return {
    n: math.prod(a.shape) * a.dtype.itemsize
    for n, a in flat.items()
    if a.sharding.is_fully_replicated
  }


def memory(compiled: jax.stages.Compiled, state) -> Memory:
  """From the compiler's analysis, and the shardings of the abstract state."""
  found = compiled.memory_analysis()
  everything = (
    found.argument_size_in_bytes
    + found.temp_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes
  )
  return Memory(
    parameters=shard_bytes((state.params, state.frozen, state.ema)),
    optimizer=shard_bytes(state.opt),
    gradients=shard_bytes(state.params),
    arguments=found.argument_size_in_bytes,
    temporaries=found.temp_size_in_bytes,
    peak=max(getattr(found, 'peak_memory_in_bytes', 0), everything),
  )


def _shape_bytes(text: str) -> float:
  total = 0.0
  for kind, dims in _SHAPE.findall(text):
    bits = re.search(r'\d+', kind)
    size = _BYTES.get(kind) or (int(bits[0]) / 8 if bits else 0)
    total += size * math.prod(int(d) for d in dims.split(',') if d)
  return total


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


def _collective(kind: str, result: str, rest: str, mesh: Mesh, islands: np.ndarray) -> tuple:
  """(kind, axes, ways, over the network, bytes of the whole array)."""
  is_start = kind.endswith('-start')
  kind = kind.removesuffix('-start')
  axes, ways, network = _axes(groups(rest), mesh, islands)
  size = _shape_bytes(result)
  if is_start and kind in ('all-gather', 'reduce-scatter'):  # (inputs, outputs)
    size *= ways / (ways + 1)
  elif is_start and kind == 'collective-permute':
    size /= 2
  elif kind == 'reduce-scatter':
    size *= ways
  return kind, axes, ways, network, size


def _between(kind: str, result: str, mesh: Mesh, islands: np.ndarray) -> tuple:
  """Like `_collective`, of what a device sends to the other slices: `result` begins with its part.

  The array is that of all slices: each sends its own, and gets the others' or their sum."""
  places = islands.reshape(mesh.devices.shape)
  names = [
    a
    for i, a in enumerate(mesh.axis_names)
    if (places != places.take(range(1), axis=i)).any() and mesh.shape[a] > 1
  ]
  size = _shape_bytes(_SHAPE.search(result)[0])
  kind, ways = kind.lower().replace('_', '-'), len(set(islands.tolist()))
  return kind, '+'.join(names), ways, True, size * (ways if kind == 'all-gather' else 1)


def _sent(kind: str, ways: int, size: float) -> float:
  """Bytes that a member sends for a whole array of `size` bytes, by a ring."""
  if kind == 'collective-permute':
    return size
  return size * (ways - 1) / ways * (2 if kind == 'all-reduce' else 1)


def collectives(
  text: str, mesh: Mesh, unknown_trips: int = 1, islands: np.ndarray | None = None
) -> list[Collective]:
  """Reads an optimized HLO module.

  Args:
    text: `compiled.as_text()`.
    mesh: whose flat device order numbers the partitions.
    unknown_trips: how often a loop is counted whose trips the compiler does not know.
    islands: int[devices], the slice or host of each device of the mesh in flat order; None: one.

  Returns:
    One entry for each (kind, axes, network), the most bytes sent first.
  """
  islands = np.zeros(mesh.size, int) if islands is None else np.asarray(islands)
  entry, calls, found, fused = _read(text, mesh, islands)
  trips: dict[str, float] = collections.defaultdict(float)
  stack = [(entry, 1.0)]
  while stack:
    name, times = stack.pop()
    trips[name] += times
    for callee, more in calls.get(name, ()):
      stack.append((callee, times * (unknown_trips if more is None else more)))
  sums: dict[tuple, list[float]] = collections.defaultdict(lambda: [0, 0.0])
  seen = set()
  for name, items in found.items():
    for channel, (*key, size) in items:
      # Start, steps and end of one asynchronous transfer are fusions that each hold its text.
      again = name in fused and channel is not None and channel in seen
      if trips[name] and name in fused:
        seen.add(channel)
      if key[2] > 1 and not again:
        total = sums[tuple(key)]
        total[0] += trips[name]
        total[1] += trips[name] * size
  out = [
    Collective(kind, axes, ways, round(count), size, _sent(kind, ways, size), network)
    for (kind, axes, ways, network), (count, size) in sums.items()
    if count
  ]
  return sorted(out, key=lambda c: -c.sent)


def _read(text: str, mesh: Mesh, islands: np.ndarray):
  """(entry, {computation: [(callee, times; None: a loop of unknown length)]}, {computation:
  [(channel, collective)]}, computations that are fusions).
  """
  entry, name = '', ''
  calls, found, fused = collections.defaultdict(list), collections.defaultdict(list), set()
  for line in text.split('\n'):
    if not line.startswith(' '):
      if header := _HEADER.match(line):
        name = header[2]
        entry = name if header[1] else entry
      continue
    instruction = _INSTRUCTION.match(line)
    if not instruction:
      continue
    result, kind, rest = instruction.groups()
    if kind.removesuffix('-start') in _KINDS:
      channel = _CHANNEL.search(rest)
      found[name].append((channel and channel[1], _collective(kind, result, rest, mesh, islands)))
      continue  # its to_apply is a sum of two numbers
    if kind.endswith(('-done', '-update')):
      continue  # names the computation of its start again
    if kind == 'send' and (between := _BETWEEN.search(rest)):
      found[name].append((None, _between(between[1], result, mesh, islands)))
    times = 1
    if kind == 'while':
      known = _TRIPS.search(rest)
      times = int(known[1]) if known else None
    calls[name] += [(callee, times) for callee in _CALLED.findall(rest)]
    if kind == 'fusion':
      fused.update(_CALLED.findall(rest))
    if branches := _BRANCHES.search(rest):
      calls[name] += [(b.strip(' %'), 1) for b in branches[1].split(',')]
  return entry, calls, found, fused


@dataclasses.dataclass(frozen=True)
class Gathering:
  """How a step brings the sharded weights of its layers together; names of stacked parameters.

  layered: one layer of it is gathered at a time, inside a loop. whole: a buffer has the size of all
  its layers gathered, which an fsdp step must not need; saved activations may have that size by
  chance. unseen: no such gather was found; of small weights a compiler makes sums.
  """

  layered: tuple[str, ...]
  whole: tuple[str, ...]
  unseen: tuple[str, ...]


def gathering(text: str, params: Mapping, mesh: Mesh, axis: str = 'fsdp') -> Gathering:
  """Reads from an optimized HLO module where weights that are sharded over `axis` are gathered.

  Buffers are known by their number of elements (a compiler merges and turns dimensions), those of
  whole stacks also by a dimension of as many as there are layers.

  Args:
    text: `compiled.as_text()`.
    params: nested dict of ShapeDtypeStruct with NamedSharding; stacked ones are named stackI/...
    mesh: of those shardings.
    axis: that is gathered.
  """
  _, calls, _, _ = _read(text, mesh, np.zeros(mesh.size, int))
  looped = {callee for items in calls.values() for callee, times in items if times != 1}
  stack = list(looped)
  while stack:
    more = {callee for callee, _ in calls.get(stack.pop(), ())} - looped
    looped |= more
    stack += more
  inside, buffers = _arrays(text, looped)
  out = {'layered': [], 'whole': [], 'unseen': []}
  for name, leaf in trees.flatten(params).items():
    parts = [(p,) if isinstance(p, str) else p or () for p in leaf.sharding.spec]
    if not name.startswith('stack') or (axis,) not in parts or mesh.shape[axis] == 1:
      continue
    size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * mesh.shape[axis]
    layers = leaf.shape[0]
    if any(n == size and layers in dims for n, dims in buffers):
      out['whole'].append(name)
    out['layered' if size // layers in inside else 'unseen'].append(name)
  return Gathering(**{k: tuple(v) for k, v in out.items()})


def _arrays(text: str, looped: set[str]) -> tuple[set[int], set[tuple[int, tuple[int, ...]]]]:
  """(elements of what all-gathers inside `looped` computations make, (elements, dimensions) of
  every array).
  """
  name, inside, buffers = '', set(), set()
  for line in text.split('\n'):
    if not line.startswith(' '):
      header = _HEADER.match(line)
      name = header[2] if header else name
      continue
    instruction = _INSTRUCTION.match(line)
    if not instruction:
      continue
    result, kind, _ = instruction.groups()
    for _, dims in _SHAPE.findall(result):
      sizes = tuple(int(d) for d in dims.split(',') if d)
      buffers.add((math.prod(sizes), sizes))
      if kind.removesuffix('-start') == 'all-gather' and name in looped:
        inside.add(math.prod(sizes))
  return inside, buffers
