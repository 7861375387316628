"""The shipped SFT loss, step and sampler on every mesh of eight devices against one device."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from tiny_model import QWEN2, TINY, ids, init, tokens_at, with_mixer

from ftjax.algorithms import sft
from ftjax.config import keys
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.models import kinds
from ftjax.models.forward import Forward
from ftjax.runtime import sharding, trees
from ftjax.training import optimizer, prefetch, state, step

ACCUM, B, T, STEPS = 2, 8, 32, 5
RATE = 1e-4
# K = 2 heads allow two ways at most; the other axes divide B and T.
MESHES = [
  dict(zip(sharding.AXES, sizes, strict=True))
  for sizes in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2), (1, 2, 4, 8))
  if np.prod(sizes) == 8
]

# Every pair of axes is split together in one of these; the others are for make test-all.
EVERY_DAY = (
  dict(data=2, fsdp=2, context=2),
  dict(data=2, tensor=2, expert=2),
  dict(fsdp=2, tensor=2, expert=2),
  dict(context=2, tensor=2, expert=2),
  dict(fsdp=8),
  dict(context=8),
  dict(fsdp=4, tensor=2),
  dict(data=2, context=4),
  dict(data=4, expert=2),
  dict(fsdp=2, expert=4),
)


def name(sizes):
  return '-'.join(f'{axis}{n}' for axis, n in sizes.items() if n > 1)


def micro_batches(seed):
  """[A, B, T] arrays of packed rows: three documents, two and padding, or padding alone; weights
  are not only 0 and 1.
  """
  rng = np.random.default_rng(seed)
  segments = np.zeros((ACCUM * B, T), np.int32)
  for row in range(ACCUM * B):
    a, b = sorted(rng.integers(4, 28, 2))
    segments[row, :a], segments[row, a:b] = 1, 2
    segments[row, b:] = 3 if row % 3 else 0
  segments[5] = 0
  tokens, labels = (ids(ACCUM * B, T, seed=seed + i) for i in (10, 20))
  weights = (
    rng.uniform(0.5, 2, segments.shape) * (segments > 0) * (rng.random(segments.shape) < 0.6)
  )
  where = tokens_at(segments)
  arrays = {
    'tokens': tokens,
    'labels': labels,
    'weights': weights.astype(np.float32),
    'segments': segments,
    'positions': np.asarray(where.positions),
  }
  return {k: a.reshape(ACCUM, B, T) for k, a in arrays.items()}


@pytest.fixture(scope='module')
def batches():
  return [micro_batches(i) for i in range(STEPS)]


def train(mesh, batches, arch=TINY):
  """Losses of STEPS steps of AdamW, the gradient of the first, the parameters before and after, as
  numpy arrays by name.
  """
  params = init(arch)
  start = trees.flatten(jax.tree.map(np.asarray, params))
  info = optimizer.leaves(kinds.declared(arch), arch.layer_slots())
  recipe = optimizer.OptimizerConfig(
    name='adamw',
    moments='float32',
    schedule=lambda k: RATE,
    b1=0.9,
    b2=0.999,
    eps=1e-6,
    weight_decay=0.1,
    clip_norm=0.0,
    decay=(('.*', 1.0),),
    multipliers=(('.*', 1.0),),
    freeze=(('.*', False),),
  )
  rule = optimizer.make_optimizer(recipe, info, info)
  abstract = jax.eval_shape(lambda p: state.create(p, {}, rule, False), params)
  places = state.state_shardings(abstract, sharding.shardings(mesh, kinds.axes(arch)), mesh)
  current = jax.jit(lambda p: state.create(p, {}, rule, False), out_shardings=places)(params)
  c = keys.default()
  with c.unlocked():
    c.loss.z_loss = 1e-3
  run = step.make_step(
    sft.make_loss(Forward(arch, jnp.dtype(c.model.compute_dtype)), c),
    rule,
    places,
    mask=optimizer.layer_mask(recipe, info, info),
    schedule=recipe.schedule,
    clip_norm=0.0,
    ema_decay=0.0,
    is_stochastic=False,
    seed=0,
  )
  rows = NamedSharding(mesh, sharding.spec(None, 'batch', 'seq'))
  placed = [prefetch.place(batch, dict.fromkeys(batch, rows)) for batch in batches]
  compiled = step.compile_step(
    run, state.with_shardings(jax.eval_shape(lambda s: s, current), places), placed[0]
  )
  losses, gradient = [], None
  for batch in placed:
    current, metrics = compiled(current, batch)
    losses.append(float(metrics['loss']))
    if gradient is None:  # the first moment is a tenth of the first gradient
      moments = current.opt[0].mu
      gradient = {n: 10 * np.asarray(m) for n, m in trees.flatten(moments).items()}
  return losses, gradient, start, trees.flatten(jax.tree.map(np.asarray, current.params))


@pytest.fixture(scope='module')
def one_device(batches):
  """Module fixtures run before `use_mesh` of any test: the mesh is that of one device."""
  return train(jax.sharding.get_mesh(), batches)


def distance(a, b):
  """Relative global L2 distance."""
  squares = sum(((a[n].astype(np.float64) - b[n]) ** 2).sum() for n in b)
  return np.sqrt(squares / sum((b[n].astype(np.float64) ** 2).sum() for n in b))


@pytest.mark.parametrize(
  'sizes',
  [
    pytest.param(
      sizes,
      marks=[] if {k: v for k, v in sizes.items() if v > 1} in EVERY_DAY else [pytest.mark.full],
    )
    for sizes in MESHES
  ],
  ids=name,
)
def test_five_steps_are_those_of_one_device(sizes, use_mesh, batches, one_device):
  check(train(use_mesh(**sizes), batches), one_device)


def check(found, expected):
  losses, gradient, _, params = found
  expected_losses, expected_gradient, start, expected = expected
  np.testing.assert_allclose(losses, expected_losses, rtol=3e-6)
  assert distance(gradient, expected_gradient) <= 2e-6
  for n, leaf in expected.items():
    assert distance({n: params[n]}, {n: leaf}) <= 1e-5, n
  moved = {n: params[n] - start[n] for n in start}
  should = {n: expected[n] - start[n] for n in start}
  # Adam divides by the gradient's own size, so rounding weighs more where it is small.
  assert distance(moved, should) <= 1e-4


@pytest.fixture(scope='module')
def qwen2_on_one_device(batches):
  return train(jax.sharding.get_mesh(), batches, QWEN2)


@pytest.mark.parametrize(
  'sizes', [dict(tensor=2, fsdp=2), dict(context=2, tensor=2, data=2)], ids=name
)
def test_biases_are_sharded_with_their_heads(sizes, use_mesh, batches, qwen2_on_one_device):
  """Biases that are not zero, their gradients too."""
  mesh = use_mesh(**sizes)
  check(train(mesh, batches, QWEN2), qwen2_on_one_device)
  start = qwen2_on_one_device[2]
  for part, heads in (('q', 4), ('k', 2), ('v', 2)):
    leaf = f'stack0/block0/attn/{part}/b'
    assert (start[leaf] != 0).all() and qwen2_on_one_device[1][leaf].any()
    placed = trees.flatten(init(QWEN2))[leaf]
    assert placed.addressable_shards[0].data.shape == (3, heads // 2, 8)


@pytest.mark.parametrize(
  'tied', [pytest.param(True, marks=pytest.mark.full), False], ids=['tied', 'untied']
)
def test_a_padded_vocabulary_on_a_mesh_is_the_plain_one_on_one_device(tied, use_mesh, batches):
  """256 tokens in 288 rows on four ways: the last of them holds 40 tokens and all the padding.

  Weight decay is on; the padding has no gradient and stays 0.
  """
  plain = with_mixer(dataclasses.replace(TINY, tied=tied), num_kv_heads=4)
  expected = train(jax.sharding.get_mesh(), batches, plain)
  mesh = use_mesh(tensor=4, fsdp=2)
  padded = dataclasses.replace(plain, vocab_multiple=96)
  losses, gradient, start, params = train(mesh, batches, padded)
  tables = ['embed/w'] if tied else ['embed/w', 'head/w']
  for name in tables:
    for leaf in (gradient[name], start[name], params[name]):
      assert leaf.shape[0] == 288 and not leaf[256:].any()
  cut = [x | {n: x[n][:256] for n in tables} for x in (gradient, start, params)]
  check((losses, *cut), expected)


def test_all_meshes_are_tried_and_every_day_each_pair_of_axes():
  assert len(MESHES) == 30
  pairs = {pair for sizes in EVERY_DAY for pair in itertools.combinations(sorted(sizes), 2)}
  assert pairs == set(itertools.combinations(sorted(sharding.AXES), 2))


def test_the_loss_moves_and_every_parameter_with_it(one_device):
  losses, gradient, start, after = one_device
  assert len(set(losses)) == STEPS
  for n, x in start.items():
    assert np.abs(gradient[n]).max() > 0 and (after[n] != x).any(), n


PROMPTS = [ids(1, n, seed=n)[0].tolist() for n in (5, 1, 12)]


def answers():
  engine = Engine(TINY, jnp.float32, (), 0, slots=3)
  found = engine.generate_at_once(init(TINY), PROMPTS, max_tokens=17, sampling=Sampling())
  return [c.tokens for c in found]


@pytest.fixture(scope='module')
def greedy():
  return answers()


@pytest.mark.parametrize('sizes', [{'fsdp': 2}, {'tensor': 2}], ids=name)
def test_greedy_answers_are_those_of_one_device(sizes, use_mesh, greedy):
  """Three prompts: over two devices a row is added, and taken away again."""
  use_mesh(**sizes)
  assert answers() == greedy
