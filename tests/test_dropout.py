"""Dropout inside models: where it acts, the mean of many draws, each kernel's gradient, what draws
the same numbers, where its rates come from, and what is refused.
"""

import dataclasses
import functools

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import family_cases as cases
from tiny_model import TINY, place, tokens_at

from ftjax.config import keys, validation
from ftjax.experiment import dropout as run_dropout
from ftjax.families import dropout as family_dropout
from ftjax.models import attention, dropout, kinds
from ftjax.models.dropout import ModelDropout, Rates
from ftjax.models.forward import Forward
from ftjax.models.kernels import blocked, dense
from ftjax.runtime import sharding
from ftjax.runtime.errors import ConfigError, DataError

FULL = pytest.mark.full
B, T, K, N, H = 2, 384, 1, 2, 8


def row_keys(seed=0, rows=B):
  keys = jax.random.split(jax.random.key(seed), rows)
  return jax.sharding.reshard(keys, sharding.spec('batch'))


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K))
  segments = np.repeat([[1, 2, 0]], [100, 220, 64], axis=1).repeat(B, 0)
  positions = np.concatenate([np.arange(n) for n in (100, 220, 64)])[None].repeat(B, 0)
  return (*map(jnp.asarray, (q, k, v)), (segments, positions.astype(np.int32)) * 2)


def drawn(rate, keys):
  return ModelDropout(Rates(attention=rate), keys).attention(N, T, T)


def of_kernels(rate, keys):
  """[(name, function of q, k, v)] of the kernels that can drop, and autodiff of a plain softmax."""
  *_, where = arrays()
  mask = dense.visible(where, None)
  found = jax.tree.map(lambda a: jax.sharding.reshard(a, jax.P()), drawn(rate, keys))
  kept, share = dropout.kept(found, rate, T), dropout.kept_share(rate)

  def plain(q, k, v):
    k, v = (jnp.repeat(a, N // K, axis=2) for a in (k, v))
    scores = jnp.einsum('BTNH,BSNH->BNTS', q, k, precision='highest') / np.sqrt(H)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30))
    weights = jnp.where(kept, weights / share, 0)
    return jnp.einsum('BNTS,BSNH->BTNH', weights, v, precision='highest')

  return {
    'plain': plain,
    'dense': lambda q, k, v: dense.attend(q, k, v, mask, None, kept, share),
    'blocked': lambda q, k, v: blocked.attend(q, k, v, where, None, None, True, found, rate),
  }


def test_kernels_drop_the_same_probabilities_with_their_gradient():
  """Rows of three blocks of queries."""
  q, k, v, _ = arrays()
  factors = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

  def both(attend):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(factors)

  functions = of_kernels(0.3, row_keys())
  expected = jax.jit(lambda: both(functions['plain']))()
  for name in ('dense', 'blocked'):
    found = jax.jit(functools.partial(both, functions[name]))()
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_the_mean_of_many_masks_is_attention_without_dropout():
  """2,000 masks of 2 rows and 2 heads: the share that is kept, and the mean, within six standard
  errors.
  """
  rate = 0.25

  @jax.jit
  def mean(keys):
    total = jax.lax.map(
      lambda keys: dropout.kept(ModelDropout(Rates(0.25), keys).attention(N, 4, 5), rate, 5), keys
    )
    return total.mean(0) / dropout.kept_share(rate)

  draws = 2000
  keys = jax.random.split(jax.random.key(3), (draws, B))
  found = np.asarray(mean(keys))
  assert found.shape == (B, N, 4, 5)
  error = np.sqrt(rate / (1 - rate) / draws)
  assert abs(found - 1).max() < 6 * error
  assert len(np.unique(found)) > 20  # each place has numbers of its own


def test_the_mean_of_many_embeddings_and_branches_is_without_dropout():
  x = place(np.ones((B, 3, 16), np.float32), 'batch', 'seq', 'act_embed')
  rates = Rates(residual=0.2, embedding=0.4)

  @jax.jit
  def mean(keys):
    def one(keys):
      drop = ModelDropout(rates, keys)
      return drop.residual('attn', x), drop.residual('mlp', x), drop.embedding(x)

    return jax.tree.map(lambda a: a.mean(0), jax.lax.map(one, keys))

  found = mean(jax.random.split(jax.random.key(1), (1000, B)))
  for a, rate in zip(found, (0.2, 0.2, 0.4), strict=True):
    assert abs(np.asarray(a) - 1).max() < 6 * np.sqrt(rate / (1 - rate) / 1000)
  assert (np.asarray(found[0]) != np.asarray(found[1])).any()


def batch_of(arch, rows=B, seed=0):
  ids = np.random.default_rng(seed).integers(1, arch.vocab_size, (rows, 16)).astype(np.int32)
  where = tokens_at(np.repeat([[1, 2]], [10, 6], axis=1).repeat(rows, 0))
  return {
    'tokens': place(ids, 'batch', 'seq'),
    'segments': where.segments,
    'positions': where.positions,
  }


ALL = Rates(0.2, 0.2, 0.2)


@functools.cache
def trained(remat):
  """states(params, batch, keys) of a training step with all three rates."""
  forward = Forward(TINY, jnp.float32, remat, rates=ALL)
  return jax.jit(lambda p, b, keys: forward.with_dropout(keys).hidden_states(p, b))


def test_a_row_draws_by_its_own_key_alone():
  params, batch, keys = kinds.init(TINY, jax.random.key(0)), batch_of(TINY), row_keys()
  found = np.asarray(trained('none')(params, batch, keys))
  plain = np.asarray(jax.jit(Forward(TINY, jnp.float32).hidden_states)(params, batch))
  assert (found != plain).any(-1).all()
  turned = {k: place(np.asarray(v)[::-1], 'batch', 'seq') for k, v in batch.items()}
  again = np.asarray(trained('none')(params, turned, keys[::-1]))
  np.testing.assert_array_equal(again[::-1], found)
  other = np.asarray(trained('none')(params, batch, row_keys(1)))
  assert (other != found).any(-1).all()


@pytest.mark.parametrize('remat', [pytest.param('dots', marks=FULL), 'full'])
def test_recomputed_layers_drop_the_same(remat):
  params, batch, keys = kinds.init(TINY, jax.random.key(0)), batch_of(TINY), row_keys()

  def gradient(remat):
    forward = Forward(TINY, jnp.float32, remat, rates=ALL).with_dropout(keys)
    return jax.jit(jax.grad(lambda p: jnp.square(forward.hidden_states(p, batch)).sum()))(params)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    gradient(remat),
    gradient('none'),
  )


def test_rates_of_0_are_the_same_program():
  batch, keys = batch_of(TINY), row_keys()
  abstract = kinds.abstract(TINY)

  def text(forward):
    states = jax.jit(lambda p, b: forward.with_dropout(keys).hidden_states(p, b))
    return states.lower(abstract, batch).as_text()

  plain = text(Forward(TINY, jnp.float32))
  assert text(Forward(TINY, jnp.float32, rates=Rates())) == plain
  assert text(Forward(TINY, jnp.float32, rates=Rates(residual=0.1))) != plain


def test_an_evaluation_and_a_reference_drop_nothing():
  forward = Forward(TINY, jnp.float32, rates=ALL)
  assert forward.inner is None
  assert forward.with_dropout(row_keys()).inner.rates == ALL
  assert forward.with_dropout(row_keys()).untrained().inner is None


@pytest.mark.parametrize(
  'name', ['deberta', *(pytest.param(n, marks=FULL) for n in ('bert', 'gemma2', 'qwen3_5'))]
)
def test_each_rate_acts_in_every_kind_of_block(name):
  """Post-norm, disentangled, norms on both sides, and delta nets beside attention."""
  arch = family_models.architecture(name)
  params = family_models.params(name, arch)
  batch, keys = family_models.of_case(name, cases.ids(cases.CASES[name])), row_keys(rows=cases.ROWS)

  @jax.jit
  def run(params):
    each = [Rates(), Rates(attention=0.5), Rates(residual=0.5), Rates(embedding=0.5)]
    forwards = [Forward(arch, jnp.float32, rates=r).with_dropout(keys) for r in each]
    return [f.hidden_states(params, batch) for f in forwards]

  plain, *found = map(np.asarray, run(params))
  for other in found:
    assert np.isfinite(other).all() and (other != plain).any()


# Which kernel.


def test_kernels_of_accelerators_are_not_chosen_for_dropout():
  problem = attention.Problem('tpu', 1, 2048, 2048, 128, 'bfloat16')
  assert attention.kernel(problem) == 'splash'
  assert attention.kernel(dataclasses.replace(problem, dropout=0.1)) == 'blocked'
  short = dataclasses.replace(problem, platform='gpu', queries=256, keys=256, dropout=0.1)
  assert attention.kernel(short) == 'dense'


# Where the rates come from.


@pytest.mark.parametrize(
  ('config', 'task', 'expected'),
  [
    (
      {'model_type': 'bert', 'hidden_dropout_prob': 0.2, 'attention_probs_dropout_prob': 0.05},
      'sequence',
      (0.05, 0.2, 0.2, 0.2),
    ),
    (
      {'model_type': 'bert', 'hidden_dropout_prob': 0.2, 'classifier_dropout': 0.3},
      'token',
      (0.1, 0.2, 0.2, 0.3),  # attention: BERT's default
    ),
    ({'model_type': 'bert'}, 'span', (0.1, 0.1, 0.1, 0.0)),
    ({'model_type': 'modernbert', 'embedding_dropout': 0.1}, '', (0.0, 0.0, 0.1, 0.0)),
    (
      {'model_type': 'distilbert', 'dropout': 0.3, 'attention_dropout': 0.2},
      'sequence',
      (0.2, 0.3, 0.3, 0.2),  # classifier: DistilBERT's default
    ),
  ],
)
def test_rates_of_a_config_json(config, task, expected):
  found = family_dropout.rates(config, task)
  assert tuple(found[k] for k in ('attention', 'residual', 'embedding', 'classifier')) == expected


def test_a_rate_that_is_none_is_refused():
  with pytest.raises(DataError, match=r'hidden_dropout_prob=1.5; expected a number from 0'):
    family_dropout.rates({'model_type': 'bert', 'hidden_dropout_prob': 1.5}, '')


def test_a_config_overrides_the_models_rates():
  c = keys.default()
  bert = family_models.architecture('bert_sequence')
  config = {'model_type': 'bert', 'hidden_dropout_prob': 0.2, 'attention_probs_dropout_prob': 0.3}
  found = run_dropout.find(c, bert, config)
  assert found.inner == Rates(0.3, 0.2, 0.2) and found.classifier == 0.2
  assert found.summary() == 'attention 0.3, residual 0.2, embedding 0.2, classifier 0.2'
  c.model.dropout.attention, c.model.dropout.classifier = 0.0, 0.5
  found = run_dropout.find(c, bert, config)
  assert found.inner == Rates(0.0, 0.2, 0.2) and found.classifier == 0.5
  decoder = run_dropout.find(
    keys.default(), TINY, {'model_type': 'llama', 'attention_dropout': 0.9}
  )
  assert not decoder.inner and not decoder.classifier and decoder.summary() == ''
  with pytest.raises(ConfigError, match=r'model.dropout.classifier=0.5: .* no label head'):
    run_dropout.find(c, TINY, {})


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'attention': 1.0}, 'model.dropout.attention=1.0; expected at least 0 and less than 1, or -1'),
    ({'residual': -0.5}, 'model.dropout.residual=-0.5; expected'),
  ],
)
def test_wrong_rates_are_refused(changes, message):
  c = keys.default()
  c.model.path, c.data.train = 'm', 'rows.jsonl'
  for key, value in changes.items():
    c.model.dropout[key] = value
  with pytest.raises(ConfigError, match=message):
    validation.validate(c)


def test_dropout_of_rollouts_is_refused():
  c = keys.default()
  c.model.path, c.data.train, c.algorithm = 'm', 'rows.jsonl', 'grpo'
  c.rollout.rewards, c.model.dropout.residual = 'math', 0.1
  with pytest.raises(ConfigError, match=r'model.dropout.residual=0.1 with algorithm=grpo'):
    validation.validate(c)
