"""experiment/auxiliary.py: what each auxiliary model means for the state, saves, and plans."""

import dataclasses

import pytest
import tiny_pairs
import tiny_rollouts

from ftjax.config.algorithms import Auxiliary
from ftjax.experiment import auxiliary
from ftjax.experiment.auxiliary import AuxiliaryModel
from ftjax.models.architecture import Architecture

# name, (in the state, of rollouts, cached), saved, passes of a step, its words in the summary.
CASES = {
  'dpo': ('reference', (True, False, False), False, 1, 'a frozen reference model'),
  'dpo cached': (
    *('reference', (False, False, True), False, 0),
    'a frozen reference model (log-probs cached)',
  ),
  'grpo': ('reference', (False, True, False), False, 0, 'a frozen reference model'),
  'ppo': ('value', (True, False, False), True, 3, 'a value model, trained too'),
}


def settings(case):
  if case.startswith('dpo'):
    return tiny_pairs.settings(**{'dpo__reference': 'cache'} if 'cached' in case else {})
  return tiny_rollouts.tiny(case, **{'policy.kl_coef': 0.1} if case == 'grpo' else {})


@pytest.mark.parametrize('case', CASES)
def test_every_question_about_a_model_is_answered_by_its_place(case):
  name, place, is_saved, passes, words = CASES[case]
  policy = arch()
  models = auxiliary.find(settings(case), policy)
  (model,) = models
  assert model.name == name and models.find(name) is model and models.find('teacher') is None
  assert (model.is_in_state, model.is_of_rollouts, model.is_cached) == place
  assert (model.is_saved, model.passes, model.describe()) == (is_saved, passes, words)
  assert model.architecture() == dataclasses.replace(policy, num_labels=int(name == 'value'))
  of_step = ((policy, 3), (model.architecture(), passes)) if passes else ((policy, 3),)
  assert models.passes(policy) == of_step
  params = {'embed': 1, name: 2}
  assert models.without(params) == ({'embed': 1} if model.is_in_state else params)
  # What starts from the policy's weights and is saved needs no fingerprint of its own.
  assert model.fingerprint(lambda: 'first', '') == (None if is_saved else 'first')


def arch() -> Architecture:
  return tiny_pairs.shapes_only(tiny_pairs.settings()).arch


def test_a_model_of_its_own_folder_has_the_architecture_of_that_folder():
  config = tiny_rollouts.tiny().model.random.to_dict()
  config = {'model_type': 'llama', 'vocab_size': 259} | config | {'hidden_size': 48}
  record = Auxiliary('reward model', 'rollout', 'rollout.reward_model', has_score=True)
  model = AuxiliaryModel(record, 'folder', arch(), '')
  found = model.architecture(lambda path: config)
  assert found.model_dim == 48 and found.num_labels == 1
  assert model.describe() == 'the reward model folder' and model.passes == 0
