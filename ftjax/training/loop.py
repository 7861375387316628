"""The host's loop around a compiled step: cadence, logs, evaluation, checkpoints, stopping.

The order at a step's end matters: read metrics, evaluate, save, stop. A run that is asked to stop
saves at once and leaves the evaluation pending until the resume; only where the best checkpoint
depends on the evaluation, the run waits for it. Metrics of step t are read after step t + 1 was
dispatched, unless something is due at t. The loop takes functions, and depends on no model or
data."""

import contextlib
import dataclasses
import logging
import math
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ftjax.cluster import preemption, processes
from ftjax.cluster.step_sync import StepSync
from ftjax.cluster.watchdog import Watchdog
from ftjax.runtime.errors import NonFiniteError, RunError, StoppedEarly
from ftjax.storage.checkpoint import Checkpoints
from ftjax.telemetry.console import Console
from ftjax.telemetry.metrics_writer import MetricsWriter
from ftjax.telemetry.throughput import Throughput, memory
from ftjax.training.plateau import Plateau, find_scale, with_scale
from ftjax.training.state import State
from ftjax.training.step import LOSS_ALONE

log = logging.getLogger(__name__)

_LOG_FILE_S = 10.0  # seconds between updates of a bar that goes to a file


@dataclasses.dataclass(frozen=True)
class Cadence:
  """The intervals of a run, in steps; 0 means never.

  patience: evaluations without a better `metric` before training ends; mode 'min' or 'max'.
  plateau: when the learning rate falls for lack of a better `metric`; None: never.
  max_bad_steps: non-finite steps in a row that end the run.
  """

  steps: int
  log_every: int
  eval_every: int
  save_every: int
  patience: int
  metric: str
  mode: str
  max_bad_steps: int
  profile_start: int
  profile_stop: int
  plateau: Plateau | None = None


@dataclasses.dataclass
class Progress:
  """The memory of the loop from step to step; saved with every checkpoint.

  value, step: the best value of the watched metric so far, and its step. evals_since: evaluations
  after it; evals_flat: those since the plateau rule acted. loss_sum, losses: of training since the
  last evaluation, for the gap between the two. eval_pending: the evaluation of the saved step is
  still to be done. began: when the run was first started, seconds since 1970. trained_s: seconds
  spent on the steps up to here. console: the memory of the console.
  """

  value: float | None = None
  step: int = 0
  evals_since: int = 0
  evals_flat: int = 0
  loss_sum: float = 0.0
  losses: int = 0
  eval_pending: bool = False
  began: float = 0.0
  trained_s: float = 0.0
  console: dict[str, Any] = dataclasses.field(default_factory=dict)

  def see(self, value: float, step: int, mode: str) -> bool:
    """Records a value; returns whether it is better than all before."""
    better = self.value is None or (value < self.value if mode == 'min' else value > self.value)
    if better and math.isfinite(value):
      self.value, self.step, self.evals_since, self.evals_flat = value, step, 0, 0
      return True
    self.evals_since += 1
    self.evals_flat += 1
    return False


class StopFlag:
  """Sets `wanted` at SIGTERM, at the first SIGINT and at the cloud's preemption notice, so that the
  run stops after the current step; a context manager.
  """

  def __init__(self):
    self.wanted = False

  def __enter__(self):
    self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
    if host := preemption.server():
      preemption.listen(host, self._notice)
    return self

  def __exit__(self, *_):
    for s, handler in self._old.items():
      signal.signal(s, handler)

  def _notice(self, reason: str):
    log.warning('this machine will be preempted (%s): stopping after this step', reason)
    self.wanted = True

  def _handle(self, number, frame):
    del frame
    log.warning('%s: stopping after this step', signal.Signals(number).name)
    self.wanted = True
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once


@dataclasses.dataclass(frozen=True)
class Hooks:
  """What the loop calls.

  evaluate: (state, steps done, is_cancelled) -> metrics of the 'eval' split; called every
    eval_every steps and at the end. It may ask is_cancelled() now and then, and return None.
  meta: steps done -> JSON saved with a checkpoint.
  saved: state -> what of it is saved.
  watch: called with (steps done, metrics) of every step.
  evaluated: called after the metrics of an evaluation were written.
  """

  evaluate: Callable[[State, int, Callable[[], bool]], dict[str, float] | None]
  meta: Callable[[int], dict[str, Any]]
  saved: Callable[[State], Any]
  watch: Callable[[int, dict[str, float]], None]
  evaluated: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Outputs:
  """Where results go. console: makes the lines that are logged. profile_dir: of traces."""

  writer: MetricsWriter
  checkpoints: Checkpoints
  throughput: Throughput
  console: Console
  profile_dir: str


class Loop:
  """Runs a compiled step to the end, or to a stop.

  Args:
    step: compiled (state, batch) -> (state, metrics).
    cadence: when things happen.
    hooks: what is called then.
    outputs: where results go.
    signals: between processes.
    watchdog: has limits for step, evaluate and save.
  """

  def __init__(
    self,
    step: Callable[[State, dict], tuple[State, dict]],
    cadence: Cadence,
    hooks: Hooks,
    outputs: Outputs,
    *,
    signals: StepSync,
    watchdog: Watchdog,
  ):
    self._step, self._cadence, self._hooks = step, cadence, hooks
    self._writer, self._checkpoints = outputs.writer, outputs.checkpoints
    self._throughput, self._console = outputs.throughput, outputs.console
    self._profile_dir = outputs.profile_dir
    self._signals, self._watchdog = signals, watchdog
    self._last_saved = 0
    self.progress = Progress()
    self._latest: dict[str, float] = {}
    self._host_metrics: dict[str, float] = {}
    self._free = 0.0
    self._bar: tqdm | None = None
    self._stop = StopFlag()

  def run(
    self, state: State, start: int, feed: Callable[[State, int], dict], progress: Progress
  ) -> State:
    """Trains from `start` steps done to cadence.steps.

    Args:
      state: donated.
      start: optimizer steps done so far.
      feed: (state, step) -> device batch, called for every step from `start` on.
      progress: of the restored checkpoint.

    Returns:
      The state after the last step.

    Raises:
      StoppedEarly: asked to stop; the state is saved.
      NonFiniteError: max_bad_steps non-finite steps in a row.
    """
    cadence, pending = self._cadence, None
    self.progress, self._last_saved = progress, start
    self._console.restore(progress.console)
    progress.began = progress.began or time.time()
    trace_from = max(start, cadence.profile_start)
    trace_to = min(cadence.profile_stop, cadence.steps)
    self._throughput.start()
    with (
      self._stop as stop,
      tqdm(
        total=cadence.steps,
        initial=start,
        unit='step',
        mininterval=0.1 if sys.stderr.isatty() else _LOG_FILE_S,
        disable=not processes.is_main(),
      ) as self._bar,
      contextlib.ExitStack() as trace,
      self._watchdog.phase('step'),
    ):
      self._free = time.perf_counter()
      if progress.eval_pending:
        with self._throughput.paused():
          self._look(state, start)
        if progress.eval_pending:
          raise self._stopped(start)
      for done in range(start + 1, cadence.steps + 1):
        if done - 1 == trace_from < trace_to:
          jax.profiler.start_trace(self._profile_dir)
          trace.callback(jax.profiler.stop_trace)  # whatever ends the loop, the trace is written
        with self._throughput.waiting():
          batch = feed(state, done - 1)
        sent = self._signals.send(stop.wanted, time.perf_counter() - self._free)
        state, metrics = self._step(state, batch)
        if pending:
          self._read(*pending)
        seen = self._signals.receive(sent, stop.wanted)
        self._host_metrics = seen.host_metrics()
        pending = (done, metrics)
        if done == trace_to > trace_from:
          jax.block_until_ready(metrics)
          trace.close()
        last, halt = done == cadence.steps, seen.stop
        evaluate = last or _due(done, cadence.eval_every)
        if evaluate or halt or _due(done, cadence.save_every):
          self._read(*pending)
          pending = None
          with self._throughput.paused():
            state, ended = self._rest(state, done, evaluate, last or halt)
          # A signal may have come while the evaluation ran.
          if halt or self.progress.eval_pending or ((last or ended) and self._is_stopping()):
            raise self._stopped(done)
          self._free = time.perf_counter()
          if ended:
            log.info(self._early_stop(done))
            break
    with self._watchdog.phase('save'):
      self._checkpoints.wait()
    return state

  def _stopped(self, done: int) -> StoppedEarly:
    """Returns the error of a stop, once every process has saved: the first one to exit ends the
    others.
    """
    return _agreed(
      StoppedEarly,
      f'stopped after step {done} of {self._cadence.steps}, and the state is saved; run the same '
      'command again to go on from there',
    )

  def _early_stop(self, done: int) -> str:
    c, p = self._cadence, self.progress
    return (
      f'early stop after step {done} of {c.steps}: {c.metric} has not improved for {c.patience} '
      f'evaluations (checkpoint.patience) since step {p.step}; its best checkpoint is exported'
    )

  def _last_checkpoint(self) -> str:
    """Returns a sentence on the checkpoint that is left after an error."""
    if not self._last_saved:
      return 'No checkpoint was saved'
    return f'The last checkpoint is of step {self._last_saved}'

  def _is_stopping(self) -> bool:
    return self._signals.is_wanted(self._stop.wanted)

  def _read(self, done: int, metrics: dict) -> None:
    """Fetches the metrics of a step, counts and writes them."""
    values = {k: np.asarray(v).item() for k, v in jax.device_get(metrics).items()}
    self._free = time.perf_counter()  # what the host does from here on, a next step may wait for
    self._watchdog.beat()
    cadence = self._cadence
    self._latest = {f'train/{k}': v for k, v in values.items()}
    self._throughput.step_done(
      tokens=values['tokens'],
      supervised=int(values['supervised_tokens']),
      attended=values.pop('attended'),
    )
    if not values['ok']:
      log.warning(self._console.not_finite(done, values, cadence.max_bad_steps))
      if values['bad_streak'] >= cadence.max_bad_steps:
        self._writer.write(done, 'train', values)
        raise _agreed(
          NonFiniteError,
          f'step {done}: loss or gradient was not finite {values["bad_streak"]} times in a row '
          f'(loss {values["loss"]}, gradient norm {values["grad_norm"]}). '
          f'{self._last_checkpoint()}. Lower optim.lr, or look at the examples with python -m '
          'ftjax.preview',
        )
      if values['skipped'] == done == cadence.steps:
        self._writer.write(done, 'train', values)
        raise _agreed(
          NonFiniteError,
          f'all {done} updates were skipped: loss or gradient was never finite. Lower optim.lr, or '
          'look at the examples with python -m ftjax.preview',
        )
    elif values['has_signal']:
      # What evaluation measures.
      self.progress.loss_sum += values.get('nll', values.get(LOSS_ALONE, values['loss']))
      self.progress.losses += 1
    for warning in self._console.step(done, values) if values['ok'] else ():
      log.warning(warning)
    self._hooks.watch(done, values)
    self._bar.update(1)
    if _due(done, cadence.log_every) or done == cadence.steps:
      speed = self._throughput.read()
      progress = self.progress
      trained = progress.trained_s + self._throughput.trained_s
      goodput = {'goodput': trained / max(time.time() - progress.began, 1e-9)}
      self._writer.write(done, 'train', values | speed | memory() | self._host_metrics | goodput)
      shown = self._console.bar(values)
      if speed:
        shown |= {'tok/s': f'{speed["tokens_per_s"]:.0f}'}
        shown |= {'mfu': f'{speed["mfu"]:.0%}'} if 'mfu' in speed else {}
      self._bar.set_postfix(shown, refresh=False)

  def _rest(self, state: State, done: int, evaluate: bool, must_save: bool) -> tuple[State, bool]:
    """Evaluates and saves what is due after step `done`. Returns the state of the next step, and
    whether training ends here for lack of progress.
    """
    cadence, metric, ended, improved = self._cadence, None, False, False
    if evaluate:
      values = self._look(state, done)
      if cadence.metric:
        measured = {f'eval/{k}': v for k, v in values.items()} | self._latest
        metric = measured.get(cadence.metric)
        improved = metric is not None and self.progress.see(metric, done, cadence.mode)
        state = self._slowed(state, done)
        ended = bool(cadence.patience) and self.progress.evals_since >= cadence.patience
      must_save = must_save or self.progress.eval_pending
    if must_save or improved or ended or _due(done, cadence.save_every):
      trained = self.progress.trained_s + self._throughput.trained_s
      progress = dataclasses.replace(self.progress, trained_s=trained)
      meta = self._hooks.meta(done) | {'progress': dataclasses.asdict(progress), 'ended': ended}
      self._writer.sync()  # rows before a checkpoint live as long as it
      with self._watchdog.phase('save'):
        self._checkpoints.save(done, self._hooks.saved(state), meta, metric)
        self._last_saved = done
        if must_save or ended:
          self._checkpoints.wait()
    return state, ended

  def _slowed(self, state: State, done: int) -> State:
    """Returns the state, with a smaller learning rate where the plateau rule asks for it."""
    rule, progress = self._cadence.plateau, self.progress
    if rule is None or progress.evals_flat < rule.patience:
      return state
    progress.evals_flat = 0
    before = float(find_scale(state.opt))
    after = rule.next_scale(before)
    if after == before:
      return state
    log.info(
      'step %d: %s has not improved since step %d (optim.plateau_patience=%d): from here on the '
      "learning rate is %.4g times the schedule's; it was %.4g times",
      *(done, self._cadence.metric, progress.step, rule.patience, after, before),
    )
    return dataclasses.replace(state, opt=with_scale(state.opt, after))

  def _look(self, state: State, done: int) -> dict[str, float]:
    """Evaluates after step `done` and writes the metrics, or leaves the evaluation pending."""
    progress = self.progress

    def is_cancelled():
      self._watchdog.beat()
      return not self._cadence.metric and self._is_stopping()

    with self._watchdog.phase('evaluate'):
      values = None if is_cancelled() else self._hooks.evaluate(state, done, is_cancelled)
    progress.eval_pending = values is None
    if values is None:
      return {}
    if progress.losses and 'loss' in values:
      values = values | {'gap': values['loss'] - progress.loss_sum / progress.losses}
      progress.loss_sum, progress.losses = 0.0, 0
    if values:
      self._writer.write(done, 'eval', values)
      line, warnings = self._console.evaluation(done, values)
      if line:
        log.info(line)
      for warning in warnings:
        log.warning(warning)
      self._hooks.evaluated()
    return values


def _agreed(kind: type[RunError], message: str) -> RunError:
  """Returns the error that every process raises now: each closes its files before any of them
  exits.
  """
  processes.leave_together()
  return kind(message)


def _due(step: int, every: int) -> bool:
  return bool(every) and step % every == 0
