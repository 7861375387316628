"""The rules of a resume: from which checkpoint a run continues, what must not have changed since,
and what is removed of everything that was written after it."""

import dataclasses
import functools
import logging
from collections.abc import Iterable
from typing import Any, Protocol

import ml_collections

from ftjax.cluster import processes
from ftjax.config import algorithms, keys, section, user_code
from ftjax.experiment import adapters, init_from, model_record, vocabulary
from ftjax.experiment.run import Run
from ftjax.hf import file_marks, peft
from ftjax.runtime import redaction
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError, DataError
from ftjax.storage.checkpoint import Checkpoints
from ftjax.training.loop import Progress

log = logging.getLogger(__name__)

# What may not change between a checkpoint and its resume, with any algorithm: the order of the
# data, and the shape of the state.
_FIXED = (
  'algorithm',
  'seed',
  'batch_size',
  'seq_len',
  'data.on_overlength',
)
_FIXED += ('data.eval_fraction', 'model.param_dtype', 'optim.name', 'optim.moments', 'optim.freeze')
_FIXED += ('optim.unfreeze_every',)
_FIXED += ('data.curriculum', 'data.mix_temperature')
_FIXED += vocabulary.FIXED + adapters.FIXED
_OF_ONE_START = ('stop_at',)  # changes from start to start


@dataclasses.dataclass(frozen=True)
class Start:
  """Where a run starts.

  Attributes:
    step: steps done.
    saved: the JSON of the checkpoint of that step; None at a fresh start.
    should_train: whether steps or an evaluation are left.
  """

  step: int
  saved: dict[str, Any] | None
  should_train: bool

  @property
  def progress(self) -> Progress:
    """The saved progress of the training loop."""
    return Progress(**self.saved['progress']) if self.saved else Progress()

  @property
  def source(self) -> dict[str, Any]:
    """The saved state of the source of batches."""
    return self.saved.get('source', {}) if self.saved else {}


class StepWriter(Protocol):
  """Something that writes to the workdir step by step."""

  def cut(self, step: int, drop_eval: bool) -> None:
    """Removes what belongs to later steps than `step` and will be written again.

    Args:
      step: steps done; -1 at a fresh start, where everything goes.
      drop_eval: whether the evaluation after `step` will be made again too.
    """


def cut(writers: Iterable[StepWriter], start: Start) -> None:
  """Removes everything that was written after the step of `start`: the one rule for metrics,
  samples and rollouts.
  """
  for writer in writers:
    writer.cut(start.step if start.saved else -1, start.progress.eval_pending)


def find(run: Run, checkpoints: Checkpoints) -> Start:
  """Returns where a run starts: after its newest checkpoint, or before the first step.

  Args:
    run: the run.
    checkpoints: of its workdir.

  Raises:
    ConfigError: the checkpoint is of another run or of more steps, or init_from holds no export.
    DataError: the checkpoint counts other rows than its steps consume.
  """
  c = run.config
  step = processes.from_main(checkpoints.latest)
  if step is None:
    if c.init_from:
      check_source(c)
    return Start(0, None, True)
  saved = checkpoints.meta(step)
  check(saved, run, fingerprints(run))
  is_read_again = run.arch.adapter is not None or any(
    not m.path and not m.is_trained for m in run.auxiliary
  )
  if c.init_from and is_read_again:  # by every process; the fingerprints are of the first one's
    check_source(c)
  if saved['cursor'] != run.cursor(step) and saved['config'].get('batch_size') == c.batch_size:
    raise DataError(
      f'{run.workdir}: checkpoint {step} has cursor {saved["cursor"]}, expected '
      f'{run.cursor(step)}: not the rows that its steps consume'
    )
  if step > run.steps:
    raise ConfigError(
      f'{run.workdir} holds a checkpoint of step {step}, but steps={run.steps}: give more steps, '
      'or another --workdir'
    )
  is_left = step < run.last_step or saved['progress']['eval_pending']
  return Start(step, saved, is_left and not has_ended(saved, c.checkpoint.patience))


def is_paused(run: Run, checkpoints: Checkpoints) -> bool:
  """Returns whether stop_at ended the training, and steps are left for a later start."""
  step = checkpoints.latest()
  if step is None or step >= run.steps:
    return False
  return not has_ended(checkpoints.meta(step), run.config.checkpoint.patience)


def check_source(c: ml_collections.ConfigDict) -> None:
  """Refuses an init_from that cannot be used; all processes must see the same one."""
  start = init_from.find(c)
  if start.adapter:
    held = peft.read(start.adapter).source.stored()
  else:
    held = file_marks.outline(start.base)
  processes.check_same('init_from', digest(held))


def check(saved: dict, run: Run, found: dict[str, str]) -> None:
  """Refuses to resume with other data or another state shape than the checkpoint's; warns of the
  other changes.

  Args:
    saved: what was saved with the checkpoint.
    run: the run that resumes.
    found: `fingerprints` of the run.

  Raises:
    ConfigError: names what changed.
  """
  now = redaction.redact(section.plain(run.config))
  # A checkpoint from before a key existed was written as if it had the default.
  before = redaction.redact(section.plain(keys.default())) | saved['config']
  changed = [k for k in now if before.get(k) != now[k] and k not in _OF_ONE_START]
  within = saved['step'] % algorithms.steps_per_batch(run.config)
  record = algorithms.of(run.config)
  kept = (*_FIXED, *record.fixed, *(record.fixed_in_rollout if within else ()))
  fixed = [f'{k}: {before.get(k)!r} -> {now[k]!r}' for k in changed if k in kept]
  code = user_code.fingerprints(run.config)
  edited = [k for k, v in saved.get('code', {}).items() if k in code and code[k] != v]
  fixed += [f'{k}: the code of {now[k]} was edited' for k in edited if k in kept]
  fixed += [f'{k}: other content' for k, v in saved['fingerprints'].items() if found.get(k) != v]
  if saved['config'].get('checkpoint.best_metric'):  # its values stand in the checkpoints
    watched = ('checkpoint.best_metric', 'checkpoint.best_mode')
    fixed += [f'{k}: {saved["config"].get(k)!r} -> {now[k]!r}' for k in changed if k in watched]
  if bool(saved['config'].get('optim.ema_decay')) != bool(now['optim.ema_decay']):
    fixed.append('optim.ema_decay switched on or off')
  if (before['optim.plateau_factor'] < 1) != (now['optim.plateau_factor'] < 1):
    fixed.append('optim.plateau_factor switched on or off')
  if fixed:
    raise ConfigError(
      f'{run.workdir} holds a checkpoint of another run; since it was saved, these changed: '
      f'{"; ".join(fixed)}. Undo that, or give another --workdir '
      '(with --config.init_from=OLD_WORKDIR to start from its weights)'
    )
  if edited:
    log.warning(
      'edited since the checkpoint: the code of %s', ', '.join(f'{k}={now[k]}' for k in edited)
    )
  if changed:
    log.warning('changed since the checkpoint: %s', ', '.join(f'{k}={now[k]!r}' for k in changed))


def has_ended(saved: dict, patience: int) -> bool:
  """Returns whether early stopping ended the run. With more patience, or none, it continues."""
  return saved['ended'] and 0 < patience <= saved['progress']['evals_since']


def first_fingerprint(run: Run) -> str:
  """Returns the sha256 of the model that a run starts from.

  Raises:
    ConfigError: it is not there.
  """
  start = init_from.find(run.config)
  if start.base:
    return model_record.fingerprint(start.base, run.workdir)
  if not start.adapter:
    return run.model.fingerprint
  adapter = processes.from_main(lambda: peft.read(start.adapter).source.fingerprint())
  return digest([run.model.fingerprint, adapter])


def fingerprints(run: Run) -> dict[str, str]:
  """Returns the fingerprints of everything that a resume must find unchanged: model, tokenizer,
  data and auxiliary models.

  Raises:
    ConfigError: the model of init_from, or an auxiliary model, is not there.
  """
  own = {'model': run.model.fingerprint, 'tokenizer': run.model.tokenizer.fingerprint}
  first = functools.partial(first_fingerprint, run)
  if run.arch.adapter is not None and run.config.init_from:
    own['init_from'] = first()  # a resume reads it again
  models = {m.name: m.fingerprint(first, run.workdir) for m in run.auxiliary}
  return own | run.data.fingerprints() | {k: v for k, v in models.items() if v is not None}
