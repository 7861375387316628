"""The jax-free tables of config/choices.py say what the implementations do."""

import dataclasses

import jax.numpy as jnp
import optax
import pytest

from ftjax.algorithms import grpo
from ftjax.config import algorithms, choices, keys, section, task_specs, validation
from ftjax.data import encode, prompts
from ftjax.evaluation import kinds
from ftjax.losses import distillation, mismatch, policy, preference, preference_table
from ftjax.training import lr_schedule, optimizer

KEYS = keys.default()


class Recorder:
  """Settings that remember which of them are read."""

  def __init__(self, values):
    self._values, self.read = values, set()

  def __getattr__(self, name):
    self.read.add(name)
    return self._values[name]


@pytest.mark.parametrize(
  ('described', 'implemented'),
  [
    (choices.PREFERENCE_LOSSES, preference_table.LOSSES),
    (choices.PREFERENCE_DIVERGENCES, preference_table.DIVERGENCES),
    (choices.DISTILLATIONS, distillation.DIVERGENCES),
    (choices.SURROGATES, policy.SURROGATES),
    (choices.LEVELS, policy.LEVELS),
    (choices.AGGREGATIONS, policy.AGGREGATIONS),
    (choices.OPTIMIZERS, optimizer.OPTIMIZERS),
    (choices.SCHEDULES, lr_schedule.SCHEDULES),
    (choices.OVERLENGTH, encode.ON_OVERLENGTH),
    (choices.TASK_KINDS, kinds.KINDS),
  ],
)
def test_the_names_are_those_of_the_implementation(described, implemented):
  assert tuple(described) == tuple(implemented)


def test_the_names_that_an_implementation_has_under_another_form():
  assert [*choices.DIVERGENCES] == [*policy.KL_TERMS, 'reward']
  assert [*choices.CORRECTIONS] == ['none', *mismatch.CORRECTIONS]
  relative = [name for name, row in choices.ADVANTAGES.items() if row.is_relative]
  assert relative == [*grpo.RELATIVE] and {*choices.ADVANTAGES} - {*relative} == {'reinforce_pp'}
  kept = tuple(name for name, row in choices.OVERLENGTH.items() if not row.truncates)
  assert kept == prompts.ON_OVERLENGTH


@pytest.mark.parametrize('name', choices.PREFERENCE_LOSSES)
def test_what_a_preference_loss_reads(name):
  row, described = preference_table.LOSSES[name], choices.PREFERENCE_LOSSES[name]
  facts = ('needs_reference', 'paired', 'whole_step')
  assert [getattr(row, f) for f in facts] == [getattr(described, f) for f in facts]
  settings = Recorder(dataclasses.asdict(preference.Settings()))
  one = jnp.full((2,), -1.0)
  batch = preference.Pairs(*[one] * 7)
  if not row.paired:
    batch = preference.Singles(one, one, one > 0, jnp.float32(0))
  row.function(batch, settings)
  row.reward(batch, settings)
  assert settings.read - {'beta'} == {*described.reads} - {'reference'}
  assert ('reference' in described.reads) == (row.needs_reference and row.paired)


@pytest.mark.parametrize('name', choices.PREFERENCE_DIVERGENCES)
def test_what_a_divergence_reads(name):
  settings = Recorder(dataclasses.asdict(preference.Settings()))
  preference_table.DIVERGENCES[name](jnp.ones(2), settings)
  assert settings.read == {*choices.PREFERENCE_DIVERGENCES[name].reads}


@pytest.mark.parametrize('name', choices.SURROGATES)
def test_what_a_surrogate_reads(name):
  objective = Recorder(dataclasses.asdict(policy.PolicyLossConfig()))
  one = jnp.ones((1, 2))
  policy.SURROGATES[name](one, one, one, objective)
  assert objective.read == {*choices.SURROGATES[name].reads} - {'level'}


@pytest.mark.parametrize('name', choices.OPTIMIZERS)
def test_what_an_optimizer_reads(name):
  config = Recorder({k: KEYS.optim[k] for k in ('b1', 'b2', 'eps')})
  leaves = {'w': optimizer.Leaf(('w',), False, 1, False, ('embed', 'ffn'))}
  made = optimizer.OPTIMIZERS[name](config, leaves)
  assert isinstance(made, optax.GradientTransformation)
  assert config.read == {*choices.OPTIMIZERS[name].reads}


@pytest.mark.parametrize('name', choices.SCHEDULES)
def test_what_a_schedule_reads(name):
  numbers = dataclasses.asdict(lr_schedule.ScheduleConfig(0.1, 20, 2, 0.1, 5))
  config = Recorder(numbers)
  lr_schedule.SCHEDULES[name](config)
  assert config.read - {'lr', 'steps', 'warmup_steps'} == {*choices.SCHEDULES[name].reads}


def test_every_key_of_a_rule_exists():
  known = section.flat(KEYS).keys()
  for key, other, values in choices.only_with():
    assert {key, other} <= known and values
  for key, values in choices.CHOICES.items():
    assert KEYS[key] in values


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    (
      {'optim.name': 'sgd', 'optim.b2': 0.9},
      'optim.b2=0.9 does nothing with optim.name=sgd',
    ),
    (
      {'optim.name': 'lion', 'optim.eps': 1e-6},
      'optim.eps=1e-06 does nothing',
    ),
    ({'optim.schedule': 'constant', 'optim.end_fraction': 0.1}, 'it is for linear, cosine, wsd'),
    ({'optim.decay_steps': 3}, 'optim.decay_steps=3 does nothing with optim.schedule=cosine'),
  ],
)
def test_a_key_that_the_chosen_optimizer_or_schedule_does_not_read_is_a_warning(changes, told):
  """No error: a config file for another optimizer has set it."""
  c = keys.default()
  c.model.path, c.data.train, c.steps = 'somewhere', 'rows.jsonl', 10
  c.update_from_flattened_dict(changes)
  validation.validate(c)
  assert told in validation.warnings(c)[0]


def test_every_key_of_a_record_exists():
  for name, record in algorithms.ALGORITHMS.items():
    for key in (*record.reads, *record.fixed, *record.fixed_in_rollout):
      assert KEYS[key] is not None, (name, key)


def test_a_task_has_a_name_once():
  with pytest.raises(ValueError, match='named twice'):
    task_specs.parse_all(('a=match:x', 'a=choice:y'))
