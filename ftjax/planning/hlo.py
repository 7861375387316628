"""Parses an optimized HLO module: its computations, and how often each is executed."""

import collections
import dataclasses
import functools
import math
import re

# Their `to_apply` is the sum of two numbers, which is not followed.
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 'bf16': 2}
_HEADER = re.compile(r'^(ENTRY )?%?([\w.$-]+) \(.*\{\s*$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.$-]+) = (.*?)\s([a-z][a-z0-9-]*)\((.*)$')
_SHAPE = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|async_execution_thread_calls)=%?([\w.$-]+)')
_BRANCHES = re.compile(r'(?:branch|called)_computations=\{([^}]*)\}')
_CONDITION = re.compile(r'condition=%?([\w.$-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NUMBER = re.compile(r'(-?\d+)\)')
_BELOW = re.compile(r'%?[\w.$-]+, %?([\w.$-]+)\), direction=LT')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """`name = result kind(rest`. result: its type or types; rest: operands and attributes."""

  name: str
  result: str
  kind: str
  rest: str
  is_root: bool = False

  @property
  def operation(self) -> str:
    """Returns the kind, without the suffix of an asynchronous start."""
    return self.kind.removesuffix('-start')

  @property
  def arrays(self) -> list[tuple[int, ...]]:
    """Returns the shapes of its results."""
    return [_dims(dims) for _, dims in _SHAPE.findall(self.result)]

  @property
  def bytes(self) -> float:
    """Returns the bytes of all its results."""
    return sum(_size(*shape) for shape in _SHAPE.findall(self.result))

  @property
  def first_bytes(self) -> float:
    """Returns the bytes of its first result."""
    return _size(*_SHAPE.findall(self.result)[0])


def _dims(text: str) -> tuple[int, ...]:
  return tuple(int(d) for d in text.split(',') if d)


def _size(kind: str, dims: str) -> float:
  bits = re.search(r'\d+', kind)
  size = _BYTES.get(kind) or (int(bits[0]) / 8 if bits else 0)
  return size * math.prod(_dims(dims))


@dataclasses.dataclass(frozen=True)
class Module:
  """entry: name of the entry computation. computations: instructions by computation name."""

  entry: str
  computations: dict[str, list[Instruction]]

  @functools.cached_property
  def calls(self) -> dict[str, list[tuple[str, int | None]]]:
    """Returns {computation: [(callee, executions; None for a loop of unknown trip count)]}."""
    return {name: [c for i in items for c in self._callees(i)] for name, items in self}

  @functools.cached_property
  def fusions(self) -> set[str]:
    """Returns the computations that are fused into one instruction."""
    return {f for _, items in self for i in items if i.kind == 'fusion' for f in _called(i)}

  @functools.cached_property
  def looped(self) -> set[str]:
    """Returns the computations that are executed inside of loops."""
    stack = [callee for items in self.calls.values() for callee, times in items if times != 1]
    found = set()
    while stack:
      if (name := stack.pop()) not in found:
        found.add(name)
        stack += [callee for callee, _ in self.calls.get(name, ())]
    return found

  def executions(self, unknown_trips: int) -> dict[str, float]:
    """Returns {computation: executions in a run of the module}; loops of unknown trip count run
    `unknown_trips` times.
    """
    out: dict[str, float] = collections.defaultdict(float)
    stack = [(self.entry, 1.0)]
    while stack:
      name, times = stack.pop()
      out[name] += times
      for callee, more in self.calls.get(name, ()):
        stack.append((callee, times * (unknown_trips if more is None else more)))
    return out

  def __iter__(self):
    return iter(self.computations.items())

  def _callees(self, instruction: Instruction) -> list[tuple[str, int | None]]:
    # The end of an asynchronous instruction names the computation of its start again.
    if instruction.operation in COLLECTIVES or instruction.kind.endswith(('-done', '-update')):
      return []
    times = self._trips(instruction) if instruction.kind == 'while' else 1
    return [(callee, times) for callee in _called(instruction)]

  def _trips(self, loop: Instruction) -> int | None:
    """Returns the trip count of a loop; None if unknown.

    Read from its annotation, else from a condition that compares a counter from 0 with a constant,
    which is all that TPU programs have.
    """
    if known := _TRIPS.search(loop.rest):
      return int(known[1])
    condition = _CONDITION.search(loop.rest)
    constants = {}
    for instruction in self.computations.get(condition[1], ()) if condition else ():
      if instruction.kind == 'constant' and instruction.result.startswith('s32[]'):
        constants[instruction.name] = int(_NUMBER.match(instruction.rest)[1])
      elif instruction.is_root and instruction.kind == 'compare':
        below = _BELOW.match(instruction.rest)
        return constants.get(below[1]) if below else None
    return None


def _called(instruction: Instruction) -> list[str]:
  branches = _BRANCHES.search(instruction.rest)
  listed = branches[1].split(',') if branches else ()
  return [*_CALLED.findall(instruction.rest), *(name.strip(' %') for name in listed)]


def read(text: str) -> Module:
  """Parses the text of `compiled.as_text()` or of a file that `--xla_dump_to` writes."""
  entry, computations, body = '', {}, []
  for line in text.split('\n'):
    if not line.startswith(' '):
      if header := _HEADER.match(line):
        body = computations.setdefault(header[2], [])
        entry = header[2] if header[1] else entry
    elif found := _INSTRUCTION.match(line):
      root, name, result, kind, rest = found.groups()
      body.append(Instruction(name, result, kind, rest, bool(root)))
  return Module(entry, computations)
