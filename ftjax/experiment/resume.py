"""What a run that goes on from a checkpoint must find as it was: config keys, data and
models."""

import logging

from ftjax.cluster import processes
from ftjax.config import algorithms, section, user_code
from ftjax.experiment import model_record
from ftjax.experiment.run import Run
from ftjax.hf import load
from ftjax.runtime import redaction
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError
from ftjax.storage import files

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
_FIXED += ('data.eval_fraction', 'model.param_dtype', 'optim.name', 'optim.freeze')


def check_source(workdir: str) -> None:
  """Refuses an init_from without an export; all processes must see the same one."""
  export = load.exported(workdir)
  if export is None:
    raise ConfigError(
      f'init_from={workdir}: there is no export/ in it; it is written when a run ends'
    )
  processes.check_same('init_from', digest(load.outline(export)))


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
  changed = [k for k in now if saved['config'].get(k) != now[k]]
  within = saved['step'] % algorithms.steps_per_batch(run.config)
  record = algorithms.of(run.config)
  kept = (*_FIXED, *record.fixed, *(record.fixed_in_rollout if within else ()))
  fixed = [f'{k}: {saved["config"].get(k)!r} -> {now[k]!r}' for k in changed if k in kept]
  code = user_code.fingerprints(run.config)
  edited = [k for k, v in saved.get('code', {}).items() if k in code and code[k] != v]
  fixed += [f'{k}: the code of {now[k]} was edited' for k in edited if k in kept]
  fixed += [f'{k}: other content' for k, v in saved['fingerprints'].items() if found.get(k) != v]
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
  if edited:
    log.warning(
      'edited since the checkpoint: the code of %s', ', '.join(f'{k}={now[k]}' for k in edited)
    )
  if changed:
    log.warning('changed since the checkpoint: %s', ', '.join(f'{k}={now[k]!r}' for k in changed))


def has_ended(saved: dict, patience: int) -> bool:
  """Whether early stopping ended the run for good: with more patience, or none, it goes on."""
  return saved['ended'] and 0 < patience <= saved['progress']['evals_since']


def first_fingerprint(run: Run) -> str:
  """sha256 of the model that a run starts from.

  Raises:
    ConfigError: it is not there.
  """
  c = run.config
  if not c.init_from:
    return run.model.fingerprint
  check_source(c.init_from)
  export = files.join(c.init_from, 'export')
  return model_record.fingerprint(export, run.workdir)


def _models_beside(run: Run) -> dict[str, str]:
  """Fingerprints of the weights that the reference and a reward model, which a resume reads again,
  and the value model come from.

  Raises:
    ConfigError: they are not there.
  """
  c, out = run.config, {}
  values = section.flat(c)
  for model in algorithms.of(c).auxiliary(c):
    if source := values.get(model.source_key):
      out[model.name] = model_record.fingerprint(source, run.workdir)
      processes.check_same(model.source_key, digest(load.outline(source)))
    elif not model.is_trained:
      out[model.name] = first_fingerprint(run)
  return out


def fingerprints(run: Run) -> dict[str, str]:
  """Of all that a resume must find as it was."""
  own = {'model': run.model.fingerprint, 'tokenizer': run.model.tokenizer.fingerprint}
  return own | run.data.fingerprints() | _models_beside(run)
