"""The invariants of a model with adapters, on every kind of base: float32 at matmul precision
highest, unless a test says otherwise.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_adapters
from tiny_adapters import RANKS, adapted, init
from tiny_model import TINY, ids, logits, place, tokens_at

from ftjax.algorithms import sft, token_loss
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.models import kinds
from ftjax.models.forward import Forward
from ftjax.models.layers import Dropout
from ftjax.runtime import trees
from ftjax.training import optimizer

FULL = pytest.mark.full
B, T = 4, 24
ONE_EACH = np.ones((B, T), np.int32)
# With a head that may have an adapter, and padding in it.
ARCH = dataclasses.replace(TINY, tied=False, vocab_multiple=96)
# Together they have everything that an adapter may have.
CASES = {
  'int8-dora': dict(base='int8', dora=True, rank_pattern=RANKS, train='embed/w|.*norm/scale'),
  'nf4-pissa': dict(base='nf4', block=8, init='pissa', rslora=True, alpha_pattern=(('.*/q', 3.0),)),
  'bfloat16-dora-pissa': dict(base='bfloat16', dora=True, init='pissa', rank_pattern=RANKS),
}
CASES = {name: {'targets': '.*'} | case for name, case in CASES.items()}
EVERY_DAY = ('nf4-pissa',)
MARKED = [pytest.param(case, marks=[] if case in EVERY_DAY else FULL) for case in CASES]


@functools.cache
def model(case, **changes):
  arch = adapted(ARCH, **CASES[case] | changes)
  return arch, init(arch)


def begun(arch):
  """Parameters as training begins: of the base of `tiny_model.init`."""
  params = trees.flatten(init(arch))
  base = {n: params[n] for n in kinds.names(arch, 'base')}
  found = jax.jit(lambda p: kinds.completed(arch, p, lambda n: None, 0, jnp.float32))(
    trees.unflatten(base)
  )
  return base, found


def close(found, expected, limit):
  """Whether arrays are equal within `limit` of the largest number."""
  np.testing.assert_allclose(found, expected, atol=limit * np.abs(expected).max())


# Where training begins.


@pytest.mark.parametrize(
  'base',
  ['nf4', *(pytest.param(base, marks=FULL) for base in ('float32', 'bfloat16', 'int8'))],
)
def test_a_new_adapter_changes_no_bit(base):
  more = {'block': 8} if base == 'nf4' else {}
  arch = adapted(ARCH, base=base, rank_pattern=RANKS, targets='.*', **more)
  own, params = begun(arch)
  tokens = ids(B, T)
  expected = logits(
    dataclasses.replace(arch, adapter=None), trees.unflatten(own), tokens, tokens_at(ONE_EACH)
  )
  found = logits(arch, params, tokens, tokens_at(ONE_EACH))
  np.testing.assert_array_equal(found, expected)
  flat = trees.flatten(params)
  assert not np.asarray(flat['stack0/block0/attn/k/lora_b']).any()
  assert np.asarray(flat['stack0/block0/attn/k/lora_a']).any()


@pytest.mark.parametrize(
  'case',
  [
    pytest.param('int8-dora', marks=FULL),
    pytest.param('nf4-pissa', marks=FULL),
    'bfloat16-dora-pissa',
  ],
)
def test_what_begins_otherwise_computes_the_same(case):
  arch = adapted(ARCH, **CASES[case])
  arch = dataclasses.replace(arch, adapter=dataclasses.replace(arch.adapter, trained=()))
  own, params = begun(arch)
  tokens = ids(B, T)
  expected = logits(
    dataclasses.replace(arch, adapter=None), trees.unflatten(own), tokens, tokens_at(ONE_EACH)
  )
  close(logits(arch, params, tokens, tokens_at(ONE_EACH)), expected, 1e-6)


# What is computed.


@pytest.mark.parametrize('case', MARKED)
def test_merged_is_base_and_adapter(case):
  arch, params = model(case)
  tokens = ids(B, T)
  expected = logits(arch, params, tokens, tokens_at(ONE_EACH))
  found = logits(kinds.with_merged(arch, 'float32'), params, tokens, tokens_at(ONE_EACH))
  close(found, expected, 1e-5)
  plain = dataclasses.replace(arch, adapter=None)
  base = logits(plain, kinds.of_model(plain, params, ''), tokens, tokens_at(ONE_EACH))
  assert np.abs(found - base).max() > 0.1 * np.abs(base).max(), 'the adapter has no weight'


@functools.partial(jax.jit, static_argnums=(0, 4))
def _gradient(arch, trained, frozen, batch, remat, keys=None):
  def total(trained):
    forward = Forward(arch, jnp.float32, remat)
    forward = forward if keys is None else forward.with_dropout(keys)
    logp = forward.token_logprobs(trees.merge(trained, frozen), batch)
    return (logp * batch['weights']).sum(), logp

  (total, logp), found = jax.value_and_grad(total, has_aux=True)(trained)
  return total, logp, found


def gradient(case, tokens, segments, remat='none', **changes):
  """(log-probs float32[B, T], gradient by name) of the next tokens of all segments."""
  arch, params = model(case, **changes)
  where = tokens_at(segments)
  following = np.roll(tokens, -1, 1)
  inside = (segments > 0) & (np.roll(segments, -1, 1) == segments)
  inside[:, -1] = False
  batch = {'tokens': tokens, 'labels': following, 'weights': inside.astype(np.float32)}
  batch = {k: place(v, 'batch', 'seq') for k, v in batch.items()}
  batch |= {'segments': where.segments, 'positions': where.positions}
  names = [n for n, p in kinds.declared(arch).items() if p.origin == 'adapter' and not p.is_fixed]
  trained, frozen = trees.select(params, lambda n: n in names)
  keys = jax.random.split(jax.random.key(3), len(tokens)) if 'dropout' in changes else None
  total, logp, found = _gradient(arch, trained, frozen, batch, remat, keys)
  return float(total), np.asarray(logp), {n: np.asarray(x) for n, x in trees.flatten(found).items()}


def same(found, expected, limit=2e-6):
  """Whether gradients are equal within `limit` of their L2 norm; none is zero."""
  apart = sum(((found[n] - x) ** 2).sum() for n, x in expected.items())
  size = sum((x**2).sum() for x in expected.values())
  assert size > 0 and apart <= limit**2 * size
  assert all(x.any() for x in expected.values())


def whole():
  """Two documents in each row, the last row padding alone."""
  segments = np.ones((B, T), np.int32)
  segments[:, 9:], segments[:, 20:] = 2, 0
  segments[-1] = 0
  return ids(B, T), segments


@pytest.mark.parametrize('case', MARKED)
def test_packed_is_padded_and_accumulated_is_whole(case):
  """Documents of a packed row in rows of their own, elsewhere in the batch; and rows of a batch cut
  in two: the same loss and gradient.
  """
  tokens, segments = whole()
  total, logp, expected = gradient(case, tokens, segments)
  halves = [
    gradient(case, tokens, segments * np.isin(np.arange(B), rows)[:, None])
    for rows in ((0, 2), (1, 3))
  ]
  np.testing.assert_allclose(sum(h[0] for h in halves), total, rtol=1e-6)
  same({n: halves[0][2][n] + halves[1][2][n] for n in expected}, expected)
  apart = []
  for row, document in ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)):
    apart.append(tokens[row][segments[row] == document])
  sums, first = [], []
  for part in (apart[:B], apart[B:]):
    padded = np.zeros((2, B, T), np.int32)
    for i, document in enumerate(part):
      padded[0, B - 1 - i, : len(document)], padded[1, B - 1 - i, : len(document)] = document, 1
    found = gradient(case, *padded)
    sums.append(found)
    first.append(found[1][::-1])
  np.testing.assert_allclose(sum(s[0] for s in sums), total, rtol=1e-6)
  same({n: sums[0][2][n] + sums[1][2][n] for n in expected}, expected)
  np.testing.assert_allclose(first[0][0, :8], logp[0, :8], atol=1e-5)
  np.testing.assert_allclose(first[0][1, :10], logp[0, 9:19], atol=1e-5)


@pytest.mark.parametrize(
  ('case', 'remat'),
  [
    ('nf4-pissa', 'dots'),
    pytest.param('nf4-pissa', 'full', marks=FULL),
    pytest.param('int8-dora', 'dots', marks=FULL),
    pytest.param('int8-dora', 'full', marks=FULL),
  ],
)
def test_recomputed_is_plain(case, remat):
  _, logp, expected = gradient(case, *whole())
  _, found, again = gradient(case, *whole(), remat=remat)
  np.testing.assert_allclose(found, logp, atol=1e-6)
  same(again, expected)


@pytest.mark.parametrize('case', MARKED)
def test_the_cache_is_the_full_forward(case):
  """Completions of base and adapter, none merged: their log-probs are the full forward's."""
  arch, params = model(case)
  engine = Engine(arch, jnp.float32, (), 0, slots=2, tokens_per_dispatch=4)
  prompts = [ids(1, n, seed=n)[0].tolist() for n in (5, 12)]
  found = engine.generate(params, prompts, group=1, max_tokens=8, sampling=Sampling(1.0), seed=1)
  tokens, segments = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
  for row, (prompt, done) in enumerate(zip(prompts, found.completions, strict=True)):
    text = prompt + done[0].tokens
    tokens[row, : len(text)], segments[row, : len(text)] = text, 1
  _, logp, _ = gradient(case, tokens, segments)
  for row, (prompt, done) in enumerate(zip(prompts, found.completions, strict=True)):
    at = slice(len(prompt) - 1, len(prompt) - 1 + len(done[0].tokens))
    np.testing.assert_allclose(done[0].logprobs, logp[row, at], atol=1e-5)


# Dropout.


def test_dropout_keeps_the_mean_and_is_of_each_row_alone():
  arch, params = model('int8-dora', dropout=0.5)
  forward = Forward(arch, jnp.float32)
  tokens, segments = ids(B, T), np.ones((B, T), np.int32)
  where = tokens_at(segments)
  batch = {
    'tokens': place(tokens, 'batch', 'seq'),
    'segments': where.segments,
    'positions': where.positions,
  }

  @jax.jit
  def states(batch, keys):
    return forward.with_dropout(keys).hidden_states(params, batch)

  keys = jax.random.split(jax.random.key(0), B)
  found = np.asarray(states(batch, keys))
  other = tokens.copy()
  other[1:] = ids(B, T, seed=5)[1:]
  again = np.asarray(states(batch | {'tokens': place(other, 'batch', 'seq')}, keys))
  np.testing.assert_array_equal(again[0], found[0])
  turned = {k: place(np.asarray(v)[::-1], 'batch', 'seq') for k, v in batch.items()}
  np.testing.assert_array_equal(np.asarray(states(turned, keys[::-1]))[::-1], found)
  assert (np.asarray(states(batch, jax.random.split(jax.random.key(1), B))) != found).any()
  assert forward.with_dropout(keys).untrained().dropout_keys is None
  plain = np.asarray(jax.jit(forward.hidden_states)(params, batch))
  assert (plain != found).any(-1).all()


@FULL
def test_an_evaluation_drops_nothing():
  """Its loss has the bits of a model without dropout, and that of training has others."""
  arch, params = model('int8-dora', dropout=0.5)
  tokens, segments = whole()
  where, following = tokens_at(segments), np.roll(tokens, -1, 1)
  weights = (segments > 0).astype(np.float32)
  batch = {'tokens': tokens, 'labels': following, 'weights': weights}
  batch = {k: place(v, 'batch', 'seq') for k, v in batch.items()}
  batch |= {'segments': where.segments, 'positions': where.positions}
  plain = dataclasses.replace(arch, adapter=dataclasses.replace(arch.adapter, dropout=0.0))
  found = [
    token_loss.make_eval_loss(Forward(a, jnp.float32))(params, batch)[0] for a in (arch, plain)
  ]
  assert found[0] == found[1]
  keys = jax.random.split(jax.random.key(0), B)
  loss = jax.jit(sft.make_loss(Forward(arch, jnp.float32), tiny_adapters.config()))
  dropped = loss(params, batch, keys)[0]
  assert abs(float(dropped / found[0]) - 1) > 1e-4


def test_the_numbers_that_are_dropped():
  """A quarter of them, the others 4/3 as large; each map, layer and row has its own."""
  drop = Dropout(0.25, jax.random.split(jax.random.key(0), 8))
  x = place(np.ones((8, 64, 32), np.float32), 'batch', 'seq', None)
  found = np.asarray(jax.jit(lambda x: drop('attn/q', x))(x))
  assert set(np.unique(found)) == {0, np.float32(1 / 0.75)}
  assert abs((found == 0).mean() - 0.25) < 0.01 and abs(found.mean() - 1) < 0.015
  assert not np.array_equal(found[0], found[1])
  other = np.asarray(jax.jit(lambda x: drop('attn/k', x))(x))
  assert abs((other == found).mean() - (0.25**2 + 0.75**2)) < 0.01


# Ranks that differ by layer.


RULES = [(name, 'float32') for name in optimizer.OPTIMIZERS]
RULES += [(name, '8bit') for name in optimizer.IN_8BIT]
COMMON = (('adamw', 'float32'), ('adamw', '8bit'), ('muon', 'float32'), ('lion', 'float32'))


@pytest.mark.parametrize(
  ('name', 'moments'), [pytest.param(*r, marks=[] if r in COMMON else FULL) for r in RULES]
)
def test_rows_beyond_a_layers_rank_stay_zero(name, moments):
  """After steps with weight decay, whatever the gradient of the rows of its own is."""
  arch, params = model('int8-dora')
  info = optimizer.leaves(kinds.declared(arch), arch.layer_slots())
  names = [n for n in info if n.endswith(('attn/k/lora_a', 'attn/k/lora_b', 'mlp/down/lora_a'))]
  trained = {n: info[n] for n in names}
  flat = {n: np.asarray(trees.flatten(params)[n]) for n in names}
  c = tiny_adapters.config().optim
  recipe = optimizer.OptimizerConfig(
    name=name,
    moments=moments,
    schedule=lambda k: 1e-2,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=0.0,
    decay=c.decay,
    multipliers=c.multipliers,
    freeze=c.freeze,
  )
  rule = optimizer.make_optimizer(recipe, info, trained)
  rng = np.random.default_rng(0)

  @jax.jit
  def update(gradient, state, params):
    moved, state = rule.update(gradient, state, params)
    return jax.tree.map(jnp.add, params, moved), state

  now, state = trees.unflatten(flat), rule.init(trees.unflatten(flat))
  for _ in range(3):
    made = {
      n: rng.normal(size=flat[n].shape).astype(np.float32) * tiny_adapters.kept_rows(arch, n)
      for n in names
    }
    now, state = update(trees.unflatten(made), state, now)
  for n, leaf in trees.flatten(now).items():
    kept = tiny_adapters.kept_rows(arch, n) > 0
    outside = np.asarray(leaf)[~np.broadcast_to(kept, leaf.shape)]
    assert not outside.any(), n
    inside = np.broadcast_to(kept, leaf.shape)
    assert (np.asarray(leaf) != flat[n])[inside].mean() > 0.99
  short = np.asarray(trees.flatten(now)['stack0/block0/attn/k/lora_b'])[1]
  assert short[:2].any() and not short[2:].any()


def test_no_gradient_reaches_the_rows_beyond_a_layers_rank():
  arch, _ = model('int8-dora')
  _, _, found = gradient('int8-dora', *whole())
  for n, leaf in found.items():
    if n.rpartition('/')[2] in ('lora_a', 'lora_b'):
      assert not leaf[np.broadcast_to(tiny_adapters.kept_rows(arch, n) == 0, leaf.shape)].any(), n
