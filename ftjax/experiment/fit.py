"""A run from its config to the comparison of base and tuned model: `fit` is the whole sequence.

The weights come from, in this order: this workdir's newest checkpoint; the export of `init_from`;
`model.path`; the seed."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import ml_collections
import numpy as np

from ftjax.cluster import processes
from ftjax.cluster.step_sync import StepSync
from ftjax.config import section, user_code
from ftjax.evaluation import gate
from ftjax.experiment import (
  adapter_export,
  cadence,
  compare,
  data_check,
  resume,
  run_card,
  run_manifest,
  start_audit,
  summary,
)
from ftjax.experiment import run as experiment
from ftjax.experiment.batch_source import Rows, Source
from ftjax.experiment.in_loop import InLoop
from ftjax.experiment.replay import Replay, same_end
from ftjax.experiment.run import Run
from ftjax.experiment.trainer import Trainer
from ftjax.hf import export as hf_export
from ftjax.hf import run_export
from ftjax.models import counts
from ftjax.reporting import page
from ftjax.runtime.errors import attempt
from ftjax.storage import files, program_cache
from ftjax.storage.checkpoint import Checkpoints, Retention
from ftjax.telemetry.console import Console
from ftjax.telemetry.metrics_writer import MetricsWriter
from ftjax.telemetry.throughput import Throughput, find_peak
from ftjax.training.loop import Hooks, Loop, Outputs
from ftjax.training.state import State
from ftjax.training.step import LossFn

log = logging.getLogger(__name__)


def ignore(step: int, metrics: dict[str, float]) -> None:
  """Does nothing with the metrics of a step."""


@dataclasses.dataclass(frozen=True)
class Parts:
  """What an algorithm's `build(run)` gives to a run.

  Attributes:
    loss: of a micro-batch.
    evaluate: (all parameters, is_cancelled) -> metrics of the evaluation rows; None when cancelled.
    source: of batches; None: the rows of run.data.
    watch: called with (steps done, metrics) of every step.
  """

  loss: LossFn
  evaluate: Callable[[dict, Callable[[], bool]], dict[str, float] | None]
  source: Source | None = None
  watch: Callable[[int, dict[str, float]], None] = ignore


def fit(
  c: ml_collections.ConfigDict,
  workdir: str,
  build: Callable[[Run], Parts],
  *,
  is_deterministic: bool = False,
  replay: Replay | None = None,
) -> None:
  """Trains a config to its end, exports the model and compares it with the base. Resumes from the
  newest checkpoint of the workdir.

  Args:
    c: a validated config.
    workdir: local folder or gs://, made if missing.
    build: of the algorithm.
    is_deterministic: whether runtime/determinism.py was applied, for the manifest.
    replay: compares the training with that of another run, and nothing is exported.

  Raises:
    ConfigError, DataError, NonFiniteError, CheckError, StoppedEarly: see runtime/errors.py.
  """
  # Config -> mesh -> tokenizer and data.
  run = experiment.start(c, workdir)
  begun = time.perf_counter()
  code = user_code.fingerprints(c)  # now: the files may be edited during the run
  with contextlib.ExitStack() as stack:
    stack.enter_context(run.watchdog.phase('restore'))  # of everything without a phase of its own
    if replay:
      replay.check(run, code)
    # The algorithm's loss, evaluation and source of batches.
    parts = build(run)
    source = parts.source or Rows(run)
    stack.callback(source.close)
    stack.enter_context(_locked(run.workdir))
    if replay:
      replay.claim(run)
    data_check.check(run)
    adapter_export.check(run)
    for model in run.auxiliary:
      model.check(run.model.tokenizer, c.seq_len)
    # Optimizer, the state in shapes, and the step.
    trainer = Trainer(run, parts.loss)
    checkpoints = stack.enter_context(_checkpoints(run))
    evaluator, console = compare.Evaluator(run), summary.make_console(c)
    in_loop = InLoop(run, evaluator.tasks, evaluator.draw)
    # Where to start: after a checkpoint, or before the first step.
    start = resume.find(run, checkpoints)
    run_manifest.write_json(run, 'config.json', run_manifest.plain_config(c))
    writer = _writer(run, replay)
    resume.cut((writer, evaluator.samples, source), start)
    _log_start(trainer, start, console)
    if start.should_train:
      start_audit.check(run, is_fresh=not (start.saved or replay))
      source.prepare()
    # Weights and optimizer state.
    state = _restored(trainer, checkpoints, start) or _fresh(trainer, evaluator)
    if start.should_train:  # the loop
      session = _Session(
        *(trainer, parts, source, checkpoints, evaluator, in_loop, console, writer, code),
        *(is_deterministic, replay),
      )
      with same_end(replay):
        state = _train(session, state, start)
    source.close()
    if _ends_here(run, checkpoints, replay):
      return
    # Export, and comparison with the base.
    best, latest = processes.from_main(lambda: [checkpoints.best(), checkpoints.latest()])
    exported = latest if best is None else best
    if exported != latest:
      log.info('exporting the best checkpoint, of step %d', best)
      state = None  # two states may not fit
      state = trainer.restore_model(checkpoints, best)
    checkpoints.close()
    params = trainer.model(state)
    del state
    _export_and_compare(run, evaluator, params, exported)
    _record_programs(run)
    log.info(summary.end(run, console, exported, latest, time.perf_counter() - begun))
    _merge(run, params, exported)


def _ends_here(run: Run, checkpoints: Checkpoints, replay: Replay | None) -> bool:
  """Returns whether nothing is exported: after a replay, or a start that stop_at ended."""
  if replay:
    replay.finish()
    return True
  is_paused = processes.from_main(lambda: resume.is_paused(run, checkpoints))
  if is_paused:
    log.info(summary.paused(run))
  return is_paused


def _record_programs(run: Run) -> None:
  """Records the checksums of the compiled programs that the run keeps."""
  if experiment.keeps_programs(run.config):
    folder = experiment.program_folder(run.workdir)
    processes.from_main(lambda: program_cache.record(folder))


def _merge(run: Run, params: dict, exported: int) -> None:
  """Exports an adapter merged into its base, or removes that of an earlier start, by lora.merge."""
  c = run.config
  if run.arch.adapter is None:
    return
  if not c.lora.merge:
    adapter_export.remove_merged(run)
    return
  with run.watchdog.phase('export'):
    has_results = bool(c.eval.tasks or c.eval.general)
    adapter_export.export_merged(
      run, params, lambda: _card(run, exported, run_export.MERGED, has_results)
    )


def _export_and_compare(
  run: Run, evaluator: compare.Evaluator, params: dict, exported: int
) -> None:
  """Exports the model and compares it with the base; with `gate` in the other order, and the model
  is not exported where a rule refuses it.
  """
  c = run.config
  if not c.gate:  # so that no fault of an evaluation costs the export
    _export(run, params, exported)
  found = evaluator.tuned(params)
  write_report(run)
  if found['gate'] and not found['gate']['passed']:
    _remove_exports(run)
  gate.enforce(found['gate'], 'It is not exported; the checkpoints are kept.')
  if c.gate:
    _export(run, params, exported)
  if c.eval.tasks or c.eval.general:
    run_card.refresh(run.workdir, run.model)


def write_report(run: Run, is_running: bool = False) -> None:
  """Writes report.html of a run, by process 0. A fault of it costs nothing else."""
  if processes.is_main():
    attempt('report.html', lambda: page.write(run.workdir, is_running))


@contextlib.contextmanager
def _locked(workdir: str) -> Iterator[None]:
  """Holds the lock of a workdir, by process 0."""
  locks = []
  processes.from_main(lambda: locks.append(files.Lock(workdir)))
  try:
    yield
  finally:
    for lock in locks:
      attempt('releasing the workdir', lock.release)


@contextlib.contextmanager
def _checkpoints(run: Run) -> Iterator[Checkpoints]:
  """Opens the checkpoints of a run. After an error a save that is under way is finished: the end of
  the interpreter would tear it. With several processes only where all have agreed to end.
  """
  c = run.config.checkpoint
  retention = Retention(c.keep, c.best_metric, c.best_mode)
  folder = files.join(run.workdir, 'checkpoints')
  checkpoints = Checkpoints(folder, retention, run.config.watchdog.save)
  try:
    yield checkpoints
  except Exception:
    if processes.is_alone() or processes.have_agreed():
      with run.watchdog.phase('save'):
        attempt('the last save', checkpoints.wait)
    raise


def _writer(run: Run, replay: Replay | None = None) -> MetricsWriter:
  c = run.config
  return MetricsWriter(
    run.workdir,
    config=section.plain(c),
    sinks=c.log.sinks,
    is_main=processes.is_main(),
    check=replay.compare if replay else None,
  )


def _log_start(trainer: Trainer, start: resume.Start, console: Console) -> None:
  """Logs the summary of what will be trained, or why nothing is left."""
  run = trainer.run
  if start.saved:
    console.restore(start.progress.console)
  if start.should_train:
    log.info(summary.start(trainer, start.step))
    if start.saved:
      order = run.data.fingerprints()['data order']
      log.info(summary.resumed(run, start.step, start.saved['cursor'], order))
    return
  why = 'all steps are done'
  if start.step < run.steps:
    is_paused = not resume.has_ended(start.saved, run.config.checkpoint.patience)
    why = f'stop_at={run.config.stop_at}' if is_paused else 'it was stopped early by its patience'
  log.info('nothing is left to train after step %d of %d: %s', start.step, run.steps, why)


def _restored(trainer: Trainer, checkpoints: Checkpoints, start: resume.Start) -> State | None:
  return trainer.restore(checkpoints, start.step) if start.saved else None


def _fresh(trainer: Trainer, evaluator: compare.Evaluator) -> State:
  """Returns the state before the first step; the base model is scored with its weights."""
  has_base_weights = not trainer.run.config.init_from
  if not has_base_weights:
    evaluator.base()
  state = trainer.fresh()
  if has_base_weights:
    evaluator.base(trainer.model(state))
  evaluator.samples.add(evaluator.local(trainer.model(state)), 0)
  return state


@dataclasses.dataclass(frozen=True)
class _Session:
  """What the training loop is built from."""

  trainer: Trainer
  parts: Parts
  source: Source
  checkpoints: Checkpoints
  evaluator: compare.Evaluator
  in_loop: InLoop
  console: Console
  writer: MetricsWriter
  code: dict[str, str]  # config.user_code.fingerprints
  is_deterministic: bool
  replay: Replay | None


def _train(s: _Session, state: State, start: resume.Start) -> State:
  """Compiles the step and runs the loop from `start`; returns the last state."""
  trainer, run, c = s.trainer, s.trainer.run, s.trainer.run.config
  with run.watchdog.phase('compile'):
    compiled = trainer.compile()
  s.writer.open()
  # After the weights were loaded, which hashes them.
  fingerprints = resume.fingerprints(run)
  manifest = run_manifest.write(
    *(trainer, compiled, start),
    fingerprints=fingerprints,
    user_code=s.code,
    is_deterministic=s.is_deterministic,
  )
  if s.replay:
    s.replay.begin(manifest)

  def evaluate(state, step, is_cancelled):
    values = s.parts.evaluate(state.averaged(), is_cancelled)
    if values is None:
      return None
    model = s.evaluator.local(trainer.model(state))
    tasks = s.in_loop.measure(model, step == run.last_step, is_cancelled)
    if tasks is None:
      return None
    s.evaluator.samples.add(model, step)
    return values | tasks

  def report():
    write_report(run, is_running=True)

  def write_rollout(step, values):
    s.writer.write(step, 'rollout', values)
    s.console.rollout(values)

  def meta(step):
    return {
      'step': step,
      'cursor': run.cursor(step),
      'config': run_manifest.plain_config(c),
      'fingerprints': fingerprints,
      'code': s.code,
      'source': s.source.saving(step),
    }

  traces = files.Staged(files.join(run.workdir, 'profile'))
  loop = Loop(
    compiled,
    cadence.of(run, s.replay.last_step if s.replay else run.last_step),
    Hooks(evaluate, meta, trainer.saved, s.parts.watch, report),
    Outputs(s.writer, s.checkpoints, _throughput(trainer), s.console, traces.folder),
    signals=StepSync(run.mesh),
    watchdog=run.watchdog,
  )
  s.console.restore(start.progress.console)
  s.in_loop.start()
  try:
    s.source.begin(write_rollout, start.step, start.source)
    state = loop.run(state, start.step, s.source.take, start.progress)
  except BaseException:
    attempt('closing the metrics', s.writer.close)
    raise
  else:
    s.writer.close()
    return state
  finally:
    s.source.close()
    attempt('keeping the profile', traces.push)
    traces.close()


def _throughput(trainer: Trainer) -> Throughput:
  """Returns the speedometer of a run; without MFU with optim.freeze, where FLOPs depend on which
  layers are frozen.
  """
  run = trainer.run
  models = [
    (counts.train_flops if times == 3 else counts.forward_flops)(arch)
    for arch, times in run.passes()
    if times
  ]
  flops = sum(models, start=counts.Flops())
  peak = None if any(frozen for _, frozen in run.config.optim.freeze) else find_peak()
  if peak:
    log.info(
      'MFU = (%.4g tokens + %.4g attended keys) FLOPs / seconds / peak; peak: %s',
      *(flops.token, flops.pair, peak.source),
    )
  return Throughput(flops=flops, peak=peak)


def _remove_exports(run: Run) -> None:
  """Removes what an earlier start of this run exported, which `gate` refuses now."""

  def remove():
    for name in ('export', run_export.MERGED):
      if files.exists(folder := files.join(run.workdir, name)):
        log.warning('gate: %s, of an earlier start, is removed', folder)
        files.remove_tree(folder)

  processes.from_main(remove)


def _card(run: Run, step: int, folder: str, has_results: bool) -> bytes:
  is_adapter = run.arch.adapter is not None and folder != run_export.MERGED
  return processes.from_main(
    lambda: run_card.build(
      run.workdir,
      run.model,
      step,
      has_results=has_results,
      is_adapter=is_adapter,
      folder=folder,
    )
  ).encode()


def _export(run: Run, params: dict, step: int) -> None:
  """Writes the model after `step` to export/ of the workdir."""
  with run.watchdog.phase('export'):
    card = _card(run, step, 'export', has_results=False)
    if run.arch.adapter is not None:
      adapter_export.export(run, params, card)
      return
    hf_export.export(
      params,
      run.arch,
      files.join(run.workdir, 'export'),
      source_config=run.model.config,
      tokenizer_files=run.model.files,
      dtype=np.dtype(jnp.dtype(run.config.model.param_dtype)),
      stop_ids=run.model.stop_ids,
      card=card,
    )
