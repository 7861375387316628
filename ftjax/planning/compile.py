"""Ahead-of-time compiles the training step of a config for hardware that is not attached, and reads
its memory, collectives and cost from the compiler.

The step is the one that training compiles, with the same shapes and shardings."""

import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from ftjax.config import algorithms, validation
from ftjax.experiment import adapters, auxiliary
from ftjax.experiment import run as experiment
from ftjax.experiment.trainer import Trainer
from ftjax.generation.sampling import Sampling
from ftjax.models import attention, counts, logit_chunks
from ftjax.models.architecture import Architecture, AttentionSpec
from ftjax.models.forward import Forward
from ftjax.planning import collectives as communication
from ftjax.planning import hlo, known_models, suggest, topology
from ftjax.planning import memory as memory_lib
from ftjax.planning import rollout as rollout_lib
from ftjax.planning.cost import Cost, estimate
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError
from ftjax.training.step import LossFn, program_text

log = logging.getLogger(__name__)

T = TypeVar('T')
MakeLoss = Callable[[Forward, ml_collections.ConfigDict], LossFn]

# Usable share of a device's memory; the CUDA runtime reserves the rest.
_USABLE = {'gpu': 0.95}


@dataclasses.dataclass(frozen=True)
class Forecast:
  """Figures of a compiled step; see planning/{memory,collectives,cost}.py.

  settings: mesh, micro-batches and rematerialization by config key. memory: None where compiling
  itself ran out of device memory; `refused` is then the program that did (step or rollout), and
  `needed` the bytes that it required (0: unknown). collectives and gathering: None where the text
  of the program is not available; the cost then contains no communication. rollout: only of
  algorithms that train on rollouts. parameters, trained: numbers of the policy, adapters included.
  """

  slice: str
  devices: int
  settings: dict[str, int | str]
  rows: int
  length: int
  parameters: int
  trained: int
  attention: str
  compiler_options: dict[str, bool | int | float | str]
  compile_seconds: float
  capacity: float
  fits: bool
  needed: float
  refused: str = ''
  memory: memory_lib.Memory | None = None
  rollout: rollout_lib.RolloutPlan | None = None
  collectives: tuple[communication.Collective, ...] | None = None
  replicated: dict[str, int] = dataclasses.field(default_factory=dict)
  gathering: memory_lib.Gathering | None = None
  cost: Cost | None = None


def make(
  c: ml_collections.ConfigDict,
  where: topology.Topology,
  arch: Architecture,
  make_loss: MakeLoss,
  dump: str = '',
) -> Forecast:
  """Compiles the step and returns its figures.

  Args:
    c: a validated config; its data and weights are not read.
    where: the target; topology.environment must be applied before jax is imported.
    arch: of the model.
    make_loss: of the algorithm.
    dump: the folder that topology.environment was called with; '' for none.

  Raises:
    ConfigError: a mesh or batch that does not divide, or an unknown slice.
  """
  mesh = sharding.make_mesh({a: c.mesh[a] for a in sharding.AXES}, topology.devices(where))
  experiment.configure_jax(c)
  settings = {f'mesh.{a}': mesh.shape[a] for a in sharding.AXES}
  settings |= {'grad_accum': c.grad_accum, 'remat': c.remat}
  begin = time.perf_counter()
  with jax.set_mesh(mesh):
    run = experiment.without_data(c, mesh, arch)
    trainer = Trainer(run, make_loss(run.forward, c))
    compiled, needed = _compiled(trainer.compile)
  dumped = topology.written(dump) if dump else ''
  chip, rollout, refused = where.chip, None, '' if compiled else 'step'
  if compiled and algorithms.of(c).on_rollouts:
    rollout, needed = _compiled(lambda: _rollout(trainer, chip))
    refused = '' if rollout else 'rollout'
  out = Forecast(
    slice=where.name,
    devices=mesh.size,
    settings=settings,
    rows=algorithms.rows_per_step(c),
    length=c.seq_len,
    parameters=counts.num_params(run.arch),
    trained=counts.num_trained(run.arch),
    attention=_kernel(c, mesh, arch, chip),
    compiler_options=trainer.compiler_options,
    compile_seconds=time.perf_counter() - begin,
    capacity=chip.memory,
    fits=False,
    needed=needed,
    refused=refused,
    rollout=rollout,
  )
  if refused:
    return out
  return _accounted(out, trainer, compiled, dumped or program_text(compiled), where)


def _kernel(c: ml_collections.ConfigDict, mesh: Mesh, arch: Architecture, chip) -> str:
  mixers = (spec.mixer for spec in arch.layers())
  sizes = [m.head_dim for m in mixers if isinstance(m, AttentionSpec)]
  if not sizes:
    return 'none'
  problem = attention.Problem(
    platform=chip.platform,
    context=mesh.shape['context'],
    queries=c.seq_len,
    keys=c.seq_len,
    head_dim=max(sizes),
    dtype=c.model.compute_dtype,
    dropout=max(0.0, c.model.dropout.attention),
  )
  return attention.kernel(problem)


def _accounted(
  out: Forecast, trainer: Trainer, compiled: jax.stages.Compiled, text: str, where
) -> Forecast:
  """Returns the forecast with memory, collectives and cost of the compiled step."""
  run, chip = trainer.run, where.chip
  c, mesh, arch = run.config, run.mesh, run.arch
  held = memory_lib.memory(compiled, trainer.abstract)
  local_tokens = out.rows // c.grad_accum * c.seq_len // (mesh.size // mesh.shape['tensor'])
  vocab = arch.vocab_rows // mesh.shape['tensor']
  loops = -(-local_tokens // logit_chunks.chunk_tokens(vocab, local_tokens))
  moved = gathering = None
  weights = run.auxiliary.without(trees.merge(trainer.abstract.params, trainer.abstract.frozen))
  if text:
    domains = topology.link_domains(mesh, chip)
    module = hlo.read(text)
    moved = tuple(communication.collectives(module, mesh, unknown_trips=loops, domains=domains))
    gathering = memory_lib.gathering(module, weights, mesh)
  needed = held.peak
  if rollout := out.rollout:
    needed = max(held.peak + rollout.auxiliary, rollout.peak)
  return dataclasses.replace(
    out,
    fits=needed <= _USABLE.get(chip.platform, 1.0) * chip.memory,
    needed=needed,
    memory=held,
    collectives=moved,
    replicated=memory_lib.replicated(weights, mesh),
    gathering=gathering,
    cost=estimate(
      *(run.passes(), where, held, moved or ()),
      rows=out.rows,
      length=c.seq_len,
      remat=c.remat,
      micro_batches=c.grad_accum,
    ),
  )


def _rollout(trainer: Trainer, chip: topology.Chip) -> rollout_lib.RolloutPlan:
  """Returns the plan of a rollout with prompts and completions of the maximal length."""
  run, c = trainer.run, trainer.run.config
  dtype = jnp.dtype(c.model.param_dtype)
  return rollout_lib.make(
    run.arch,
    run.mesh,
    rollout_lib.Size(
      prompts=c.batch_size,
      group=c.rollout.group,
      prompt_tokens=algorithms.max_example(c) - c.rollout.max_tokens,
      max_tokens=c.rollout.max_tokens,
      slots=c.rollout.slots,
    ),
    Sampling(c.rollout.temperature, c.rollout.top_k, c.rollout.top_p),
    dtype=jnp.dtype(c.model.compute_dtype),
    state=memory_lib.shard_bytes(trainer.abstract),
    auxiliary=sum(
      rollout_lib.leaf_bytes(m.leaves(known_models.read), run.mesh, dtype)
      for m in run.auxiliary.of_rollouts
    ),
    bandwidth=chip.bandwidth,
  )


def _compiled(compile_it: Callable[[], T]) -> tuple[T | None, float]:
  """Returns (the compiled program or None where compiling ran out of device memory, the bytes that
  it then required).
  """
  try:
    return compile_it(), 0.0
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    if 'RESOURCE_EXHAUSTED' not in text or 'vmem' in text:
      raise
    return None, _required_bytes(text)


def _required_bytes(text: str) -> float:
  """Returns the bytes that a compiler required, by its error message; 0 if unknown. libtpu reports
  only the temporaries where these alone are too large.
  """
  used = re.search(r'[Uu]sed ([\d.]+)([KMGT]?)(?:iB)? of', text)
  used = used or re.search(r'required for [\w ]+ \(([\d.]+)([KMGT]?)\) exceeds', text)
  scale = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  return float(used[1]) * scale[used[2]] if used else 0.0


def better(
  c: ml_collections.ConfigDict,
  where: topology.Topology,
  arch: Architecture,
  make_loss: MakeLoss,
  most: int,
  dump: str = '',
) -> Forecast | None:
  """Compiles up to `most` candidates and returns the fastest that fits; None if none does."""
  width = jnp.dtype(c.model.compute_dtype).itemsize
  adapted = adapters.adapted(arch, c)
  others = auxiliary.find(c, adapted)
  trained = [m for m in others.in_state if m.is_trained]
  copies = [m for m in others.in_state if not m.is_trained]
  copies += [m for m in others.of_rollouts if not m.path]
  held = suggest.Held(
    1 + len(trained),
    sum(not m.shares_base for m in copies),
    samples=algorithms.of(c).on_rollouts,
  )
  rows = algorithms.rows_per_step(c)
  tried = suggest.candidates(adapted, where, rows, c.seq_len, width, most, held)
  best = None
  for candidate in tried:
    other = c.copy_and_resolve_references()
    other.update_from_flattened_dict(candidate.overrides())
    shown = ' '.join(f'{k}={v}' for k, v in candidate.overrides().items())
    with contextlib.suppress(ConfigError):  # sizes that do not divide are no candidate
      validation.validate(other)
      found = make(other, where, arch, make_loss, dump)
      log.info(
        '%s: %.1f GiB, %s', shown, found.needed / 2**30, 'fits' if found.fits else 'too much'
      )
      quicker = found.fits and (
        best is None or (found.cost.seconds or 0) < (best.cost.seconds or 0)
      )
      best = found if quicker else best
  return best
