"""Experts: products by group, what a layer of experts computes, its load-balance loss, and what a
training step does with it.
"""

import functools
import re

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model
from flax import nnx
from parity import family_cases as cases

from ftjax.algorithms import sft
from ftjax.config import keys
from ftjax.experiment import run as experiment
from ftjax.experiment.trainer import Trainer
from ftjax.families import tensor_map
from ftjax.hf import layout
from ftjax.models import grouped, lora, routing
from ftjax.models.architecture import MoeSpec
from ftjax.models.forward import Forward
from ftjax.models.moe import Moe
from ftjax.models.routing import RouterLog
from ftjax.runtime import trees
from ftjax.runtime.errors import ConfigError
from ftjax.training.state import create

# Products by group.


@pytest.mark.parametrize('rows', [9, 600])  # small blocks, and large ones
def test_a_product_by_group_is_that_of_each_row_with_its_own_matrix(rows):
  """In values and gradients, also for an empty group. What stands behind the last group is not
  read, whatever it is.
  """
  rng = np.random.default_rng(0)
  sizes = rng.multinomial(rows - 4, [0.5, 0.2, 0.3])
  sizes = np.int32([sizes[0], 0, *sizes[1:]])
  x, g = rng.normal(size=(2, rows, 6)).astype(np.float32)
  w = rng.normal(size=(4, 6, 6)).astype(np.float32)
  x[sizes.sum() :] = g[sizes.sum() :] = np.nan
  product = functools.partial(grouped.dot, sizes=jnp.asarray(sizes))
  y, backward = jax.vjp(product, jnp.asarray(x), jnp.asarray(w))
  dx, dw = backward(jnp.asarray(g))
  owner, inside = np.repeat(np.arange(4), sizes), slice(sizes.sum())
  np.testing.assert_allclose(y[inside], np.einsum('mi,mio->mo', x[inside], w[owner]), atol=1e-5)
  np.testing.assert_allclose(dx[inside], np.einsum('mo,mio->mi', g[inside], w[owner]), atol=1e-5)
  each = np.stack([x[inside][owner == e].T @ g[inside][owner == e] for e in range(4)])
  np.testing.assert_allclose(dw, each, atol=1e-4)
  assert not np.asarray(y)[sizes.sum() :].any() and not np.asarray(dx)[sizes.sum() :].any()


def test_the_loop_of_cpu_is_the_product_of_other_platforms():
  rng = np.random.default_rng(1)
  x, w = (jnp.float32(rng.normal(size=s)) for s in ((40, 6), (3, 6, 5)))
  sizes = jnp.int32([13, 20, 7])
  np.testing.assert_allclose(grouped._blocked(x, w, sizes), grouped._ragged(x, w, sizes), atol=1e-5)
  g = jnp.float32(rng.normal(size=(40, 5)))
  np.testing.assert_allclose(
    grouped._blocked_sums(x, g, sizes), grouped._ragged_sums(x, g, sizes), atol=1e-4
  )


@pytest.mark.parametrize('shape', [(40, 6, 5), (300, 70, 130)])
def test_the_kernels_of_gpus_are_the_product_of_other_platforms(shape):
  """Step by step; widths below and beyond a block, an empty group, rows behind the last one."""
  rows, inputs, outputs = shape
  rng = np.random.default_rng(2)
  x, w, g = (
    jnp.float32(rng.normal(size=s)) for s in ((rows, inputs), (4, inputs, outputs), (rows, outputs))
  )
  first = rows // 3
  sizes = jnp.int32([first, 0, rows - first - 7, 4])
  inside = slice(rows - 3)
  # In an island: interpret mode knows no Explicit axes.
  product, sums = (
    jax.jit(jax.shard_map(f, in_specs=jax.P(), out_specs=jax.P(), check_vma=False))
    for f in (
      functools.partial(grouped._by_kernel, interpret=True),
      functools.partial(grouped._sums_by_kernel, interpret=True),
    )
  )
  expected = grouped._blocked(x, w, sizes)
  np.testing.assert_allclose(product(x, w, sizes)[inside], expected[inside], atol=1e-4)
  expected = grouped._blocked_sums(x, g, sizes)
  np.testing.assert_allclose(sums(x, g, sizes), expected, atol=1e-4)


# A layer.

SPEC = MoeSpec(num_experts=5, top_k=2, ffn_dim=12)


@pytest.fixture(scope='module')
def layer():
  """(x [B, T, D], segments) -> (y, Routing) of a random layer, jitted."""
  arch = tiny_model.TINY
  definition, declared = lora.define(Moe(16, SPEC), '', arch)
  rng = np.random.default_rng(2)
  weights = {
    n: tiny_model.place(rng.normal(size=p.shape).astype(np.float32), *p.axes)
    for n, p in declared.items()
  }
  module = trees.unflatten(weights)
  run = jax.jit(lambda x, segments: nnx.merge(definition, module)(x, segments))

  def call(x, segments):
    y, found = run(
      tiny_model.place(x, 'batch', 'seq', None), tiny_model.place(segments, 'batch', 'seq')
    )
    return np.asarray(y), jax.tree.map(np.asarray, found)

  return call


def states(seed=0):
  return np.random.default_rng(seed).normal(size=(2, 24, 16)).astype(np.float32)


def test_permuting_tokens_changes_nothing(layer):
  x, segments = states(), np.ones((2, 24), np.int32)
  y, found = layer(x, segments)
  order = np.random.default_rng(3).permutation(48)

  def mixed(a):
    return a.reshape(48, *a.shape[2:])[order].reshape(a.shape)

  z, other = layer(mixed(x), segments)
  np.testing.assert_array_equal(z, mixed(y))
  np.testing.assert_array_equal(other.choices, mixed(found.choices))
  np.testing.assert_array_equal(other.chosen, found.chosen)


def test_a_token_does_not_know_the_others(layer):
  """Even where all others go to its own expert: no expert is ever full."""
  x, segments = states(), np.ones((2, 24), np.int32)
  crowd = np.broadcast_to(x[:1, :1], x.shape).copy()
  y, found = layer(crowd, segments)
  assert found.chosen.max() == 48
  crowd[1, 1:] = states(4)[1, 1:]
  z, _ = layer(crowd, segments)
  np.testing.assert_array_equal(z[0, 0], y[0, 0])


def test_padding_goes_to_no_expert(layer):
  segments = np.ones((2, 24), np.int32)
  segments[0, 17:] = 0
  x = states()
  y, found = layer(x, segments)
  x[0, 17:] = np.nan
  z, other = layer(x, segments)
  np.testing.assert_array_equal(z, y)
  assert not y[0, 17:].any() and found.tokens == 41 and found.chosen.sum() == 82
  assert found.probs.sum() == pytest.approx(41)
  for got, expected in zip(other[:3], found[:3], strict=True):
    np.testing.assert_array_equal(got, expected)


# The load-balance loss.


@functools.cache
def golden():
  with np.load(cases.FOLDER.parent / 'routers.npz') as found:
    return dict(found)


@functools.partial(jax.jit, static_argnums=0)
def balance(arch, params, batch):
  """(load-balance loss of a batch, its gradient)."""

  def total(params):
    log = RouterLog()
    Forward(arch, jnp.float32, router_log=log).hidden_states(params, batch)
    (found,) = log.take()
    return routing.load_balance(found.chosen, found.tokens, found.probs)

  return jax.value_and_grad(total)(params)


@pytest.mark.parametrize('name', [pytest.param('mixtral', marks=pytest.mark.full), 'qwen3_moe'])
def test_the_load_balance_loss_is_that_of_transformers(name):
  """In value and gradient, of the tokens that are no padding, over all layers together."""
  arch, stored = family_models.architecture(name), golden()
  batch = family_models.batch(stored[f'{name}/ids'], stored[f'{name}/mask'])
  value, gradient = balance(arch, family_models.params(name, arch), batch)
  assert float(value) == pytest.approx(float(stored[f'{name}/balance']), rel=1e-6)
  leaves = {n: np.asarray(g) for n, g in trees.flatten(gradient).items()}
  compared = 0
  for hf, parts in layout.by_tensor(arch).items():
    expected = stored.get(f'{name}/gradient/{hf}')
    if expected is not None:
      got = tensor_map.whole_tensor([(b, leaves[b.leaf][b.at]) for b in parts])
      np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
      compared += 1
  assert compared == 1 + len(arch.mixtures())


@functools.cache
def stepped(name, accum=1, factor=-1.0):
  """(metrics, gradient's moment) of a step on the rows of the golden file, repeated."""
  arch, stored = family_models.architecture(name), golden()
  tokens, mask = stored[f'{name}/ids'], stored[f'{name}/mask']
  c = keys.default()
  c.batch_size, c.seq_len, c.steps, c.grad_accum = 2, tokens.shape[1], 10, accum
  c.moe.balance, c.optim.name, c.optim.clip_norm = factor, 'sgd', 0.0
  run = experiment.without_data(c, jax.sharding.get_mesh(), arch)
  trainer = Trainer(run, sft.make_loss(run.forward, c))
  params = family_models.params(name, arch)
  places = jax.tree.map(lambda a: a.sharding, trainer.abstract)
  state = jax.jit(lambda p: create(p, {}, trainer.optimizer, False), out_shardings=places)(params)
  shape = (accum, 2 // accum, tokens.shape[1])
  batch = {
    n: tiny_model.place(np.asarray(x).reshape(shape), None, 'batch', 'seq')
    for n, x in family_models.batch(tokens, mask).items()
  }
  new, metrics = trainer.compile()(state, batch)
  moment = jax.tree.map(np.asarray, optax.tree.get(new.opt, 'trace'))
  return {k: float(v) for k, v in metrics.items()}, trees.flatten(moment)


def test_a_step_adds_the_loss_with_the_factor_of_the_model():
  """As transformers does with output_router_logits."""
  name = 'mixtral'
  metrics, _ = stepped(name)
  assert metrics['loss'] == pytest.approx(float(golden()[f'{name}/loss']), rel=1e-6)
  assert metrics['moe/balance'] == pytest.approx(float(golden()[f'{name}/balance']), rel=1e-6)
  assert metrics['loss/alone'] == pytest.approx(metrics['nll'], rel=1e-6) != metrics['loss']
  experts = family_models.architecture(name).mixtures()[0].num_experts
  assert 1 < metrics['moe/max_load'] <= metrics['moe/max_load/worst_layer'] <= experts
  assert 0 < metrics['moe/entropy'] < 1 and 0 <= metrics['moe/idle'] < 1


def test_accumulated_is_the_whole_batch():
  """The shares of the load are those of all micro-batches; rows have unequal lengths."""
  (whole, moment), (parts, other) = (stepped('mixtral', n) for n in (1, 2))
  assert parts['loss'] == pytest.approx(whole['loss'], rel=1e-6)
  for key in (k for k in whole if k.startswith('moe/')):
    assert parts[key] == pytest.approx(whole[key], rel=1e-5), key
  for name, g in moment.items():
    np.testing.assert_allclose(other[name], g, rtol=0, atol=2e-6 * np.abs(g).max(), err_msg=name)


@pytest.mark.full
def test_the_factor_can_be_set():
  """With 0 rows do not know of each other; the statistics are there all the same."""
  usual, none = stepped('mixtral')[0], stepped('mixtral', factor=0.0)[0]
  factor = family_models.architecture('mixtral').mixtures()[0].balance
  gap = usual['loss'] - none['loss']
  assert gap == pytest.approx(factor * usual['moe/balance'], rel=1e-4)
  assert none['moe/balance'] == usual['moe/balance'] and none['loss'] == none['nll']


def test_a_factor_for_a_model_without_experts_is_refused():
  c = keys.default()
  c.moe.balance, c.seq_len = 0.01, 64
  with pytest.raises(ConfigError, match=re.escape('moe.balance=0.01: the model has no experts')):
    experiment.without_data(c, jax.sharding.get_mesh(), tiny_model.TINY)


def test_statistics_of_a_known_load():
  chosen = jnp.float32([[8, 0, 0, 0], [2, 2, 2, 2]])
  found = {k: float(v) for k, v in routing.load_statistics(chosen).items()}
  assert found == pytest.approx(
    {'max_load': 2.5, 'max_load/worst_layer': 4.0, 'entropy': 0.5, 'idle': 3 / 8}
  )
