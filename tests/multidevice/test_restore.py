"""A checkpoint of eight devices on fewer: the same bits, and the same next step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import TINY, ids, init, place

from ftjax.algorithms import sft
from ftjax.config import keys
from ftjax.models import kinds
from ftjax.models.forward import Forward
from ftjax.runtime import sharding, trees
from ftjax.storage.checkpoint import Checkpoints, Retention
from ftjax.training.state import create, state_shardings, with_shardings

B, T = 8, 16
OPTIMIZER = optax.adam(0.1)
MESHES = {
  1: {},
  2: dict(fsdp=2),
  4: dict(fsdp=2, tensor=2),
  8: dict(data=2, fsdp=2, tensor=2),
}


def make(params):
  return create(params, {}, OPTIMIZER, with_ema=True)


def abstract(mesh):
  shapes = jax.eval_shape(make, kinds.abstract(TINY))
  where = sharding.shardings(mesh, kinds.axes(TINY))
  return with_shardings(shapes, state_shardings(shapes, where, mesh))


def loss_and_gradient(params):
  """Of one batch with ragged weights, on the current mesh; numpy, by name."""
  rng = np.random.default_rng(1)
  batch = {
    'tokens': ids(B, T, 1),
    'labels': ids(B, T, 2),
    'weights': (rng.random((B, T)) < 0.5).astype(np.float32),
    'segments': np.ones((B, T), np.int32),
    'positions': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
  }
  batch = {k: place(v, 'batch', 'seq') for k, v in batch.items()}
  loss_fn = sft.make_loss(Forward(TINY, jnp.float32), keys.default())

  @jax.jit
  def both(params, batch):
    def mean(params):
      total, weight, _ = loss_fn(params, batch, None)
      return total / weight

    return jax.value_and_grad(mean)(params)

  loss, gradient = both(params, batch)
  return float(loss), {n: np.asarray(g) for n, g in trees.flatten(gradient).items()}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(folder, state as numpy, (loss, gradient)) of a state of eight devices, moments not 0."""
  sizes = dict.fromkeys(sharding.AXES, 1)
  with jax.set_mesh(sharding.make_mesh(sizes | MESHES[8])):
    mesh = jax.sharding.get_mesh()
    target = abstract(mesh)
    state = jax.jit(make, out_shardings=jax.tree.map(lambda a: a.sharding, target))(init(TINY))
    rng = np.random.default_rng(2)
    numbers = jax.tree.map(
      lambda a: (
        rng.normal(size=a.shape).astype(np.float32) if a.dtype == jnp.float32 else np.asarray(a + 7)
      ),
      state.opt,
    )
    opt = jax.tree.map(lambda n, a: jax.device_put(n, a.sharding), numbers, state.opt)
    state = dataclasses.replace(state, opt=opt)
    folder = str(tmp_path_factory.mktemp('checkpoints'))
    checkpoints = Checkpoints(folder, Retention(1, '', 'min'))
    checkpoints.save(3, state, {}, None)
    checkpoints.wait()
    checkpoints.close()
    return folder, jax.tree.map(np.asarray, state), loss_and_gradient(state.params)


@pytest.mark.parametrize('count', sorted(MESHES))
def test_restored_on_other_devices(saved, use_mesh, count):
  """The state bitwise; the next loss within 1e-6, its gradient within 5e-6 of its L2 norm."""
  folder, want, (want_loss, want_gradient) = saved
  mesh = use_mesh(**MESHES[count])
  target = abstract(mesh)
  checkpoints = Checkpoints(folder, Retention(1, '', 'min'))
  state = checkpoints.restore(3, target)
  checkpoints.close()
  for got, expected, where in zip(
    *(jax.tree.leaves(t) for t in (state, want, target)), strict=True
  ):
    assert got.sharding == where.sharding and got.dtype == expected.dtype
    assert np.asarray(got).tobytes() == expected.tobytes()
  loss, gradient = loss_and_gradient(state.params)
  assert loss == pytest.approx(want_loss, rel=1e-6)
  apart = sum(np.sum((gradient[n] - g) ** 2, dtype=np.float64) for n, g in want_gradient.items())
  size = sum(np.sum(g**2, dtype=np.float64) for g in want_gradient.values())
  assert apart**0.5 <= 5e-6 * size**0.5 and size > 0
