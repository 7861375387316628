"""Leaf origins, with a model kind outside the package (toy_kind.py): an adapter is trained, saved
and not exported; a derived leaf is never saved, and computed again from what was loaded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from safetensors.numpy import load_file
from toy_kind import ADAPTER, DERIVED

from ftjax import config
from ftjax.algorithms import sft
from ftjax.experiment import run as experiment
from ftjax.experiment.trainer import Trainer
from ftjax.families import table
from ftjax.generation import weights
from ftjax.hf import export, load
from ftjax.models import counts, kinds
from ftjax.planning import memory
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError
from ftjax.storage.checkpoint import Checkpoints, Retention

ARCH = dataclasses.replace(tiny_model.TINY, kind='toy_kind:KIND')


def places(arch=ARCH):
  return sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))


def trainer_of(**changes):
  c = config.default()
  c.update_from_flattened_dict({'steps': 4, 'seq_len': 16, 'batch_size': 2, 'eval.batch_size': 2})
  c.update_from_flattened_dict(changes)
  run = experiment.without_data(c, jax.sharding.get_mesh(), ARCH)
  return Trainer(run, sft.make_loss(run.forward, c))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A HF folder of the base leaves."""
  return tiny_model.write_folder(tmp_path_factory.mktemp('base') / 'm', tiny_model.TINY)


def test_files_hold_base_leaves_alone(folder, tmp_path):
  params = load.load_params(folder, ARCH, places(), jnp.dtype(jnp.bfloat16), seed=3)
  flat = trees.flatten(params)
  assert flat.keys() == kinds.declared(ARCH).keys()
  assert {n for n, x in flat.items() if x.dtype != jnp.bfloat16} == {ADAPTER, DERIVED}
  np.testing.assert_array_equal(flat[ADAPTER], 0.5)
  expected = np.asarray(flat['embed/w'], np.float32).mean(0)
  np.testing.assert_allclose(flat[DERIVED], expected, atol=1e-6)
  small = dict(source_config=None, tokenizer_files={}, dtype=np.dtype(np.float32), stop_ids=())
  export.export(params, ARCH, tmp_path / 'out', **small)
  written = load_file(tmp_path / 'out' / 'model.safetensors')
  assert written.keys() == load_file(f'{folder}/model.safetensors').keys()
  assert table.architecture(load.read_config(tmp_path / 'out')) == tiny_model.TINY


def test_an_adapter_is_trained_and_saved_and_a_derived_leaf_is_neither(folder, tmp_path):
  trainer = trainer_of()
  assert DERIVED in trainer.frozen and ADAPTER not in trainer.frozen
  assert kinds.names(trainer.run.arch, 'adapter') == [ADAPTER]
  params = load.load_params(folder, ARCH, places(), jnp.dtype(jnp.float32))
  state = trainer._init(params)
  flat = trees.flatten(state.params)
  assert ADAPTER in flat and DERIVED not in flat
  saved = trainer.saved(state)
  assert not trees.flatten(saved.frozen)
  # A value that only the checkpoint can know.
  other = trees.unflatten(flat | {ADAPTER: flat[ADAPTER] + 1.0, 'embed/w': flat['embed/w'] * 2.0})
  checkpoints = Checkpoints(str(tmp_path / 'c'), Retention(1, '', 'min'), 60.0)
  checkpoints.save(1, trainer.saved(dataclasses.replace(state, params=other)), {}, None)
  checkpoints.wait()
  restored = trainer.restore(checkpoints, 1)
  checkpoints.close()
  model = trees.flatten(trainer.model(restored))
  np.testing.assert_array_equal(model[ADAPTER], 1.5)
  old = np.asarray(trees.flatten(params)[DERIVED])
  np.testing.assert_allclose(model[DERIVED], 2 * old, atol=1e-6)
  assert trees.flatten(restored.frozen).keys() == {DERIVED}


def test_a_plan_counts_each_leaf_in_its_own_dtype():
  trainer = trainer_of(**{'model.param_dtype': 'bfloat16'})
  own = 4 * 2 * ARCH.model_dim
  base = 2 * counts.num_params(tiny_model.TINY)
  state = trainer.abstract
  assert memory.shard_bytes((state.params, state.frozen)) == base + own
  assert counts.num_params(ARCH) == counts.num_params(tiny_model.TINY) + ARCH.model_dim
  assert counts.matmul_params(ARCH) == counts.matmul_params(tiny_model.TINY)


def test_a_rollout_keeps_the_dtype_that_a_leaf_declares():
  mesh = jax.sharding.get_mesh()
  params = kinds.init(ARCH, jax.random.key(0))
  flat = trees.flatten(weights.rollout_params(params, ARCH, mesh, jnp.dtype(jnp.bfloat16)))
  assert {n for n, x in flat.items() if x.dtype != jnp.bfloat16} == {ADAPTER, DERIVED}


def test_a_kind_without_decode_generates_nothing():
  with pytest.raises(ConfigError, match=r'toy_kind:KIND.*generates no text'):
    kinds.decode(ARCH, {}, None, None, None, None, dtype=jnp.float32)
  with pytest.raises(ConfigError, match='toy_kind:NONE'):
    kinds.of(dataclasses.replace(ARCH, kind='toy_kind:NONE'))


def test_the_adapter_enters_the_forward_pass():
  params = kinds.init(ARCH, jax.random.key(0))
  ids = tiny_model.ids(1, 8)
  where = tiny_model.tokens_at(np.ones((1, 8)))
  got = tiny_model.logits(ARCH, params, ids, where)
  base = {k: v for k, v in params.items() if k not in ('adapter', 'derived')}
  assert np.abs(got - tiny_model.logits(tiny_model.TINY, base, ids, where)).max() > 0.1
  assert trees.flatten(params).keys() == kinds.declared(ARCH).keys()
