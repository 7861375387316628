"""The table of the training algorithms: one record each, with all that the rest of the program asks
of an algorithm. Everything but this table is written without the name of an algorithm.

An algorithm outside of this package is a record of its own, named `algorithm='module:RECORD'`."""

from ftjax.config import choices, distill_settings, label_algorithms
from ftjax.config.algorithm_record import REWARD, Algorithm, Auxiliary, Config
from ftjax.runtime import named_object
from ftjax.runtime.errors import ConfigError

# Log-probs of both completions of a row under the reference, where they come with the batches.
REFERENCE_FIELDS = ('ref_first', 'ref_second')


# Parts that several rows share.

_BY_SHAPE = {
  'text': (('loss',), ('loss', 'perplexity')),
  'pair': (('loss', 'rewards/accuracy', 'rewards/margin'), ('accuracy', 'margin', 'loss')),
  'label': (
    ('loss', 'rewards/chosen', 'rewards/rejected'),
    ('loss', 'rewards/chosen', 'rewards/rejected'),
  ),
  'score': (('loss', 'error/absolute'), ('loss', 'unexplained')),
}


def _measured_on_examples(example: str) -> dict[str, str]:
  of_pairs = {'accuracy': 'max', 'margin': 'max'} if example == 'pair' else {}
  return {'loss': 'min', 'gap': 'min'} | of_pairs


_TRAINED_ON_ROLLOUTS = dict(
  on_rollouts=True,
  measured=lambda c: {'reward': 'max'},
  headline=lambda c: (('reward', 'length'), ('reward',)),
  fixed=('rollout.group', 'rollout.max_tokens', 'rollout.updates', 'rollout.minibatches'),
)
_ROLLOUT_ARRAYS = ('rollout.temperature', 'rollout.rewards', 'rollout.reward_model')
_ROLLOUT_ARRAYS += ('rollout.step_reward', 'rollout.step_separator')
_POLICY_ARRAYS = ('policy.kl', 'policy.kl_coef', 'policy.kl_target', 'policy.overlong')


def _reward_model(c: Config) -> tuple[Auxiliary, ...]:
  of_steps = bool(c.rollout.step_reward)
  rewarder = Auxiliary(
    *('reward model', 'rollout', 'rollout.reward_model'),
    has_score=not of_steps,
    scores_steps=of_steps,
  )
  return (rewarder,) if c.rollout.reward_model else ()


def _preference_reference(c: Config) -> tuple[Auxiliary, ...]:
  place = {'step': 'state', 'cache': 'cache'}[c.dpo.reference]
  reference = Auxiliary('reference', place)
  return (reference,) if choices.preference_loss(c.dpo.loss).needs_reference else ()


def _policy_reference(c: Config) -> tuple[Auxiliary, ...]:
  return (Auxiliary('reference', 'rollout'),) if c.policy.kl_coef > 0 else ()


def _policy_fields(c: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
  ref = c.policy.kl_coef > 0 and c.policy.kl != 'reward'
  old = ('old_logp',) if steps_per_batch(c) > 1 else ()
  by_token = ('advantages', 'sampler_logp', *old, *(('ref_logp',) if ref else ()))
  return by_token, ('kl_coef',) if ref and c.policy.kl_target else ()


def _policy_needs_old_logp(c: Config) -> bool:
  return steps_per_batch(c) > 1 or (c.policy.kl_coef > 0 and c.policy.kl == 'reward')


# Rows.

# Keys of data for rows whose tokens have weights of their own, and whose questions may be altered.
_WEIGHED = ('data.balance',)
_ALTERED = ('data.augment', 'data.augment_copies', 'data.augment_templates')

_SFT = Algorithm(
  module='ftjax.algorithms.sft',
  measured=lambda c: {'loss': 'min', 'gap': 'min', 'perplexity': 'min'},
  headline=lambda c: _BY_SHAPE['text'],
  reads=('loss', 'data.packing', 'data.loss_on', *_WEIGHED, *_ALTERED),
  fixed=('data.packing', 'data.loss_on', *_WEIGHED, *_ALTERED),
)


def _distill_auxiliary(c: Config) -> tuple[Auxiliary, ...]:
  teacher = Auxiliary('teacher', 'state', 'distill.teacher', has_own_architecture=True)
  return () if c.distill.file else (teacher,)


_DISTILL = Algorithm(
  module='ftjax.algorithms.distill',
  measured=lambda c: {'loss': 'min', 'gap': 'min', 'perplexity': 'min'},
  headline=lambda c: (('loss', 'divergence'), ('loss', 'perplexity')),
  reads=(
    *('distill', *distill_settings.ROLLOUT_KEYS),
    *('data.packing', 'data.loss_on', *_WEIGHED, *_ALTERED),
  ),
  wide=distill_settings.wide,
  auxiliary=_distill_auxiliary,
  fixed=('data.packing', 'data.loss_on', *_WEIGHED, *_ALTERED),
  check=distill_settings.check,
)


def _dpo_example(c: Config) -> str:
  return 'pair' if choices.preference_loss(c.dpo.loss).paired else 'label'


def _dpo_fields(c: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
  is_cached = any(a.place == 'cache' for a in _preference_reference(c))
  return (), ('values', *(REFERENCE_FIELDS if is_cached else ()))


def _check_preference_loss(c: Config) -> None:
  """Refuses a loss that compares the examples of a step where a step has parts, or one example."""
  if not choices.preference_loss(c.dpo.loss).whole_step:
    return
  if c.grad_accum > 1:
    raise ConfigError(
      f'dpo.loss={c.dpo.loss} with grad_accum={c.grad_accum}: it compares the examples of the '
      'whole step with each other; set grad_accum=1, and remat=full to save memory'
    )
  if c.batch_size < 2 or c.eval.batch_size < 2:
    raise ConfigError(f'dpo.loss={c.dpo.loss} needs batch_size and eval.batch_size of at least 2')


def _check_dpo(c: Config) -> None:
  if not choices.preference_loss(c.dpo.loss).paired and c.dpo.reference == 'cache':
    raise ConfigError(
      f'dpo.reference=cache is for losses of pairs, and dpo.loss={c.dpo.loss} is not one of them: '
      'leave it at step'
    )
  _check_preference_loss(c)


_DPO = Algorithm(
  module='ftjax.algorithms.dpo',
  measured=lambda c: _measured_on_examples(_dpo_example(c)),
  headline=lambda c: _BY_SHAPE[_dpo_example(c)],
  reads=('dpo',),
  example=_dpo_example,
  fields=_dpo_fields,
  auxiliary=_preference_reference,
  check=_check_dpo,
)


def _reward_model_example(c: Config) -> str:
  return choices.REWARD_OBJECTIVES[c.reward_model.objective].example


def _check_reward_model(c: Config) -> None:
  if c.eval.tasks or c.eval.prompts or c.eval.general:
    raise ConfigError(
      'eval.tasks, eval.prompts and eval.general ask for text, which a reward model cannot write'
    )


_REWARD_MODEL = Algorithm(
  module='ftjax.algorithms.reward_model',
  measured=lambda c: _measured_on_examples(_reward_model_example(c)),
  headline=lambda c: _BY_SHAPE[_reward_model_example(c)],
  reads=('reward_model',),
  example=_reward_model_example,
  fields=lambda c: ((), ('values',)),
  labels=lambda c: REWARD,
  check=_check_reward_model,
)


def _grpo_is_relative(c: Config) -> bool:
  return choices.ADVANTAGES[c.grpo.advantage].is_relative


def _check_grpo(c: Config) -> None:
  if c.rollout.group < 2 and _grpo_is_relative(c):
    raise ConfigError(
      f'rollout.group={c.rollout.group}: grpo.advantage={c.grpo.advantage} compares the '
      'completions of a prompt; expected at least 2'
    )


_GRPO = Algorithm(
  module='ftjax.algorithms.grpo',
  reads=('rollout', 'policy', 'grpo'),
  is_relative=_grpo_is_relative,
  fields=_policy_fields,
  needs_old_logp=_policy_needs_old_logp,
  auxiliary=lambda c: (*_policy_reference(c), *_reward_model(c)),
  fixed_in_rollout=(*_ROLLOUT_ARRAYS, *_POLICY_ARRAYS, 'grpo.advantage'),
  check=_check_grpo,
  **_TRAINED_ON_ROLLOUTS,
)


def _ppo_fields(c: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
  by_token, by_row = _policy_fields(c)
  return (*by_token, 'returns', 'old_values'), by_row


def _ppo_auxiliary(c: Config) -> tuple[Auxiliary, ...]:
  value = Auxiliary('value', 'state', 'ppo.value_from', is_trained=True, has_score=True)
  return (*_policy_reference(c), value, *_reward_model(c))


def _check_ppo(c: Config) -> None:
  if not (0 < c.ppo.gamma <= 1 and 0 <= c.ppo.lam <= 1):
    raise ConfigError(
      f'ppo.gamma={c.ppo.gamma}, ppo.lam={c.ppo.lam}; expected gamma in (0, 1] and lam in [0, 1]'
    )
  if (c.policy.aggregate, c.policy.level) != ('token', 'token'):
    raise ConfigError(
      f'policy.aggregate={c.policy.aggregate}, policy.level={c.policy.level}: PPO has advantages '
      'and a value loss of every token, so expected token for both'
    )


_PPO = Algorithm(
  module='ftjax.algorithms.ppo',
  reads=('rollout', 'policy', 'ppo'),
  fields=_ppo_fields,
  needs_old_logp=_policy_needs_old_logp,
  auxiliary=_ppo_auxiliary,
  fixed_in_rollout=(
    *_ROLLOUT_ARRAYS,
    *_POLICY_ARRAYS,
    *('ppo.value_from', 'ppo.gamma', 'ppo.lam', 'ppo.whiten'),
  ),
  check=_check_ppo,
  **_TRAINED_ON_ROLLOUTS,
)


def _check_chooses(c: Config, least: int) -> None:
  if c.rollout.group < least:
    raise ConfigError(
      f'rollout.group={c.rollout.group}: {c.algorithm} chooses among the completions of a prompt; '
      f'expected at least {least}'
    )


_BEST_OF_N = Algorithm(
  module='ftjax.algorithms.best_of_n',
  reads=('rollout', 'best_of_n'),
  rows_per_prompt=lambda c: c.best_of_n.keep,
  is_relative=lambda c: True,
  auxiliary=_reward_model,
  fixed_in_rollout=(*_ROLLOUT_ARRAYS, 'best_of_n.keep'),
  check=lambda c: _check_chooses(c, c.best_of_n.keep),
  **_TRAINED_ON_ROLLOUTS,
)


def _check_online_dpo(c: Config) -> None:
  if c.dpo.reference == 'cache':
    raise ConfigError(
      'dpo.reference=cache: online_dpo makes its pairs during training; leave it at step'
    )
  if not choices.preference_loss(c.dpo.loss).paired:
    raise ConfigError(f'dpo.loss={c.dpo.loss} takes single completions, and online_dpo makes pairs')
  _check_preference_loss(c)
  _check_chooses(c, 2)


_ONLINE_DPO = Algorithm(
  module='ftjax.algorithms.online_dpo',
  reads=('rollout', 'dpo'),
  example=lambda c: 'pair',
  rows_per_prompt=lambda c: 1,
  completions_per_row=2,
  is_relative=lambda c: True,
  fields=_dpo_fields,
  auxiliary=lambda c: (*_preference_reference(c), *_reward_model(c)),
  fixed_in_rollout=_ROLLOUT_ARRAYS,
  check=_check_online_dpo,
  **_TRAINED_ON_ROLLOUTS,
)

_SPAN_KEYS = ('span_corruption.density', 'span_corruption.mean_length')
# The loss without neftune, which adds noise to what a decoder reads.
_SOURCE_LOSS = ('loss.label_smoothing', 'loss.z_loss', 'loss.dynamic')
_SEQ2SEQ = Algorithm(
  module='ftjax.algorithms.seq2seq',
  measured=lambda c: {'loss': 'min', 'gap': 'min', 'perplexity': 'min'},
  headline=lambda c: _BY_SHAPE['text'],
  reads=('seq2seq', *_SOURCE_LOSS, 'data.packing', *_WEIGHED, *_ALTERED),
  example=lambda c: 'source_target',
  reads_source=True,
  fixed=('data.packing', 'seq2seq.source_len', *_WEIGHED, *_ALTERED),
)


def _check_span_corruption(c: Config) -> None:
  own = c.span_corruption
  if not 0 < own.density < 1 or own.mean_length < 1:
    raise ConfigError(
      f'span_corruption.density={own.density}, span_corruption.mean_length={own.mean_length}; '
      'expected a share between 0 and 1, and at least 1 token'
    )


_SPAN_CORRUPTION = Algorithm(
  module='ftjax.algorithms.span_corruption',
  measured=lambda c: {'loss': 'min', 'gap': 'min', 'perplexity': 'min'},
  headline=lambda c: _BY_SHAPE['text'],
  reads=('seq2seq', 'span_corruption', *_SOURCE_LOSS, 'data.packing'),
  example=lambda c: 'document',
  reads_source=True,
  fixed=('data.packing', 'seq2seq.source_len', *_SPAN_KEYS),
  check=_check_span_corruption,
)

ALGORITHMS: dict[str, Algorithm] = {
  'sft': _SFT,
  'dpo': _DPO,
  'reward_model': _REWARD_MODEL,
  'grpo': _GRPO,
  'ppo': _PPO,
  'best_of_n': _BEST_OF_N,
  'online_dpo': _ONLINE_DPO,
  'distill': _DISTILL,
  'seq2seq': _SEQ2SEQ,
  'span_corruption': _SPAN_CORRUPTION,
} | label_algorithms.ROWS


def find(name: str) -> Algorithm:
  """Returns the record of a name in ALGORITHMS, or of a 'package.module:RECORD'.

  Raises:
    ConfigError: there is none.
  """
  if name in ALGORITHMS:
    return ALGORITHMS[name]
  if not named_object.is_named(name):
    raise ConfigError(f"algorithm={name!r}; expected one of {tuple(ALGORITHMS)} or 'module:RECORD'")
  return named_object.instance('algorithm', name, Algorithm)


def of(c: Config) -> Algorithm:
  """Returns the record of a config's algorithm."""
  return find(c.algorithm)


def auxiliary(c: Config, name: str) -> Auxiliary | None:
  """Returns a run's auxiliary model of this name; None where it has none."""
  return next((a for a in of(c).auxiliary(c) if a.name == name), None)


def place(c: Config, name: str) -> str:
  """Returns `Auxiliary.place` of an auxiliary model; '' where a run has none of this name."""
  found = auxiliary(c, name)
  return found.place if found else ''


def is_packed(c: Config) -> bool:
  """Returns whether several examples share a row."""
  return c.data.packing and 'data.packing' in of(c).reads


def source_len(c: Config) -> int:
  """Returns the tokens that an encoder reads in a row of the batch; 0 for other algorithms."""
  return (c.seq2seq.source_len or c.seq_len) if of(c).reads_source else 0


def is_read(c: Config, key: str) -> bool:
  """Returns whether the algorithm reads a section, or a key, that not every algorithm does."""
  section = key.partition('.')[0]
  return not {key, section}.isdisjoint(of(c).reads)


def steps_per_batch(c: Config) -> int:
  """Returns the optimizer updates on batch_size rows, or on the rollout of that many prompts."""
  return c.rollout.updates * c.rollout.minibatches if of(c).on_rollouts else 1


def rows_per_rollout(c: Config) -> int:
  """Returns the rows of the arrays that a rollout trains on."""
  return c.batch_size * of(c).rows_per_prompt(c)


def prompts_per_rollout(c: Config) -> int:
  """Returns the prompts, or rows, that are taken from the data for steps_per_batch updates."""
  return c.batch_size * (1 + (c.rollout.redraws if of(c).on_rollouts else 0))


def documents_per_row(c: Config) -> int | None:
  """Returns the most documents that a row holds; None: as many as find room."""
  shapes = of(c).documents(c)
  return min(shape[0] for shape in shapes.values()) if shapes else None


def max_example(c: Config) -> int:
  """Returns the most tokens that a prompt and its completion may have together."""
  return c.seq_len // of(c).completions_per_row


def rows_per_step(c: Config) -> int:
  """Returns the rows of the arrays of an optimizer update; a micro-batch has R / grad_accum."""
  if of(c).on_rollouts:
    return rows_per_rollout(c) // c.rollout.minibatches
  return c.batch_size
