"""An optimizer and a schedule outside of the package train, resume and export; and what is wrong
with one is reported before anything is loaded.
"""

import json

import jax
import numpy as np
import pytest
import toy_optimizer
import toy_run

from ftjax import config
from ftjax.algorithms import sft
from ftjax.config import user_code, validation
from ftjax.experiment import fit
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
    leaves = {'w': optimizer.Leaf(('w',), False, 1, False, ('embed', 'ffn'))}
    settings = optimizer.OptimizerConfig(name, 'float32', lambda k: 0.1, *numbers, *tables)
    optimizer.make_optimizer(settings, leaves, leaves)
  with pytest.raises(ConfigError, match=r'optim.schedule=.* returned a float; expected a function'):
    make_schedule('toy_optimizer:no_schedule', ScheduleConfig(0.1, 4, 0, 0.0, 0))


@pytest.mark.full
def test_code_that_is_edited_during_a_run_does_not_count(tmp_path, monkeypatch):
  """A checkpoint names the code that trained, also while its file is being edited."""
  path = tmp_path / 'edited_schedule.py'
  text = 'def half(config):\n  return lambda k: config.lr / 2\n'
  path.write_text(text)
  monkeypatch.syspath_prepend(tmp_path)
  c = valid(model__path='', data__train='sums:20', steps=1, seq_len=64, batch_size=8)
  c.model.random = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
  )
  c.optim.schedule, c.compile_cache = 'edited_schedule:half', False
  validation.validate(c)
  before = user_code.fingerprints(c)

  def build(run):
    path.write_text('def half(config:')
    return sft.build(run)

  mesh = jax.sharding.get_mesh()
  fit.fit(c, str(tmp_path / 'run'), build)
  jax.set_mesh(mesh)
  meta = tmp_path / 'run' / 'checkpoints' / '1' / 'meta' / 'metadata'
  assert json.loads(meta.read_text())['code'] == before


def test_their_code_is_part_of_a_resume():
  c = valid(optim__name='toy_optimizer:sign_momentum')
  assert user_code.fingerprints(c).keys() == {'optim.name'}
  assert user_code.fingerprints(valid()) == {}
  assert toy_optimizer.sawtooth.__module__ == 'toy_optimizer'
