"""What a run that goes on from a checkpoint must find as it was: config keys, data and
models."""

import logging

from ftjax.cluster import processes
from ftjax.config import algorithm_keys, algorithms
from ftjax.config import keys as config_lib
from ftjax.experiment import model_record
from ftjax.experiment.run import Run
from ftjax.hf import load
from ftjax.runtime import redaction
from ftjax.runtime.digest import digest
from ftjax.runtime.errors import ConfigError
from ftjax.storage import files

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
_FIXED += ('rollout.group', 'rollout.max_tokens', 'rollout.updates', 'rollout.minibatches')

# Nor, between two updates on a rollout, what its arrays hold.
_IN_ROLLOUT = ('rollout.temperature', 'grpo.advantage', 'best_of_n.keep', 'ppo.value_from')
_IN_ROLLOUT += ('policy.kl', 'policy.kl_coef', 'policy.kl_target', 'policy.overlong')
_IN_ROLLOUT += ('rollout.rewards', 'rollout.reward_model', 'ppo.gamma', 'ppo.lam', 'ppo.whiten')


def check_source(workdir: str) -> None:
  """Refuses an init_from without an export; all processes must see the same one."""
  export = load.exported(workdir)
  if export is None:
    raise ConfigError(
      f'init_from={workdir}: there is no export/ in it; it is written when a run ends'
    )
  processes.check_same('init_from', digest(load.outline(export)))


def check(saved: dict, run: Run, found: dict[str, str]) -> None:
  """Refuses to go on with other data or another state shape than the checkpoint's; tells of the
  other changes.
  """
  now = redaction.redact(config_lib.plain(run.config))
  changed = [k for k in now if saved['config'].get(k) != now[k]]
  within = saved['step'] % algorithm_keys.steps_per_batch(run.config)
  kept = (*_FIXED, *_IN_ROLLOUT) if within else _FIXED
  fixed = [f'{k}: {saved["config"].get(k)!r} -> {now[k]!r}' for k in changed if k in kept]
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
  if algorithms.has_reference(c):
    out['reference'] = first_fingerprint(run)
  if algorithms.has_value_model(c) and c.ppo.value_from:
    out['value'] = model_record.fingerprint(c.ppo.value_from, run.workdir)
    processes.check_same('ppo.value_from', digest(load.outline(c.ppo.value_from)))
  if c.algorithm in algorithm_keys.ON_ROLLOUTS and c.rollout.reward_model:
    out['reward model'] = model_record.fingerprint(c.rollout.reward_model, run.workdir)
    processes.check_same('rollout.reward_model', digest(load.outline(c.rollout.reward_model)))
  return out


def fingerprints(run: Run) -> dict[str, str]:
  """Of all that a resume must find as it was."""
  own = {'model': run.model.fingerprint, 'tokenizer': run.model.tokenizer.fingerprint}
  return own | run.data.fingerprints() | _models_beside(run)
