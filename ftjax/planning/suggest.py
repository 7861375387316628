"""Proposes meshes, micro-batches and rematerialization to compile, best guess first.

Candidates are pruned by arithmetic (divisibility, memory of the state); the compiler decides which
fit."""

import dataclasses
import math
from collections.abc import Iterator

import jax.numpy as jnp

from ftjax.models import counts, kinds
from ftjax.models.architecture import Architecture, BlockSpec, MlpSpec
from ftjax.planning.topology import Topology

_STATE_BYTES = 16  # of a trained float32 parameter: itself, two moments of Adam, the gradient
_COPY_BYTES = 4  # of a float32 parameter that is not trained


@dataclasses.dataclass(frozen=True)
class Held:
  """Models of one size in device memory: numbers of trained models and of others (`copies`), and
  whether one is copied for sampling, sharded only over `tensor`.
  """

  trained: int = 1
  copies: int = 0
  samples: bool = False


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Settings to compile instead of those of the config."""

  data: int
  fsdp: int
  context: int
  tensor: int
  grad_accum: int
  remat: str

  def overrides(self) -> dict[str, int | str]:
    """Returns the settings by config key."""
    mesh = {f'mesh.{a}': getattr(self, a) for a in ('data', 'fsdp', 'context', 'tensor')}
    return mesh | {'mesh.expert': 1, 'grad_accum': self.grad_accum, 'remat': self.remat}


def _divisors(n: int, most: int) -> list[int]:
  return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def _all(arch: Architecture, topology: Topology, rows: int, length: int) -> Iterator[Candidate]:
  slices, devices = topology.slices, topology.num_devices
  local, specs = devices // slices, arch.layers()
  for tensor in _divisors(math.gcd(*(s.mixer.split_heads for s in specs), local), 16):
    for context in _divisors(local // tensor, 64):
      fsdp = local // tensor // context
      ways = fsdp * slices
      if length % (context * 128) or rows % ways or arch.model_dim % fsdp:
        continue
      for accum in _divisors(rows // ways, 64):
        for remat in ('dots', 'full'):
          yield Candidate(slices, fsdp, context, tensor, accum, remat)


def _inner(spec: BlockSpec) -> int:
  """Returns how many numbers of a token stand between the matrices of a layer."""
  wide = 2 if isinstance(spec.mlp, MlpSpec) else 3
  return spec.mixer.inner + wide * spec.mlp.ffn_dim


def _base_bytes(arch: Architecture) -> int:
  """Returns the bytes of the frozen base under an adapter; 0 without one."""
  if not arch.adapter:
    return 0
  found = kinds.declared(arch).values()
  return sum(math.prod(p.shape) * jnp.dtype(p.dtype).itemsize for p in found if p.origin == 'base')


def _bytes(
  c: Candidate, arch: Architecture, rows: int, length: int, width: int, held: Held
) -> float:
  """Estimates the peak bytes of one device: the state, and the larger of the step's temporaries
  (one gathered layer and embedding table, saved activations, activations of a layer) and the copy
  for sampling.
  """
  n = counts.num_params(arch)
  tokens = rows // (c.data * c.fsdp) // c.grad_accum * length / c.context
  layer = (n - arch.vocab_size * arch.model_dim) / arch.num_layers / c.tensor
  table = arch.vocab_size * arch.model_dim / c.tensor
  inner = max(map(_inner, arch.layers())) / c.tensor
  kept = arch.model_dim + (inner + arch.model_dim if c.remat == 'dots' else 0)
  saved = held.trained * arch.num_layers * tokens * kept * width
  gathered = 4 * table + 2 * layer * width
  base = _base_bytes(arch)
  copy = base or _COPY_BYTES * n
  state = _STATE_BYTES * held.trained * counts.num_trained(arch) + base + copy * held.copies
  state /= c.fsdp * c.tensor
  sampling = (base or width * n) / c.tensor if held.samples else 0.0
  return state + max(gathered + saved + 2 * tokens * inner * width, sampling)


def _preference(c: Candidate) -> tuple:
  """Returns a sort key, smaller is better: communication, then rematerialization, then latency."""
  return (c.context * c.tensor, c.tensor > 1, c.grad_accum * (1.3 if c.remat == 'full' else 1.0))


def candidates(
  arch: Architecture,
  topology: Topology,
  rows: int,
  length: int,
  width: int,
  most: int,
  held: Held = Held(),  # noqa: B008 - frozen
) -> list[Candidate]:
  """Returns the first `most` candidates to compile.

  Args:
    arch: the model.
    topology: the slices; the axis `data` spans them.
    rows: packed sequences of a step, over all devices.
    length: tokens of a row.
    width: bytes of the compute dtype.
    most: number of candidates.
    held: models of the run.
  """
  found = list(_all(arch, topology, rows, length))
  room = topology.chip.memory
  likely = [c for c in found if _bytes(c, arch, rows, length, width, held) <= 1.1 * room]
  if likely:
    return sorted(likely, key=_preference)[:most]
  return sorted(found, key=lambda c: _bytes(c, arch, rows, length, width, held))[:most]
