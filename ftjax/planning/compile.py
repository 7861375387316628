"""The training step of a config compiled for a slice that is not here, and what the compiler says.

The step is the one that training compiles, from the same shapes and shardings."""

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
from ftjax.experiment import auxiliary
from ftjax.experiment import run as experiment
from ftjax.experiment.trainer import Trainer
from ftjax.families import table
from ftjax.generation.sampling import Sampling
from ftjax.models import attention, counts, head
from ftjax.models.architecture import Architecture
from ftjax.models.forward import Forward
from ftjax.planning import collectives as communication
from ftjax.planning import hlo, known_models, suggest, topology
from ftjax.planning import memory as account
from ftjax.planning import rollout as phase_lib
from ftjax.planning.cost import Cost, estimate
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError
from ftjax.training.step import LossFn, program_text

log = logging.getLogger(__name__)

T = TypeVar('T')
MakeLoss = Callable[[Forward, ml_collections.ConfigDict], LossFn]

# What a runtime keeps of a GPU's memory for itself.
_USABLE = {'gpu': 0.95}


@dataclasses.dataclass(frozen=True)
class Forecast:
  """A compiled step in figures; see planning/{account,communication,cost}.py.

  settings: the mesh, micro-batches and recomputation it was compiled with, by config key. memory:
  None where the compiler itself ran out: refused then tells of what (step or rollout), needed how
  many bytes it wanted (0: not told). collectives and gathering: None where the program's text is
  not to be had; the cost then has no communication in it. rollout: of algorithms that train on what
  the model says.
  """

  slice: str
  devices: int
  settings: dict[str, int | str]
  rows: int
  length: int
  parameters: int
  attention: str
  compiler_options: dict[str, bool | int | float | str]
  compile_seconds: float
  capacity: float
  fits: bool
  needed: float
  refused: str = ''
  memory: account.Memory | None = None
  rollout: phase_lib.Phase | None = None
  collectives: tuple[communication.Collective, ...] | None = None
  replicated: dict[str, int] = dataclasses.field(default_factory=dict)
  gathering: account.Gathering | None = None
  cost: Cost | None = None


def make(
  c: ml_collections.ConfigDict,
  where: topology.Topology,
  arch: Architecture,
  make_loss: MakeLoss,
  dump: str = '',
) -> Forecast:
  """Compiles and accounts.

  Args:
    c: a validated config; its data and weights are not touched.
    where: the slices; topology.environment was applied before jax was imported.
    arch: the model's.
    make_loss: of the algorithm.
    dump: that topology.environment was given; '': none.

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
  chip, phase, refused = where.chip, None, '' if compiled else 'step'
  if compiled and algorithms.of(c).on_rollouts:
    phase, needed = _compiled(lambda: _phase(trainer, chip))
    refused = '' if phase else 'rollout'
  out = Forecast(
    slice=where.name,
    devices=mesh.size,
    settings=settings,
    rows=algorithms.rows_per_step(c),
    length=c.seq_len,
    parameters=counts.num_params(arch),
    attention=_kernel(c, mesh, arch, chip),
    compiler_options=trainer.compiler_options,
    compile_seconds=time.perf_counter() - begin,
    capacity=chip.memory,
    fits=False,
    needed=needed,
    refused=refused,
    rollout=phase,
  )
  if refused:
    return out
  return _accounted(out, trainer, compiled, dumped or program_text(compiled), where)


def _kernel(c: ml_collections.ConfigDict, mesh: Mesh, arch: Architecture, chip) -> str:
  problem = attention.Problem(
    platform=chip.platform,
    context=mesh.shape['context'],
    queries=c.seq_len,
    keys=c.seq_len,
    head_dim=max(spec.mixer.head_dim for spec in arch.layers()),
    dtype=c.model.compute_dtype,
  )
  return attention.kernel(problem)


def _accounted(
  out: Forecast, trainer: Trainer, compiled: jax.stages.Compiled, text: str, where
) -> Forecast:
  """The forecast with what a compiled step holds, moves and costs."""
  run, chip = trainer.run, where.chip
  c, mesh, arch = run.config, run.mesh, run.arch
  held = account.memory(compiled, trainer.abstract)
  local_tokens = out.rows // c.grad_accum * c.seq_len // (mesh.size // mesh.shape['tensor'])
  vocab = arch.vocab_size // mesh.shape['tensor']
  loops = -(-local_tokens // head.chunk_tokens(vocab, local_tokens))
  moved = gathering = None
  if text:
    apart = topology.islands(mesh, chip)
    module = hlo.read(text)
    moved = tuple(communication.collectives(module, mesh, unknown_trips=loops, islands=apart))
    gathering = account.gathering(module, trainer.abstract.params, mesh)
  needed = held.peak
  if phase := out.rollout:
    needed = max(held.peak + phase.auxiliary, phase.peak)
  return dataclasses.replace(
    out,
    fits=needed <= _USABLE.get(chip.platform, 1.0) * chip.memory,
    needed=needed,
    memory=held,
    collectives=moved,
    replicated=account.replicated(trainer.abstract.params, mesh),
    gathering=gathering,
    cost=estimate(
      *(auxiliary.passes(c, arch), where, held, moved or ()),
      rows=out.rows,
      length=c.seq_len,
      remat=c.remat,
      micro_batches=c.grad_accum,
    ),
  )


def _phase(trainer: Trainer, chip: topology.Chip) -> phase_lib.Phase:
  """Of a rollout with prompts and completions as long as the config lets them be."""
  run, c = trainer.run, trainer.run.config
  models = []
  if algorithms.place(c, 'reference') == 'rollout':
    models.append(run.arch)
  if path := c.rollout.reward_model:
    models.append(
      dataclasses.replace(table.architecture(known_models.read(path), c.model.family), num_labels=1)
    )
  dtype = jnp.dtype(c.model.param_dtype)
  return phase_lib.make(
    run.arch,
    run.mesh,
    phase_lib.Size(
      prompts=c.batch_size,
      group=c.rollout.group,
      prompt_tokens=algorithms.max_example(c) - c.rollout.max_tokens,
      max_tokens=c.rollout.max_tokens,
      slots=c.rollout.slots,
    ),
    Sampling(c.rollout.temperature, c.rollout.top_k, c.rollout.top_p),
    dtype=jnp.dtype(c.model.compute_dtype),
    state=account.shard_bytes(trainer.abstract),
    auxiliary=sum(phase_lib.model_bytes(arch, run.mesh, dtype) for arch in models),
    bandwidth=chip.bandwidth,
  )


def _compiled(compile_it: Callable[[], T]) -> tuple[T | None, float]:
  """(what it gives; None where the compiler ran out of the device's memory, bytes it then
  wanted).
  """
  try:
    return compile_it(), 0.0
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    if 'RESOURCE_EXHAUSTED' not in text or 'vmem' in text:
      raise
    return None, _wanted(text)


def _wanted(text: str) -> float:
  """Bytes that a compiler wanted in vain, by its message; 0 where it tells none. libtpu tells of
  the temporaries alone where they alone are too many.
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
  """The quickest estimate that fits among up to `most` compiled candidates; None: none fits."""
  width = jnp.dtype(c.model.compute_dtype).itemsize
  models = auxiliary.passes(c, arch)
  trained = sum(times == 3 for _, times in models)
  held = suggest.Held(
    trained,
    len(models) - trained + (algorithms.place(c, 'reference') == 'rollout'),
    samples=algorithms.of(c).on_rollouts,
  )
  rows = algorithms.rows_per_step(c)
  tried = suggest.candidates(arch, where, rows, c.seq_len, width, most, held)
  best = None
  for candidate in tried:
    other = c.copy_and_resolve_references()
    other.update_from_flattened_dict(candidate.overrides())
    told = ' '.join(f'{k}={v}' for k, v in candidate.overrides().items())
    with contextlib.suppress(ConfigError):  # what does not divide is no candidate
      validation.validate(other)
      found = make(other, where, arch, make_loss, dump)
      log.info('%s: %.1f GiB, %s', told, found.needed / 2**30, 'fits' if found.fits else 'too much')
      quicker = found.fits and (
        best is None or (found.cost.seconds or 0) < (best.cost.seconds or 0)
      )
      best = found if quicker else best
  return best
