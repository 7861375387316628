"""Checks of a config that need neither devices nor data."""

import difflib
import importlib.util
import math
import os
import re
from typing import Any

from ftjax.config import (
  adapter_checks,
  algorithms,
  choices,
  custom_keys,
  data_checks,
  gate_rules,
  model_checks,
  section_checks,
  study_checks,
  task_specs,
)
from ftjax.config.keys import default
from ftjax.config.section import Section, flat, place_of, random_required
from ftjax.runtime import named_object
from ftjax.runtime.errors import ConfigError
from ftjax.storage import locations

POSITIVE = (
  'model.vocab_multiple',
  'batch_size',
  'seq_len',
  'grad_accum',
  'checkpoint.keep',
  'optim.plateau_patience',
  'eval.batch_size',
  'log.every',
  'eval.max_tokens',
  'eval.samples',
  'eval.num_beams',
  'eval.in_loop_rows',
  'eval.endpoint.concurrency',
  'eval.endpoint.timeout',
  'max_bad_steps',
  'data.augment_copies',
  'rollout.group',
  'rollout.max_tokens',
  'rollout.slots',
  'rollout.updates',
  'rollout.minibatches',
  'best_of_n.keep',
  'distill.top_k',
  'study.trials',
  'study.repeats',
  'study.parallel',
)
NOT_NEGATIVE = (
  'steps',
  'stop_at',
  'data.audit',
  'data.workers',
  'optim.warmup_steps',
  'optim.decay_steps',
  'optim.weight_decay',
  'optim.clip_norm',
  'optim.sam_radius',
  'optim.unfreeze_every',
  'loss.z_loss',
  'loss.neftune',
  'loss.r_drop',
  'checkpoint.every',
  'checkpoint.patience',
  'eval.every',
  'eval.rows',
  'eval.shots',
  'eval.temperature',
  'profile.start',
  'dpo.gamma',
  'dpo.nll_coef',
  'dpo.desirable',
  'dpo.undesirable',
  'reward_model.centring',
  'rollout.top_k',
  'rollout.samples',
  'rollout.max_failed',
  'rollout.redraws',
  'ppo.value_coef',
  'ppo.value_clip',
  'policy.clip_low',
  'policy.clip_high',
  'policy.dual_clip',
  'policy.kl_coef',
  'policy.kl_target',
  'policy.kl_gain',
  'policy.entropy_coef',
  'policy.overlong',
)
_LOCATIONS = (
  'init_from',
  'data.cache',
  'data.chat_template',
  'distill.file',
  'distill.teacher',
  'ppo.value_from',
  'rollout.reward_model',
)
_TABLES = ('optim.decay', 'optim.multipliers', 'optim.freeze')


def validate(c: Section) -> None:
  """Checks what can be checked without devices or data.

  Raises:
    ConfigError: naming the key, what was got, and what was expected; begins with FILE:LINE where
      the key was set by a config file.
  """
  try:
    _validate(c)
  except ConfigError as error:
    if place := place_of(str(error), c):
      raise ConfigError(f'{place}: {error}') from error
    raise


def _validate(c: Section) -> None:
  values, usual = flat(c), flat(default())
  for key, value in values.items():
    if value is None:
      raise ConfigError(f'{key}=None; expected a value like the default, {usual[key]!r}')
    if isinstance(value, float) and not math.isfinite(value):
      raise ConfigError(f'{key}={value}; expected a finite number')
  for key, allowed in ({'algorithm': tuple(algorithms.ALGORITHMS)} | choices.CHOICES).items():
    _check_choice(key, values[key], allowed)
  for key in POSITIVE:
    if values[key] < 1:
      raise ConfigError(f'{key}={values[key]}; expected at least 1')
  for key in (*NOT_NEGATIVE, *(k for k in values if k.startswith('watchdog.'))):
    if values[key] < 0:
      raise ConfigError(f'{key}={values[key]}; expected at least 0')
  for key in _TABLES:
    _check_table(key, values[key])
  for key in ('data.train', 'data.eval'):
    _check_sources(key, values[key])
  _check_locations(c)
  if c.eval.every and not (c.data.eval or c.data.eval_fraction or c.eval.prompts or c.eval.in_loop):
    raise ConfigError(
      f'eval.every={c.eval.every} finds nothing to evaluate: give data.eval, data.eval_fraction, '
      'eval.prompts or eval.in_loop'
    )
  _check_options(c.compiler_options)
  section_checks.check_new_tokens(c)
  _check_random(c)
  if not c.steps and c.epochs <= 0:
    raise ConfigError(f'steps={c.steps}, epochs={c.epochs}: one of them must be positive')
  if bool(c.model.path) == bool(len(c.model.random)):
    raise ConfigError(
      f'model.path={c.model.path!r}: give the folder of a model (or model.random, not both)'
    )
  if not c.data.train:
    raise ConfigError('data.train is empty: give the training data, path[::format][@weight]')
  if c.checkpoint.patience and not c.checkpoint.best_metric:
    raise ConfigError('checkpoint.patience needs checkpoint.best_metric, for example eval/loss')
  if not (0 <= c.optim.b1 < 1 and 0 <= c.optim.b2 < 1 and c.optim.eps > 0):
    raise ConfigError(
      f'optim.b1={c.optim.b1}, optim.b2={c.optim.b2}, optim.eps={c.optim.eps}; expected b1 and b2 '
      'in [0, 1) and eps > 0'
    )
  if c.optim.lr <= 0:
    raise ConfigError(f'optim.lr={c.optim.lr}; expected a positive number')
  if c.optim.ema_decay and c.model.param_dtype != 'float32':
    raise ConfigError('optim.ema_decay needs model.param_dtype=float32: its small steps vanish')
  _check_sinks(c.log.sinks)
  if (
    not 0 <= c.optim.ema_decay < 1
    or not 0 <= c.data.eval_fraction < 1
    or not 0 <= c.loss.label_smoothing < 1
  ):
    raise ConfigError(
      'optim.ema_decay, data.eval_fraction and loss.label_smoothing must lie in [0, 1)'
    )
  if c.profile.stop < c.profile.start:
    raise ConfigError(f'profile.stop={c.profile.stop} lies before profile.start={c.profile.start}')
  _check_lengths(c)
  # From here on, modules of the user may be imported, which may take seconds.
  for key in choices.OBJECTS:
    if named_object.is_named(values[key]):
      choices.checked_object(key, values[key])
  if c.model.family:
    named_object.load('model.family', c.model.family)
  gate_rules.parse_all(c.gate)
  task_specs.check_objects(task_specs.parse_all(c.eval.tasks))
  custom_keys.complete(c)
  study_checks.check(c)
  section_checks.check(c)
  data_checks.check(c)
  model_checks.check(c)
  adapter_checks.check(c)


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
  takes_objects = key == 'algorithm' or key in choices.OBJECTS
  if value in allowed or (takes_objects and named_object.is_named(value)):
    return
  near = difflib.get_close_matches(value, allowed, n=1)
  hint = f'; did you mean {near[0]}?' if near else ''
  more = " or 'module:object'" if takes_objects else ''
  raise ConfigError(f'{key}={value!r}; expected one of {allowed}{more}{hint}')


def _check_sinks(sinks: Any) -> None:
  for sink in sinks:
    if sink not in ('wandb', 'mlflow'):
      raise ConfigError(f'log.sinks: {sink!r}; expected wandb or mlflow')
    if importlib.util.find_spec(sink) is None:
      raise ConfigError(
        f"log.sinks: {sink} is not installed; pip install '.[{sink}]' in the checkout of ftjax"
      )


def _check_table(key: str, table: Any) -> None:
  for row in table:
    if not isinstance(row, tuple | list) or len(row) != 2:
      raise ConfigError(f'{key}: {row!r} is not a row; expected pairs (regex, value)')
    try:
      re.compile(row[0])
    except (re.error, TypeError) as error:
      raise ConfigError(f'{key}: {row[0]!r} is not a regular expression: {error}') from error
    if not isinstance(row[1], int | float):
      raise ConfigError(f'{key}: {row!r}; expected a number, or True or False')


def _check_options(options: Any) -> None:
  for row in options:
    if not isinstance(row, tuple | list) or len(row) != 2 or not isinstance(row[0], str):
      raise ConfigError(
        f'compiler_options: {row!r} is not an option; expected pairs such as '
        "('xla_gpu_enable_latency_hiding_scheduler', True)"
      )
    if not isinstance(row[1], bool | int | float | str):
      raise ConfigError(f'compiler_options: {row!r}; expected a number, True, False or a text')


def _check_sources(key: str, sources: Any) -> None:
  entries = sources if isinstance(sources, tuple | list) else [sources]
  if wrong := [e for e in entries if not isinstance(e, str)]:
    raise ConfigError(f'{key}: {wrong[0]!r}; expected a text, or a tuple of texts')


def _check_locations(c: Section) -> None:
  """Checks the form of every key that names a folder or a file."""
  for key in _LOCATIONS:
    locations.check(key, c[key])
    if c[key].startswith('~'):
      raise ConfigError(f'{key}={c[key]}: write the whole path, {os.path.expanduser(c[key])}')
  locations.check('model.path', c.model.path)
  for key in ('data.train', 'data.eval'):
    for source in _entries(c[key]):
      locations.check(key, source)
  for task in task_specs.parse_all(c.eval.tasks):
    locations.check(task_specs.KEY, task.path)


def _entries(sources: str | tuple[str, ...] | list[str]) -> list[str]:
  """Returns the entries of data.train or data.eval."""
  return [s.strip() for s in (sources.split(',') if isinstance(sources, str) else sources)]


def _check_lengths(c: Section) -> None:
  """Refuses numbers of steps that contradict each other, where `steps` is known before the data."""
  if not c.steps:
    return
  if c.optim.warmup_steps >= c.steps:
    raise ConfigError(
      f'optim.warmup_steps={c.optim.warmup_steps} with steps={c.steps}: the learning rate would '
      'not reach optim.lr before the end; expected fewer warmup steps than steps'
    )
  if c.optim.schedule == 'wsd' and c.optim.warmup_steps + c.optim.decay_steps > c.steps:
    raise ConfigError(
      f'optim.decay_steps={c.optim.decay_steps} and optim.warmup_steps={c.optim.warmup_steps} are '
      f'more than steps={c.steps}'
    )
  if c.checkpoint.best_metric and c.eval.every > c.steps:
    raise ConfigError(
      f'eval.every={c.eval.every} with steps={c.steps}: checkpoint.best_metric='
      f'{c.checkpoint.best_metric} would be measured once, at the end; expected at most {c.steps}'
    )
  evaluations = -(-c.steps // max(1, c.eval.every))
  if c.checkpoint.patience and c.checkpoint.patience >= evaluations:
    raise ConfigError(
      f'checkpoint.patience={c.checkpoint.patience} can never stop a run of {evaluations} '
      f'evaluations (steps={c.steps}, eval.every={c.eval.every}); expected fewer, or 0 for none'
    )
  # The first evaluation is the best so far, and no update comes after the last.
  if c.optim.plateau_factor < 1 and c.optim.plateau_patience > evaluations - 2:
    raise ConfigError(
      f'optim.plateau_patience={c.optim.plateau_patience} can never lower the learning rate in a '
      f'run of {evaluations} evaluations (steps={c.steps}, eval.every={c.eval.every}); expected '
      'at most the evaluations less two'
    )


def warnings(c: Section) -> list[str]:
  """Returns lines for the start of the log about settings that are allowed and rarely intended."""
  out = section_checks.unread_optimizer_keys(c)
  train = {s.rpartition('@')[0] or s for s in _entries(c.data.train)}
  if same := sorted(train & set(_entries(c.data.eval)) - {''}):
    out.append(
      f'data.eval={same[0]} is also in data.train: its loss measures what was memorized; give rows '
      'that are not trained on, or data.eval_fraction'
    )
  return out


def _check_random(c: Section) -> None:
  if not len(c.model.random):
    return
  required = random_required(c.model.random.get('model_type', ''))
  if missing := [k for k in required if k not in c.model.random]:
    raise ConfigError(f'model.random lacks {", ".join(missing)}')
