"""Trains a run to its end: state, resume, loop, export, comparison. Shared by every algorithm.

The state comes from, in this order: this workdir's newest checkpoint; the weights of `init_from`;
the model's weights."""

import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ftjax.cluster import processes
from ftjax.cluster.step_sync import StepSync
from ftjax.config import section, user_code
from ftjax.experiment import compare, data_check, resume, summary
from ftjax.experiment.auxiliary import BESIDE
from ftjax.experiment.batch_source import Rows, Source, Tell
from ftjax.experiment.run import Run, keeps_programs, program_folder
from ftjax.experiment.trainer import Trainer
from ftjax.hf import export as hf_export
from ftjax.models import counts
from ftjax.runtime import redaction
from ftjax.runtime.errors import ConfigError, DataError, attempt
from ftjax.storage import files, program_cache
from ftjax.storage.checkpoint import Checkpoints, Retention
from ftjax.telemetry import manifest
from ftjax.telemetry.console import Console
from ftjax.telemetry.metrics_writer import MetricsWriter
from ftjax.telemetry.throughput import Throughput, find_peak
from ftjax.training.loop import Cadence, Loop, Progress
from ftjax.training.state import State
from ftjax.training.step import LossFn, program_text

log = logging.getLogger(__name__)

EvalLoss = Callable[[dict, Callable[[], bool]], dict[str, float] | None]


@dataclasses.dataclass(frozen=True)
class _Session:
  """What a run is trained with."""

  trainer: Trainer
  source: Source
  eval_loss: EvalLoss
  watch: Tell
  checkpoints: Checkpoints
  judge: compare.Evaluator
  console: Console

  @functools.cached_property
  def fingerprints(self) -> dict[str, str]:
    """What a resume must find as it was. A fresh run asks for it when its weights are loaded: they
    are hashed as they are read.
    """
    return resume.fingerprints(self.trainer.run)


def fit(
  run: Run,
  loss_fn: LossFn,
  eval_loss: EvalLoss,
  watch: Tell = lambda *_: None,
  source: Source | None = None,
) -> None:
  """Trains, exports and compares; goes on from the newest checkpoint of the workdir.

  Args:
    run: from experiment.start.
    loss_fn: of the algorithm.
    eval_loss: (parameters with what stands beside the model, is_cancelled) -> metrics of the
      evaluation rows; None when cancelled.
    watch: is shown (steps done, metrics) of every step.
    source: of batches; None: the rows of run.data.
  """
  with run.watchdog.phase('restore'):  # of all that has no phase of its own
    locks = []  # one, held by process 0
    processes.from_main(lambda: locks.append(files.Lock(run.workdir)))
    try:
      session = _opened(run, loss_fn, eval_loss, watch, source)
      try:
        _fit(session)
      except Exception:
        _let_save_end(session)
        raise
    finally:
      for lock in locks:
        attempt('releasing the workdir', lock.release)


def _opened(
  run: Run, loss_fn: LossFn, eval_loss: EvalLoss, watch: Tell, source: Source | None
) -> _Session:
  c = run.config
  data_check.check(run)
  retention = Retention(c.checkpoint.keep, c.checkpoint.best_metric, c.checkpoint.best_mode)
  folder = files.join(run.workdir, 'checkpoints')
  return _Session(
    trainer=Trainer(run, loss_fn),
    source=source or Rows(run),
    eval_loss=eval_loss,
    watch=watch,
    checkpoints=Checkpoints(folder, retention, c.watchdog.save),
    judge=compare.Evaluator(run),
    console=summary.make_console(c),
  )


def _let_save_end(s: _Session) -> None:
  """Of a run that ends with an error: the interpreter's end would tear a save that is under way.
  With others it is waited for where all have agreed to end.
  """
  if processes.is_alone() or processes.have_agreed():
    with s.trainer.run.watchdog.phase('save'):
      attempt('the last save', s.checkpoints.wait)


def _newest(s: _Session) -> tuple[int | None, dict[str, Any] | None]:
  """(steps done, what was saved with them) of the checkpoint to go on from; None without one."""
  run, c = s.trainer.run, s.trainer.run.config
  start = processes.from_main(s.checkpoints.latest)
  if start is None:
    if c.init_from:
      resume.check_source(c.init_from)
    return None, None
  saved = s.checkpoints.meta(start)
  resume.check(saved, run, s.fingerprints)
  if saved['cursor'] != run.cursor(start) and saved['config'].get('batch_size') == c.batch_size:
    raise DataError(
      f'{run.workdir}: checkpoint {start} has cursor {saved["cursor"]}, expected '
      f'{run.cursor(start)}: not the rows that its steps consume'
    )
  if start > run.steps:
    raise ConfigError(
      f'{run.workdir} holds a checkpoint of step {start}, but steps={run.steps}: give more steps, '
      'or another --workdir'
    )
  return start, saved


def _resumed(s: _Session, start: int, saved: dict[str, Any]) -> State:
  state = s.trainer.restore(s.checkpoints, start)
  s.judge.forget_answers_after(start)
  return state


def _begun(s: _Session) -> State:
  run, trainer, judge = s.trainer.run, s.trainer, s.judge
  if run.config.init_from:
    judge.base()
  state = trainer.fresh()
  if not run.config.init_from:
    judge.base(trainer.model(state))
  judge.answer(trainer.model(state), 0)
  return state


def _fit(s: _Session) -> None:
  run, trainer, checkpoints = s.trainer.run, s.trainer, s.checkpoints
  c, begun = run.config, time.perf_counter()
  start, saved = _newest(s)
  plain = redaction.redact(section.plain(c))
  if processes.is_main():
    files.write_text(files.join(run.workdir, 'config.json'), json.dumps(plain, indent=1) + '\n')
  eval_pending = bool(saved) and saved['progress']['eval_pending']
  goes_on = not (saved and resume.has_ended(saved, c.checkpoint.patience)) and (
    (start or 0) < run.steps or eval_pending
  )
  if saved:
    s.console.restore(Progress(**saved['progress']).console)
  if saved and not goes_on:
    why = 'all steps are done' if start == run.steps else 'it was stopped early by its patience'
    log.info('nothing is left to train after step %d of %d: %s', start, run.steps, why)
  if goes_on:
    log.info(summary.start(trainer, start or 0))
    if saved:
      log.info(summary.resumed(run, start, saved['cursor'], s.fingerprints['data order']))
    s.source.prepare(trainer)
  state = _begun(s) if saved is None else _resumed(s, start, saved)
  if goes_on:
    state = _train(s, state, start or 0, saved)
  best, latest = processes.from_main(lambda: [checkpoints.best(), checkpoints.latest()])
  exported = latest if best is None else best
  if exported != latest:
    log.info('exporting the best checkpoint, of step %d', best)
    state = None  # two states may not fit
    state = checkpoints.restore(best, trainer.saved(trainer.abstract))
  checkpoints.close()
  params = trainer.model(state)
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
  s.judge.tuned(params)
  if keeps_programs(c):
    processes.from_main(lambda: program_cache.record(program_folder(run.workdir)))
  seconds = time.perf_counter() - begun
  log.info(summary.end(run, s.console, exported, latest, seconds))


def _writer(run: Run, start: int, saved: dict[str, Any] | None) -> MetricsWriter:
  return MetricsWriter(
    run.workdir,
    restored_step=start if saved else None,
    drop_eval=bool(saved) and saved['progress']['eval_pending'],
    config=section.plain(run.config),
    sinks=run.config.log.sinks,
    is_main=processes.is_main(),
  )


def _train(s: _Session, state: State, start: int, saved: dict[str, Any] | None) -> State:
  """The loop with its writers, from `start` steps done."""
  trainer, run, c = s.trainer, s.trainer.run, s.trainer.run.config
  with run.watchdog.phase('compile'):
    compiled = trainer.compile()
  writer = _writer(run, start, saved)
  printed = program_text(compiled)
  executable = hashlib.sha256(printed.encode()).hexdigest() if printed else ''
  made_of = manifest.build(
    section.plain(c), s.fingerprints, executable, trainer.compiler_options, run.data.counts()
  )
  if processes.is_main():
    files.write_text(files.join(run.workdir, 'manifest.json'), json.dumps(made_of, indent=1) + '\n')
  # With frozen leaves the formula would count products that are not computed, with other models
  # beside this one leave out some that are.
  alone = set(trainer.abstract.frozen).isdisjoint(BESIDE) and len(run.parts()) == 1
  arch, peak = run.arch, find_peak() if alone and not trainer.frozen else None
  if peak:
    log.info('MFU = (6 P tokens + 12 L N H attended keys) / seconds / peak; peak: %s', peak.source)

  def evaluate(state, step, is_cancelled):
    values = s.eval_loss(trainer.averaged(state), is_cancelled)
    if values is not None:
      s.judge.answer(trainer.model(state), step)
    return values

  def write_rollout(step, values):
    writer.write(step, 'rollout', values)
    s.console.rollout(values)

  def meta(step):
    return {
      'step': step,
      'cursor': run.cursor(step),
      'config': redaction.redact(section.plain(c)),
      'fingerprints': s.fingerprints,
      'code': user_code.fingerprints(c),
      'source': s.source.saving(step),
    }

  throughput = Throughput(
    matmul_params=counts.matmul_params(arch),
    attention_width=counts.attention_width(arch),
    peak=peak,
  )
  traces = files.Staged(files.join(run.workdir, 'profile'))
  loop = Loop(
    compiled,
    _cadence(run),
    evaluate=evaluate,
    meta=meta,
    saved=trainer.saved,
    watch=s.watch,
    writer=writer,
    checkpoints=s.checkpoints,
    throughput=throughput,
    console=s.console,
    signals=StepSync(run.mesh),
    watchdog=run.watchdog,
    profile_dir=traces.folder,
  )
  progress = Progress(**saved['progress']) if saved else Progress()
  s.console.restore(progress.console)
  kept = saved.get('source', {}) if saved else {}
  try:
    s.source.begin(trainer, write_rollout, start, kept)
    state = loop.run(state, start, s.source.take, progress)
  except BaseException:
    attempt('closing the metrics', writer.close)
    raise
  else:
    writer.close()
    return state
  finally:
    s.source.end()
    attempt('keeping the profile', traces.push)
    traces.close()


def _cadence(run: Run) -> Cadence:
  c = run.config
  return Cadence(
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
