"""What a manifest holds of code, packages and environment, and how two are compared."""

import json
import pathlib

import pytest

from ftjax.experiment import manifest_diff, run_metrics
from ftjax.runtime import determinism
from ftjax.runtime.errors import ConfigError
from ftjax.telemetry import environment, manifest, source_code

# Code


def test_the_digest_is_of_every_source_file_but_configs(tmp_path):
  """So a wheel, which has the configs inside, is the same code as its checkout."""
  for name in ('train.py', 'losses/masked.py', 'losses/__init__.py'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f'# {name}\n')
  before = source_code.digests(tmp_path)
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'tiny.py').write_text('')
  (tmp_path / 'losses' / 'BUILD').write_text('')
  assert source_code.digests(tmp_path) == before
  (tmp_path / 'losses' / 'masked.py').write_text('# edited\n')
  after = source_code.digests(tmp_path)
  assert after['digest'] != before['digest']
  assert after['folders']['entries'] == before['folders']['entries']
  assert after['folders']['losses'] != before['folders']['losses']


# Packages and environment


def test_packages_are_those_that_ftjax_needs_and_what_these_need():
  found = environment.packages()
  assert {'jax', 'jaxlib', 'flax', 'numpy', 'ml-dtypes', 'tensorstore', 'certifi'} <= found.keys()
  assert not {'pytest', 'ruff', 'ftjax'} & found.keys()


def test_no_secret_is_in_a_manifest(monkeypatch):
  secret = 'hf_' + 'a' * 30
  monkeypatch.setenv('XLA_FLAGS', f'--xla_dump_to=https://me:{secret}@host/x')
  monkeypatch.setenv('HF_TOKEN', secret)
  monkeypatch.setenv('NCCL_ALGO', f'token={secret}')
  made = manifest.build({}, manifest.Made())
  assert secret not in json.dumps(made) and 'HF_TOKEN' not in json.dumps(made)


def test_a_start_replaces_those_that_came_later():
  """A run killed before a checkpoint starts again from an older step: what it did since is gone."""
  base = manifest.build({}, manifest.Made(executable='e' * 64))
  found = manifest.with_start(base, {}, 0, {})
  for step in (20, 40, 40, 30):
    found = manifest.with_start(base, found, step, {})
  assert [s['step'] for s in found['starts']] == [0, 20, 30]


# Differences


def pair(**changes):
  base = manifest.with_start(manifest.build({}, manifest.Made(executable='e' * 64)), {}, 0, {})
  return base, base | changes


def test_equal_manifests_have_no_difference():
  assert manifest_diff.environment_differences(*pair()) == []


@pytest.mark.parametrize(
  ('changes', 'name', 'may_change_bits'),
  [
    ({'devices': {'kind': 'cpu', 'count': 5, 'processes': 1}}, 'devices', True),
    ({'python': '3.99'}, 'Python', False),
    ({'environment': {'NCCL_PROTO': 'LL'}}, 'NCCL_PROTO', True),
    ({'xla_flags': '--xla_cpu_enable_fast_math=true'}, 'XLA_FLAGS', True),
    ({'dependencies': {'versions': {'jaxlib': '9', 'tqdm': '9'}}}, 'jaxlib', True),
    ({'cpu': {'model': 'other', 'features': []}}, 'processor', True),
  ],
)
def test_a_difference_of_the_environment_is_named(changes, name, may_change_bits):
  found = {d.name: d for d in manifest_diff.environment_differences(*pair(**changes))}
  assert found[name].may_change_bits == may_change_bits


def test_packages_that_compute_nothing_do_not_loosen_the_comparison():
  run, here = pair()
  versions = here['dependencies']['versions'] | {'tqdm': '0'}
  here['dependencies'] = here['dependencies'] | {'versions': versions}
  found = manifest_diff.environment_differences(run, here)
  assert [(d.name, d.may_change_bits) for d in found] == [('tqdm', False)]


def test_a_commit_with_the_same_source_files_is_no_difference():
  run, here = pair()
  here['code'] = here['code'] | {'commit': 'c' * 40, 'modified': True}
  assert manifest_diff.environment_differences(run, here) == []
  here['code'] = here['code'] | {'digest': 'd' * 64}
  found = manifest_diff.environment_differences(run, here)
  assert [(d.name, d.may_change_bits) for d in found] == [('code of ftjax', False)]


@pytest.mark.parametrize('number', ['2', None])
def test_cores_do_not_matter_where_nproc_sets_the_threads(number):
  run, here = pair(host_cores=999)
  for made in (run, here):
    made['environment'] = {'NPROC': number} if number else {}
  found = manifest_diff.environment_differences(run, here)
  assert [(d.name, d.may_change_bits) for d in found] == [('host cores', number is None)]


def test_flags_that_change_no_number_are_no_difference():
  silent = '--xla_dump_to=/x --xla_force_host_platform_device_count=1'
  run, here = pair(xla_flags=silent)
  run['xla_flags'] = ''
  assert manifest_diff.environment_differences(run, here) == []


def test_an_earlier_start_on_another_machine_is_a_difference():
  run, here = pair()
  first = run['starts'][0] | {'devices': {'kind': 'TPU v5e', 'count': 4, 'processes': 1}}
  run = run | {'starts': [first, run['starts'][0] | {'step': 20}]}
  found = manifest_diff.environment_differences(run, here)
  assert [d.name for d in found] == ['start at step 0'] and '4 x TPU v5e' in found[0].run


def test_each_cause_is_named():
  code = {'digest': 'x', 'folders': {'losses': 'x', 'models': 'm'}}
  run = {
    'fingerprints': {'model': 'a', 'tokenizer': 't', 'data order': 'o', 'data 0': 'd'},
    'models': {'model.path': 'models/small'},
    'data': {'data 0': {'name': 'rows.jsonl'}},
    'code': {'digest': 'y', 'folders': {'losses': 'y', 'models': 'm'}},
    'user_code': {'loss.name': 'u'},
  }
  now = {'model': 'b', 'tokenizer': 't', 'data order': 'p', 'data 0': 'e'}
  found = manifest_diff.causes(run, now, code, {'loss.name': 'v'}, ())
  assert len(found) == 4
  assert found[0].startswith('model (models/small): other content')
  assert found[1].startswith('data 0 (rows.jsonl): other content')
  assert found[2].startswith('loss.name: the code of the module')
  assert 'files differ in losses' in found[3]
  assert len(manifest_diff.causes(run, now, code, {}, ('code',))) == 2
  same = run['fingerprints']
  assert 'no digest' in manifest_diff.causes(run | {'code': {}}, same, code, {}, ())[-1]


# Rows


def train_row(**values):
  return {'batch_checksum': 7, 'tokens': 3, 'supervised_tokens': 2, 'loss': 1.0} | values


@pytest.mark.parametrize(
  ('here', 'bitwise', 'within'),
  [
    ({}, None, None),
    ({'loss': 1.0 + 2**-23}, 'loss', None),
    ({'loss': 1.0 + 2e-6}, 'loss', 'loss'),
    ({'grad_norm': 5.0}, 'grad_norm', None),
    ({'batch_checksum': 8, 'loss': 2.0}, 'batch_checksum', 'batch_checksum'),
    ({'loss': 'NaN'}, 'loss', 'loss'),
  ],
)
def test_rows_are_compared_by_bits_or_within_a_tolerance(here, bitwise, within):
  for is_bitwise, expected in ((True, bitwise), (False, within)):
    found = run_metrics.compare(('train', 1), train_row(), train_row(**here), is_bitwise)
    assert (found and found.name) == expected


def test_nan_equals_nan():
  rows = train_row(loss='NaN'), train_row(loss='NaN')
  assert run_metrics.compare(('train', 1), *rows, True) is None
  assert run_metrics.compare(('train', 1), *rows, False) is None


def test_rows_between_steps_are_expected_by_log_every(tmp_path):
  rows = [{'step': s, 'split': 'train', 'loss': 1.0} for s in (10, 20, 25)]
  path = pathlib.Path(tmp_path, 'metrics.jsonl')
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  assert len(run_metrics.read_run(str(tmp_path), 10, 25)) == 3
  path.write_text('{"torn')
  with pytest.raises(ConfigError, match='no row of a training step'):
    run_metrics.read_run(str(tmp_path), 10, 25)


# --deterministic


def test_deterministic_keeps_what_is_set_and_adds_the_rest():
  found = {'JAX_PLATFORMS': 'cuda', 'XLA_FLAGS': '--xla_dump_to=/x --xla_gpu_deterministic_ops'}
  determinism.apply(found)
  assert found['XLA_FLAGS'].split() == [
    '--xla_dump_to=/x',
    '--xla_gpu_deterministic_ops',
    '--xla_gpu_exclude_nondeterministic_ops=true',
    '--xla_gpu_autotune_level=0',
  ]
  assert found['NCCL_NVLS_ENABLE'] == '0'
  before = dict(found)
  determinism.apply(found)
  assert found == before


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('XLA_FLAGS', '--xla_gpu_deterministic_ops=false'),
    ('XLA_FLAGS', '--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=0'),
    ('XLA_FLAGS', '--xla_gpu_autotune_level=2'),
    ('NCCL_NVLS_ENABLE', '1'),
  ],
)
def test_a_contradiction_is_refused(name, value):
  with pytest.raises(ConfigError, match='--deterministic needs'):
    determinism.apply({'JAX_PLATFORMS': 'cuda,cpu', name: value})


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_cpus_and_tpus_need_nothing(platform):
  found = {'JAX_PLATFORMS': platform, 'XLA_FLAGS': '--xla_gpu_autotune_level=2'}
  before = dict(found)
  determinism.apply(found)
  assert found == before
