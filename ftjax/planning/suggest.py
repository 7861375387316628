"""Proposes meshes, micro-batches and rematerialization to compile, best guess first.

Candidates are pruned by arithmetic (divisibility, memory of the state); the compiler decides which
fit."""

import dataclasses
import math
from collections.abc import Iterator

import jax.numpy as jnp

from ftjax.models import counts, kinds
from ftjax.models.architecture import Architecture, BlockSpec, MlpSpec, MoeSpec
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
  expert: int = 1

  def overrides(self) -> dict[str, int | str]:
    """Returns the settings by config key."""
    axes = ('data', 'fsdp', 'context', 'tensor', 'expert')
    mesh = {f'mesh.{a}': getattr(self, a) for a in axes}
    return mesh | {'grad_accum': self.grad_accum, 'remat': self.remat}

  @property
  def rows(self) -> int:
    """Ways that the rows of a step are split."""
    return self.data * self.fsdp * self.expert


def _divisors(n: int, most: int) -> list[int]:
  return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def _all(arch: Architecture, topology: Topology, rows: int, length: int) -> Iterator[Candidate]:
  slices, devices = topology.slices, topology.num_devices
  local, specs = devices // slices, arch.layers()
  experts = math.gcd(*(m.num_experts for m in arch.mixtures())) if arch.mixtures() else 1
  for tensor in _divisors(math.gcd(*(s.mixer.split_heads for s in specs), local), 16):
    for context in _divisors(local // tensor, 64):
      left = local // tensor // context
      if length % (context * 128) or rows % (left * slices):
        continue
      for expert in _divisors(math.gcd(left, experts), 64):
        fsdp = left // expert
        if arch.model_dim % fsdp:
          continue
        for accum in _divisors(rows // (left * slices), 64):
          for remat in ('dots', 'full'):
            yield Candidate(slices, fsdp, context, tensor, accum, remat, expert)


def _inner(spec: BlockSpec, model_dim: int, expert: int) -> int:
  """Returns how many numbers of a token stand between the matrices of a layer: with experts, of
  each choice of all tokens whose experts a device may have.
  """
  mlp = spec.mlp
  if isinstance(mlp, MoeSpec):
    return spec.mixer.inner + expert * mlp.top_k * (3 * mlp.ffn_dim + 2 * model_dim)
  return spec.mixer.inner + (2 if isinstance(mlp, MlpSpec) else 3) * mlp.ffn_dim


def _kept(spec: BlockSpec, model_dim: int) -> int:
  """Returns how many of them remat='dots' keeps: not those of experts."""
  return spec.mixer.inner if isinstance(spec.mlp, MoeSpec) else _inner(spec, model_dim, 1)


def _expert_params(arch: Architecture) -> int:
  """Returns the number of parameters that `expert` splits."""
  found = kinds.declared(arch).values()
  return sum(counts.weights(p) for p in found if 'expert' in p.axes)


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
  n, of_experts = counts.num_params(arch), _expert_params(arch)
  split = 1 - of_experts / n * (1 - 1 / c.expert)  # share of the parameters, with `expert`
  tokens = rows // c.rows // c.grad_accum * length / c.context
  layer = (n * split - arch.vocab_size * arch.model_dim) / arch.num_layers / c.tensor
  table = arch.vocab_size * arch.model_dim / c.tensor
  dim, layers = arch.model_dim, arch.layers()
  inner = max(_inner(spec, dim, c.expert) for spec in layers) / c.tensor
  most = max(_kept(spec, dim) for spec in layers) / c.tensor
  kept = dim + (most + dim if c.remat == 'dots' else 0)
  saved = held.trained * arch.num_layers * tokens * kept * width
  gathered = 4 * table + 2 * layer * width
  base = _base_bytes(arch)
  copy = base or _COPY_BYTES * n
  state = _STATE_BYTES * held.trained * counts.num_trained(arch) + base + copy * held.copies
  state *= split / (c.fsdp * c.tensor)
  sampling = (base or width * n) / c.tensor if held.samples else 0.0
  return state + max(gathered + saved + 2 * tokens * inner * width, sampling)


def _preference(c: Candidate, arch: Architecture, rows: int, length: int) -> tuple:
  """Returns a sort key, smaller is better: communication, then rematerialization, then latency."""
  steps = c.grad_accum * (1.3 if c.remat == 'full' else 1.0)
  return (c.context * c.tensor, c.tensor > 1, _traffic(c, arch, rows, length), steps)


def _traffic(c: Candidate, arch: Architecture, rows: int, length: int) -> float:
  """Returns the numbers that a device receives in a step for its experts: their matrices over fsdp,
  the tokens of the others over expert. 0 for a model without experts.
  """
  if not arch.mixtures():
    return 0.0
  own = _expert_params(arch) / (c.expert * c.tensor)
  weights = own * (1 - 1 / c.fsdp) * c.grad_accum
  tokens = rows // c.rows * length / c.context
  return weights + (c.expert - 1) * tokens * arch.model_dim * len(arch.mixtures())


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
    return sorted(likely, key=lambda c: _preference(c, arch, rows, length))[:most]
  return sorted(found, key=lambda c: _bytes(c, arch, rows, length, width, held))[:most]
