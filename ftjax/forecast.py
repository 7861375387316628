"""The training step of a config compiled for a slice that is not here, and what the compiler says.

The step is the one that training compiles, from the same shapes and shardings."""

import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from ftjax import algorithm_config, config, experiment
from ftjax.models import attention, head
from ftjax.models.architecture import Architecture
from ftjax.planning import account, suggest, topology
from ftjax.planning.cost import Cost, estimate
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError
from ftjax.trainer import Trainer
from ftjax.training.step import LossFn, program_text

log = logging.getLogger(__name__)

MakeLoss = Callable[[Architecture, ml_collections.ConfigDict], LossFn]

# What a runtime keeps of a GPU's memory for itself.
_USABLE = {'gpu': 0.95}


@dataclasses.dataclass(frozen=True)
class Forecast:
  """A compiled step in figures; see planning/account.py and planning/cost.py.

  settings: the mesh, micro-batches and recomputation it was compiled with, by config key. memory:
  None where the compiler itself ran out, and then needed tells how many bytes it wanted (0: not
  told). collectives and gathering: None where jaxlib cannot print the program; the cost then has no
  communication in it.
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
  memory: account.Memory | None = None
  collectives: tuple[account.Collective, ...] | None = None
  replicated: dict[str, int] = dataclasses.field(default_factory=dict)
  gathering: account.Gathering | None = None
  cost: Cost | None = None


def make(
  c: ml_collections.ConfigDict, where: topology.Topology, arch: Architecture, make_loss: MakeLoss
) -> Forecast:
  """Compiles and accounts.

  Args:
    c: a validated config; its data and weights are not touched.
    where: the slices; topology.environment was applied before jax was imported.
    arch: the model's.
    make_loss: of the algorithm.

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
    trainer = Trainer(run, make_loss(arch, c))
    compiled, needed = _compile(trainer)
  seconds = time.perf_counter() - begin
  chip = where.chip
  name = attention.kernel(
    attention.Problem(
      platform=chip.platform,
      context=mesh.shape['context'],
      queries=c.seq_len,
      keys=c.seq_len,
      head_dim=arch.head_dim,
      dtype=c.model.compute_dtype,
    )
  )
  out = Forecast(
    slice=where.name,
    devices=mesh.size,
    settings=settings,
    rows=algorithm_config.rows_per_step(c),
    length=c.seq_len,
    parameters=arch.num_params(),
    attention=name,
    compiler_options=trainer.compiler_options,
    compile_seconds=seconds,
    capacity=chip.memory,
    fits=False,
    needed=needed,
  )
  if compiled is None:
    return out
  held = account.memory(compiled, trainer.abstract)
  rows = algorithm_config.rows_per_step(c)
  local_tokens = rows // c.grad_accum * c.seq_len // (mesh.size // mesh.shape['tensor'])
  vocab = arch.vocab_size // mesh.shape['tensor']
  loops = -(-local_tokens // head.chunk_tokens(vocab, local_tokens))
  moved = gathering = None
  if text := program_text(compiled):
    apart = topology.islands(mesh, chip)
    moved = tuple(account.collectives(text, mesh, unknown_trips=loops, islands=apart))
    gathering = account.gathering(text, trainer.abstract.params, mesh)
  return dataclasses.replace(
    out,
    fits=held.peak <= _USABLE.get(chip.platform, 1.0) * chip.memory,
    needed=held.peak,
    memory=held,
    collectives=moved,
    replicated=account.replicated(trainer.abstract.params, mesh),
    gathering=gathering,
    cost=estimate(
      *(arch, where, held, moved or ()),
      rows=rows,
      length=c.seq_len,
      remat=c.remat,
      micro_batches=c.grad_accum,
    ),
  )


def _compile(trainer: Trainer) -> tuple[jax.stages.Compiled | None, float]:
  """(the step; None where the compiler ran out of the device's memory, bytes it then wanted)."""
  try:
    return trainer.compile(), 0.0
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
) -> Forecast | None:
  """The quickest estimate that fits among up to `most` compiled candidates; None: none fits."""
  width = jnp.dtype(c.model.compute_dtype).itemsize
  tried = suggest.candidates(arch, where, algorithm_config.rows_per_step(c), c.seq_len, width, most)
  best = None
  for candidate in tried:
    other = c.copy_and_resolve_references()
    other.update_from_flattened_dict(candidate.overrides())
    told = ' '.join(f'{k}={v}' for k, v in candidate.overrides().items())
    with contextlib.suppress(ConfigError):  # what does not divide is no candidate
      config.validate(other)
      found = make(other, where, arch, make_loss)
      log.info('%s: %.1f GiB, %s', told, found.needed / 2**30, 'fits' if found.fits else 'too much')
      quicker = found.fits and (
        best is None or (found.cost.seconds or 0) < (best.cost.seconds or 0)
      )
      best = found if quicker else best
  return best
