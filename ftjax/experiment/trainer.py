"""The state of a run and its compiled step: where weights come from, what is trained, saved,
evaluated and exported.

The state's parameters are the model's, with other models beside it under names of their own:
`reference/` (the policy as it was at the start, frozen; not saved, but read again from where it
came) and `value/` (a value model, trained and saved with the policy)."""

import dataclasses
import logging
import time

import jax
import jax.numpy as jnp
from jax import monitoring

from ftjax.config import algorithms
from ftjax.experiment.auxiliary import model_of
from ftjax.experiment.run import Run
from ftjax.hf import load
from ftjax.models import kinds
from ftjax.runtime import compiler_options, sharding, trees
from ftjax.storage.checkpoint import Checkpoints
from ftjax.telemetry import console
from ftjax.training import optimizer as optimizer_lib
from ftjax.training.lr_schedule import ScheduleConfig, make_schedule
from ftjax.training.state import State, create, state_shardings, with_shardings
from ftjax.training.step import LossFn, compile_step, make_step

log = logging.getLogger(__name__)


def _leaves(run: Run) -> dict[str, optimizer_lib.Leaf]:
  """What the optimizer must know of every parameter, those of a value model among them."""
  out = {}
  for prefix, arch in run.parts().items():
    found = optimizer_lib.leaves(kinds.declared(arch), arch.layer_slots())
    out |= {
      f'{prefix}{n}': dataclasses.replace(leaf, names=tuple(f'{prefix}{x}' for x in leaf.names))
      for n, leaf in found.items()
    }
  return out


class Trainer:
  """The compiled step of a run with everything around it."""

  def __init__(self, run: Run, loss_fn: LossFn):
    c = run.config
    if c.model.param_dtype == 'bfloat16':
      log.warning(
        'model.param_dtype=bfloat16: steps smaller than about 1/256 of a weight change nothing, '
        'and with a usual optim.lr most are; float32 trains better where memory allows it'
      )
    self.run = run
    self._has_reference = algorithms.place(c, 'reference') == 'state'
    info = self.leaves = _leaves(run)
    numbers = ('lr', 'warmup_steps', 'end_fraction', 'decay_steps')
    self.schedule = make_schedule(
      c.optim.schedule, ScheduleConfig(steps=run.steps, **{n: c.optim[n] for n in numbers})
    )
    names = (
      'name',
      'b1',
      'b2',
      'eps',
      'weight_decay',
      'clip_norm',
      'decay',
      'multipliers',
      'freeze',
    )
    config = optimizer_lib.OptimizerConfig(schedule=self.schedule, **{n: c.optim[n] for n in names})
    self._derived = {
      f'{p}{n}' for p, arch in run.parts().items() for n in kinds.names(arch, 'derived')
    }
    self.frozen = optimizer_lib.frozen_names(config.freeze, info) | self._derived
    trained = {n: leaf for n, leaf in info.items() if n not in self.frozen}
    self.optimizer = optimizer_lib.make_optimizer(config, info, trained)
    abstract = jax.eval_shape(self._create, run.abstract_params())
    shardings = state_shardings(abstract, run.parameter_shardings(), run.mesh)
    self.abstract = with_shardings(abstract, shardings)
    self._init = jax.jit(self._create, out_shardings=shardings)
    self._step = make_step(
      loss_fn,
      self.optimizer,
      shardings,
      mask=optimizer_lib.layer_mask(config, info, trained),
      schedule=self.schedule,
      clip_norm=c.optim.clip_norm,
      ema_decay=c.optim.ema_decay,
      seed=c.seed,
    )

  @property
  def compiler_options(self) -> dict[str, compiler_options.Value]:
    """Of the step, on this run's devices."""
    c, kind = self.run.config, self.run.mesh.devices.flat[0].device_kind
    return compiler_options.resolve(kind, c.compiler_options)

  def _create(self, params: dict) -> State:
    frozen, trained = trees.select(params, lambda n: n in self.frozen)
    if self._has_reference:
      # A copy: a state is donated whole, and no buffer twice.
      frozen = frozen | {'reference': jax.tree.map(jnp.copy, model_of(params))}
    return create(trained, frozen, self.optimizer, bool(self.run.config.optim.ema_decay))

  def compile(self) -> jax.stages.Compiled:
    """Ahead of time, from shapes: the same executable for a fresh start and a resume."""
    batch, options = self.run.abstract_batch(), self.compiler_options
    if options:
      log.info('compiler options: %s', compiler_options.format_flags(options))
    begin, counts = time.perf_counter(), _CacheCounts()
    compiled = compile_step(self._step, self.abstract, batch, options)
    seconds, cache = time.perf_counter() - begin, counts.close()
    log.info(console.compiled(seconds, cache, *_memory(compiled)))
    return compiled

  # Where a state comes from.

  @property
  def _source(self) -> str:
    init_from = self.run.config.init_from
    return load.exported(init_from) if init_from else self.run.model.source

  def first(self) -> dict:
    """The model's weights as they were at the start, of init_from or of model.path."""
    return self.run.load_params(self._source, self.run.config.model.param_dtype)

  def fresh(self) -> State:
    """A state of no steps."""
    dtype = self.run.config.model.param_dtype
    return self._init(self.first() | self.run.load_beside(self._source, dtype))

  def restore(self, checkpoints: Checkpoints, step: int) -> State:
    """The state saved at a step, with its reference."""
    state = self._with_derived(checkpoints.restore(step, self.saved(self.abstract)))
    if not self._has_reference:
      return state
    return dataclasses.replace(state, frozen=state.frozen | {'reference': self.first()})

  # What of it is wanted.

  def saved(self, state: State) -> State:
    """Returns what is saved of a state or of its shapes: all but reference and derived leaves."""
    kept = {k: v for k, v in state.frozen.items() if k != 'reference'}
    if self._derived:
      _, kept = trees.select(kept, lambda n: n in self._derived)
    return dataclasses.replace(state, frozen=kept)

  def _with_derived(self, state: State) -> State:
    """Returns a state with its derived leaves computed; one from a checkpoint has none."""
    if not self._derived:
      return state
    _, frozen = trees.select(state.frozen, lambda n: n in self._derived)
    flat, found, run = trees.flatten(trees.merge(state.params, frozen)), {}, self.run
    dtype = jnp.dtype(run.config.model.param_dtype)
    for prefix, arch in run.parts().items():
      own = {n: flat[f'{prefix}{n}'] for n in kinds.names(arch, 'base', 'adapter')}
      places = trees.flatten(sharding.shardings(run.mesh, kinds.axes(arch)))
      model = trees.unflatten(own)
      whole = trees.flatten(
        kinds.completed(arch, model, places.__getitem__, run.config.seed, dtype)
      )
      found |= {f'{prefix}{n}': whole[n] for n in kinds.names(arch, 'derived')}
    return dataclasses.replace(state, frozen=trees.merge(frozen, trees.unflatten(found)))

  def everything(self, state: State) -> dict:
    """The parameters in training as they are now, with what stands beside the model."""
    return trees.merge(state.params, state.frozen)

  def averaged(self, state: State) -> dict:
    """The same with the moving average in place of what is trained, where there is one."""
    return trees.merge(state.ema or state.params, state.frozen)

  def model(self, state: State) -> dict:
    """Returns the model that is evaluated and exported, of the moving average if there is one."""
    return model_of(self.averaged(self._with_derived(state)))


def _memory(compiled: jax.stages.Compiled) -> tuple[int | None, int | None]:
  """(bytes that a step takes on a device at its peak, bytes that the device has); None where the
  compiler or the device does not say.
  """
  found = compiled.memory_analysis()
  if found is None:
    return None, None
  sizes = found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes
  stats = jax.local_devices()[0].memory_stats() or {}
  return sizes - found.alias_size_in_bytes, stats.get('bytes_limit')


class _CacheCounts:
  """Counts hits and misses of the compile cache while it lives."""

  def __init__(self):
    self._counts = {'hits': 0, 'misses': 0}
    monitoring.register_event_listener(self._see)

  def _see(self, event: str, **_):
    for name in self._counts:
      if event == f'/jax/compilation_cache/cache_{name}':
        self._counts[name] += 1

  def close(self) -> str:
    monitoring.unregister_event_listener(self._see)
    return ', '.join(f'{v} {k}' for k, v in self._counts.items())
