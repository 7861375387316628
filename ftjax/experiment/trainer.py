"""The state of a run and its compiled step: what is trained, saved, evaluated and exported.

The state's parameters are those of the model, with auxiliary models under names of their own
(experiment/auxiliary.py)."""

import dataclasses
import logging
import time

import jax
import jax.numpy as jnp
from jax import monitoring

from ftjax.experiment import balance
from ftjax.experiment.run import Run
from ftjax.models import kinds
from ftjax.runtime import compiler_options, sharding, trees
from ftjax.runtime.errors import ConfigError
from ftjax.storage.checkpoint import Checkpoints
from ftjax.telemetry import console
from ftjax.training import optimizer as optimizer_lib
from ftjax.training.lr_schedule import ScheduleConfig, make_schedule
from ftjax.training.state import State, create, state_shardings, with_shardings
from ftjax.training.step import Extras, LossFn, compile_step, make_step

log = logging.getLogger(__name__)


def _leaves(run: Run) -> dict[str, optimizer_lib.Leaf]:
  """Returns what the optimizer must know of every trained parameter, also of auxiliary models."""
  out, ratio = {}, run.config.lora.b_lr_ratio
  for prefix, arch in run.trained_archs().items():
    found = optimizer_lib.leaves(kinds.declared(arch), arch.layer_slots())
    out |= {
      f'{prefix}{n}': dataclasses.replace(
        leaf,
        names=tuple(f'{prefix}{x}' for x in leaf.names),
        rate=ratio if n.endswith('/lora_b') else 1.0,
      )
      for n, leaf in found.items()
    }
  return {n: leaf for n, leaf in out.items() if n in run.trained_leaves()}


class Trainer:
  """The optimizer, the state and the compiled step of a run.

  Args:
    run: a config on a mesh.
    loss_fn: of the algorithm.

  Attributes:
    abstract: the state in shapes, with shardings.
    leaves: what the optimizer knows of every trained parameter.
    frozen: names of parameters that optim.freeze leaves as they are.
    unfreezing: the schedule of gradual unfreezing; None without.
  """

  def __init__(self, run: Run, loss_fn: LossFn):
    c = run.config
    if c.model.param_dtype == 'bfloat16' and c.optim.rounding == 'nearest':
      log.warning(
        'model.param_dtype=bfloat16: steps smaller than about 1/256 of a weight change nothing, '
        'and with a usual optim.lr most are; set optim.rounding=stochastic, or, where memory '
        'allows it, model.param_dtype=float32'
      )
    self.run = run
    # Auxiliary models that are part of the state and do not change.
    self._constant = tuple(m for m in run.auxiliary.in_state if not m.is_trained)
    info = self.leaves = _leaves(run)
    numbers = ('lr', 'warmup_steps', 'end_fraction', 'decay_steps')
    self.schedule = make_schedule(
      c.optim.schedule, ScheduleConfig(steps=run.steps, **{n: c.optim[n] for n in numbers})
    )
    names = (
      'name',
      'moments',
      'b1',
      'b2',
      'eps',
      'weight_decay',
      'clip_norm',
      'decay',
      'multipliers',
      'freeze',
      'layer_decay',
    )
    settings = optimizer_lib.OptimizerConfig(
      schedule=self.schedule,
      has_plateau=c.optim.plateau_factor < 1,
      **{n: c.optim[n] for n in names},
    )
    self._derived = run.parameter_names(lambda p: p.origin == 'derived')
    # The frozen base under an adapter: read from where it came, and never saved.
    is_adapted = run.arch.adapter is not None
    self._base = run.parameter_names(lambda p: is_adapted and p.origin == 'base')
    fixed = run.parameter_names(lambda p: p.is_fixed)
    frozen = optimizer_lib.frozen_names(settings.freeze, info)
    self.frozen = frozen | self._derived | self._base | fixed
    trained = {n: leaf for n, leaf in info.items() if n not in self.frozen}
    if is_adapted:
      self._check_tables(fixed)
    self.optimizer = optimizer_lib.make_optimizer(settings, info, trained)
    self.unfreezing = None
    if c.optim.unfreeze_every:
      self.unfreezing = optimizer_lib.unfreezing(
        c.optim.unfreeze_every, settings.freeze, info, trained
      )
      self._check_unfreezing()
    abstract = jax.eval_shape(self._create, run.abstract_params())
    others = {m.name: run.abstract_leaves(m.leaves()) for m in self._constant}
    abstract = dataclasses.replace(abstract, frozen=abstract.frozen | others)
    shardings = state_shardings(abstract, run.parameter_shardings(), run.mesh)
    self.abstract = with_shardings(abstract, shardings)
    own = self._without_base(self._without_constant(shardings))
    self._init = jax.jit(self._create, out_shardings=own)
    self._step = make_step(
      balance.with_balance(run, loss_fn),
      self.optimizer,
      shardings,
      mask=optimizer_lib.layer_mask(settings, info, trained),
      schedule=self.schedule,
      clip_norm=c.optim.clip_norm,
      ema_decay=c.optim.ema_decay,
      is_stochastic=c.optim.rounding == 'stochastic',
      seed=c.seed,
      extras=Extras(c.optim.sam_radius, self.unfreezing),
    )

  @property
  def compiler_options(self) -> dict[str, compiler_options.Value]:
    """The compiler options of the step on this run's devices."""
    c, kind = self.run.config, self.run.mesh.devices.flat[0].device_kind
    return compiler_options.resolve(kind, c.compiler_options)

  def compile(self) -> jax.stages.Compiled:
    """Compiles the step ahead of time, from shapes: the same executable for a fresh start, a resume
    and a plan.
    """
    batch, options = self.run.abstract_batch(), self.compiler_options
    if options:
      log.info('compiler options: %s', compiler_options.format_flags(options))
    begin, counts = time.perf_counter(), _CacheCounts()
    compiled = compile_step(self._step, self.abstract, batch, options)
    seconds, cache = time.perf_counter() - begin, counts.close()
    log.info(console.compiled(seconds, cache, *_memory(compiled)))
    return compiled

  def _check_tables(self, fixed: set[str]) -> None:
    """Refuses tables of the optimizer that leave an adapter untrained, or that are about its frozen
    base alone; fixed: names of adapter leaves that keep their initial values.
    """
    held, c = self._base | self._derived | fixed, self.run.config
    if self.leaves.keys() <= self.frozen:
      raise ConfigError('optim.freeze freezes the whole adapter; nothing is left to train')
    names = [x for n, leaf in self.leaves.items() if n not in held for x in leaf.names]
    trees.match_table(c.optim.multipliers, names, 'optim.multipliers (the base is frozen)')

  def _check_unfreezing(self) -> None:
    """Refuses a schedule that would leave layers untrained at the last step."""
    found, steps = self.unfreezing, self.run.steps
    # Without data, for a plan, the number of steps may be unknown.
    is_known = self.run.data is not None or self.run.config.steps
    if is_known and found.last_start >= steps:
      raise ConfigError(
        f'optim.unfreeze_every={found.every}: the last of {found.count} groups of layers would '
        f'begin to train after {found.last_start} updates, and the run has {steps}; expected at '
        f'most {(steps - 1) // max(1, found.count - 1)}, or optim.freeze for layers that are not '
        'trained'
      )

  # Where a state comes from.

  def _create(self, params: dict) -> State:
    """Returns a fresh state of parameters of the trained models."""
    frozen, trained = trees.select(params, lambda n: n in self.frozen)
    return create(trained, frozen, self.optimizer, bool(self.run.config.optim.ema_decay))

  def fresh(self) -> State:
    """Returns a state of no steps."""
    run = self.run
    first = run.load_first()
    trained = {m.name: run.load_auxiliary(m, first) for m in run.auxiliary.in_state if m.is_trained}
    # Copies: a state is donated whole, and no buffer twice.
    constant = jax.tree.map(jnp.copy, self._load_constant(first))
    # The base as it was read: as a result of the program it would be in memory twice.
    base, others = trees.select(first | trained, lambda n: n in self._base)
    state = self._init(others)
    state = dataclasses.replace(state, frozen=trees.merge(state.frozen, base))
    return self._with_constant(state, constant)

  def restore(self, checkpoints: Checkpoints, step: int) -> State:
    """Returns the state saved at a step, with the base under an adapter, its derived leaves and
    constant auxiliary models.
    """
    state = checkpoints.restore(step, self.saved(self.abstract))
    if not self._base and not self._constant:
      return self._with_derived(state)
    first = self.run.load_first()
    state = self._with_base(state, first)
    return self._with_constant(self._with_derived(state), self._load_constant(first))

  def restore_model(self, checkpoints: Checkpoints, step: int) -> State:
    """Returns the state saved at a step, for `model`: without constant auxiliary models."""
    state = checkpoints.restore(step, self.saved(self.abstract))
    return self._with_base(state, self.run.load_first()) if self._base else state

  def _with_base(self, state: State, first: dict) -> State:
    return dataclasses.replace(state, frozen=trees.merge(state.frozen, self._load_base(first)))

  def _load_base(self, first: dict) -> dict:
    """Returns the leaves of frozen bases under adapters; first: the weights that training starts
    from.
    """
    if not self._base:
      return {}
    run = self.run
    # A trained auxiliary model from a folder of its own does not share the base.
    own = [m for m in run.auxiliary.in_state if m.is_trained and not m.shares_base]
    return trees.select(
      first | {m.name: run.load_auxiliary(m, first) for m in own}, lambda n: n in self._base
    )[0]

  def _load_constant(self, first: dict) -> dict[str, dict]:
    """Returns the own weights of the constant auxiliary models."""
    return {m.name: self.run.load_auxiliary(m, first) for m in self._constant}

  def _with_constant(self, state: State, models: dict[str, dict]) -> State:
    """Returns `state` with its constant auxiliary models."""
    return dataclasses.replace(state, frozen=state.frozen | models)

  # What of a state is used.

  def saved(self, state: State) -> State:
    """Returns what is saved of a state, of its shapes or of its shardings: all but the base under
    an adapter, derived leaves and the constant auxiliary models.
    """
    state = self._without_base(self._without_constant(state))
    if not self._derived:
      return state
    _, kept = trees.select(state.frozen, lambda n: n in self._derived)
    return dataclasses.replace(state, frozen=kept)

  def _without_base(self, state: State) -> State:
    if not self._base:
      return state
    _, kept = trees.select(state.frozen, lambda n: n in self._base)
    return dataclasses.replace(state, frozen=kept)

  def _without_constant(self, state: State) -> State:
    names = {m.name for m in self._constant}
    kept = {k: v for k, v in state.frozen.items() if k not in names}
    return dataclasses.replace(state, frozen=kept)

  def _with_derived(self, state: State) -> State:
    """Returns a state with its derived leaves computed; one from a checkpoint has none."""
    if not self._derived:
      return state
    _, frozen = trees.select(state.frozen, lambda n: n in self._derived)
    flat, found, run = trees.flatten(trees.merge(state.params, frozen)), {}, self.run
    dtype = jnp.dtype(run.config.model.param_dtype)
    for prefix, arch in run.trained_archs().items():
      names = kinds.names(arch, 'base', 'adapter')
      own = {n: flat.get(f'{prefix}{n}', flat.get(n)) for n in names}
      places = trees.flatten(sharding.shardings(run.mesh, kinds.axes(arch)))
      model = trees.unflatten(own)
      whole = trees.flatten(
        kinds.completed(arch, model, places.__getitem__, run.config.seed, dtype)
      )
      found |= {f'{prefix}{n}': whole[n] for n in kinds.names(arch, 'derived')}
    return dataclasses.replace(state, frozen=trees.merge(frozen, trees.unflatten(found)))

  def model(self, state: State) -> dict:
    """Returns the model that is evaluated and exported, of the moving average if there is one."""
    return self.run.auxiliary.without(self._with_derived(state).averaged())


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
