"""A preference loss outside of the package trains pairs made on rollouts that a reward outside of
the package scores, resumes and exports.
"""

import jax.numpy as jnp
import pytest
import toy_loss
import toy_run

from ftjax import config
from ftjax.algorithms import preference as preference_loss
from ftjax.config import algorithms, validation
from ftjax.losses import preference
from ftjax.runtime.errors import ConfigError

SETTINGS = (
  'dpo.loss=toy_loss:SQUARE',
  'dpo.beta=0.5',
  'rollout.rewards=toy_reward:vowels@1',
  'steps=4',
  'batch_size=4',
  'rollout.group=4',
  'rollout.max_tokens=8',
  'rollout.slots=16',
  'data.train=sums:30',
  'checkpoint.every=2',
  'eval.prompts=()',
)


def valid(**changes):
  c = config.default()
  c.algorithm, c.dpo.loss = 'dpo', 'toy_loss:SQUARE'
  c.model.path, c.data.train, c.steps = 'somewhere', 'rows.jsonl', 10
  c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
  return c


def test_it_trains_resumes_and_exports(tmp_path):
  whole = tmp_path / 'whole'
  toy_run.train('tiny_online_dpo', whole, *SETTINGS)
  train, rollouts = (toy_run.rows(whole, split) for split in ('train', 'rollout'))
  assert train[0]['loss'] == 1.0  # policy and reference are equal
  assert train[-1]['loss'] != 1.0
  assert 0 < rollouts[0]['reward'] == rollouts[0]['reward/vowels'] < 1
  assert (whole / 'export' / 'model.safetensors').exists()
  assert toy_run.resumed(whole, tmp_path / 'again', 4, 'tiny_online_dpo', *SETTINGS) == []


def test_it_is_asked_what_a_shipped_loss_is_asked():
  c = valid(dpo__label_smoothing=0.1)  # no rule says which keys a user's loss reads
  validation.validate(c)
  assert algorithms.of(c).example(c) == 'pair'
  assert algorithms.place(c, 'reference') == 'state'
  c = valid(dpo__reference='cache')
  validation.validate(c)
  assert algorithms.place(c, 'reference') == 'cache'
  assert preference_loss.row(c) is toy_loss.SQUARE
  ones = jnp.ones(2)
  pairs = preference.Pairs(*(x * ones for x in (-1.0, -4.0, -2.0, -3.0, 1.0, 1.0, 0.0)))
  total, weight, metrics = preference.loss(toy_loss.SQUARE, pairs, ones, preference.Settings(0.5))
  assert (float(total), float(weight)) == (0.0, 2.0)  # margin 0.5 (1 + 1) = 1
  assert float(metrics['rewards/margin'][0]) == 2.0


@pytest.mark.parametrize(
  ('name', 'told'),
  [
    ('toy_loss:SQARE', 'dpo.loss=toy_loss:SQARE: toy_loss has no SQARE; did you mean'),
    ('toy_loss:square', r'is a function \(pairs, settings\); expected a ftjax.losses.pref'),
    ('toy_loss:Row', 'is a type; expected a ftjax.losses.preference.Row'),
    ('nothing_here:X', 'dpo.loss=nothing_here:X: cannot import nothing_here'),
    ('toy_loss:', "dpo.loss='toy_loss:'; expected 'package.module:object'"),
  ],
)
def test_what_is_no_loss_is_refused_by_key(name, told):
  with pytest.raises(ConfigError, match=told):
    validation.validate(valid(dpo__loss=name))
