"""Checks of the sections that only some algorithms read: settings that nothing reads, and settings
that contradict each other."""

import ml_collections

from ftjax.config import algorithms, choices, distill_settings, task_specs
from ftjax.config.algorithms import max_example, rows_per_rollout, rows_per_step, steps_per_batch
from ftjax.config.keys import default
from ftjax.config.section import flat
from ftjax.runtime import named_object
from ftjax.runtime.errors import ConfigError

# (key, other key): the key is read where the other one is not 0, and not empty.
_NEEDS = (('policy.kl', 'policy.kl_coef'), ('policy.kl_gain', 'policy.kl_target'))
_NEEDS += (('rollout.step_reward', 'rollout.reward_model'),)
_NEEDS += (('rollout.step_separator', 'rollout.step_reward'),)
_NEEDS += (('distill.top_k', 'distill.file'),)
_NEEDS += tuple((key, 'distill.on_policy') for key in distill_settings.ROLLOUT_KEYS)
# What the training metrics of a checkpoint may be, of every algorithm.
_TRAIN_METRICS = ('train/loss', 'train/grad_norm')


def check(c: ml_collections.ConfigDict) -> None:
  """Checks a config by the record of its algorithm.

  Raises:
    ConfigError: naming the keys.
  """
  record = algorithms.of(c)
  _check_idle(c)
  _check_eval(c)
  _check_metric(c)
  _check_plateau(c)
  _check_precision(c)
  _check_step(c)
  if 'dpo' in record.reads:
    _check_dpo(c)
  record.check(c)
  if record.on_rollouts:
    _check_rollout(c)
  if 'policy' in record.reads:
    _check_policy(c)
  if rows_per_step(c) % c.grad_accum:
    what = 'rows per update' if record.on_rollouts else 'batch_size'
    raise ConfigError(f'grad_accum={c.grad_accum} must divide {what}={rows_per_step(c)}')


def check_new_tokens(c: ml_collections.ConfigDict) -> None:
  """Checks the lists of new tokens, before a tokenizer is read."""
  seen: dict[str, str] = {}
  for key in ('model.add_tokens', 'model.add_special_tokens'):
    for text in c[key]:
      if not isinstance(text, str) or not text:
        raise ConfigError(f'{key}: {text!r} is no token; expected texts of one character or more')
      if text in seen:
        raise ConfigError(f'{key}: {text!r} is in {seen[text]} already: leave it out')
      seen[text] = key
  if seen and c.lora.rank:
    raise ConfigError(
      f'{next(iter(seen.values()))} with lora.rank={c.lora.rank}: an adapter belongs to the tables '
      'of its base, and cannot make them larger. Add the tokens to the base first, by a run with '
      'lora.rank=0 whose export is then model.path'
    )
  means: set[str] = set()
  for row in c.model.init_tokens:
    if (
      not isinstance(row, tuple | list)
      or len(row) != 2
      or not all(isinstance(text, str) and text for text in row)
    ):
      raise ConfigError(
        f'model.init_tokens: {row!r} is not a pair; expected (new token, text) such as '
        "('<tool>', 'tool call')"
      )
    if row[0] not in seen or row[0] in means:
      why = 'is there twice' if row[0] in means else 'is in neither list of new tokens'
      raise ConfigError(f'model.init_tokens: {row[0]!r} {why}; expected each new token once')
    means.add(row[0])
  if means and not c.model.path:
    raise ConfigError('model.init_tokens does nothing with model.random, whose rows are random')


def _check_idle(c: ml_collections.ConfigDict) -> None:
  """Refuses a setting that nothing reads: it is a misunderstanding."""
  values, usual = flat(c), flat(default())
  some_read = {k for record in algorithms.ALGORITHMS.values() for k in record.reads}
  changed = [k for k in values if k in usual and values[k] != usual[k]]
  for key in changed:
    is_optional = key in some_read or key.partition('.')[0] in some_read
    if is_optional and not algorithms.is_read(c, key):
      raise ConfigError(
        f'{key}={values[key]} does nothing with algorithm={c.algorithm}: leave it out'
      )
  for key, reason in _unread_choices(c).items():
    if not key.startswith('optim.'):
      raise ConfigError(f'{reason}: leave it out')
  for key, other in _NEEDS:
    if key in changed and not values[other] and algorithms.is_read(c, other):
      nothing = "''" if values[other] == '' else 0
      raise ConfigError(
        f'{key}={values[key]} does nothing with {other}={nothing}: set {other}, or leave {key} out'
      )


def _unread_choices(c: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns {changed key that the chosen value of another key does not read: the reason}."""
  values, usual, out = flat(c), flat(default()), {}
  for key, other, readers in choices.only_with():
    chosen = values[other]
    is_unread = chosen not in readers and not named_object.is_named(chosen)
    if is_unread and values[key] != usual[key]:
      out[key] = (
        f'{key}={values[key]} does nothing with {other}={chosen}; it is for {", ".join(readers)}'
      )
  return out


def unread_optimizer_keys(c: ml_collections.ConfigDict) -> list[str]:
  """Returns a line for each key of the optimizer that is set and not read. These are allowed: with
  optim.name on the command line the keys of a config file for another optimizer are still there.
  """
  return [reason for key, reason in _unread_choices(c).items() if key.startswith('optim.')]


def _check_step(c: ml_collections.ConfigDict) -> None:
  """Refuses settings of SAM and of rates by depth that cannot be meant."""
  if not 0 < c.optim.layer_decay <= 1:
    raise ConfigError(
      f'optim.layer_decay={c.optim.layer_decay}; expected more than 0 and at most 1, a factor of '
      "the learning rate of the layer above; ULMFiT's 2.6 is 0.385 here"
    )
  if c.optim.sam_radius and c.model.param_dtype != 'float32':
    raise ConfigError(
      f'optim.sam_radius={c.optim.sam_radius} needs model.param_dtype=float32: in bfloat16 most '
      'weights would not move by so little'
    )
  if c.optim.sam_radius and algorithms.of(c).on_rollouts:
    raise ConfigError(
      f'optim.sam_radius={c.optim.sam_radius} with algorithm={c.algorithm}: ratios to the '
      'sampler hold where it sampled, not where the second gradient is taken; leave it at 0'
    )


def _check_precision(c: ml_collections.ConfigDict) -> None:
  """Refuses 8-bit moments where there are none, and a rounding of float32 parameters."""
  name, able = c.optim.name, [n for n, row in choices.OPTIMIZERS.items() if row.takes_8bit]
  if c.optim.moments == '8bit' and name not in able:
    raise ConfigError(
      f'optim.moments=8bit with optim.name={name}: only {", ".join(able)} can hold their moments '
      'in 8 bits; set optim.moments=float32'
    )
  if c.optim.moments == '8bit' and name == 'sgd' and not c.optim.b1:
    raise ConfigError(
      'optim.moments=8bit does nothing with optim.name=sgd and optim.b1=0, which has no momentum: '
      'leave it out'
    )
  if c.optim.rounding == 'stochastic' and c.model.param_dtype != 'bfloat16':
    raise ConfigError(
      f'optim.rounding=stochastic with model.param_dtype={c.model.param_dtype}: only bfloat16 '
      'parameters are rounded; set model.param_dtype=bfloat16, or leave optim.rounding out'
    )


def _check_eval(c: ml_collections.ConfigDict) -> None:
  specs = task_specs.parse_all(c.eval.tasks)
  names = [s.name for s in specs if s.kind not in (task_specs.LM_EVAL, task_specs.LM_EVAL_CHAT)]
  if unknown := [name for name in c.eval.in_loop if name not in names]:
    raise ConfigError(
      f'eval.in_loop: {unknown[0]!r}; expected names of eval.tasks, without those of lm-eval: '
      f'{names}'
    )
  if len(set(c.eval.in_loop)) < len(c.eval.in_loop):
    raise ConfigError(f'eval.in_loop={c.eval.in_loop}; expected each name once')
  if c.eval.in_loop and not c.eval.every:
    raise ConfigError('eval.in_loop needs eval.every: the steps between two evaluations')
  if not 0 < c.eval.max_share <= 1:
    raise ConfigError(f'eval.max_share={c.eval.max_share}; expected a share in (0, 1]')
  if c.eval.num_beams > 1 and (c.eval.temperature or c.eval.samples > 1):
    raise ConfigError(
      f'eval.num_beams={c.eval.num_beams} with eval.temperature={c.eval.temperature} and '
      f'eval.samples={c.eval.samples}: a beam search draws nothing; leave these at 0 and 1'
    )
  if c.eval.samples > 1 and not c.eval.temperature:
    raise ConfigError(
      f'eval.samples={c.eval.samples} with eval.temperature=0 would give equal completions; set '
      'eval.temperature, for example to 0.7'
    )
  for key in ('stop', 'shots_from'):
    if wrong := [entry for entry in c.eval[key] if not isinstance(entry, str) or not entry]:
      raise ConfigError(f'eval.{key}: got {wrong[0]!r}, expected texts that are not empty')
  for entry in c.eval.shots_from:
    name, equals, path = entry.partition('=')
    if not equals or not path or name not in names:
      raise ConfigError(
        f'eval.shots_from: {entry!r}; expected task=path with a name of eval.tasks, {names}'
      )
  sources = [entry.partition('=')[0] for entry in c.eval.shots_from]
  if len(set(sources)) < len(sources):
    raise ConfigError(f'eval.shots_from={c.eval.shots_from}; expected one source of each task')
  if c.eval.shots_from and not c.eval.shots:
    raise ConfigError('eval.shots_from is given and eval.shots is 0: set eval.shots')


def _check_metric(c: ml_collections.ConfigDict) -> None:
  """Refuses a best_metric that is not measured, or is better in the other direction."""
  metric, measured = c.checkpoint.best_metric, algorithms.of(c).measured(c)
  known = (*(f'eval/{name}' for name in measured), *_TRAIN_METRICS)
  if metric.startswith(tuple(f'eval/{task}/' for task in c.eval.in_loop)):
    return  # which figures a task has, and which way they are better, its kind knows
  if metric not in ('', *known):
    raise ConfigError(
      f'checkpoint.best_metric={metric!r}; expected one of {known}, which {c.algorithm} measures, '
      'or eval/TASK/METRIC of a task of eval.in_loop'
    )
  if measured.get(metric.removeprefix('eval/')) == 'max' and c.checkpoint.best_mode == 'min':
    raise ConfigError(
      f'checkpoint.best_metric={metric} is better when it is larger: set checkpoint.best_mode=max'
    )
  if metric.startswith('eval/') and not (c.data.eval or c.data.eval_fraction):
    raise ConfigError(f'checkpoint.best_metric={metric} needs data.eval or data.eval_fraction')
  if metric and not c.eval.every:
    raise ConfigError(
      f'checkpoint.best_metric={metric} needs eval.every: it is read when the model is evaluated'
    )


def _check_plateau(c: ml_collections.ConfigDict) -> None:
  """Refuses a plateau rule that cannot act, and its other keys without it."""
  o, usual = c.optim, default().optim
  if not 0 < o.plateau_factor <= 1:
    raise ConfigError(
      f'optim.plateau_factor={o.plateau_factor}; expected more than 0 and less than 1, or 1 for '
      'no plateau rule'
    )
  if o.plateau_factor == 1:
    for key in ('plateau_patience', 'plateau_min'):
      if o[key] != usual[key]:
        raise ConfigError(
          f'optim.{key}={o[key]} does nothing with optim.plateau_factor=1: set '
          f'optim.plateau_factor, for example to 0.5, or leave optim.{key} out'
        )
    return
  if not 0 <= o.plateau_min < 1:
    raise ConfigError(
      f"optim.plateau_min={o.plateau_min}; expected a share of the schedule's rate in [0, 1)"
    )
  if not c.checkpoint.best_metric:
    raise ConfigError(
      f'optim.plateau_factor={o.plateau_factor} needs checkpoint.best_metric, for example '
      'eval/loss: the metric that has to improve'
    )
  if 0 < c.checkpoint.patience <= o.plateau_patience:
    raise ConfigError(
      f'optim.plateau_patience={o.plateau_patience} with checkpoint.patience='
      f'{c.checkpoint.patience}: training ends before the learning rate falls; expected fewer'
    )


def _check_dpo(c: ml_collections.ConfigDict) -> None:
  if c.dpo.beta <= 0 or not 0 <= c.dpo.label_smoothing < 0.5:
    raise ConfigError(
      f'dpo.beta={c.dpo.beta}, dpo.label_smoothing={c.dpo.label_smoothing}; expected a positive '
      'number, and one in [0, 0.5)'
    )
  if c.dpo.loss == 'exo' and not c.dpo.label_smoothing:
    raise ConfigError(
      'dpo.loss=exo with dpo.label_smoothing=0: the loss is infinite; expected more, for example '
      '0.001'
    )
  if c.dpo.tau <= 0:
    raise ConfigError(f'dpo.tau={c.dpo.tau}; expected a positive number')


def _check_rollout(c: ml_collections.ConfigDict) -> None:
  r = c.rollout
  if not r.rewards:
    raise ConfigError("rollout.rewards is empty: name a reward, for example 'math@1'")
  if isinstance(r.stop, str) or not all(isinstance(s, str) and s for s in r.stop):
    raise ConfigError(f'rollout.stop={r.stop!r}; expected a tuple of texts')
  if r.temperature <= 0:
    raise ConfigError(
      f'rollout.temperature={r.temperature}; expected more than 0: equal completions give no signal'
    )
  for key in ('reward_limit', 'function_limit'):
    if r[key] <= 0:
      raise ConfigError(f'rollout.{key}={r[key]}; expected seconds, more than 0')
  if not 0 < r.top_p <= 1:
    raise ConfigError(f'rollout.top_p={r.top_p}; expected more than 0 and at most 1')
  if r.max_tokens >= max_example(c):
    shared = algorithms.of(c).completions_per_row
    half = f' / {shared}: {shared} completions share a row' if shared > 1 else ''
    raise ConfigError(
      f'rollout.max_tokens={r.max_tokens} leaves no room for a prompt in seq_len={c.seq_len}{half}'
    )
  if c.data.eval_fraction:
    raise ConfigError('data.eval_fraction cannot split prompts: give held-out ones in data.eval')
  if choices.OVERLENGTH[c.data.on_overlength].truncates:
    allowed = ' or '.join(k for k, row in choices.OVERLENGTH.items() if not row.truncates)
    raise ConfigError(
      f'data.on_overlength={c.data.on_overlength!r}: prompts are not truncated; expected {allowed}'
    )
  if r.redraws and (r.group < 2 or not algorithms.of(c).is_relative(c)):
    raise ConfigError(
      f'rollout.redraws={r.redraws}: prompts whose completions all have one reward are replaced '
      'only where completions are compared with others of their prompt; elsewhere that would '
      'select prompts by their outcome'
    )
  if rows_per_rollout(c) % r.minibatches:
    raise ConfigError(
      f'rollout.minibatches={r.minibatches} must divide the {rows_per_rollout(c)} rows of a rollout'
    )


def _check_policy(c: ml_collections.ConfigDict) -> None:
  r, p = c.rollout, c.policy
  if p.correction != 'none' and (r.top_k or r.top_p < 1):
    raise ConfigError(
      f'policy.correction={p.correction} with rollout.top_k={r.top_k}, top_p={r.top_p}: the '
      'ratio needs a sampler that can choose every token; set top_k=0 and top_p=1, or '
      'correction=none'
    )
  if not 0 <= p.correction_low <= 1 <= p.correction_high:
    raise ConfigError(
      f'policy.correction_low={p.correction_low}, correction_high={p.correction_high} must hold 1'
    )
  if p.kl_target and not p.kl_coef:
    raise ConfigError(
      f'policy.kl_target={p.kl_target} with policy.kl_coef=0: set policy.kl_coef, the '
      'coefficient of the first rollout'
    )
  if p.clip_low > 1:
    raise ConfigError(
      f'policy.clip_low={p.clip_low}: the ratio stays above 1 - clip_low; expected at most 1'
    )
  if not 0 < p.kl_gain <= 1:
    raise ConfigError(
      f'policy.kl_gain={p.kl_gain}; expected more than 0 and at most 1, so that the coefficient '
      'moves by at most a fifth'
    )
  if p.level == 'trajectory' and p.aggregate != 'sequence':
    raise ConfigError(
      f'policy.level=trajectory with policy.aggregate={p.aggregate} counts a completion by its '
      'length squared: its ratio stands on every token; set aggregate=sequence'
    )
  if p.dual_clip and p.dual_clip <= 1 + p.clip_high:
    raise ConfigError(
      f'policy.dual_clip={p.dual_clip}; expected more than 1 + policy.clip_high = '
      f'{1 + p.clip_high}, or 0 for none'
    )
  if p.overlong > r.max_tokens:
    raise ConfigError(
      f'policy.overlong={p.overlong} is more than rollout.max_tokens={r.max_tokens}'
    )
  if p.surrogate == 'reinforce' and steps_per_batch(c) > 1:
    raise ConfigError(
      'policy.surrogate=reinforce holds for the first update alone: set rollout.updates=1 and '
      'rollout.minibatches=1, or take clip or cispo'
    )
