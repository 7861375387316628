"""SAM against a plain loop of two gradients, however a step is cut, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import by_hand, host, toy, with_signal
from tiny_model import TINY, ids, init, place, tokens_at

from ftjax.algorithms import sft
from ftjax.config import keys, validation
from ftjax.models.forward import Forward
from ftjax.runtime.errors import ConfigError
from ftjax.training import sharpness
from ftjax.training.step import Extras, executable_fingerprint

RADIUS = 0.3


def plain_loop(batch, steps, clip=0.0):
  """Weights, losses, rises of the loss and norms of SGD with SAM, rate 0.1, in float64."""
  a, out = np.array([1.0, -2.0, 0.5]), []
  for _ in range(steps):
    loss, first = by_hand(batch, a)
    there = a + RADIUS * first / np.linalg.norm(first)
    above, second = by_hand(batch, there)
    size = np.linalg.norm(second)
    a = a - 0.1 * second * min(1.0, clip / size if clip else 1.0)
    out.append((loss, above - loss, size))
  return a, *map(np.array, zip(*out, strict=True))


@pytest.mark.parametrize(('micro', 'clip'), [(1, 0.0), (4, 0.0), (2, 0.5)])
def test_five_steps_are_those_of_a_plain_loop(micro, clip):
  state, step, batch = toy(micro=micro, extras=Extras(RADIUS), clip_norm=clip)
  rows = host(batch)
  logged = []
  for _ in range(5):
    state, metrics = step(state, batch)
    logged.append([float(metrics[k]) for k in ('loss', 'sharpness', 'grad_norm')])
  a, *expected = plain_loop(rows, 5, clip)
  np.testing.assert_allclose(state.params['a'], a, rtol=1e-5)
  np.testing.assert_allclose(np.array(logged).T, expected, rtol=1e-4, atol=1e-6)
  assert float(state.frozen['b']) == 0.25


def test_it_is_the_first_step_of_optax_contrib_sam():
  """In its opaque mode, with gradients of the same rows."""
  state, step, batch = toy(extras=Extras(RADIUS))
  rows = jax.tree.map(jnp.asarray, host(batch))
  params = {'a': jnp.array([1.0, -2.0, 0.5])}

  def mean(params):
    error = rows['x'][0] @ params['a'] + 0.25 - rows['y'][0]
    return (rows['w'][0] * error**2).sum() / rows['w'][0].sum()

  def gradient(params, _):
    return jax.grad(mean)(params)

  theirs = optax.contrib.sam(
    optax.sgd(0.1),
    optax.chain(optax.contrib.normalize(), optax.sgd(RADIUS)),
    sync_period=2,
    opaque_mode=True,
  )
  first = gradient(params, 0)
  updates, _ = theirs.update(first, theirs.init(params), params, grad_fn=gradient)
  after, _ = step(state, batch)
  np.testing.assert_allclose(
    after.params['a'], optax.apply_updates(params, updates)['a'], rtol=1e-5
  )


def test_frozen_layers_do_not_move_in_the_ascent():
  def mask(gradient):
    return {'a': gradient['a'] * jnp.array([1.0, 0.0, 1.0])}

  state, step, batch = toy(extras=Extras(RADIUS), mask=mask)
  rows = host(batch)
  _, first = by_hand(rows)
  first[1] = 0
  _, second = by_hand(rows, [1, -2, 0.5] + RADIUS * first / np.linalg.norm(first))
  after, _ = step(state, batch)
  second[1] = 0
  np.testing.assert_allclose(after.params['a'], [1, -2, 0.5] - 0.1 * second, rtol=1e-5)
  assert float(after.params['a'][1]) == -2.0


def test_a_step_without_signal_or_with_a_nan_changes_nothing():
  state, step, batch = toy(extras=Extras(RADIUS), loss_fn=with_signal)
  before = host(state.params)
  idle = batch | {'y': jnp.full_like(batch['y'], 99)}
  state, metrics = step(state, idle)
  assert not bool(metrics['has_signal'])
  bad = batch | {'y': jnp.full_like(batch['y'], np.nan)}
  state, metrics = step(state, bad)
  assert not bool(metrics['ok'])
  np.testing.assert_array_equal(state.params['a'], before['a'])


def test_a_gradient_of_0_moves_nothing():
  params = {'a': jnp.ones(3)}
  found = sharpness.ascend(params, {'a': jnp.zeros(3)}, 0.5)
  np.testing.assert_array_equal(found['a'], params['a'])


def test_a_radius_of_0_is_the_same_program():
  texts = []
  for changes in ({}, {'extras': Extras(0.0)}, {'extras': Extras(0.1)}):
    _, step, _ = toy(**changes)
    texts.append(executable_fingerprint(step))
  assert texts[0] == texts[1] != texts[2]


def test_on_a_model_the_second_gradient_has_the_masks_of_the_first():
  """With dropout: the rise of the loss is that of one function, by its definition."""
  params = init(TINY)
  batch = {'tokens': ids(4, 16), 'labels': ids(4, 16, seed=1)}
  batch |= {'weights': np.ones((4, 16), np.float32)}
  batch = {k: place(v, 'batch', 'seq') for k, v in batch.items()}
  where = tokens_at(np.ones((4, 16), np.int32))
  batch |= {'segments': where.segments, 'positions': where.positions}
  c = keys.default()
  loss = sft.make_loss(Forward(TINY, jnp.float32), c)
  row_keys = jax.random.split(jax.random.key(0), 4)

  @jax.jit
  def both(params):
    def mean(p):
      total, weight, _ = loss(p, batch, row_keys)
      return total / weight

    value, gradient = jax.value_and_grad(mean)(params)
    above = mean(sharpness.ascend(params, gradient, 0.01))
    return value, above, sharpness.norm(gradient)

  value, above, size = map(float, both(params))
  np.testing.assert_allclose(above - value, 0.01 * size, rtol=0.1)  # to first order


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model.param_dtype': 'bfloat16'}, r'optim.sam_radius=0.05 needs model.param_dtype=float32'),
    (
      {'algorithm': 'grpo', 'rollout.rewards': 'math'},
      r'optim.sam_radius=0.05 with algorithm=grpo',
    ),
  ],
)
def test_what_it_may_not_stand_with_is_refused(changes, message):
  c = keys.default()
  c.model.path, c.data.train, c.optim.sam_radius = 'm', 'rows.jsonl', 0.05
  c.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=message):
    validation.validate(c)
