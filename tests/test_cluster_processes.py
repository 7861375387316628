"""The error of processes whose configs differ."""

import pytest

from ftjax.cluster import processes
from ftjax.config import keys, section
from ftjax.runtime.errors import ConfigError

SECRET = 'hf_' + 'aB3dE5fG7hJ9kL1mN2pQ4'


@pytest.fixture
def configs(monkeypatch):
  """`configs(settings, ...)` is the error of processes with these keys changed, '' for none."""

  def run(*changed):
    seen = []
    for settings in changed:  # what each process sends
      c = keys.default()
      c.update_from_flattened_dict(settings)
      monkeypatch.setattr(processes, 'gather', lambda own: seen.append(own) or [own])
      processes.check_same_values('the config', section.plain(c))
    monkeypatch.setattr(processes, 'gather', lambda own: seen)
    try:
      processes.check_same_values('the config', {})
    except ConfigError as error:
      return str(error)
    return ''

  return run


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    (
      ({'optim.lr': 1e-5}, {'optim.lr': 2e-5}),
      ['optim.lr=1e-05 on process 0, 2e-05 on process 1. Give every process the same command'],
    ),
    (
      ({'steps': 3}, {'steps': 3}, {'steps': 4}, {'steps': 4}),
      ['steps=3 on processes 0, 1, 4 on processes 2, 3'],
    ),
    (
      ({}, {'data.train': ('a', 'b'), 'seed': 5}),
      ["data.train='' on process 0, ['a', 'b'] on process 1", 'seed=0 on process 0, 5 on'],
    ),
    (
      ({'model.random': {'hidden_size': 8}}, {'model.random': {'hidden_size': 16}}),
      ["model.random={'hidden_size': 8} on process 0, {'hidden_size': 16} on process 1"],
    ),
    (
      [{}, *[{'seed': 1}] * 70],
      ['seed=0 on process 0, 1 on processes 1, 2, 3, 4 and 66 more'],
    ),
    (
      ({}, {f'watchdog.{k}': 1.0 for k in keys.default().watchdog} | {'mesh.data': 2, 'seed': 1,
       'steps': 1, 'epochs': 2.0}),
      ['. Give every process', ' and 2 more. '],
    ),
  ],
)  # fmt: skip
def test_the_keys_that_differ_with_their_values_and_processes(configs, changed, message):
  output = configs(*changed)
  assert output.startswith('the config differs between the processes: ')
  assert all(part in output for part in message)


def test_equal_configs_are_accepted(configs):
  assert configs({'seed': 3}, {'seed': 3}) == ''
  assert configs({}) == ''


def test_secrets_are_compared_and_not_shown(configs):
  output = configs({'model.path': SECRET}, {'model.path': SECRET[::-1] + 'x'})
  assert 'model.path=' in output and 'on process 0' in output and 'on process 1' in output
  assert SECRET not in output and '<redacted>' in output
  assert SECRET not in str(configs({'model.path': SECRET}, {'model.path': SECRET}))


def test_a_key_that_one_process_does_not_know():
  """Two versions of ftjax."""
  lines = processes.differences([{'a': ('1', 1)}, {'a': ('1', 1), 'b': ('2', 2)}])
  assert lines == ['b=missing on process 0, 2 on process 1']
