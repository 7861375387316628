"""R-Drop: its divergence by hand, the chunked head against dense logits, the loss of a step, and
its refusal without dropout.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY, ids, init, place, tokens_at

from ftjax.algorithms import sft
from ftjax.config import keys
from ftjax.experiment import dropout as run_dropout
from ftjax.losses import r_drop
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models import logit_chunks
from ftjax.models.architecture import LogitSpec
from ftjax.models.dropout import Rates
from ftjax.models.forward import Forward
from ftjax.models.paired_head import paired_sums
from ftjax.runtime.errors import ConfigError

B, T, D, V = 2, 160, 32, 64


def test_by_hand():
  """p = (1/2, 1/2), q = (3/4, 1/4): half of (p - q) (log p - log q), summed, is ln(3) / 8."""
  first, second = jnp.zeros((1, 2)), jnp.array([[math.log(3), 0.0]])
  assert float(r_drop.symmetric_kl(first, second)[0]) == pytest.approx(math.log(3) / 8, rel=1e-6)
  found, by_first, by_second = r_drop.divergence_and_gradients(first, second, None)
  assert float(found[0]) == pytest.approx(math.log(3) / 8, rel=1e-6)
  kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)  # KL(p || q)
  slope = (0.5 * (math.log(0.5 / 0.75) - kl) + 0.5 - 0.75) / 2
  np.testing.assert_allclose(by_first, [[slope, -slope]], rtol=1e-6)
  np.testing.assert_allclose(by_first.sum() + by_second.sum(), 0, atol=1e-7)


def test_other_label_heads_by_hand():
  """sigmoid: numbers 0 and ln 3 are p = 1/2 and q = 3/4; value: (1 - 3)^2 / 2."""
  first, second = jnp.array([[0.0, 0.0]]), jnp.array([[math.log(3), 0.0]])
  found = r_drop.symmetric_kl(first, second, 'sigmoid')
  assert float(found[0]) == pytest.approx(0.25 * math.log(3) / 2, rel=1e-6)
  assert float(r_drop.symmetric_kl(jnp.ones((1, 1)), 3 * jnp.ones((1, 1)), 'value')[0]) == 2.0
  with pytest.raises(ValueError, match="kind='hinge'; expected softmax"):
    r_drop.symmetric_kl(first, second, 'hinge')


@pytest.mark.parametrize('parts', [1, 3])
def test_gradients_are_those_of_autodiff(parts):
  """Also with the vocabulary in parts and padded."""
  rng = np.random.default_rng(0)
  first, second = (jnp.asarray(rng.normal(size=(7, 12)) * 3, jnp.float32) for _ in range(2))
  gradient = jax.grad(lambda a, b: r_drop.symmetric_kl(a, b).sum(), (0, 1))
  expected = (r_drop.symmetric_kl(first, second), *gradient(first, second))
  padded = [np.pad(x, ((0, 0), (0, 3)), constant_values=-np.inf) for x in (first, second)]
  pieces = [jnp.moveaxis(x.reshape(7, parts, -1), 1, 0) for x in padded]

  def one(a, b):
    return r_drop.divergence_and_gradients(a, b, 'tensor')

  found, *g = jax.vmap(one, axis_name='tensor', out_axes=(None, 1, 1))(*pieces)
  np.testing.assert_allclose(found, expected[0], rtol=2e-5, atol=1e-6)
  for got, wanted in zip(g, expected[1:], strict=True):
    got = np.asarray(got).reshape(7, -1)
    np.testing.assert_allclose(got[:, :12], wanted, atol=2e-6)
    assert (got[:, 12:] == 0).all()


def test_equal_and_far_passes():
  far = jnp.array([[300.0, 0.0, -300.0], [0.0, 0.0, 0.0]])
  found, *g = r_drop.divergence_and_gradients(far, far, None)
  assert not np.asarray(found).any() and not np.asarray(g).any()
  found, *g = r_drop.divergence_and_gradients(far, far[:, ::-1], None)
  assert np.isfinite(found).all() and np.isfinite(np.asarray(g)).all()


@pytest.mark.parametrize(
  'sizes', [{}, pytest.param(dict(fsdp=2, tensor=2, context=2), marks=pytest.mark.full)]
)
def test_the_head_is_that_of_dense_logits(sizes, use_mesh, monkeypatch):
  """320 tokens in chunks of 128, a padded vocabulary, label smoothing."""
  monkeypatch.setattr(logit_chunks, 'CHUNK_BYTES', 1)
  use_mesh(**sizes)
  rng, strength, how = np.random.default_rng(0), 0.7, LogitSpec(vocab=V - 3)
  x, y = (np.float32(rng.normal(size=(B, T, D))) for _ in range(2))
  w = np.float32(rng.normal(size=(V, D)) * 0.3)
  labels = rng.integers(0, V - 3, (B, T), np.int32)
  weights = rng.uniform(0.1, 3, (B, T)).astype(np.float32)
  weights[0, 40:] = 0
  terms = LossConfig(label_smoothing=0.1)

  def dense(x, y, w):
    logits = [jnp.einsum('BTD,VD->BTV', a, w)[..., :-3] for a in (x, y)]
    logp = [jax.nn.log_softmax(a) for a in logits]
    nll = [-jnp.take_along_axis(a, labels[..., None], -1)[..., 0] for a in logp]
    loss = [0.9 * n - 0.1 * a.mean(-1) for n, a in zip(nll, logp, strict=True)]
    apart = r_drop.symmetric_kl(*(a.reshape(-1, V - 3) for a in logits)).reshape(B, T)
    total = ((sum(loss) / 2 + strength * apart) * weights).sum()
    return total, ((sum(nll) / 2 * weights).sum(), (apart * weights).sum())

  expected, gradients = jax.value_and_grad(dense, (0, 1, 2), has_aux=True)(x, y, w)

  @jax.jit
  def chunked(x, y, w, labels, weights):
    def loss(x, y, w):
      first, second = (x, w, None), (y, w, None)
      found = paired_sums(first, second, labels, weights, terms, strength, how)
      return found[0], found[1:]

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, y, w)

  states, table, tokens = ('batch', 'seq', 'act_embed'), ('vocab', 'embed'), ('batch', 'seq')
  arguments = (place(x, *states), place(y, *states), place(w, *table))
  found, g = chunked(*arguments, place(labels, *tokens), place(weights, *tokens))
  np.testing.assert_allclose(jax.tree.leaves(found), jax.tree.leaves(expected), rtol=2e-5)
  for got, wanted in zip(g, gradients, strict=True):
    np.testing.assert_allclose(got, wanted, atol=2e-4)


def test_a_step_has_two_passes_with_other_masks():
  """Without dropout both are one pass; with it, the first one is that of a step without R-Drop."""
  batch = {'tokens': ids(4, 16), 'labels': ids(4, 16, seed=1)}
  batch |= {'weights': np.ones((4, 16), np.float32)}
  batch = {k: place(v, 'batch', 'seq') for k, v in batch.items()}
  where = tokens_at(np.ones((4, 16), np.int32))
  batch |= {'segments': where.segments, 'positions': where.positions}
  params, c, row_keys = init(TINY), keys.default(), jax.random.split(jax.random.key(0), 4)
  c.loss.r_drop = 2.0

  @jax.jit
  def run(params):
    dropping = Forward(TINY, jnp.float32, rates=Rates(residual=0.2))
    steps = [sft.make_loss(f, c) for f in (Forward(TINY, jnp.float32), dropping)]
    plain = sft.make_loss(Forward(TINY, jnp.float32), keys.default())
    one = dropping.with_dropout(row_keys).cross_entropy(params, batch, LossConfig())[1]
    return [f(params, batch, row_keys) for f in (*steps, plain)], one

  (alone, dropped, plain), first = run(params)
  assert abs(float(alone[2]['divergence'][0])) < 1e-4
  np.testing.assert_allclose(alone[0], plain[0], rtol=1e-5)
  apart, nll = float(dropped[2]['divergence'][0]), float(dropped[2]['nll'][0])
  assert apart > 0.1 and abs(nll - float(first)) > 1e-3
  np.testing.assert_allclose(dropped[0], nll + 2 * apart, rtol=1e-5)


def test_without_dropout_it_is_refused():
  c = keys.default()
  c.loss.r_drop = 1.0
  with pytest.raises(
    ConfigError, match=r'loss.r_drop=1.0 compares two passes .* nothing is dropped'
  ):
    run_dropout.check(c, TINY, {})
  c.model.dropout.attention = 0.1
  run_dropout.check(c, TINY, {})
