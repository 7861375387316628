"""An optimizer and a schedule outside of the package train, resume and export; and what is wrong
with one is reported before anything is loaded.
"""

import numpy as np
import pytest
import toy_optimizer
import toy_run

from ftjax import config
from ftjax.config import user_code, validation
from ftjax.runtime.errors import ConfigError
from ftjax.training import optimizer
from ftjax.training.lr_schedule import ScheduleConfig, make_schedule

SETTINGS = (
  'optim.name=toy_optimizer:sign_momentum',
  'optim.schedule=toy_optimizer:sawtooth',
  'optim.warmup_steps=0',
  'steps=4',
  'data.train=sums:60',
  'checkpoint.every=2',
  'eval.every=2',
  'eval.prompts=()',
)


def valid(**changes):
  c = config.default()
  c.model.path, c.data.train, c.steps = 'somewhere', 'rows.jsonl', 10
  c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
  return c


def test_they_train_resume_and_export(tmp_path):
  whole = tmp_path / 'whole'
  toy_run.train('tiny_sft', whole, *SETTINGS)
  rows = toy_run.rows(whole, 'train')
  np.testing.assert_allclose([r['lr'] for r in rows], [3e-3, 2.25e-3, 1.5e-3, 0.75e-3], rtol=1e-6)
  assert rows[0]['loss'] > rows[-1]['loss']
  assert (whole / 'export' / 'model.safetensors').exists()
  assert toy_run.resumed(whole, tmp_path / 'again', 4, 'tiny_sft', *SETTINGS) == []


@pytest.mark.parametrize(
  ('key', 'value', 'told'),
  [
    ('optim__name', 'toy_optimiser:x', 'optim.name=.*cannot import toy_optimiser'),
    ('optim__name', 'toy_optimizer:sign', 'has no sign; it has .*sign_momentum'),
    ('optim__name', 'toy_optimizer:sign_momentun', 'did you mean toy_optimizer:sign_momentum'),
    (
      'optim__name',
      'toy_optimizer:sawtooth',
      r'is a function \(config\); expected a ',
    ),
    ('optim__schedule', 'toy_optimizer:optax', 'is a module; expected a function'),
    ('optim__schedule', 'toy_optimizer', "optim.schedule='toy_optimizer'; .* or 'module:object'"),
  ],
)
def test_what_is_no_such_function_is_refused_by_key(key, value, told):
  with pytest.raises(ConfigError, match=told):
    validation.validate(valid(**{key: value}))


def test_what_they_return_is_checked():
  with pytest.raises(ConfigError, match=r'optim.name=.* returned a str; expected an optax'):
    name = 'toy_optimizer:no_optimizer'
    numbers = (0.9, 0.99, 1e-8, 0.0, 1.0)
    tables = ((('.*', 1.0),), (('.*', 1.0),), (('.*', False),))
    leaves = {'w': optimizer.Leaf(('w',), False, 1, False)}
    settings = optimizer.OptimizerConfig(name, lambda k: 0.1, *numbers, *tables)
    optimizer.make_optimizer(settings, leaves, leaves)
  with pytest.raises(ConfigError, match=r'optim.schedule=.* returned a float; expected a function'):
    make_schedule('toy_optimizer:no_schedule', ScheduleConfig(0.1, 4, 0, 0.0, 0))


def test_their_code_is_part_of_a_resume():
  c = valid(optim__name='toy_optimizer:sign_momentum')
  assert user_code.fingerprints(c).keys() == {'optim.name'}
  assert user_code.fingerprints(valid()) == {}
  assert toy_optimizer.sawtooth.__module__ == 'toy_optimizer'
