"""Rates by depth and gradual unfreezing: by hand, on a model's parameters, and over steps, where
what is frozen keeps its bits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_adapters
from tiny_model import TINY, UNTIED, ids, init, place, tokens_at

from ftjax.algorithms import sft
from ftjax.config import keys, validation
from ftjax.models import kinds
from ftjax.models.forward import Forward
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError
from ftjax.training import layer_schedule, optimizer
from ftjax.training.optimizer import OptimizerConfig
from ftjax.training.state import create, state_shardings
from ftjax.training.step import Extras, make_step

NAMES = {
  'embed/w': ('embed/w',),
  'stack0/block0/q': ('layer0/q', 'layer1/q', 'layer2/q'),
  'final_norm/scale': ('final_norm/scale',),
  'head/w': ('head/w',),
}
VALUE = {
  'value/stack0/block0/q': ('value/layer0/q', 'value/layer1/q'),
  'value/score/w': ('value/score/w',),
}


def as_lists(found):
  return {n: np.round(x, 4).tolist() for n, x in found.items()}


def test_rates_by_depth_by_hand():
  found = as_lists(layer_schedule.decayed(NAMES, 0.5))
  assert found == {
    'embed/w': [0.0625],
    'stack0/block0/q': [0.125, 0.25, 0.5],
    'final_norm/scale': [1],
    'head/w': [1],
  }
  tied = {n: own for n, own in NAMES.items() if n != 'head/w'}
  found = as_lists(layer_schedule.decayed(tied, 0.5))  # a norm alone is with the last layer
  assert found['stack0/block0/q'] == [0.25, 0.5, 1] and found['embed/w'] == [0.125]
  assert found['final_norm/scale'] == [1]


def test_a_model_beside_it_has_depths_of_its_own():
  found = as_lists(layer_schedule.decayed(NAMES | VALUE, 0.5))
  assert found['value/score/w'] == [1] and found['value/stack0/block0/q'] == [0.25, 0.5]
  assert found['stack0/block0/q'] == [0.125, 0.25, 0.5]


def groups(names, **frozen):
  trained = {n: np.ones(len(own), bool) for n, own in names.items()}
  for name, layers in frozen.items():
    trained[name][layers] = False
  return layer_schedule.unfreezing(10, names, trained)


def test_groups_by_hand():
  found = groups(NAMES)
  assert (found.count, found.last_start) == (5, 40)
  assert as_lists(found.groups) == {
    'embed/w': [4],
    'stack0/block0/q': [3, 2, 1],
    'final_norm/scale': [0],
    'head/w': [0],
  }


def test_a_group_without_a_trained_parameter_is_left_out():
  found = groups(NAMES, **{'stack0/block0/q': [1]})
  assert found.count == 4 and found.groups['embed/w'].tolist() == [3]
  assert found.groups['stack0/block0/q'][[0, 2]].tolist() == [2, 1]
  adapter = {'stack0/block0/q': NAMES['stack0/block0/q']}  # the others are a frozen base
  found = layer_schedule.unfreezing(10, NAMES, {n: np.ones(3, bool) for n in adapter})
  assert found.groups['stack0/block0/q'].tolist() == [2, 1, 0] and found.count == 3


def test_every_parameter_of_a_model_has_a_place():
  info = optimizer.leaves(kinds.declared(UNTIED), UNTIED.layer_slots())
  names = {n: leaf.names for n, leaf in info.items()}
  found = layer_schedule.decayed(names, 0.5)
  for name, own in found.items():
    top = name.startswith(('head', 'final_norm'))
    expected = [2.0**-4] if name == 'embed/w' else [1.0] if top else [1 / 8, 1 / 4, 1 / 2]
    np.testing.assert_allclose(own, expected, err_msg=name)


# Over steps.

RATE, EVERY = 0.1, 2
OPEN = (('.*', False),)


def config(name='adamw', **changes):
  settings = dict(
    moments='float32',
    schedule=lambda k: RATE,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    decay=(('.*', 1.0),),
    multipliers=(('.*', 1.0),),
    freeze=OPEN,
  )
  return OptimizerConfig(name=name, **(settings | changes))


@functools.cache
def batch(micro=1):
  arrays = {'tokens': ids(4, 16), 'labels': ids(4, 16, seed=1)}
  where = tokens_at(np.ones((4, 16), np.int32))
  arrays |= {'segments': np.asarray(where.segments), 'positions': np.asarray(where.positions)}
  arrays |= {'weights': np.ones((4, 16), np.float32)}
  return {
    k: place(v.reshape(micro, 4 // micro, 16), None, 'batch', 'seq') for k, v in arrays.items()
  }


def start(arch, settings, every, params=None):
  """(state, jitted step, the schedule)."""
  mesh, params = jax.sharding.get_mesh(), params or init(arch)
  declared = kinds.declared(arch)
  info = optimizer.leaves(declared, arch.layer_slots())
  off = optimizer.frozen_names(settings.freeze, info)
  trained = {n: leaf for n, leaf in info.items() if n not in off}
  rule = optimizer.make_optimizer(settings, info, trained)
  found = optimizer.unfreezing(every, settings.freeze, info, trained) if every else None
  frozen, kept = trees.select(params, lambda n: n in off)
  abstract = jax.eval_shape(lambda p, f: create(p, f, rule, True), kept, frozen)
  shardings = state_shardings(abstract, sharding.shardings(mesh, kinds.axes(arch)), mesh)
  state = jax.jit(lambda p, f: create(p, f, rule, True), out_shardings=shardings)(kept, frozen)
  step = make_step(
    sft.make_loss(Forward(arch, jnp.float32), keys.default()),
    rule,
    shardings,
    mask=optimizer.layer_mask(settings, info, trained),
    schedule=settings.schedule,
    clip_norm=settings.clip_norm,
    ema_decay=0.5,
    is_stochastic=False,
    seed=0,
    extras=Extras(0.0, found),
  )
  return state, jax.jit(step, out_shardings=(shardings, None)), found


def host(tree):
  return {n: np.asarray(x) for n, x in trees.flatten(tree).items()}


def test_what_is_not_trained_yet_keeps_its_bits_and_then_moves():
  """Weight decay and momentum are on; the moving average stays too."""
  state, step, found = start(TINY, config(), EVERY)
  begun = host(state.params)
  for k in range(found.last_start + 1):
    state, _ = step(state, batch())
    after, average = host(state.params), host(state.ema)
    for name, own in found.groups.items():
      for layer, group in enumerate(own):
        pick = (lambda x, i=layer: x[i]) if len(own) > 1 else (lambda x: x)
        is_same = pick(after[name]).tobytes() == pick(begun[name]).tobytes()
        assert is_same == (group * EVERY > k), (name, layer, k)
        if is_same:
          assert pick(average[name]).tobytes() == pick(begun[name]).tobytes()


def test_the_norm_and_the_clipping_count_what_is_trained():
  """SGD: the first update is that of the top group alone, clipped by its own norm."""
  settings = config('sgd', b1=0.0, weight_decay=0.0, clip_norm=0.01)
  state, step, found = start(TINY, settings, 5)
  begun = host(state.params)
  state, metrics = step(state, batch())
  moved = {n: x - begun[n] for n, x in host(state.params).items()}
  length = np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in moved.values()))
  np.testing.assert_allclose(length, RATE * 0.01, rtol=1e-3)
  assert float(metrics['grad_norm']) > 0.01
  assert {n for n, x in moved.items() if x.any()} == {n for n, g in found.groups.items() if 0 in g}


def test_moments_are_warm_when_a_layer_begins_to_train():
  """The first steps of a layer are no larger than Adam's usual ones: at most about the rate."""
  settings = config(weight_decay=0.0, clip_norm=0.0)
  state, step, found = start(TINY, settings, 4)
  name = 'stack0/block0/mlp/up/w'
  largest = []
  for _ in range(found.last_start + 2):
    before = host(state.params)[name]
    state, _ = step(state, batch())
    largest.append(abs(host(state.params)[name] - before).max())
  assert max(largest) < 1.5 * RATE


def test_rates_by_depth_in_a_step():
  """SGD: each layer's step is its factor times the plain one."""
  moved = []
  for factor in (1.0, 0.5):
    changed = config('sgd', b1=0.0, weight_decay=0.0, clip_norm=0.0, layer_decay=factor)
    state, step, _ = start(TINY, changed, 0)
    begun = host(state.params)
    after = host(step(state, batch())[0].params)
    moved.append({n: x - begun[n] for n, x in after.items()})
  plain, found = moved
  for name, x in found.items():
    factors = (
      [1 / 8] if name == 'embed/w' else [1.0] if name == 'final_norm/scale' else [1 / 4, 1 / 2, 1]
    )
    scale = np.reshape(factors, (-1, *(1,) * (x.ndim - 1))) if len(factors) > 1 else factors[0]
    np.testing.assert_allclose(x, scale * plain[name], atol=2e-6, err_msg=name)


def test_frozen_layers_and_adapters_have_no_group():
  freeze = (('layer2/.*|final_norm/scale', True), ('.*', False))
  info = optimizer.leaves(kinds.declared(TINY), TINY.layer_slots())
  found = optimizer.unfreezing(3, freeze, info, info)
  assert found.count == 3 and found.groups['embed/w'].tolist() == [2]
  arch = tiny_adapters.adapted(TINY)
  info = optimizer.leaves(kinds.declared(arch), arch.layer_slots())
  own = {n: leaf for n, leaf in info.items() if '/lora_' in n}
  found = optimizer.unfreezing(3, OPEN, info, own)
  assert found.count == 3 and all(g.tolist() == [2, 1, 0] for g in found.groups.values())


def test_select_by_hand():
  found = groups({'a': ('layer0/a', 'layer1/a'), 'embed/w': ('embed/w',)})
  new, old = ({'a': jnp.full((2, 3), x), 'embed': {'w': jnp.full(2, x)}} for x in (1.0, -0.0))
  for updates, expected in ((0, [0, 1, 0]), (10, [1, 1, 0]), (20, [1, 1, 1])):
    out = found.select(new, old, jnp.int32(updates))
    assert [float(out['a'][0, 0]), float(out['a'][1, 2]), float(out['embed']['w'][1])] == expected
  masked = found.masked({'a': jnp.full((2, 3), jnp.inf)}, jnp.int32(0))['a']
  assert np.isnan(masked[0]).all() and np.isinf(masked[1]).all()
  assert np.signbit(np.asarray(found.select(new, old, jnp.int32(0))['a'][0])).all()  # -0.0 stays


@pytest.mark.parametrize('value', [0.0, 1.5, -0.9])
def test_a_factor_that_is_none_is_refused(value):
  c = keys.default()
  c.model.path, c.data.train, c.optim.layer_decay = 'm', 'rows.jsonl', value
  with pytest.raises(
    ConfigError, match=r'optim.layer_decay=.*; expected more than 0 and at most 1'
  ):
    validation.validate(c)
