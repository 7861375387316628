"""The state of a run: made around parameters, and where each of its arrays lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny_model import TINY

from ftjax.config import keys
from ftjax.models import kinds
from ftjax.runtime import sharding, trees
from ftjax.training import optimizer
from ftjax.training.state import create, state_shardings, with_shardings

INFO = optimizer.leaves(kinds.declared(TINY), TINY.layer_slots())


def make_optimizer(name):
  c = keys.default()
  r = optimizer.OptimizerConfig(
    name=name, moments='float32', schedule=lambda k: 0.1, b1=0.9, b2=0.99, eps=1e-8,
    weight_decay=0.1, clip_norm=1.0, decay=c.optim.decay, multipliers=c.optim.multipliers,
    freeze=c.optim.freeze,
  )  # fmt: skip
  return optimizer.make_optimizer(r, INFO, INFO)


def lay_out(name, mesh, with_ema=True):
  """(abstract state, its shardings) of TINY under an optimizer."""
  make = lambda p: create(p, {}, make_optimizer(name), with_ema)  # noqa: E731
  abstract = jax.eval_shape(make, kinds.abstract(TINY))
  where = sharding.shardings(mesh, kinds.axes(TINY))
  return abstract, state_shardings(abstract, where, mesh)


def test_a_fresh_state():
  params, frozen = {'a': jnp.arange(3.0)}, {'b': jnp.ones(2)}
  state = create(params, frozen, optax.adam(0.1), with_ema=True)
  assert (int(state.step), int(state.skipped), int(state.bad_streak)) == (0, 0, 0)
  np.testing.assert_array_equal(state.ema['a'], params['a'])
  assert state.ema.keys() == {'a'} and state.frozen == frozen
  assert create(params, frozen, optax.adam(0.1), with_ema=False).ema == {}
  # Only trained leaves have moments.
  assert {jnp.shape(x) for x in jax.tree.leaves(state.opt)} == {(), (3,)}


def test_the_average_does_not_share_the_buffer_of_the_parameters():
  """Both are donated to the step; one buffer donated twice is an error."""
  state = create({'a': jnp.arange(3.0)}, {}, optax.sgd(0.1), True)
  assert state.ema['a'].unsafe_buffer_pointer() != state.params['a'].unsafe_buffer_pointer()


def test_moments_lie_like_their_parameters(use_mesh):
  mesh = use_mesh(fsdp=2, tensor=2)
  abstract, where = lay_out('adamw', mesh)
  expected = trees.flatten(sharding.shardings(mesh, kinds.axes(TINY)))
  adam = where.opt[0]
  for tree in (where.params, where.ema, adam.mu, adam.nu):
    assert trees.flatten(tree) == expected
  for leaf in (where.step, where.skipped, where.bad_streak, adam.count):
    assert leaf.spec == P()
  assert expected['stack0/block0/attn/q/w'].spec == P(None, 'fsdp', 'tensor', None)
  assert jax.tree.structure(where) == jax.tree.structure(abstract)


@pytest.mark.parametrize('name', optimizer.OPTIMIZERS)
def test_no_large_array_is_replicated(name, use_mesh):
  """What an optimizer holds of a parameter is spread over the devices as the parameter is."""
  mesh = use_mesh(fsdp=2, tensor=2)
  abstract, where = lay_out(name, mesh)
  mixer = TINY.layers()[0].mixer
  smallest = TINY.num_layers * TINY.model_dim * mixer.num_kv_heads * mixer.head_dim
  for leaf, s in zip(jax.tree.leaves(abstract), jax.tree.leaves(where), strict=True):
    if leaf.size >= smallest:
      assert s.num_devices == 4 and not s.is_fully_replicated, (leaf.shape, s.spec)
      assert np.prod(s.shard_shape(leaf.shape)) * 4 == leaf.size, (leaf.shape, s.spec)


def test_shapes_that_carry_shardings(use_mesh):
  mesh = use_mesh(fsdp=2)
  abstract, where = lay_out('adamw', mesh)
  both = with_shardings(abstract, where)
  q = both.params['stack0']['block0']['attn']['q']['w']
  assert q.shape == (3, 32, 4, 8) and q.dtype == jnp.float32
  assert q.sharding == where.params['stack0']['block0']['attn']['q']['w']
