"""Compiler options: the table by device, one's own over it, and what a compiler refuses."""

import json

import jax
import jax.numpy as jnp
import pytest
import tiny_run

from ftjax.config import keys, validation
from ftjax.runtime import compiler_options
from ftjax.runtime.errors import ConfigError
from ftjax.telemetry import manifest
from ftjax.training.step import compile_step

GATHER = 'xla_enable_async_all_gather'
FUSION = 'xla_tpu_enable_async_collective_fusion'


@pytest.mark.parametrize(
  ('kind', 'some', 'none'),
  [
    ('TPU v4', GATHER, FUSION),
    ('TPU v5 lite', FUSION, 'xla_gpu_enable_latency_hiding_scheduler'),
    ('TPU v5e', FUSION, 'xla_gpu_enable_latency_hiding_scheduler'),
    ('TPU v5', GATHER, FUSION),  # is a v5p
    ('TPU v5p', GATHER, FUSION),
    ('TPU v6 lite', GATHER, FUSION),  # where libtpu refuses it
    ('TPU7x', GATHER, FUSION),
    ('NVIDIA H200', 'xla_gpu_enable_latency_hiding_scheduler', GATHER),
  ],
)
def test_each_kind_of_device_has_its_own(kind, some, none):
  found = compiler_options.known(kind)
  assert some in found and none not in found
  assert all(name.startswith('xla_') for name in found)


def test_a_cpu_has_none():
  assert compiler_options.known(jax.devices()[0].device_kind) == {}


def test_ones_own_lie_over_the_table():
  own = ((GATHER, False), (FUSION, ''), ('xla_a', 3), ('xla_b', 'true'))
  table, found = compiler_options.known('TPU v5e'), compiler_options.resolve('TPU v5e', own)
  assert found == {k: v for k, v in table.items() if k != FUSION} | {
    GATHER: False,
    'xla_a': 3,
    'xla_b': True,
  }
  assert list(found) == sorted(found)
  assert compiler_options.known('TPU v5e') == table  # and is not changed by it
  assert compiler_options.format_flags(found).startswith(f'xla_a=3 xla_b=true {GATHER}=false ')


def compiled(options):
  shape = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(
    jax.devices()[0]
  ))  # fmt: skip
  return compile_step(lambda state, batch: (state + batch, {}), shape, shape, options)


def test_the_compiler_is_given_them():
  assert compiled({'xla_cpu_enable_fast_math': True}).as_text()
  with pytest.raises(ConfigError, match=r"xla_no_such.*remove it with \('NAME', ''\)"):
    compiled({'xla_no_such': True})
  with pytest.raises(ConfigError, match=r'compiler_options: .*xla_cpu_enable_fast_math'):
    compiled({'xla_cpu_enable_fast_math': 'perhaps'})


def test_another_failure_stays_its_own():
  assert compiler_options.explain(RuntimeError('RESOURCE_EXHAUSTED'), {}) is None


@pytest.mark.parametrize('wrong', [('xla_a',), (('xla_a', True, 1),), ((1, 2),), (('a', None),)])
def test_what_is_no_pair_is_refused(wrong):
  c = keys.default()
  c.model.path, c.data.train = 'm', 'd'
  with pytest.raises(ConfigError, match='compiler_options'):
    c.compiler_options = wrong
    validation.validate(c)


def test_the_manifest_names_them():
  made = manifest.build({}, manifest.Made(compiler_options={'xla_a': True}))
  assert json.loads(json.dumps(made))['compiler_options'] == {'xla_a': True}


def test_plan_and_train_refuse_the_same_unknown_option(tmp_path):
  own = "--config.compiler_options=(('xla_no_such_thing', True),)"
  for entry, more in (('plan', '--topology=cpu:1'), ('train', f'--workdir={tmp_path}')):
    code, told = tiny_run.run(entry, ['--config=tiny_sft', more, own])
    assert code == 2 and "'xla_no_such_thing'" in told and 'Traceback' not in told
