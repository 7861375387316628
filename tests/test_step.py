"""One update: cut into micro-batches or whole, clipped, skipped when something is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_model import TINY, ids, init, place

from ftjax.algorithms import sft
from ftjax.config import keys as config
from ftjax.models import kinds
from ftjax.models.forward import Forward
from ftjax.runtime import sharding
from ftjax.training import optimizer as optimizer_lib
from ftjax.training import prefetch
from ftjax.training.state import create, state_shardings, with_shardings
from ftjax.training.step import SIGNAL, batch_stats, compile_step, make_step

SETTINGS = dict(mask=lambda g: g, schedule=lambda k: 0.1, clip_norm=0.0, ema_decay=0.0, seed=7)
SETTINGS |= dict(is_stochastic=False)


def square_loss(params, rows, keys):
  """Sum of w (x . a + b - y)^2; the frozen `b` only shifts; `draw` shows the keys."""
  error = rows['x'] @ params['a'] + params['b'] - rows['y']
  weight = rows['w'].sum()
  metrics = {'error': (jnp.abs(error * rows['w']).sum(), weight)}
  drawn = jax.vmap(jax.random.uniform)(keys)
  metrics['draw'] = (drawn.sum(), jnp.float32(drawn.size))
  return (rows['w'] * error**2).sum(), weight, metrics


def with_signal(params, rows, keys):
  """The same loss, said to be constant where every y is 99."""
  total, weight, metrics = square_loss(params, rows, keys)
  found = (rows['y'] != 99).any().astype(jnp.float32)
  return total, weight, metrics | {SIGNAL: (found, jnp.float32(1))}


def build(loss_fn, params, frozen, optimizer, batch, **changes):
  """(state, compiled step, batch on devices) on the current mesh."""
  mesh = jax.sharding.get_mesh()
  settings = SETTINGS | changes
  make = lambda p, f: create(p, f, optimizer, bool(settings['ema_decay']))  # noqa: E731
  abstract = jax.eval_shape(make, params, frozen)
  replicated = jax.tree.map(lambda _: NamedSharding(mesh, P()), params | frozen)
  shardings = state_shardings(abstract, replicated, mesh)
  state = jax.jit(make, out_shardings=shardings)(params, frozen)
  batch = jax.device_put(batch, NamedSharding(mesh, P()))
  step = make_step(loss_fn, optimizer, shardings, **settings)
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
  return state, compile_step(step, with_shardings(abstract, shardings), like), batch


def toy(micro=1, rows=8, optimizer=None, loss_fn=square_loss, **changes):
  rng = np.random.default_rng(rows)
  batch = dict(x=rng.normal(size=(rows, 3)), y=rng.normal(size=rows), w=rng.integers(0, 2, rows))
  batch = {
    k: v.astype(np.float32).reshape(micro, rows // micro, *v.shape[1:]) for k, v in batch.items()
  }
  for key in ('tokens', 'segments', 'positions'):
    batch[key] = np.zeros((micro, rows // micro, 2), np.int32)
  batch['weights'] = np.stack([batch['w'], np.zeros_like(batch['w'])], -1)
  params, frozen = {'a': jnp.array([1.0, -2.0, 0.5])}, {'b': jnp.array(0.25)}
  return build(loss_fn, params, frozen, optimizer or optax.sgd(0.1), batch, **changes)


def host(tree):
  return jax.tree.map(lambda x: np.array(x), tree)


def by_hand(batch, a=(1.0, -2.0, 0.5), b=0.25):
  """Mean loss over weighted rows and its gradient."""
  x, y, w = (np.float64(batch[k]).reshape(-1, *np.shape(batch[k])[2:]) for k in 'xyw')
  error = x @ np.array(a) + b - y
  return (w * error**2).sum() / w.sum(), 2 * (w * error) @ x / w.sum()


def test_one_update_by_hand():
  state, step, batch = toy()
  loss, gradient = by_hand(host(batch))
  after, metrics = step(state, batch)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
  np.testing.assert_allclose(metrics['grad_norm'], np.linalg.norm(gradient), rtol=1e-6)
  np.testing.assert_allclose(after.params['a'], [1, -2, 0.5] - 0.1 * gradient, rtol=1e-6)
  assert float(after.frozen['b']) == 0.25
  assert int(after.step) == 1 and bool(metrics['ok']) and after.ema == {}
  assert float(metrics['supervised_tokens']) == host(batch)['w'].sum()


# What was batch_stats


def test_what_was_fed_is_counted_and_known_by_its_checksum(use_mesh):
  """By hand, however the rows are spread; another token, or the same ones elsewhere, tell."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 2**31 - 1, (2, 4, 8)).astype(np.int32)
  segments = np.array([[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]] * 4, np.int32).reshape(
    2, 4, 8
  )
  positions = np.array([[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]] * 4, np.int32).reshape(
    2, 4, 8
  )
  weights = (segments == 1).astype(np.float32) / 2
  arrays = dict(tokens=tokens, segments=segments, positions=positions, weights=weights)
  same = segments[..., :, None] == segments[..., None, :]
  mask = same & np.tril(np.ones((8, 8), bool)) & (segments > 0)[..., None]
  expected = tiny_run.checksum(tokens)

  def count(**changes):
    mesh = jax.sharding.get_mesh()
    rows = NamedSharding(mesh, sharding.spec(None, 'batch', 'seq'))
    placed = prefetch.place(arrays | changes, dict.fromkeys(arrays, rows))
    return {k: v.item() for k, v in jax.jit(batch_stats)(placed).items()}

  for sizes in ({}, {'data': 2, 'fsdp': 2}, {'fsdp': 2, 'context': 2, 'tensor': 2}):
    use_mesh(**sizes)
    supervised = {'supervised_tokens': weights.sum()}
    found = {'tokens': 52, 'attended': mask.sum(), 'batch_checksum': expected} | supervised
    assert count() == found
  assert count(tokens=tokens[:, ::-1])['batch_checksum'] != expected
  tokens[1, 2, 3] += 1
  assert count(tokens=tokens)['batch_checksum'] != expected


# Accumulated == whole


@pytest.fixture(scope='module')
def ragged():
  """32 rows of ragged length with 0 to 15 supervised tokens; rows 8 to 15 have none."""
  rng = np.random.default_rng(3)
  tokens, T = ids(32, 16), 16
  lengths = rng.integers(2, T + 1, 32)
  there = np.arange(T) < lengths[:, None]
  weights = (there & (rng.random((32, T)) < 0.6)).astype(np.float32)
  weights[8:16] = 0  # the second micro-batch of four, and eight of the 32
  weights[:, -1] = 0
  return dict(
    tokens=np.where(there, tokens, 0),
    labels=np.roll(tokens, -1, axis=1),
    weights=weights,
    segments=there.astype(np.int32),
    positions=np.where(there, np.arange(T), 0).astype(np.int32),
  )


def sft_step(rows, micro, neftune=0.0):
  """(loss, gradient norm, parameters after a plain step of rate 1, supervised) of one update."""
  c = config.default()
  c.loss.neftune = neftune
  loss_fn = sft.make_loss(Forward(TINY, jnp.dtype(c.model.compute_dtype)), c)
  params = init(TINY)
  optimizer = optax.sgd(1.0)
  abstract = jax.eval_shape(lambda p: create(p, {}, optimizer, False), params)
  mesh = jax.sharding.get_mesh()
  where = sharding.shardings(mesh, kinds.axes(TINY))
  shardings = state_shardings(abstract, where, mesh)
  batch = {
    k: place(v.reshape(micro, 32 // micro, 16), None, 'batch', 'seq') for k, v in rows.items()
  }
  like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in batch.items()}
  step = make_step(loss_fn, optimizer, shardings, **SETTINGS)
  compiled = compile_step(step, with_shardings(abstract, shardings), like)
  state = jax.jit(lambda p: create(p, {}, optimizer, False), out_shardings=shardings)(params)
  state, metrics = compiled(state, batch)
  return jax.device_get((metrics['loss'], metrics['grad_norm'], state.params)), int(
    metrics['supervised_tokens']
  )


@pytest.fixture(scope='module')
def whole(ragged):
  return sft_step(ragged, 1)


def test_noise_on_embeddings_is_the_same_however_rows_are_accumulated(ragged, whole):
  """NEFTune: drawn by row; and it does something."""
  (loss, norm, params), _ = sft_step(ragged, 1, neftune=5.0)
  (loss4, norm4, params4), _ = sft_step(ragged, 4, neftune=5.0)
  np.testing.assert_allclose([loss4, norm4], [loss, norm], rtol=2e-6)
  assert abs(loss - whole[0][0]) > 1e-4
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(params4), strict=True):
    np.testing.assert_allclose(b, a, atol=2e-6)


def test_noise_on_embeddings_has_the_published_size():
  """Uniform in +-alpha / sqrt(n D), n the tokens of the row's document."""
  segments = np.repeat([[1] * 4 + [2] * 12], 64, 0).astype(np.int32)
  keys = jax.random.split(jax.random.key(0), 64)
  batch = {'segments': place(segments, 'batch', 'seq')}
  noise = np.asarray(sft.embedding_noise(5.0, batch, 32, keys))
  for part, n in ((noise[:, :4], 4), (noise[:, 4:], 12)):
    bound = 5.0 / np.sqrt(n * 32)
    assert np.abs(part).max() <= bound
    np.testing.assert_allclose(part.std(), bound / np.sqrt(3), rtol=0.02)
  assert not np.array_equal(noise[0], noise[1])


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'lion', 'muon', 'sgd'])
@pytest.mark.parametrize('micro', [pytest.param(1, marks=pytest.mark.full), 4])
def test_bfloat16_parameters_train(ragged, name, micro):
  """The state keeps its dtypes over steps, with every optimizer, and the loss falls."""
  c = config.default()
  info = optimizer_lib.leaves(kinds.declared(TINY), TINY.layer_slots())
  names = ('b1', 'b2', 'eps', 'weight_decay', 'clip_norm', 'decay', 'multipliers', 'freeze')
  rate = 3e-2 if name in ('sgd', 'muon') else 3e-3
  numbers = {n: c.optim[n] for n in names}
  recipe = optimizer_lib.OptimizerConfig(name, 'float32', lambda _: rate, **numbers)
  optimizer = optimizer_lib.make_optimizer(recipe, info, info)
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), init(TINY))
  mesh = jax.sharding.get_mesh()
  make = lambda p: create(p, {}, optimizer, False)  # noqa: E731
  abstract = jax.eval_shape(make, params)
  shardings = state_shardings(abstract, sharding.shardings(mesh, kinds.axes(TINY)), mesh)
  batch = {
    k: place(v.reshape(micro, 32 // micro, 16), None, 'batch', 'seq') for k, v in ragged.items()
  }
  like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in batch.items()}
  loss = sft.make_loss(Forward(TINY, jnp.dtype(c.model.compute_dtype)), c)
  step = make_step(loss, optimizer, shardings, **SETTINGS)
  compiled = compile_step(step, with_shardings(abstract, shardings), like)
  state, losses = jax.jit(make, out_shardings=shardings)(params), []
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.opt) if x.dtype != jnp.int32)
  for _ in range(6):
    state, metrics = compiled(state, batch)
    losses.append(float(metrics['loss']))
  assert losses[-1] < losses[0]


@pytest.mark.parametrize('micro', [4, 32])
def test_accumulated_equals_whole(ragged, whole, micro):
  """Also where micro-batches have unequal or no supervised tokens; a mean of means would not."""
  counts = ragged['weights'].reshape(micro, -1).sum(1)
  assert (counts == 0).any() and len(set(counts.tolist())) > 2
  (loss, norm, params), supervised = sft_step(ragged, micro)
  (want_loss, want_norm, want_params), want_supervised = whole
  assert supervised == want_supervised == counts.sum()
  np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
  np.testing.assert_allclose(norm, want_norm, rtol=1e-6)
  for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(want_params), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_all_masked_is_no_loss_and_no_gradient():
  state, step, batch = toy()
  after, metrics = step(state, batch | {'w': batch['w'] * 0})
  assert float(metrics['loss']) == 0 and float(metrics['grad_norm']) == 0 and bool(metrics['ok'])
  np.testing.assert_array_equal(after.params['a'], [1, -2, 0.5])


OPTIMIZERS = {
  'adam with momentum and decay': optax.adamw(0.1, weight_decay=0.5),
  'sgd with momentum': optax.sgd(0.1, momentum=0.9),
  'lion': optax.lion(0.1, weight_decay=0.5),
  'a schedule': optax.adam(optax.linear_schedule(1.0, 0.0, 5)),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('kind', ['all weights 0', 'constant loss'])
def test_a_step_without_signal_changes_nothing_but_the_counts(name, kind):
  """After a good step momentum, decay and the schedule's count would move on."""
  schedule = optax.linear_schedule(1.0, 0.0, 5)
  is_constant = kind == 'constant loss'
  settings = dict(ema_decay=0.5, schedule=schedule)
  settings |= dict(loss_fn=with_signal) if is_constant else {}
  state, step, batch = toy(2, optimizer=OPTIMIZERS[name], **settings)
  state, first = step(state, batch)
  assert bool(first['has_signal']) and int(first['no_signal']) == 0 and SIGNAL not in first
  before = host((state.params, state.opt, state.ema))
  idle = {'y': batch['y'] * 0 + 99} if is_constant else {'w': batch['w'] * 0}
  for count in (1, 2, 3):
    state, metrics = step(state, batch | idle)
    assert bool(metrics['ok']) and not bool(metrics['has_signal'])
    assert (int(metrics['no_signal']), int(metrics['skipped'])) == (count, 0)
  after = host((state.params, state.opt, state.ema))
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert a.tobytes() == b.tobytes()
  state, metrics = step(state, batch)
  assert int(state.step) == 5 and int(state.no_signal) == 3
  np.testing.assert_allclose(metrics['lr'], 0.8)  # the second update's, not the fifth's
  assert not np.array_equal(state.params['a'], before[0]['a'])


def test_a_step_without_signal_neither_ends_nor_adds_to_a_streak_of_bad_ones():
  state, step, batch = toy()
  bad = jax.device_put(spoil(batch, 'nan'), batch['x'].sharding)
  streaks = []
  for rows in (bad, batch | {'w': batch['w'] * 0}, bad, batch):
    state, metrics = step(state, rows)
    streaks.append(int(metrics['bad_streak']))
  assert streaks == [1, 1, 2, 0]


def test_metrics_of_micro_batches_are_divided_once():
  means = []
  for micro in (1, 2, 8):
    state, step, batch = toy(micro)
    _, metrics = step(state, batch)
    means.append(float(metrics['error']))
  np.testing.assert_allclose(means[1:], means[0], rtol=1e-6)


# Clipping


@pytest.mark.parametrize('clip', [0.05, 1.0, 1e6])
def test_clip_as_in_optax(clip):
  state, step, batch = toy(clip_norm=clip)
  _, gradient = by_hand(host(batch))
  clipped, _ = optax.clip_by_global_norm(clip).update({'a': jnp.float32(gradient)}, None)
  after, metrics = step(state, batch)
  np.testing.assert_allclose(
    after.params['a'], np.array([1, -2, 0.5]) - 0.1 * np.array(clipped['a']), rtol=1e-6
  )
  np.testing.assert_allclose(  # the norm before clipping is what is logged
    metrics['grad_norm'], np.linalg.norm(gradient), rtol=1e-6
  )


def test_masked_gradients_do_not_count_in_the_norm():
  """Or a frozen layer would shrink the others' updates."""
  mask = lambda g: {'a': g['a'] * jnp.array([1.0, 0.0, 1.0])}  # noqa: E731
  state, step, batch = toy(clip_norm=0.05, mask=mask)
  _, gradient = by_hand(host(batch))
  gradient[1] = 0
  after, metrics = step(state, batch)
  np.testing.assert_allclose(metrics['grad_norm'], np.linalg.norm(gradient), rtol=1e-6)
  expected = [1, -2, 0.5] - 0.1 * 0.05 * gradient / np.linalg.norm(gradient)
  np.testing.assert_allclose(after.params['a'], expected, rtol=1e-6)


# What is not finite


def spoil(batch, kind):
  """A batch whose loss is NaN, whose loss is infinite, or whose gradient alone overflows."""
  x = np.array(batch['x'])
  y = np.array(batch['y'])
  w = np.ones_like(np.array(batch['w']))
  if kind == 'nan':
    y[0, 0] = np.nan
  elif kind == 'inf':
    y[0, 0] = 1e30
  else:  # the loss 1e30 is finite, the norm of a gradient of 2e25 is not
    x[0, 0], y[0, 0] = [1e10, 0, 0], 1e15
  return batch | {'x': jnp.array(x), 'y': jnp.array(y), 'w': jnp.array(w)}


@pytest.mark.parametrize('kind', ['nan', 'inf', 'gradient'])
def test_a_non_finite_step_changes_nothing_but_the_counts(kind):
  optimizer = optax.adam(0.1)
  state, step, batch = toy(optimizer=optimizer, ema_decay=0.5)
  state, _ = step(state, batch)
  before = host((state.params, state.opt, state.ema))
  bad = jax.device_put(spoil(batch, kind), batch['x'].sharding)
  for count in (1, 2):
    state, metrics = step(state, bad)
    assert not bool(metrics['ok'])
    assert bool(jnp.isfinite(metrics['loss'])) == (kind == 'gradient')
    assert int(metrics['skipped']) == int(metrics['bad_streak']) == count
    after = host((state.params, state.opt, state.ema))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
      np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))
  state, metrics = step(state, batch)
  assert bool(metrics['ok']) and int(state.step) == 4
  assert (int(state.skipped), int(state.bad_streak)) == (2, 0)
  assert not np.array_equal(state.params['a'], before[0]['a'])


def test_after_a_skip_the_rate_is_the_one_that_was_used():
  schedule = optax.linear_schedule(1.0, 0.0, 10)
  state, step, batch = toy(optimizer=optax.sgd(schedule), schedule=schedule)
  bad = jax.device_put(spoil(batch, 'nan'), batch['x'].sharding)
  state, first = step(state, batch)
  state, _ = step(state, bad)
  before = np.array(state.params['a'])
  _, gradient = by_hand(host(batch), a=before)
  state, third = step(state, batch)
  assert float(first['lr']) == 1.0
  used = (before - np.array(state.params['a']))[0] / gradient[0]
  np.testing.assert_allclose(used, float(third['lr']), rtol=1e-4)
  np.testing.assert_allclose(used, 0.9, rtol=1e-4)


# Moving average, keys


def test_ema_by_hand():
  state, step, batch = toy(ema_decay=0.75)
  ema = np.array([1.0, -2.0, 0.5])
  for _ in range(3):
    state, _ = step(state, batch)
    ema = 0.75 * ema + 0.25 * np.array(state.params['a'])
    np.testing.assert_allclose(state.ema['a'], ema, rtol=1e-6)
  assert state.ema.keys() == {'a'}  # frozen leaves have none


@pytest.mark.parametrize('micro', [1, 2])
def test_keys_are_a_function_of_seed_step_and_row(micro):
  """And not of the micro-batch that a row falls into."""
  drawn = {}
  for seed, rows in ((7, 8), (8, 4)):
    state, step, batch = toy(micro, rows, seed=seed)
    for number in range(2):
      state, metrics = step(state, batch)
      keys = [
        jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), row)
        for row in range(rows)
      ]
      expected = np.mean([float(jax.random.uniform(k)) for k in keys])
      np.testing.assert_allclose(metrics['draw'], expected, rtol=1e-6)
      drawn[seed, number] = float(metrics['draw'])
  assert len(set(drawn.values())) == 4
