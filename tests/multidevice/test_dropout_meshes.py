"""Dropout inside a model on meshes: the numbers that one device drops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY, ids, init, place

from ftjax.models.dropout import Rates
from ftjax.models.forward import Forward
from ftjax.runtime import sharding

B, T = 4, 32


def states():
  """Hidden states of a training step in the rows' natural order, with all three rates."""
  order = sharding.zigzag(T, sharding.axis_size('context'))
  segments = np.repeat([[1, 2, 0]], [14, 12, 6], axis=1).repeat(B, 0).astype(np.int32)
  positions = np.concatenate([np.arange(n) for n in (14, 12, 6)])[None].repeat(B, 0)
  batch = {'tokens': ids(B, T, seed=2), 'segments': segments, 'positions': positions}
  batch = {k: place(v[:, order].astype(np.int32), 'batch', 'seq') for k, v in batch.items()}
  keys = jax.sharding.reshard(jax.random.split(jax.random.key(0), B), sharding.spec('batch'))
  forward = Forward(TINY, jnp.float32, rates=Rates(0.3, 0.3, 0.3))
  run = jax.jit(lambda p, b, keys: forward.with_dropout(keys).hidden_states(p, b))
  return np.asarray(run(init(TINY), batch, keys))[:, np.argsort(order)]


@pytest.fixture(scope='module')
def one_device():
  return states()


@pytest.mark.parametrize(
  'sizes',
  [
    dict(data=2, context=2, tensor=2),
    pytest.param(dict(fsdp=2, context=4), marks=pytest.mark.full),
  ],
)
def test_a_mesh_drops_what_one_device_drops(sizes, use_mesh, one_device):
  use_mesh(**sizes)
  np.testing.assert_allclose(states(), one_device, atol=2e-5)
