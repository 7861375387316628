"""Sections of a config for the algorithms beside supervised tuning: their keys with defaults, what
may stand in them, and what may not stand together. config.py puts them in and calls `check`."""

import ml_collections
from ml_collections import config_dict

from ftjax.config.section import Section
from ftjax.runtime.errors import ConfigError

ALGORITHMS = ('sft', 'dpo', 'reward_model', 'grpo', 'ppo', 'best_of_n', 'online_dpo')
# They train on what the model says to prompts, the first of them by the policy gradient.
POLICY_GRADIENT = ('grpo', 'ppo')
ON_ROLLOUTS = (*POLICY_GRADIENT, 'best_of_n', 'online_dpo')

# What evaluations measure, by algorithm; and what of it is better when it is larger.
_OF_PAIRS = ('loss', 'gap', 'accuracy', 'margin')
MEASURED = {
  'sft': ('loss', 'gap', 'perplexity'),
  'dpo': _OF_PAIRS,
  'reward_model': _OF_PAIRS,
} | dict.fromkeys(ON_ROLLOUTS, ('reward',))
LARGER = ('accuracy', 'margin', 'reward')

CHOICES = {
  'dpo.loss': (
    'sigmoid',
    'sigmoid_norm',
    'ipo',
    'hinge',
    'robust',
    'simpo',
    'cpo',
    'orpo',
    'kto',
  ),
  'dpo.reference': ('step', 'cache'),
  'reward_model.objective': ('pairs', 'scores'),
  'policy.surrogate': ('clip', 'cispo', 'reinforce'),
  'policy.level': ('token', 'sequence', 'trajectory'),
  'policy.aggregate': ('token', 'sequence', 'constant'),
  'policy.kl': ('k2', 'k3', 'k3_is', 'reward'),
  'policy.correction': (
    'none',
    'token_truncate',
    'token_mask',
    'sequence_truncate',
    'sequence_mask',
  ),
  'grpo.advantage': ('grpo', 'dr_grpo', 'rloo', 'reinforce_pp_baseline', 'reinforce_pp'),
}
POSITIVE = (
  'rollout.group',
  'rollout.max_tokens',
  'rollout.slots',
  'rollout.updates',
  'rollout.minibatches',
  'best_of_n.keep',
)
NOT_NEGATIVE = (
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


# Which algorithms read a section; for which values of another key a key says anything; and which
# key says nothing where another is 0.
_READERS = {
  'dpo': ('dpo', 'online_dpo'),
  'reward_model': ('reward_model',),
  'rollout': ON_ROLLOUTS,
  'policy': POLICY_GRADIENT,
  'grpo': ('grpo',),
  'ppo': ('ppo',),
  'best_of_n': ('best_of_n',),
}
_ONLY_WITH = (
  ('dpo.label_smoothing', 'dpo.loss', ('sigmoid', 'robust', 'simpo', 'cpo')),
  ('dpo.gamma', 'dpo.loss', ('simpo',)),
  ('dpo.reference', 'dpo.loss', ('sigmoid', 'sigmoid_norm', 'ipo', 'hinge', 'robust')),
  ('dpo.nll_coef', 'dpo.loss', ('simpo', 'cpo')),
  ('dpo.desirable', 'dpo.loss', ('kto',)),
  ('dpo.undesirable', 'dpo.loss', ('kto',)),
  ('reward_model.centring', 'reward_model.objective', ('pairs',)),
  ('policy.dual_clip', 'policy.surrogate', ('clip',)),
  ('policy.clip_low', 'policy.surrogate', ('clip',)),
  ('policy.clip_high', 'policy.surrogate', ('clip', 'cispo')),
  ('policy.level', 'policy.surrogate', ('clip', 'cispo')),
  ('policy.correction_low', 'policy.correction', CHOICES['policy.correction'][1:]),
  ('policy.correction_high', 'policy.correction', CHOICES['policy.correction'][1:]),
)
_NEEDS = (('policy.kl', 'policy.kl_coef'), ('policy.kl_gain', 'policy.kl_target'))


def add(c: ml_collections.ConfigDict) -> None:
  """Puts the sections into a config."""
  c.dpo = Section()
  c.dpo.loss = 'sigmoid'  # sigmoid is DPO's; the others are described in docs/preference.md
  c.dpo.beta = 0.1  # strength of the pull to the reference
  # Where the reference's log-probs come from: computed in each step, or once before the first one.
  c.dpo.reference = 'step'
  c.dpo.label_smoothing = 0.0  # assumed share of flipped labels, in [0, 0.5)
  c.dpo.gamma = 0.0  # margin of simpo, in rewards
  c.dpo.nll_coef = 0.0  # weight of the chosen completion's likelihood in cpo and simpo
  c.dpo.desirable = 1.0  # weight of desirable completions in kto
  c.dpo.undesirable = 1.0  # weight of undesirable completions in kto

  c.reward_model = Section()
  c.reward_model.objective = 'pairs'  # pairs: Bradley-Terry; scores: squared error
  c.reward_model.centring = 0.0  # weight of (sum of a pair's rewards)^2; 0.01 is usual

  # For algorithms that train on completions of the model.
  c.rollout = Section()
  c.rollout.group = 8  # completions of each prompt
  c.rollout.max_tokens = 256  # most tokens of a completion
  c.rollout.temperature = 1.0  # of sampling, and of the log-probs that are trained
  c.rollout.top_k = 0  # sample among the k likeliest tokens; 0: all
  c.rollout.top_p = 1.0  # sample among the likeliest tokens of this probability in all; 1: all
  c.rollout.slots = 64  # sequences decoded at once
  c.rollout.stop = ()  # texts that end a completion
  # (name, weight) pairs, or one text like 'math@1,format:think,answer@0.2': docs/rewards.md.
  c.rollout.rewards = config_dict.FieldReference((), field_type=object)
  # Folder of the reward `model` (export/ of a run with algorithm=reward_model); '': none.
  c.rollout.reward_model = ''
  c.rollout.reward_limit = 1.0  # seconds for one completion in a built-in reward that may hang
  c.rollout.function_limit = 60.0  # seconds for one call of a user's reward function
  c.rollout.max_failed = 3  # rollouts in a row without one reward that end the run; 0: never
  # Times that prompts with a zero-variance group are replaced by others (DAPO's dynamic sampling);
  # so many batches of prompts are reserved for each rollout.
  c.rollout.redraws = 0
  c.rollout.updates = 1  # passes over a rollout
  c.rollout.minibatches = 1  # optimizer updates in each pass
  c.rollout.samples = 8  # completions of a rollout that are kept in rollouts/<number>.jsonl

  # The policy-gradient loss.
  c.policy = Section()
  c.policy.surrogate = 'clip'  # form of the loss; clip is PPO's
  c.policy.level = 'token'  # what a ratio is taken over: token, sequence (GSPO), trajectory
  c.policy.clip_low = 0.2  # the ratio stays above 1 - clip_low
  c.policy.clip_high = 0.2  # the ratio stays below 1 + clip_high
  c.policy.dual_clip = 0.0  # largest ratio with a negative advantage; 0: none
  # Mean over all tokens, over the means of the completions (sequence), or by a constant length.
  c.policy.aggregate = 'token'
  # Divergence from the initial model: a loss term k2, k3 or k3_is; reward: k1, subtracted from the
  # reward.
  c.policy.kl = 'k3_is'
  c.policy.kl_coef = 0.0  # weight of that divergence; 0: no copy of the initial model is held
  # Nats per token that the weight is adapted to, once a rollout; 0: the weight is fixed.
  c.policy.kl_target = 0.0
  c.policy.kl_gain = 0.1  # speed of that adaptation; a change is at most a fifth of it
  c.policy.entropy_coef = 0.0  # weight of the entropy bonus
  # Importance weights for a sampler whose log-probs differ from the trainer's.
  c.policy.correction = 'none'
  c.policy.correction_low = 0.0  # lower bound of that weight
  c.policy.correction_high = 2.0  # upper bound of that weight
  c.policy.overlong = 0  # last tokens before max_tokens with a penalty, up to 1; 0: none

  c.grpo = Section()
  # How advantages are computed: all but reinforce_pp are relative to the prompt's group.
  c.grpo.advantage = 'grpo'

  c.ppo = Section()
  # Reward model that the value model starts from, an export folder; '': the policy, with value 0.
  c.ppo.value_from = ''
  c.ppo.gamma = 1.0  # discount per token
  c.ppo.lam = 0.95  # lambda of generalized advantage estimation
  c.ppo.whiten = True  # advantages of a rollout are scaled to mean 0 and variance 1
  c.ppo.value_coef = 0.1  # weight of the value loss
  c.ppo.value_clip = 0.2  # largest change of a value on one rollout; 0: no limit

  c.best_of_n = Section()
  c.best_of_n.keep = 1  # completions of each prompt that are trained on, the best ones
  c.best_of_n.min_reward = -1e9  # completions with a smaller reward are left out


def steps_per_batch(c: ml_collections.ConfigDict) -> int:
  """Optimizer updates on what one batch_size of rows or prompts gave."""
  return c.rollout.updates * c.rollout.minibatches if c.algorithm in ON_ROLLOUTS else 1


def rows_per_rollout(c: ml_collections.ConfigDict) -> int:
  """Rows of the arrays that a rollout trains on."""
  per_prompt = {'best_of_n': c.best_of_n.keep, 'online_dpo': 1}
  return c.batch_size * per_prompt.get(c.algorithm, c.rollout.group)


def prompts_per_rollout(c: ml_collections.ConfigDict) -> int:
  """Prompts, or rows, that are taken from the data for steps_per_batch updates."""
  return c.batch_size * (1 + (c.rollout.redraws if c.algorithm in ON_ROLLOUTS else 0))


def max_example(c: ml_collections.ConfigDict) -> int:
  """Tokens that a prompt and its completion may have together."""
  return c.seq_len // 2 if c.algorithm == 'online_dpo' else c.seq_len


def rows_per_step(c: ml_collections.ConfigDict) -> int:
  """Rows of the arrays of an optimizer update, R of R / grad_accum in a micro-batch."""
  if c.algorithm in ON_ROLLOUTS:
    return rows_per_rollout(c) // c.rollout.minibatches
  return c.batch_size


def check(c: ml_collections.ConfigDict) -> None:
  """Raises ConfigError, naming the keys."""
  if c.algorithm != 'sft' and (idle := [f'loss.{k}' for k, v in c.loss.items() if v]):
    raise ConfigError(f'{idle[0]} does nothing with algorithm={c.algorithm}: leave it at 0')
  if c.algorithm != 'sft' and not c.data.packing:
    raise ConfigError(f'data.packing=False does nothing with algorithm={c.algorithm}: leave it out')
  if c.algorithm != 'sft' and c.data.loss_on != 'assistant':
    raise ConfigError(
      f'data.loss_on={c.data.loss_on} does nothing with algorithm={c.algorithm}: leave it out'
    )
  _check_idle(c)
  _check_metric(c)
  if c.algorithm in ('dpo', 'online_dpo'):
    _check_dpo(c)
  if c.algorithm == 'reward_model' and (c.eval.tasks or c.eval.prompts):
    raise ConfigError('eval.tasks and eval.prompts ask for text, which a reward model cannot write')
  if c.algorithm in ON_ROLLOUTS:
    _check_rollout(c)
    if c.algorithm in POLICY_GRADIENT:
      _check_policy(c)
    if c.algorithm == 'ppo':
      _check_ppo(c)
    if c.algorithm in ('best_of_n', 'online_dpo'):
      _check_group(c)
  if rows_per_step(c) % c.grad_accum:
    what = 'rows per update' if c.algorithm in ON_ROLLOUTS else 'batch_size'
    raise ConfigError(f'grad_accum={c.grad_accum} must divide {what}={rows_per_step(c)}')


def _check_idle(c: ml_collections.ConfigDict) -> None:
  """A setting that says nothing is a misunderstanding."""
  usual = Section()
  add(usual)

  def is_set(key: str) -> bool:
    section, name = key.split('.')
    return c[section][name] != usual[section][name]

  for section, readers in _READERS.items():
    keys = [f'{section}.{k}' for k in c[section]]
    if c.algorithm not in readers and (idle := [k for k in keys if is_set(k)]):
      raise ConfigError(f'{idle[0]} does nothing with algorithm={c.algorithm}: leave it out')
  for key, other, values in _ONLY_WITH:
    section, name = other.split('.')
    if is_set(key) and (chosen := c[section][name]) not in values:
      raise ConfigError(
        f'{key} does nothing with {other}={chosen}; it is for {", ".join(values)}: leave it out'
      )
  for key, other in _NEEDS:
    section, name = other.split('.')
    if is_set(key) and not c[section][name]:
      raise ConfigError(f'{key} does nothing with {other}=0: set {other}, or leave {key} out')


def _check_metric(c: ml_collections.ConfigDict) -> None:
  """What is watched must be measured, and better in the direction that is asked for."""
  metric, names = c.checkpoint.best_metric, MEASURED[c.algorithm]
  if (c.algorithm, c.dpo.loss) == ('dpo', 'kto') or (
    (c.algorithm, c.reward_model.objective) == ('reward_model', 'scores')
  ):
    names = tuple(name for name in names if name not in LARGER)  # no pairs
  known = (*(f'eval/{name}' for name in names), 'train/loss', 'train/grad_norm')
  if metric not in ('', *known):
    raise ConfigError(
      f'checkpoint.best_metric={metric!r}; expected one of {known}, which {c.algorithm} measures'
    )
  if metric.removeprefix('eval/') in LARGER and c.checkpoint.best_mode == 'min':
    raise ConfigError(
      f'checkpoint.best_metric={metric} is better when it is larger: set checkpoint.best_mode=max'
    )


def _check_dpo(c: ml_collections.ConfigDict) -> None:
  if c.dpo.beta <= 0 or not 0 <= c.dpo.label_smoothing < 0.5:
    raise ConfigError(
      f'dpo.beta={c.dpo.beta}, dpo.label_smoothing={c.dpo.label_smoothing}; expected a positive '
      'number, and one in [0, 0.5)'
    )
  if c.dpo.reference == 'cache' and c.algorithm == 'online_dpo':
    raise ConfigError(
      'dpo.reference=cache: online_dpo makes its pairs as it goes; leave it at step'
    )
  if c.dpo.loss != 'kto':
    return
  if c.algorithm == 'online_dpo':
    raise ConfigError('dpo.loss=kto takes single answers, online_dpo makes pairs')
  if c.grad_accum > 1:
    raise ConfigError(
      f'dpo.loss=kto with grad_accum={c.grad_accum}: its reference point is a mean over the whole '
      'step; set grad_accum=1, and remat=full to save memory'
    )
  if c.batch_size < 2 or c.eval.batch_size < 2:
    raise ConfigError('dpo.loss=kto needs batch_size and eval.batch_size of at least 2')


def _check_rollout(c: ml_collections.ConfigDict) -> None:
  r = c.rollout
  if not r.rewards:
    raise ConfigError("rollout.rewards is empty: say what is paid, for example 'math@1'")
  if isinstance(r.stop, str) or not all(isinstance(s, str) and s for s in r.stop):
    raise ConfigError(f'rollout.stop={r.stop!r}; expected a tuple of texts')
  if r.temperature <= 0:
    raise ConfigError(
      f'rollout.temperature={r.temperature}; expected more than 0: equal completions teach nothing'
    )
  for key in ('reward_limit', 'function_limit'):
    if r[key] <= 0:
      raise ConfigError(f'rollout.{key}={r[key]}; expected seconds, more than 0')
  if not 0 < r.top_p <= 1:
    raise ConfigError(f'rollout.top_p={r.top_p}; expected more than 0 and at most 1')
  if r.max_tokens >= max_example(c):
    half = ' / 2: two completions share a row' if c.algorithm == 'online_dpo' else ''
    raise ConfigError(
      f'rollout.max_tokens={r.max_tokens} leaves no room for a prompt in seq_len={c.seq_len}{half}'
    )
  if c.data.eval_fraction:
    raise ConfigError('data.eval_fraction splits no prompts: name the held-out ones in data.eval')
  if c.data.on_overlength not in ('error', 'drop'):
    raise ConfigError(
      f'data.on_overlength={c.data.on_overlength!r}: prompts are not cut; expected error or drop'
    )
  if r.redraws and (
    r.group < 2
    or c.algorithm == 'ppo'
    or (c.algorithm == 'grpo' and c.grpo.advantage == 'reinforce_pp')
  ):
    raise ConfigError(
      f'rollout.redraws={r.redraws}: prompts whose completions all earn the same may give way only '
      'where completions are compared with others of their prompt; elsewhere that would choose '
      'prompts by their outcome'
    )
  if rows_per_rollout(c) % r.minibatches:
    raise ConfigError(
      f'rollout.minibatches={r.minibatches} must divide the {rows_per_rollout(c)} rows of a rollout'
    )


def _check_policy(c: ml_collections.ConfigDict) -> None:
  r, p = c.rollout, c.policy
  if r.group < 2 and c.algorithm == 'grpo' and c.grpo.advantage != 'reinforce_pp':
    raise ConfigError(
      f'rollout.group={r.group}: grpo.advantage={c.grpo.advantage} compares the completions of a '
      'prompt; expected at least 2'
    )
  if p.correction != 'none' and (r.top_k or r.top_p < 1):
    raise ConfigError(
      f'policy.correction={p.correction} with rollout.top_k={r.top_k}, top_p={r.top_p}: a ratio to '
      'a sampler that left tokens out is none; set top_k=0 and top_p=1, or correction=none'
    )
  if not 0 <= p.correction_low <= 1 <= p.correction_high:
    raise ConfigError(
      f'policy.correction_low={p.correction_low}, correction_high={p.correction_high} must hold 1'
    )
  if p.kl_target and not p.kl_coef:
    raise ConfigError(
      f'policy.kl_target={p.kl_target} with policy.kl_coef=0: give the coefficient to begin with'
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


def _check_ppo(c: ml_collections.ConfigDict) -> None:
  if not (0 < c.ppo.gamma <= 1 and 0 <= c.ppo.lam <= 1):
    raise ConfigError(
      f'ppo.gamma={c.ppo.gamma}, ppo.lam={c.ppo.lam}; expected gamma in (0, 1] and lam in [0, 1]'
    )
  if (c.policy.aggregate, c.policy.level) != ('token', 'token'):
    raise ConfigError(
      f'policy.aggregate={c.policy.aggregate}, policy.level={c.policy.level}: PPO has advantages '
      'and a value loss of every token, so expected token for both'
    )


def _check_group(c: ml_collections.ConfigDict) -> None:
  """Of algorithms that choose among the completions of a prompt."""
  least = c.best_of_n.keep if c.algorithm == 'best_of_n' else 2
  if c.rollout.group < least:
    raise ConfigError(
      f'rollout.group={c.rollout.group}: {c.algorithm} chooses among the completions of a prompt; '
      f'expected at least {least}'
    )
