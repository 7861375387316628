"""An optimized HLO module as compilers write it: computations, and how often each is executed."""

import collections
import dataclasses
import functools
import math
import re

# Their `to_apply` is a sum of two numbers, which nothing needs to look into.
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
    """The kind, of an asynchronous one that is started too."""
    return self.kind.removesuffix('-start')

  @property
  def arrays(self) -> list[tuple[int, ...]]:
    """Dimensions of what it makes."""
    return [_dims(dims) for _, dims in _SHAPE.findall(self.result)]

  @property
  def bytes(self) -> float:
    """Of all that it makes."""
    return sum(_size(*shape) for shape in _SHAPE.findall(self.result))

  @property
  def first_bytes(self) -> float:
    """Of the first array that it makes."""
    return _size(*_SHAPE.findall(self.result)[0])


def _dims(text: str) -> tuple[int, ...]:
  return tuple(int(d) for d in text.split(',') if d)


def _size(kind: str, dims: str) -> float:
  bits = re.search(r'\d+', kind)
  size = _BYTES.get(kind) or (int(bits[0]) / 8 if bits else 0)
  return size * math.prod(_dims(dims))


@dataclasses.dataclass(frozen=True)
class Module:
  """entry: name of the computation that begins. computations: their instructions, by name."""

  entry: str
  computations: dict[str, list[Instruction]]

  @functools.cached_property
  def calls(self) -> dict[str, list[tuple[str, int | None]]]:
    """{computation: [(callee, times; None: a loop of which nothing tells how long it is)]}."""
    return {name: [c for i in items for c in self._callees(i)] for name, items in self}

  @functools.cached_property
  def fusions(self) -> set[str]:
    """Computations that are fused into one instruction."""
    return {f for _, items in self for i in items if i.kind == 'fusion' for f in _called(i)}

  @functools.cached_property
  def looped(self) -> set[str]:
    """Computations that are executed inside of loops."""
    stack = [callee for items in self.calls.values() for callee, times in items if times != 1]
    found = set()
    while stack:
      if (name := stack.pop()) not in found:
        found.add(name)
        stack += [callee for callee, _ in self.calls.get(name, ())]
    return found

  def executions(self, unknown_trips: int) -> dict[str, float]:
    """{computation: how often a run of the module executes it}; unknown_trips stands for None."""
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
    # The end of what is asynchronous names the computation of its start again.
    if instruction.operation in COLLECTIVES or instruction.kind.endswith(('-done', '-update')):
      return []
    times = self._trips(instruction) if instruction.kind == 'while' else 1
    return [(callee, times) for callee in _called(instruction)]

  def _trips(self, loop: Instruction) -> int | None:
    """As annotated, or as a condition tells that compares what counts from 0 with a constant: on
    TPUs nothing else tells it.
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
  """Of `compiled.as_text()`, or of what `--xla_dump_to` writes."""
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
