"""Weights of a rollout against those of the trainer: the same bits; a sync that failed is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY, init

from ftjax.generation import weights
from ftjax.runtime import trees


def numbers(params):
  return {n: np.asarray(a).astype(np.float32) for n, a in trees.flatten(params).items()}


@pytest.mark.parametrize(
  'sizes', [{}, {'fsdp': 4, 'tensor': 2}, {'data': 2, 'expert': 2, 'context': 2}], ids=str
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_copy_has_the_same_bits_elsewhere(use_mesh, sizes, dtype):
  mesh = use_mesh(**sizes)
  params = init(TINY)
  target = weights.rollout_mesh(mesh)
  copy = weights.rollout_params(params, TINY, target, dtype)
  for n, leaf in numbers(copy).items():
    np.testing.assert_array_equal(leaf, np.asarray(trees.flatten(params)[n].astype(dtype)), n)
  for leaf in jax.tree.leaves(copy):
    assert leaf.dtype == dtype and leaf.sharding.mesh == target
    assert leaf.sharding.num_devices == mesh.size
    if sizes.get('tensor', 1) == 1:
      assert leaf.is_fully_replicated
  gate = trees.flatten(copy)['stack0/block0/mlp/gate/w']
  assert gate.addressable_shards[0].data.size * mesh.shape['tensor'] == gate.size
  every = len(trees.flatten(params))
  assert weights.checksums(params, dtype, count=every, seed=0) == weights.checksums(
    copy, dtype, count=every, seed=0
  )


def test_a_copy_outlives_the_trainer_s_update():
  params = init(TINY)
  before = numbers(params)
  copy = weights.rollout_params(params, TINY, jax.sharding.get_mesh(), jnp.float32)
  jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0)(params)
  for n, leaf in numbers(copy).items():
    np.testing.assert_array_equal(leaf, before[n])


def test_a_checksum_sees_one_bit_and_one_exchange():
  params = init(TINY)
  flat = trees.flatten(params)
  every = weights.checksums(params, jnp.float32, count=99, seed=0)
  assert set(every) == set(flat) and len(set(every.values())) == len(every)
  name = 'stack0/block0/attn/o/w'
  leaf = np.asarray(flat[name])
  changed = leaf.copy()
  changed.flat[7] = np.nextafter(changed.flat[7], 9)
  turned = leaf.swapaxes(0, 0).copy()
  turned[0], turned[1] = leaf[1], leaf[0]
  for other in (changed, turned):
    put = jax.device_put(other, flat[name].sharding)
    got = weights.checksums(trees.unflatten(flat | {name: put}), jnp.float32, count=99, seed=0)
    assert {n for n in every if got[n] != every[n]} == {name}


def test_leaves_are_drawn_by_seed():
  params = init(TINY)
  drawn = [set(weights.checksums(params, jnp.bfloat16, count=3, seed=s)) for s in (0, 0, 1, 2)]
  assert drawn[0] == drawn[1] and all(len(d) == 3 for d in drawn)
  assert len(set.union(*drawn)) > 3
