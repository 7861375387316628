"""Runs a run again and compares it with what it logged: `python -m ftjax.train --replay=DIR`.

fit.py calls a Replay in this order: `check` before the model is loaded, `claim` once the workdir is
locked, `begin` when the step is compiled, `compare` after every row of metrics, `finish`. Process 0
reads the files of the run and compares; all processes end with its verdict."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from ftjax.cluster import processes
from ftjax.config.replayed_run import RECORD, ReplayedRun
from ftjax.experiment import manifest_diff, model_record, resume, run_manifest, run_metrics
from ftjax.experiment import run as experiment
from ftjax.experiment.run import Run
from ftjax.experiment.run_metrics import Key, Mismatch, Row
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import CheckError, NonFiniteError
from ftjax.storage import files, program_cache
from ftjax.telemetry import environment, source_code

log = logging.getLogger(__name__)


class Replay:
  """Compares a run that is trained now with the one that `replayed` describes.

  Attributes:
    last_step: the step where the comparison ends; known after `check`.
  """

  def __init__(self, replayed: ReplayedRun):
    self._of = replayed
    self.last_step = 0
    self._workdir, self._steps = '', 0
    # Of process 0 alone.
    self._rows: dict[Key, Row] = {}
    self._done: set[Key] = set()  # rows that were compared and are equal
    self._differences: list[manifest_diff.Difference] = []
    self._is_bitwise = self._has_begun = False

  def check(self, run: Run, user_code: Mapping[str, str]) -> None:
    """Ends a replay that would train something else than the run did, before the model is loaded.

    Raises:
      CheckError: other data, weights, tokenizer or code, or edited metrics; names each.
      ConfigError: the run has no metrics to compare.
    """
    of = self._of
    self._workdir, self._steps = run.workdir, run.steps
    model_record.adopt(of.folder, run.workdir)
    found = manifest_diff.causes(
      of.manifest, resume.fingerprints(run), source_code.identity(), user_code, of.despite
    )
    # Code may differ from host to host.
    everywhere = processes.gather(found)
    if any(everywhere):
      which = next(i for i, lines in enumerate(everywhere) if lines)
      where = '' if processes.is_alone() else f'process {which}: '
      raise _agreed(
        f'this is not the run of {of.folder}, so it is not replayed: '
        f'{where}{"; ".join(everywhere[which])}'
      )
    self.last_step = processes.from_main(self._read)

  def _read(self) -> int:
    c = self._of.config
    changed = manifest_diff.changed_keys(self._of.manifest)
    every = 0 if 'log.every' in changed else c.log.every
    self._rows = run_metrics.read_run(self._of.folder, every, self._steps)
    if any(key.startswith(('eval.', 'data.eval')) for key in changed):
      log.warning('the evaluation changed during the run: only training steps are compared')
      self._rows = {k: row for k, row in self._rows.items() if k[0] == 'train'}
    self._check_metric()
    last = run_metrics.last_step(self._rows)
    self._rows = {k: row for k, row in self._rows.items() if k[1] <= last}
    log.info(
      'replaying %s: %d steps%s, %d rows to compare',
      *(self._of.folder, last, '' if last == self._steps else f' of {self._steps}'),
      len(self._rows),
    )
    return last

  def _check_metric(self) -> None:
    """Refuses a run whose learning rate followed a task that was left out for its cost at some
    evaluation: at which one, depends on the clock.
    """
    c = self._of.config
    name = c.checkpoint.best_metric.removeprefix('eval/')
    left_out = [s for (split, s), row in self._rows.items() if split == 'eval' and name not in row]
    if c.optim.plateau_factor < 1 and left_out and c.checkpoint.best_metric != name:
      raise CheckError(
        f'{self._of.folder} cannot be replayed: its learning rate followed {name} '
        f'(optim.plateau_factor), which eval.max_share left out by the clock at '
        f'{run_metrics.steps_text(left_out)}. Train with eval.max_share=1 for a run that can be'
      )

  def _share_programs(self, run: Run) -> None:
    """Copies the compiled programs of the run, where they are made for these devices: on a GPU
    another compilation may choose other kernels. The run's folder is only read.
    """
    if not experiment.keeps_programs(run.config) or os.environ.get('JAX_COMPILATION_CACHE_DIR'):
      return
    kind, cpu = jax.devices()[0].device_kind, environment.cpu()
    if not manifest_diff.has_same_devices(self._of.manifest, kind, cpu):
      return
    source, target = (experiment.program_folder(w) for w in (self._of.folder, run.workdir))
    copied = processes.from_main(lambda: program_cache.copy(source, target))
    log.info('%d compiled programs of the run are used', copied)

  def claim(self, run: Run) -> None:
    """Marks the workdir as that of this replay, and gives it the compiled programs of the run."""
    processes.from_main(lambda: self._record('not finished'))
    self._share_programs(run)

  def begin(self, manifest: Mapping[str, Any]) -> None:
    """Compares the environment, and the rows that an earlier start of this replay wrote.

    Args:
      manifest: of the replay.
    """
    self._end_at(processes.from_main(lambda: self._begin(manifest)))

  def _begin(self, manifest: Mapping[str, Any]) -> str:
    self._has_begun = True
    self._differences = manifest_diff.environment_differences(self._of.manifest, manifest)
    self._is_bitwise = not any(d.may_change_bits for d in self._differences)
    if self._differences:
      table = manifest_diff.table(self._differences)
      log.warning('the environment is not that of the run:\n%s', table)
    if self._is_bitwise:
      log.info('comparing bits')
    else:
      log.warning('comparing losses within %g relative, not bits', run_metrics.TOLERANCE)
    own, _ = run_metrics.read(files.join(self._workdir, 'metrics.jsonl'))
    for (split, step), row in own.items():
      if verdict := self._compare(step, split, row):
        return verdict
    return ''

  def compare(self, step: int, split: str, row: Mapping[str, Any]) -> None:
    """Compares a row of metrics; the `check` of a MetricsWriter.

    Raises:
      CheckError: it differs from that of the run.
    """
    if split in ('train', 'eval'):
      self._end_at(processes.from_main(lambda: self._compare(step, split, dict(row))))

  def _compare(self, step: int, split: str, row: Row) -> str:
    """Returns the message of the first difference, '' for none."""
    known = self._rows.get((split, step))
    if known is None:
      # The evaluation after the last step of a run that was stopped is not made any more; rows of
      # training are complete, see run_metrics.read_run.
      is_missing = split == 'eval' and step < self.last_step and self._has_evaluations()
      found = Mismatch(split, step, 'loss', None, row.get('loss')) if is_missing else None
    else:
      found = run_metrics.compare((split, step), known, row, self._is_bitwise)
    if found is None:
      self._done.add((split, step))
      return ''
    self._record('differs', found)
    return self._message(found)

  def _has_evaluations(self) -> bool:
    return any(split == 'eval' for split, _ in self._rows)

  def _message(self, found: Mismatch) -> str:
    equal = sum(split == 'train' for split, _ in self._done)
    what = [d.text() for d in self._differences]
    if not what and self._of.is_deterministic:
      what = ['nothing, so metrics.jsonl was edited']
    elif not what:
      what = [
        'nothing: metrics.jsonl was edited, or this device does not repeat its bits (on a GPU, '
        'train with --deterministic)'
      ]
    values = f'{found.name}={_shown(found.run)} in the run and {_shown(found.here)} here'
    if found.relative() < float('inf'):
      values += f', {found.relative():.2g} relative'
    kind = 'training' if found.split == 'train' else 'evaluation'
    return (
      f'replay of {self._of.folder} differs first at step {found.step} ({kind}): {values}. '
      f'{equal} training rows before it are equal ({self._how()}). '
      f'What differs in the manifests: {"; ".join(what)}'
    )

  def _how(self) -> str:
    return 'bitwise' if self._is_bitwise else f'losses within {run_metrics.TOLERANCE:g} relative'

  def is_complete(self) -> bool:
    """Returns whether every row of the run was compared; all processes ask for it."""
    return processes.from_main(lambda: self._rows.keys() <= self._done)

  def finish(self) -> None:
    """Logs the verdict of a replay without difference.

    Raises:
      CheckError: the run has rows that the replay did not write.
    """
    self._end_at(processes.from_main(self._finish))

  def _finish(self) -> str:
    # An earlier start has trained all steps.
    if not self._has_begun and (verdict := self._begin(run_manifest.read(self._workdir))):
      return verdict
    c = self._of.config
    left = [k for k in self._rows if k not in self._done]
    if not (c.data.eval or c.data.eval_fraction or c.eval.in_loop):  # tasks alone were evaluated
      left = [k for k in left if k[0] == 'train']
    if left:
      split, step = left[0]
      self._record('differs', Mismatch(split, step, 'loss', self._rows[left[0]].get('loss'), None))
      return f'{self._of.folder} has a row of step {step} ({split}) that the replay did not write'
    self._record('equal')
    compared = [split for split, _ in self._rows]
    steps, evaluations = (compared.count(split) for split in ('train', 'eval'))
    log.info(
      'replay of %s: equal, %s (%d rows of training up to step %d, %d of evaluation)',
      *(self._of.folder, self._how(), steps, self.last_step, evaluations),
    )
    return ''

  def _end_at(self, verdict: str) -> None:
    if verdict:
      raise _agreed(verdict)

  def _record(self, verdict: str, found: Mismatch | None = None) -> None:
    """Writes replay.json."""
    content = {
      'run': self._of.folder,
      'manifest': digest(self._of.manifest),
      'despite': list(self._of.despite),
      'verdict': verdict,
      'compared': 'bits' if self._is_bitwise else f'losses within {run_metrics.TOLERANCE:g}',
      'rows': len(self._done),
      'environment': {d.name: [d.run, d.here] for d in self._differences},
    }
    if found is not None:
      content['first_difference'] = dataclasses.asdict(found)
    files.write_text(files.join(self._workdir, RECORD), json.dumps(content, indent=1) + '\n')


@contextlib.contextmanager
def same_end(replay: Replay | None) -> Iterator[None]:
  """Lets non-finite training end a replay in peace, where it ended the run at the same step."""
  try:
    yield
  except NonFiniteError:
    if replay is None or not replay.is_complete():
      raise


def _shown(value: Any) -> str:
  return 'nothing' if value is None else repr(value)


def _agreed(message: str) -> CheckError:
  """Returns the error that every process raises now: each closes its files before any of them
  exits.
  """
  processes.leave_together()
  return CheckError(message)
