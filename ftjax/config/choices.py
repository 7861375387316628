"""The values that a config key may take, as data without jax: which other keys each value reads,
and the facts that checks need. The implementations are tables under the same names in losses/,
training/ and data/; tests/test_choices.py compares the two."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from ftjax.runtime import named_object


@dataclasses.dataclass(frozen=True)
class Choice:
  """One value of a key.

  reads: keys of the same section that this value reads and other values of the key do not.
  """

  reads: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PreferenceLoss(Choice):
  """A row of losses/preference_table.py. paired: it trains on pairs, else on labelled examples.
  whole_step: it compares the examples of a step with each other.
  """

  needs_reference: bool = True
  paired: bool = True
  whole_step: bool = False


@runtime_checkable
class PreferenceFacts(Protocol):
  """What a config asks of a preference loss; losses.preference.Row has it."""

  needs_reference: bool
  paired: bool
  whole_step: bool


@dataclasses.dataclass(frozen=True)
class Advantage(Choice):
  """A row of grpo.advantage. is_relative: it compares the completions of one prompt."""

  is_relative: bool = True


@dataclasses.dataclass(frozen=True)
class Overlength(Choice):
  """A row of data.on_overlength. truncates: it shortens examples, which prompts do not allow."""

  truncates: bool = False


@dataclasses.dataclass(frozen=True)
class RewardObjective(Choice):
  """A row of reward_model.objective. example: the shape of its training examples."""

  example: str = 'pair'


@dataclasses.dataclass(frozen=True)
class ClassObjective(Choice):
  """A row of classification.objective. problem: transformers' problem_type, '' for none. is_number:
  it learns one number and no labels.
  """

  problem: str = ''
  is_number: bool = False


@dataclasses.dataclass(frozen=True)
class Optimizer(Choice):
  """A row of optim.name. takes_8bit: it can hold its moments in 8 bits."""

  takes_8bit: bool = False


PREFERENCE_LOSSES = {
  'sigmoid': PreferenceLoss(('label_smoothing', 'reference', 'divergence')),
  'sigmoid_norm': PreferenceLoss(('reference', 'divergence')),
  'ipo': PreferenceLoss(('reference', 'divergence')),
  'hinge': PreferenceLoss(('reference', 'divergence')),
  'robust': PreferenceLoss(('label_smoothing', 'reference', 'divergence')),
  'exo': PreferenceLoss(('label_smoothing', 'reference', 'divergence')),
  'discopop': PreferenceLoss(('tau', 'reference', 'divergence')),
  'nca': PreferenceLoss(('reference',)),
  'sppo': PreferenceLoss(('reference',)),
  'apo_zero': PreferenceLoss(('reference',)),
  'apo_down': PreferenceLoss(('reference',)),
  'bco': PreferenceLoss(('reference',), whole_step=True),
  'aot': PreferenceLoss(('label_smoothing', 'reference'), whole_step=True),
  'aot_unpaired': PreferenceLoss(('label_smoothing', 'reference'), whole_step=True),
  'simpo': PreferenceLoss(('label_smoothing', 'gamma', 'nll_coef'), needs_reference=False),
  'cpo': PreferenceLoss(('label_smoothing', 'nll_coef'), needs_reference=False),
  'orpo': PreferenceLoss((), needs_reference=False),
  'kto': PreferenceLoss(('desirable', 'undesirable'), paired=False, whole_step=True),
}
# Of the policy from the reference, in losses of pairs.
PREFERENCE_DIVERGENCES = {
  'reverse_kl': Choice(),
  'forward_kl': Choice(),
  'js': Choice(),
  'alpha': Choice(('divergence_alpha',)),
}
DISTILLATIONS = {'forward_kl': Choice(), 'reverse_kl': Choice(), 'js': Choice(('beta',))}
REWARD_OBJECTIVES = {
  'pairs': RewardObjective(('centring',)),
  'scores': RewardObjective((), example='score'),
}
CLASS_OBJECTIVES = {
  'single': ClassObjective(
    ('labels', 'class_weights', 'focal_gamma', 'label_smoothing'), 'single_label_classification'
  ),
  'multi': ClassObjective(
    ('labels', 'class_weights', 'focal_gamma', 'threshold'), 'multi_label_classification'
  ),
  'regression': ClassObjective((), 'regression', is_number=True),
  'binary': ClassObjective((), is_number=True),
}
EMBEDDING_OBJECTIVES = {
  'contrastive': Choice(('temperature', 'symmetric', 'in_batch', 'negatives')),
  'margin': Choice(('margin', 'in_batch', 'negatives')),
  'cosine': Choice(),
}
SURROGATES = {
  'clip': Choice(('dual_clip', 'clip_low', 'clip_high', 'level')),
  'cispo': Choice(('clip_high', 'level')),
  'reinforce': Choice(),
}
LEVELS = dict.fromkeys(('token', 'sequence', 'trajectory'), Choice())
AGGREGATIONS = dict.fromkeys(('token', 'sequence', 'constant'), Choice())
# 'reward' is no term of the loss: the divergence is subtracted from the reward.
DIVERGENCES = dict.fromkeys(('k2', 'k3', 'k3_is', 'reward'), Choice())
_BOUNDS = Choice(('correction_low', 'correction_high'))
CORRECTIONS = {
  'none': Choice(),
  'token_truncate': _BOUNDS,
  'token_mask': _BOUNDS,
  'sequence_truncate': _BOUNDS,
  'sequence_mask': _BOUNDS,
}
ADVANTAGES = {
  'grpo': Advantage(),
  'dr_grpo': Advantage(),
  'rloo': Advantage(),
  'reinforce_pp_baseline': Advantage(),
  'reinforce_pp': Advantage(is_relative=False),
}
OPTIMIZERS = {
  'adamw': Optimizer(('b1', 'b2', 'eps'), takes_8bit=True),
  'adafactor': Optimizer(),
  'lion': Optimizer(('b1', 'b2'), takes_8bit=True),
  'muon': Optimizer(('b1', 'b2', 'eps')),
  'sgd': Optimizer(('b1',), takes_8bit=True),
}
SCHEDULES = {
  'constant': Choice(),
  'linear': Choice(('end_fraction',)),
  'cosine': Choice(('end_fraction',)),
  'wsd': Choice(('end_fraction', 'decay_steps')),
  'inverse_sqrt': Choice(),
}
OVERLENGTH = {
  'error': Overlength(),
  'drop': Overlength(),
  'truncate_left': Overlength(truncates=True),
  'truncate_right': Overlength(truncates=True),
}

_SETTINGS = ('space', 'trials', 'rungs', 'reduction')
_SEARCH = Choice(_SETTINGS)
STUDIES = {
  '': Choice(),
  'grid': Choice(('space', 'rungs', 'reduction')),
  'random': _SEARCH,
  'sobol': _SEARCH,
  'tpe': _SEARCH,
  'gp': _SEARCH,
  'kfold': Choice(('folds', 'repeats', 'stratify', 'group')),
  'learning_curve': Choice(('fractions', 'seeds', 'group')),
  'seeds': Choice(('space', 'seeds')),
}

TABLES: dict[str, Mapping[str, Choice]] = {
  'dpo.loss': PREFERENCE_LOSSES,
  'dpo.divergence': PREFERENCE_DIVERGENCES,
  'distill.divergence': DISTILLATIONS,
  'reward_model.objective': REWARD_OBJECTIVES,
  'classification.objective': CLASS_OBJECTIVES,
  'embedding.objective': EMBEDDING_OBJECTIVES,
  'policy.surrogate': SURROGATES,
  'policy.level': LEVELS,
  'policy.aggregate': AGGREGATIONS,
  'policy.kl': DIVERGENCES,
  'policy.correction': CORRECTIONS,
  'grpo.advantage': ADVANTAGES,
  'optim.name': OPTIMIZERS,
  'optim.schedule': SCHEDULES,
  'data.on_overlength': OVERLENGTH,
  'study.kind': STUDIES,
}
# Kinds of evaluation tasks; docs/evaluation.md has a row for each.
TASK_KINDS = (
  'choice',
  'choice_by_length',
  'choice_by_prior',
  'preference',
  'perplexity',
  'answer_perplexity',
  'match',
  'math',
  'math_strict',
  'label',
  'yes_no',
  'question',
  'translation',
  'translation_characters',
  'summarization',
  'summarization_unicode',
  'entities',
  'instructions',
  'tool_calls',
  'json',
  'json_schema',
  'stereotype_pair',
  'stereoset',
  'question_bias',
  'coreference',
  'toxicity',
  'refusal',
  'canary_exposure',
  'canary_leak',
)

# Names of data.augment, and whether a rate follows them; data/augment.py has the functions.
AUGMENTATIONS = {'word_dropout': True, 'swap': True, 'noise': True, 'template': False}

# Keys with a few values and no more facts.
_PLAIN = {
  'dpo.reference': ('step', 'cache'),
  'rollout.step_reward': ('', 'min', 'product', 'last'),
  'remat': ('none', 'dots', 'full'),
  'model.param_dtype': ('float32', 'bfloat16'),
  'model.compute_dtype': ('float32', 'bfloat16'),
  'optim.moments': ('float32', '8bit'),
  'optim.rounding': ('nearest', 'stochastic'),
  'checkpoint.best_mode': ('min', 'max'),
  'data.on_unrendered': ('error', 'warn'),
  'data.on_bad_row': ('error', 'drop'),
  'data.on_audit': ('report', 'error'),
  'data.balance': ('none', 'sqrt', 'equal'),
  'data.curriculum': ('none', 'length', 'difficulty'),
  'embedding.pool': ('', 'mean', 'first', 'last'),
  'data.loss_on': ('assistant', 'completion', 'all'),
  'lora.init': ('uniform', 'pissa'),
  'lora.base': ('bfloat16', 'float32', 'int8', 'nf4'),
  'lora.on_init_from': ('continue', 'merge'),
}
CHOICES: dict[str, tuple[str, ...]] = {k: tuple(t) for k, t in TABLES.items()} | _PLAIN

# Keys that also take 'module:object', and the form of that object.
OBJECTS = {
  'dpo.loss': 'a ftjax.losses.preference.Row',
  'optim.name': 'a function (OptimizerConfig, leaves) -> optax.GradientTransformation',
  'optim.schedule': 'a function (ScheduleConfig) -> function of the update number',
}


def only_with() -> list[tuple[str, str, tuple[str, ...]]]:
  """Returns (key, other key, values of the other key): the key is read with these values alone."""
  out = []
  for other, table in TABLES.items():
    section = other.rpartition('.')[0]
    for name in dict.fromkeys(n for row in table.values() for n in row.reads):
      values = tuple(value for value, row in table.items() if name in row.reads)
      out.append((f'{section}.{name}', other, values))
  return out


def preference_loss(name: str) -> PreferenceFacts:
  """Returns the facts of the loss that dpo.loss names.

  Raises:
    ConfigError: a 'module:object' that cannot be imported, or is no loss.
  """
  if not named_object.is_named(name):
    return PREFERENCE_LOSSES[name]
  return checked_object('dpo.loss', name)


def checked_object(key: str, name: str) -> Any:
  """Returns the object that the text 'module:object' under one of the keys of OBJECTS names.

  Raises:
    ConfigError: it cannot be imported, or has another form.
  """
  found = named_object.load(key, name)
  if key == 'dpo.loss':
    is_usable = isinstance(found, PreferenceFacts) and not isinstance(found, type)
  else:
    is_usable = named_object.takes(found, 2 if key == 'optim.name' else 1)
  if not is_usable:
    raise named_object.wrong(key, name, found, OBJECTS[key])
  return found
