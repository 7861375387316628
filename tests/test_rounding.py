"""Stochastic rounding of bfloat16 parameters: unbiased, the same on every mesh, and it moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.training import rounding

KEY = jax.random.key(3)


def test_to_a_neighbour_and_unbiased():
  """The mean of 4,096 draws is within five standard errors of each number."""
  rng = np.random.default_rng(0)
  x = np.float32([*rng.normal(size=32), *rng.normal(size=16) * 1e-30, 1.0, -0.0, 255.4])
  draws = np.asarray(rounding.to_bfloat16(jnp.tile(x, (4096, 1)), KEY).astype(jnp.float32))
  cut = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
  up = ((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
  is_exact = cut == x
  assert ((draws == cut) | ((draws == up) & ~is_exact)).all()
  apart = np.abs(draws.astype(np.float64).mean(0) - x)
  assert (apart <= 5 * 0.5 * np.abs(up - cut) / np.sqrt(4096)).all()
  assert len(np.unique(draws[:, 0])) == 2


def test_what_is_not_finite_stays_so():
  x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
  x = jnp.append(x, jax.lax.bitcast_convert_type(jnp.uint32(0x7FFFFFFF), jnp.float32))
  got = np.asarray(rounding.to_bfloat16(x, KEY).astype(jnp.float32))
  np.testing.assert_array_equal(got, [np.inf, -np.inf, np.nan, np.nan])


@pytest.mark.parametrize('is_stochastic', [True, False])
def test_small_steps_add_up(is_stochastic):
  """A hundred steps of a twentieth of the neighbours' distance; to the nearest, none counts."""
  params = {'a': jnp.ones(1000, jnp.bfloat16), 'b': jnp.ones(4, jnp.float32)}
  size = 2**-7 / 20
  updates = {'a': jnp.full(1000, size), 'b': jnp.full(4, size)}

  def one(params, key):
    if is_stochastic:
      return rounding.apply_updates(params, updates, key), None
    return jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates), None

  params, _ = jax.jit(lambda p: jax.lax.scan(one, p, jax.random.split(KEY, 100)))(params)
  assert params['a'].dtype == jnp.bfloat16 and params['b'].dtype == jnp.float32
  mean = float(params['a'].astype(jnp.float32).mean())
  assert mean == pytest.approx(1 + 100 * size if is_stochastic else 1.0, abs=1e-3)
  np.testing.assert_allclose(params['b'], 1 + 100 * size, rtol=1e-5)


def test_the_bits_follow_from_key_and_name_on_any_mesh(use_mesh):
  x = np.random.default_rng(1).normal(size=(16, 24)).astype(np.float32)
  params = {'a': {'w': x.astype(jnp.bfloat16)}, 'b': {'w': x.astype(jnp.bfloat16)}}
  updates = jax.tree.map(lambda p: np.full(p.shape, 1e-4, np.float32), params)
  found = []
  for sizes, spec in (
    ({}, P()),
    (dict(fsdp=2, tensor=4), P('tensor', 'fsdp')),
    (dict(fsdp=8), P('fsdp')),
  ):
    where = NamedSharding(use_mesh(**sizes), spec)
    placed = jax.device_put((params, updates), where)
    run = jax.jit(jax.sharding.auto_axes(rounding.apply_updates, out_sharding=where))
    found.append(jax.tree.map(np.asarray, run(*placed, KEY)))
  for other in found[1:]:
    assert other['a']['w'].tobytes() == found[0]['a']['w'].tobytes()
  assert found[0]['a']['w'].tobytes() != found[0]['b']['w'].tobytes()


@pytest.mark.full
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
  """With 8-bit moments and stochastic rounding, through the entry: the losses and the export."""
  keys = ('model.param_dtype=bfloat16', 'optim.rounding=stochastic', 'optim.moments=8bit')
  keys = (
    *keys,
    'optim.ema_decay=0.0',
    'optim.warmup_steps=0',
    'optim.schedule=constant',
    'steps=4',
    'checkpoint.every=2',
    'eval.every=4',
  )
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  code, told = tiny_run.run('train', tiny_run.arguments(whole, *keys))
  assert code == 0, told
  code, told = tiny_run.run('train', tiny_run.arguments(cut, *keys, 'steps=2', 'eval.every=2'))
  assert code == 0, told
  code, told = tiny_run.run('train', tiny_run.arguments(cut, *keys))
  assert code == 0, told
  losses = {
    w: [r['loss'] for (s, _), r in tiny_run.metrics(w).items() if s == 'train']
    for w in (whole, cut)
  }
  assert losses[whole] == losses[cut] and len(losses[cut]) == 4
  weights = [(w / 'export' / 'model.safetensors').read_bytes() for w in (whole, cut)]
  assert weights[0] == weights[1]
  code, told = tiny_run.run(
    'train', tiny_run.arguments(cut, *keys, 'optim.moments=float32', 'steps=6')
  )
  assert code == 2 and "optim.moments: '8bit' -> 'float32'" in told
