"""An optimizer over stacked leaves does to each layer what optax does to that layer alone."""

import functools
import re

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import QWEN2, TINY, UNTIED

from ftjax.config import keys
from ftjax.models import kinds
from ftjax.runtime import trees
from ftjax.runtime.errors import ConfigError
from ftjax.training import optimizer
from ftjax.training.optimizer import OPTIMIZERS, Leaf, OptimizerConfig

STEPS, B1, B2, EPS = 5, 0.9, 0.99, 1e-8

# Wide enough for adafactor to factor (128), heads on either side of the split.
DECLARED = {
  'embed/w': ((160, 128), ('vocab', 'embed'), 128, 0.0),
  'final_norm/scale': ((128,), ('norm',), 0, 1.0),
  'stack0/block0/attn/o/w': ((3, 4, 32, 128), ('layers', 'heads', 'head_dim', 'embed'), 128, 0.0),
  'stack0/block0/attn/q/w': ((3, 128, 4, 32), ('layers', 'embed', 'heads', 'head_dim'), 128, 0.0),
  'stack0/block0/attn_norm/scale': ((3, 128), ('layers', 'norm'), 0, 1.0),
  'stack0/block0/mlp/up/w': ((3, 128, 136), ('layers', 'embed', 'ffn'), 128, 0.0),
  # As large as a matrix that adafactor would factor and muon turn.
  'stack0/block0/attn/q/b': ((3, 128, 130), ('layers', 'heads', 'head_dim'), 0, 0.0),
}
INFO = optimizer.leaves(DECLARED, [('stack0/block0', i) for i in range(3)])
MATRIX = {'attn/o/w': (128, 128), 'attn/q/w': (128, 128), 'mlp/up/w': (128, 136)}

DECAY = (('.*(norm/scale|/b)', 0.0), ('layer1/.*', 0.5), ('.*', 1.0))
MULTIPLIERS = (('layer0/.*', 0.25), ('layer2/attn/.*', 3.0), ('.*', 1.0))
FREEZE = (('layer1/attn/q/w', True), ('.*', False))
NOTHING = (('.*', False),)
ALL = (('.*', 1.0),)


def schedule(k):
  return 0.01 / (1.0 + k)


def recipe(name, **changes):
  settings = dict(
    moments='float32',
    schedule=schedule,
    b1=B1,
    b2=B2,
    eps=EPS,
    weight_decay=0.1,
    clip_norm=0.0,
    decay=DECAY,
  )
  settings |= dict(multipliers=MULTIPLIERS, freeze=FREEZE)
  return OptimizerConfig(name=name, **(settings | changes))


def numbers(seed, declared=DECLARED):
  rng = np.random.default_rng(seed)
  return {
    n: rng.normal(size=s).astype(np.float32) * (1 + i)
    for i, (n, (s, *_)) in enumerate(declared.items())
  }


GRADIENTS = [numbers(100 + i) for i in range(STEPS)]


def unstack(flat, info=INFO):
  """{per-layer name: the layer's own array}."""
  out = {}
  for name, leaf in info.items():
    for i, layer in enumerate(leaf.names):
      out[layer] = flat[name][i] if leaf.stacked else flat[name]
  return out


def first_match(table, name):
  return next(float(v) for regex, v in table if re.fullmatch(regex, name))


def alone(name, rate, decay, is_muon):
  """optax's own optimizer for one unstacked array."""
  if name == 'adamw' or (name == 'muon' and not is_muon):
    return optax.adamw(rate, B1, B2, EPS, weight_decay=decay)
  if name == 'lion':
    return optax.lion(rate, B1, B2, weight_decay=decay)
  decayed = optax.add_decayed_weights(decay)
  last = optax.scale_by_learning_rate(rate)
  if name == 'sgd':
    return optax.chain(optax.sgd(1.0, B1), optax.scale(-1.0), decayed, last)
  if name == 'adafactor':
    return optax.chain(optax.adafactor(1.0), optax.scale(-1.0), decayed, last)
  return optax.contrib.muon(rate, beta=B1, weight_decay=decay, consistent_rms=0.2)


@functools.partial(jax.jit, static_argnames=('name', 'is_muon'))
def updates_alone(name, is_muon, p, gradients, factor, decay):
  """One unstacked array after an update with each of `gradients`."""
  tx = alone(name, lambda k: factor * schedule(k), decay, is_muon)

  def one(carry, gradient):
    w, state = carry
    u, state = tx.update({'w': gradient}, state, w)
    return (optax.apply_updates(w, u), state), None

  w = {'w': p}
  return jax.lax.scan(one, (w, tx.init(w)), gradients)[0][0]['w']


def expected(r):
  """Every layer on its own, in its matrix form, after all updates."""
  out = {}
  for layer, p in unstack(numbers(0)).items():
    kind = layer.split('/', 1)[1]
    is_matrix = layer.startswith('layer') and kind in MATRIX
    view = MATRIX[kind] if is_matrix else (-1,) if kind == 'attn/q/b' else p.shape
    gradients = np.stack([unstack(g)[layer].reshape(view) for g in GRADIENTS])
    factor = first_match(r.multipliers, layer) * (1 - first_match(r.freeze, layer))
    decay = r.weight_decay * first_match(r.decay, layer)
    w = updates_alone(r.name, is_matrix, p.reshape(view), gradients, factor, decay)
    out[layer] = np.asarray(w).reshape(p.shape)
  return out


def run(r, info=INFO, trained=None, gradients=GRADIENTS, start=None):
  """The stacked leaves after an update with each of `gradients`."""
  trained = info if trained is None else trained
  tx = optimizer.make_optimizer(r, info, trained)
  start = start or numbers(0)
  params = trees.unflatten({n: start[n] for n in trained})
  stacked = trees.unflatten({n: np.stack([g[n] for g in gradients]) for n in trained})

  def one(carry, gradient):
    params, state = carry
    updates, state = tx.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def whole(params, gradients):
    return jax.lax.scan(one, (params, tx.init(params)), gradients)[0][0]

  return {n: np.asarray(p) for n, p in trees.flatten(whole(params, stacked)).items()}


def same(a, b):
  """But for the last bit, since two programs are compiled."""
  np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@functools.cache
def finals(name, freeze=FREEZE):
  return run(recipe(name, freeze=freeze))


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_stacked_equals_every_layer_alone(name):
  r = recipe(name)
  got, want, start = unstack(finals(name)), expected(r), unstack(numbers(0))
  assert got.keys() == want.keys() and len(got) == 2 + 5 * 3
  for layer in want:
    # Relative to how far the parameter moved, else a wrong update would hide behind a large weight.
    moved = np.abs(want[layer] - start[layer]).max()
    assert (moved == 0) == (layer == 'layer1/attn/q/w'), layer
    tolerance = 2e-4 if name == 'muon' else 2e-5
    np.testing.assert_allclose(
      got[layer], want[layer], rtol=1e-6, atol=tolerance * moved, err_msg=layer
    )


def test_the_cases_above_differ():
  """Each name and table has an effect that the comparison would see."""
  ends = {n: finals(n)['stack0/block0/attn/q/w'] for n in OPTIMIZERS}
  for a in OPTIMIZERS:
    for b in OPTIMIZERS:
      assert a == b or np.abs(ends[a] - ends[b]).max() > 1e-3
  plain = run(recipe('adamw', decay=(('.*', 1.0),), multipliers=(('.*', 1.0),)))
  for name, p in finals('adamw').items():
    assert np.abs(p - plain[name]).max() > 1e-5 or name == 'embed/w', name


@pytest.mark.parametrize('name', ['adafactor', 'muon'])
def test_a_layer_does_not_feel_the_gradients_of_others(name):
  """With one state for a whole leaf it would."""
  other = [dict(g) for g in GRADIENTS]
  for g in other:
    factors = np.float32([1, 50, 1])[:, None, None]
    g['stack0/block0/mlp/up/w'] = g['stack0/block0/mlp/up/w'] * factors
  a, b = finals(name), run(recipe(name), gradients=other)
  a, b = a['stack0/block0/mlp/up/w'], b['stack0/block0/mlp/up/w']
  np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])


def test_muon_orthogonalizes_each_layer():
  r = recipe('muon', weight_decay=0.0, freeze=NOTHING, multipliers=(('.*', 1.0),))
  before, after = numbers(0), run(r, gradients=GRADIENTS[:1])
  for name in ('stack0/block0/attn/q/w', 'stack0/block0/attn/o/w'):
    for layer in range(3):
      step = (before[name][layer] - after[name][layer]).reshape(128, 128) / schedule(0)
      singular = np.linalg.svd(step / (0.2 * np.sqrt(128)), compute_uv=False)
      # Five Newton-Schulz steps bring all but the smallest singular values near 1.
      assert 0.6 < np.median(singular) < 1.3 and singular.max() < 1.3


def test_muon_leaves_tables_and_norms_to_adam():
  got, adam = finals('muon'), finals('adamw')
  for name in ('embed/w', 'final_norm/scale', 'stack0/block0/attn_norm/scale'):
    same(got[name], adam[name])


def test_adamw_as_in_torch():
  """torch.optim.AdamW(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1), torch 2.x."""
  gradients = [
    [0.1, -0.2, 0.3],
    [-1.0, 0.5, 0.25],
    [0.0, 2.0, -0.5],
    [0.3, 0.3, 0.3],
    [-0.7, 0.01, 1.5],
  ]
  golden = [
    [0.88999999, -1.88, 0.39500001],
    [0.94833183, -1.9053493, 0.29189223],
    [0.99093717, -1.9565723, 0.29219058],
    [1.0053077, -2.0024199, 0.26681578],
    [1.0425947, -2.0380716, 0.20709634],
  ]
  info = {'w': Leaf(('w',), False, 0, False, ('norm',))}
  table = dict(decay=(('.*', 1.0),), multipliers=(('.*', 1.0),), freeze=NOTHING)
  r = recipe('adamw', schedule=lambda k: 0.1, **table)
  for count in (1, 2, 5):
    got = run(
      r,
      info,
      gradients=[{'w': np.float32(g)} for g in gradients[:count]],
      start={'w': np.float32([1.0, -2.0, 0.5])},
    )
    np.testing.assert_allclose(got['w'], golden[count - 1], rtol=2e-6)


def test_moments_of_bfloat16_parameters_are_those_of_float32():
  """In bfloat16 an average that forgets a thousandth a step would keep its largest value."""
  wide = {'final_norm/scale': np.full(128, 1.0, np.float32)}
  info = {n: INFO[n] for n in wide}
  make = optimizer.make_optimizer(
    recipe('adamw', b2=0.999, decay=ALL, multipliers=ALL, freeze=NOTHING), info, info
  )
  moments = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    params = jax.tree.map(lambda x, d=dtype: jnp.asarray(x, d), wide)
    state = make.init(params)
    for size in (4.0, *[0.25] * 400):
      _, state = make.update(
        jax.tree.map(lambda p, s=size: jnp.full_like(p, s), params), state, params
      )
    moments[dtype] = [np.asarray(x) for x in jax.tree.leaves(state) if x.ndim]
  for got, want in zip(moments[jnp.bfloat16], moments[jnp.float32], strict=True):
    np.testing.assert_array_equal(got, want)
  assert max(m.max() for m in moments[jnp.float32]) < 0.25 + 0.016 * 0.9


def test_sgd_without_momentum_keeps_no_buffer():
  tx = optimizer.make_optimizer(recipe('sgd', b1=0.0), INFO, INFO)
  state = tx.init(trees.unflatten(numbers(0)))
  assert all(x.ndim == 0 for x in jax.tree.leaves(state))


def test_switching_decay_keeps_the_shape_of_the_state():
  params = trees.unflatten(numbers(0))
  with_decay, without = (
    jax.tree.structure(
      optimizer.make_optimizer(recipe('adamw', weight_decay=w), INFO, INFO).init(params)
    )
    for w in (0.1, 0.0)
  )
  assert with_decay == without


# Names and tables


def test_names_of_layers_follow_the_pattern():
  slots = [('stack0/block0', 0), ('stack0/block1', 0), ('stack0/block0', 1), ('stack0/block1', 1)]
  slots += [('stack1/block0', 0)]
  declared = {
    f'{block}/mlp/up/w': ((n, 8, 16), ('layers', 'embed', 'ffn'), 8, 0.0)
    for block, n in (('stack0/block0', 2), ('stack0/block1', 2), ('stack1/block0', 1))
  }
  info = optimizer.leaves(declared, slots)
  assert info['stack0/block0/mlp/up/w'].names == ('layer0/mlp/up/w', 'layer2/mlp/up/w')
  assert info['stack0/block1/mlp/up/w'].names == ('layer1/mlp/up/w', 'layer3/mlp/up/w')
  assert info['stack1/block0/mlp/up/w'].names == ('layer4/mlp/up/w',)


@pytest.mark.parametrize('arch', [TINY, UNTIED, QWEN2])
def test_the_decoder_as_an_optimizer_sees_it(arch):
  info = optimizer.leaves(kinds.declared(arch), arch.layer_slots())
  for name, (shape, *_) in kinds.declared(arch).items():
    leaf = info[name]
    dims = shape[1:] if leaf.stacked else shape
    assert leaf.stacked == name.startswith('stack') and len(leaf.names) == (
      arch.num_layers if leaf.stacked else 1
    )
    assert leaf.table == (name in ('embed/w', 'head/w'))
    if 'norm' in name or name.endswith('/b'):
      assert leaf.split == 0
    elif leaf.stacked:  # [in, out] of HF's nn.Linear
      inside = {'attn/o': 32, 'mlp/down': 64}.get('/'.join(name.split('/')[2:4]), arch.model_dim)
      assert int(np.prod(dims[: leaf.split])) == inside


def still(arch):
  """The leaves that do not decay by default."""
  info = optimizer.leaves(kinds.declared(arch), arch.layer_slots())
  r = recipe('sgd', b1=0.0, decay=keys.default().optim.decay, multipliers=ALL, freeze=NOTHING)
  start = {n: np.ones(p.shape, np.float32) for n, p in kinds.declared(arch).items()}
  tx, params = optimizer.make_optimizer(r, info, info), trees.unflatten(start)
  zero = jax.tree.map(np.zeros_like, params)
  moved = trees.flatten(tx.update(zero, tx.init(params), params)[0])
  return {n.removeprefix('stack0/block0/') for n, u in moved.items() if not np.asarray(u).any()}


@pytest.mark.parametrize('arch', [UNTIED, QWEN2])
def test_norm_scales_and_biases_do_not_decay_by_default(arch):
  biases = {'attn/q/b', 'attn/k/b', 'attn/v/b'} if arch.layers()[0].mixer.qkv_bias else set()
  assert still(arch) == {'attn_norm/scale', 'mlp_norm/scale', 'final_norm/scale'} | biases


def test_norms_and_rates_of_delta_nets_do_not_decay_by_default():
  arch = family_models.architecture('qwen3_5')
  vectors = {n for n, p in kinds.declared(arch).items() if not p.fan_in}
  assert still(arch) == {n.removeprefix('stack0/block0/') for n in vectors}
  assert sum('a_log' in n for n in vectors) >= 1


@pytest.mark.parametrize('key', ['decay', 'multipliers', 'freeze'])
def test_a_table_must_cover_and_every_row_must_decide(key):
  with pytest.raises(ConfigError, match=f'optim.{key}: no row matches.*embed/w'):
    optimizer.make_optimizer(recipe('adamw', **{key: (('layer.*', 0.0),)}), INFO, INFO)
  with pytest.raises(ConfigError, match=f'optim.{key}.*layer3'):
    table = (('layer3/.*', 0.0), ('.*', 1.0))
    optimizer.make_optimizer(recipe('adamw', **{key: table}), INFO, INFO)
  with pytest.raises(ConfigError, match=f'optim.{key}.*attn/v'):  # hidden behind an earlier row
    table = (('layer0/attn/.*', 0.0), ('layer./attn/v/w', 0.0), ('.*', 1.0))
    optimizer.make_optimizer(recipe('adamw', **{key: table}), INFO, INFO)


def test_an_unknown_name_is_refused():
  with pytest.raises(ConfigError, match="name='adam'"):
    optimizer.make_optimizer(recipe('adam'), INFO, INFO)


# Freezing


def test_whole_leaves_are_frozen_by_name():
  table = (('embed/w', True), ('layer[01]/.*', True), ('layer2/mlp/.*', True), ('.*', False))
  assert optimizer.frozen_names(table, INFO) == {'embed/w', 'stack0/block0/mlp/up/w'}
  with pytest.raises(ConfigError, match='every parameter'):
    optimizer.frozen_names((('.*', True),), INFO)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_frozen_layer_does_not_move_and_does_not_matter(name):
  """With decay on; the others move as if nothing were frozen."""
  table = (('layer1/.*', True), ('.*', False))
  frozen, free = finals(name, table), finals(name, NOTHING)
  for leaf, p in frozen.items():
    if INFO[leaf].stacked:
      np.testing.assert_array_equal(p[1], numbers(0)[leaf][1])
      same(p[[0, 2]], free[leaf][[0, 2]])


def test_trained_leaves_alone_have_state():
  r = recipe('adamw', freeze=(('embed/w', True), ('.*', False)))
  trained = {n: leaf for n, leaf in INFO.items() if n != 'embed/w'}
  got, whole = run(r, INFO, trained), finals('adamw', NOTHING)
  assert got.keys() == trained.keys()
  for name, p in got.items():
    same(p, whole[name])


def test_the_mask_zeroes_frozen_layers_of_a_gradient():
  r = recipe('adamw', freeze=(('embed/w', True), ('layer1/.*', True), ('.*', False)))
  trained = {n: leaf for n, leaf in INFO.items() if n != 'embed/w'}
  gradient = {n: jnp.asarray(g) for n, g in GRADIENTS[0].items() if n in trained}
  masked = trees.flatten(optimizer.layer_mask(r, INFO, trained)(trees.unflatten(gradient)))
  for name, g in masked.items():
    if INFO[name].stacked:
      assert not g[1].any()
      np.testing.assert_array_equal(g[np.array([0, 2])], gradient[name][np.array([0, 2])])
    else:
      np.testing.assert_array_equal(g, gradient[name])


@pytest.mark.parametrize('name', ['muon', 'adafactor', 'adamw'])
def test_each_expert_moves_as_a_matrix_of_its_own(name):
  leaf, rng = 'stack0/block0/mlp/up/w', np.random.default_rng(0)
  start, gradient = (rng.normal(size=(1, 3, 128, 136)).astype(np.float32) for _ in range(2))
  gradient[:, 1] *= 100

  def moved(axes, start, gradient):
    info = optimizer.leaves({leaf: (start.shape, axes, 128, 0.0)}, [('stack0/block0', 0)])
    tx = optimizer.make_optimizer(
      recipe(name, decay=ALL, multipliers=ALL, freeze=NOTHING), info, info
    )
    params, found = (trees.unflatten({leaf: x}) for x in (start, gradient))
    return np.asarray(trees.flatten(tx.update(found, tx.init(params), params)[0])[leaf])

  found = moved(('layers', 'expert', 'embed', 'ffn'), start, gradient)
  for e in range(3):
    alone = moved(('layers', 'embed', 'ffn'), start[:, e], gradient[:, e])
    np.testing.assert_allclose(found[:, e], alone, rtol=1e-4, atol=1e-6)
