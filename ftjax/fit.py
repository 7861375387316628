"""Trains a run to its end: state, resume, loop, export, comparison. Shared by every algorithm that
trains on a stream of rows.

The state comes from, in this order: this workdir's newest checkpoint; the weights of `init_from`;
the model's weights. A reference (the policy as it was at the start) is a frozen part of the state
under `reference/`; it is not saved, but read again from where it came."""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import monitoring

from ftjax import compare
from ftjax import config as config_lib
from ftjax.experiment import Run
from ftjax.hf import export as hf_export
from ftjax.hf import load
from ftjax.models import transformer
from ftjax.runtime import compiler_options, files, manifest, peers, redaction, trees
from ftjax.runtime.checkpoint import Checkpoints, Retention
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.runtime.metrics import MetricsWriter
from ftjax.runtime.throughput import Throughput, find_peak
from ftjax.training import optimizer as optimizer_lib
from ftjax.training.feed import Feed
from ftjax.training.loop import Cadence, Loop, Progress
from ftjax.training.schedule import make_schedule
from ftjax.training.signals import Signals
from ftjax.training.state import State, create, state_shardings, with_shardings
from ftjax.training.step import LossFn, compile_step, make_step, program_text

log = logging.getLogger(__name__)

# What may not change between a checkpoint and its resume: the order of the data, and the shape of
# the state.
_FIXED = (
  'algorithm',
  'seed',
  'batch_size',
  'seq_len',
  'data.packing',
  'data.loss_on',
  'data.on_overlength',
)
_FIXED += ('data.eval_fraction', 'model.param_dtype', 'optim.name', 'optim.freeze')


EvalLoss = Callable[[dict, Callable[[], bool]], dict[str, float] | None]
Watch = Callable[[int, dict[str, float]], None]


class Trainer:
  """The compiled step of a run with everything around it."""

  def __init__(self, run: Run, loss_fn: LossFn):
    c = run.config
    self.run = run
    info = optimizer_lib.leaves(transformer.declared(run.arch), run.arch.layer_slots())
    self.schedule = make_schedule(
      c.optim.schedule,
      c.optim.lr,
      run.steps,
      warmup_steps=c.optim.warmup_steps,
      end_fraction=c.optim.end_fraction,
      decay_steps=c.optim.decay_steps,
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
    recipe = optimizer_lib.Recipe(schedule=self.schedule, **{n: c.optim[n] for n in names})
    self.frozen = optimizer_lib.frozen_names(recipe.freeze, info)
    trained = {n: leaf for n, leaf in info.items() if n not in self.frozen}
    self.optimizer = optimizer_lib.make_optimizer(recipe, info, trained)
    dtype = jnp.dtype(c.model.param_dtype)
    abstract = jax.eval_shape(self._create, transformer.abstract(run.arch, dtype))
    shardings = state_shardings(abstract, run.parameter_shardings(), run.mesh)
    self.abstract = with_shardings(abstract, shardings)
    self._init = jax.jit(self._create, out_shardings=shardings)
    self._step = make_step(
      loss_fn,
      self.optimizer,
      shardings,
      mask=optimizer_lib.layer_mask(recipe, info, trained),
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
    if self.run.has_reference:
      # A copy: a state is donated whole, and no buffer twice.
      frozen = frozen | {'reference': jax.tree.map(jnp.copy, params)}
    return create(trained, frozen, self.optimizer, bool(self.run.config.optim.ema_decay))

  def fresh(self) -> State:
    """A state around the weights of init_from or of the model."""
    return self._init(self._first_params())

  def _first_params(self) -> dict:
    c, source = self.run.config, self.run.model.source
    if c.init_from:
      source = load.exported(c.init_from)
    return self.run.load_params(source, c.model.param_dtype)

  def saved(self, state: State) -> State:
    """What of a state (or of its shapes) is saved: all but the reference."""
    kept = {k: v for k, v in state.frozen.items() if k != 'reference'}
    return dataclasses.replace(state, frozen=kept)

  def restore(self, checkpoints: Checkpoints, step: int) -> State:
    """The state saved at a step, with its reference."""
    state = checkpoints.restore(step, self.saved(self.abstract))
    if not self.run.has_reference:
      return state
    return dataclasses.replace(state, frozen=state.frozen | {'reference': self._first_params()})

  def compile(self) -> jax.stages.Compiled:
    """Ahead of time, from shapes: the same executable for a fresh start and a resume."""
    batch = self.run.abstract_batch()
    options = self.compiler_options
    log.info('compiler options: %s', compiler_options.told(options) or 'none')
    begin, counts = time.perf_counter(), _CacheCounts()
    compiled = compile_step(self._step, self.abstract, batch, options)
    log.info(
      'step compiled in %.1f s; compile cache: %s', time.perf_counter() - begin, counts.close()
    )
    return compiled

  def parameters(self, state: State) -> dict:
    """What is evaluated and exported: the moving average where there is one."""
    return trees.merge(state.ema or state.params, self.saved(state).frozen)

  def with_reference(self, state: State) -> dict:
    """The same with the reference, where there is one."""
    return trees.merge(state.ema or state.params, state.frozen)


def _check_source(workdir: str) -> None:
  if load.exported(workdir) is None:
    raise ConfigError(
      f'init_from={workdir}: there is no export/ in it; it is written when a run ends'
    )


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


def _check_resume(saved: dict, run: Run, fingerprints: dict[str, str]) -> None:
  """Refuses to go on with other data or another state shape than the checkpoint's; tells of the
  other changes.
  """
  now = redaction.redact(config_lib.plain(run.config))
  changed = [k for k in now if saved['config'].get(k) != now[k]]
  fixed = [f'{k}: {saved["config"].get(k)!r} -> {now[k]!r}' for k in changed if k in _FIXED]
  fixed += [
    f'{k}: other content' for k, v in saved['fingerprints'].items() if fingerprints.get(k) != v
  ]
  if saved['config'].get('checkpoint.best_metric'):  # its values stand in the checkpoints
    watched = ('checkpoint.best_metric', 'checkpoint.best_mode')
    fixed += [f'{k}: {saved["config"].get(k)!r} -> {now[k]!r}' for k in changed if k in watched]
  if bool(saved['config'].get('optim.ema_decay')) != bool(now['optim.ema_decay']):
    fixed.append('optim.ema_decay switched on or off')
  if fixed:
    raise ConfigError(
      f'{run.workdir} holds a checkpoint of another run; since it was saved, these changed: '
      f'{"; ".join(fixed)}. Undo that, or give another --workdir '
      '(with --config.init_from=OLD_WORKDIR to start from its weights)'
    )
  if changed:
    log.warning('changed since the checkpoint: %s', ', '.join(f'{k}={now[k]!r}' for k in changed))


def _has_ended(saved: dict, patience: int) -> bool:
  """Whether early stopping ended the run for good: with more patience, or none, it goes on."""
  return saved['ended'] and 0 < patience <= saved['progress']['evals_since']


def _reference_source(run: Run) -> dict[str, str]:
  """Fingerprint of the weights that a resume takes the reference from, where it is not the model's.

  Raises:
    ConfigError: they are not there.
  """
  if not (run.has_reference and run.config.init_from):
    return {}
  _check_source(run.config.init_from)
  export = files.join(run.config.init_from, 'export')
  return {'reference': peers.from_main(lambda: load.fingerprint(export))}


def fit(run: Run, loss_fn: LossFn, eval_loss: EvalLoss, watch: Watch = lambda *_: None) -> None:
  """Trains, exports and compares; goes on from the newest checkpoint of the workdir.

  Args:
    run: from experiment.start.
    loss_fn: of the algorithm.
    eval_loss: (parameters with the reference, is_cancelled) -> metrics of the evaluation rows; None
      when cancelled.
    watch: is shown (steps done, metrics) of every step.
  """
  locks = []  # one, held by process 0
  peers.from_main(lambda: locks.append(files.Lock(run.workdir)))
  try:
    _fit(run, loss_fn, eval_loss, watch)
  finally:
    for lock in locks:
      lock.release()


def _fit(run: Run, loss_fn: LossFn, eval_loss: EvalLoss, watch: Watch) -> None:
  c = run.config
  fingerprints = {
    'model': run.model.fingerprint,
    'tokenizer': run.model.tokenizer.fingerprint,
  } | run.data.fingerprints()
  fingerprints |= _reference_source(run)
  trainer = Trainer(run, loss_fn)
  retention = Retention(c.checkpoint.keep, c.checkpoint.best_metric, c.checkpoint.best_mode)
  checkpoints = Checkpoints(files.join(run.workdir, 'checkpoints'), retention)
  judge = compare.Judge(run)
  start, saved = peers.from_main(checkpoints.latest), None
  if start is not None:
    saved = checkpoints.meta(start)
    if (
      saved['cursor'] != start * c.batch_size and saved['config'].get('batch_size') == c.batch_size
    ):
      raise DataError(
        f'{run.workdir}: checkpoint {start} has cursor {saved["cursor"]}, not step x batch_size'
      )
    _check_resume(saved, run, fingerprints)
    if start > run.steps:
      raise ConfigError(
        f'{run.workdir} holds a checkpoint of step {start}, but steps={run.steps}: give more '
        'steps, or another --workdir'
      )
  elif c.init_from:
    _check_source(c.init_from)
  plain = redaction.redact(config_lib.plain(c))
  if peers.is_main():
    files.write_text(files.join(run.workdir, 'config.json'), json.dumps(plain, indent=1) + '\n')

  if saved is None:
    if c.init_from:
      judge.base()
    state, start = trainer.fresh(), 0
    if not c.init_from:
      judge.base(trainer.parameters(state))
    judge.answer(trainer.parameters(state), 0)
  else:
    with run.watchdog.phase('restore'):
      state = trainer.restore(checkpoints, start)
    judge.forget_answers_after(start)
    first = run.data.stream.examples(start)[:1]
    log.info(
      'resuming after step %d of %d: epoch %.2f, %d rows consumed, next example %s, data order %s',
      start,
      run.steps,
      start * c.batch_size / run.data.mixture.rows_per_epoch,
      saved['cursor'],
      first,
      fingerprints['data order'][:12],
    )

  owed = bool(saved) and saved['progress']['owed']
  if not (saved and _has_ended(saved, c.checkpoint.patience)) and (start < run.steps or owed):
    state = _train(
      *(trainer, state, start, saved, fingerprints, checkpoints, judge, eval_loss, watch)
    )
  best, latest = peers.from_main(lambda: [checkpoints.best(), checkpoints.latest()])
  if best is not None and best != latest:
    log.info('exporting the best checkpoint, of step %d', best)
    state = None  # two states may not fit
    with run.watchdog.phase('restore'):
      state = trainer.restore(checkpoints, best)
  checkpoints.close()
  params = trainer.parameters(state)
  del state
  with run.watchdog.phase('export'):
    hf_export.export(
      params,
      run.arch,
      files.join(run.workdir, 'export'),
      source_config=run.model.config,
      tokenizer_files=run.model.files,
      dtype=np.dtype(jnp.dtype(c.model.param_dtype)),
      stop_ids=run.model.stop_ids,
    )
  judge.tuned(params)


def _train(
  trainer, state, start, saved, fingerprints, checkpoints, judge, eval_loss, watch
) -> State:
  """The loop with its writers, from `start` steps done."""
  run, c = trainer.run, trainer.run.config
  with run.watchdog.phase('compile'):
    compiled = trainer.compile()
  writer = MetricsWriter(
    run.workdir,
    restored_step=start if saved else None,
    drop_eval=bool(saved) and saved['progress']['owed'],
    config=config_lib.plain(c),
    sinks=c.log.sinks,
    is_main=peers.is_main(),
  )
  printed = program_text(compiled)
  executable = hashlib.sha256(printed.encode()).hexdigest() if printed else ''
  made_of = manifest.build(config_lib.plain(c), fingerprints, executable, trainer.compiler_options)
  if peers.is_main():
    files.write_text(files.join(run.workdir, 'manifest.json'), json.dumps(made_of, indent=1) + '\n')
  # With frozen leaves the formula would count products that are not computed, with a reference
  # leave out some that are.
  arch, peak = run.arch, None if trainer.frozen or run.has_reference else find_peak()
  log.info(
    'MFU = (6 P tokens + 12 L N H attended keys) / seconds / peak; peak: %s',
    peak.source if peak else 'unknown',
  )

  def evaluate(state, step, is_cancelled):
    values = eval_loss(trainer.with_reference(state), is_cancelled)
    if values is not None:
      judge.answer(trainer.parameters(state), step)
    return values

  def meta(step):
    return {
      'step': step,
      'cursor': step * c.batch_size,
      'config': redaction.redact(config_lib.plain(c)),
      'fingerprints': fingerprints,
    }

  cadence = Cadence(
    steps=run.steps,
    log_every=c.log.every,
    eval_every=c.eval.every,
    save_every=c.checkpoint.every,
    patience=c.checkpoint.patience,
    metric=c.checkpoint.best_metric,
    mode=c.checkpoint.best_mode,
    max_bad_steps=c.max_bad_steps,
    profile_start=c.profile.start,
    profile_stop=c.profile.stop,
  )
  throughput = Throughput(
    matmul_params=arch.matmul_params(),
    num_layers=arch.num_layers,
    attention_dim=arch.num_heads * arch.head_dim,
    peak=peak,
  )
  traces = files.Staged(files.join(run.workdir, 'profile'))
  loop = Loop(
    compiled,
    cadence,
    evaluate=evaluate,
    meta=meta,
    saved=trainer.saved,
    watch=watch,
    writer=writer,
    checkpoints=checkpoints,
    throughput=throughput,
    signals=Signals(run.mesh),
    watchdog=run.watchdog,
    profile_dir=traces.folder,
  )
  feed = Feed(run.batch, run.batch_shardings(micro=True), start, run.steps)
  try:
    progress = Progress(**saved['progress']) if saved else Progress()
    return loop.run(state, start, lambda _, step: feed.take(step), progress)
  finally:
    feed.close()
    writer.close()
    traces.push()
    traces.close()
