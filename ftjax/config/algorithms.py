"""What each algorithm asks of a run: the shape of its examples, the arrays of its batches, and the
copies of the model that it holds."""

import dataclasses

import ml_collections

from ftjax.config.algorithm_keys import ON_ROLLOUTS, POLICY_GRADIENT, steps_per_batch
from ftjax.losses import preference
from ftjax.models.architecture import Architecture

# Of each row: log-probs of both answers under the reference, where they come with the batches.
REFERENCE_FIELDS = ('ref_first', 'ref_second')


def example_shape(c: ml_collections.ConfigDict) -> str:
  """What a training example is: 'text', or one of data.judged.SHAPES."""
  if c.algorithm == 'online_dpo':
    return 'pair'
  if c.algorithm == 'dpo':
    return 'pair' if preference.LOSSES[c.dpo.loss].paired else 'label'
  if c.algorithm == 'reward_model':
    return {'pairs': 'pair', 'scores': 'score'}[c.reward_model.objective]
  return 'text'


def is_packed(c: ml_collections.ConfigDict) -> bool:
  """Whether several examples share a row; judged ones and completions have each their own."""
  return c.data.packing and example_shape(c) == 'text' and c.algorithm not in ON_ROLLOUTS


def num_labels(c: ml_collections.ConfigDict) -> int:
  """`Architecture.num_labels` of the model that a config trains."""
  return int(c.algorithm == 'reward_model')


def has_value_model(c: ml_collections.ConfigDict) -> bool:
  """Whether a value model is trained beside the policy."""
  return c.algorithm == 'ppo'


def value_arch(arch: Architecture) -> Architecture:
  """Of that value model: the policy's with a score for a head."""
  return dataclasses.replace(arch, num_labels=1)


def has_reference(c: ml_collections.ConfigDict) -> bool:
  """Whether the policy is compared with the model as it was at the start."""
  if c.algorithm in ('dpo', 'online_dpo'):
    return preference.LOSSES[c.dpo.loss].needs_reference
  return c.algorithm in POLICY_GRADIENT and c.policy.kl_coef > 0


def reference_beside(c: ml_collections.ConfigDict) -> bool:
  """Whether that reference is a model beside the state, which rollouts are shown to."""
  return has_reference(c) and c.algorithm in POLICY_GRADIENT


def reference_cached(c: ml_collections.ConfigDict) -> bool:
  """Whether its log-probs come with the batches, and it stands in no memory at all."""
  return c.algorithm == 'dpo' and has_reference(c) and c.dpo.reference == 'cache'


def reference_in_step(c: ml_collections.ConfigDict) -> bool:
  """Whether the training step itself reads it; it then stands in the state."""
  return has_reference(c) and not reference_beside(c) and not reference_cached(c)


def passes(
  c: ml_collections.ConfigDict, arch: Architecture
) -> tuple[tuple[Architecture, int], ...]:
  """Models that a training step computes, each with 3 for forward and backward (which costs two
  forwards), 1 for forward alone.
  """
  value = ((value_arch(arch), 3),) if has_value_model(c) else ()
  reference = ((arch, 1),) if reference_in_step(c) else ()
  return ((arch, 3), *value, *reference)


def fields(c: ml_collections.ConfigDict) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Float arrays of a batch beside those of data/batches.py: of each token, and of each row."""
  if example_shape(c) != 'text':
    return (), ('values', *(REFERENCE_FIELDS if reference_cached(c) else ()))
  if c.algorithm not in POLICY_GRADIENT:
    return (), ()
  old = steps_per_batch(c) > 1
  ref = has_reference(c) and c.policy.kl != 'reward'
  by_token = ('advantages', 'sampler_logp', *['old_logp'] * old, *['ref_logp'] * ref)
  if has_value_model(c):
    by_token += ('returns', 'old_values')
  return by_token, ('kl_coef',) if ref and c.policy.kl_target else ()


def wants_old_logp(c: ml_collections.ConfigDict) -> bool:
  """Whether a rollout needs the trainer's own log-probs of its tokens before the first update on
  it: that update's own pass gives them too late for a reward.
  """
  if c.algorithm not in POLICY_GRADIENT:
    return False
  return steps_per_batch(c) > 1 or (has_reference(c) and c.policy.kl == 'reward')
