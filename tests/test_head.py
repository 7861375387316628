"""The chunked head against dense logits: values, gradients, borders of chunks, and memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tiny_model import TINY, init, place, tokens_at

from ftjax.losses.cross_entropy import LossConfig
from ftjax.models import head, kinds, logit_chunks
from ftjax.models.architecture import LogitSpec

B, T, D, V = 2, 160, 32, 256  # 320 tokens: two chunks of 128 and a half one
TERMS = [LossConfig(), LossConfig(0.1), LossConfig(0.0, 1e-2), LossConfig(0.2, 1e-2)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(logit_chunks, 'CHUNK_BYTES', 1)  # the least: 128 tokens


def example(seed=0):
  """States [B, T, D], head [V, D], labels [B, T]."""
  rng = np.random.default_rng(seed)
  x, w = rng.normal(size=(B, T, D)), rng.normal(size=(V, D)) * 0.3
  return np.float32(x), np.float32(w), rng.integers(0, V, (B, T), np.int32)


def first(count):
  """Weights of one for `count` tokens strewn over the batch."""
  weights = np.zeros(B * T, np.float32)
  weights[np.random.default_rng(count).permutation(B * T)[:count]] = 1
  return weights.reshape(B, T)


def ragged():
  weights = np.random.default_rng(1).uniform(0.1, 3, (B, T)).astype(np.float32)
  weights[0, 40:] = 0
  weights[1, ::3] = 0
  return weights


MASKS = {
  'all': np.ones((B, T), np.float32),
  'none': np.zeros((B, T), np.float32),
  'ragged, not 0 or 1': ragged(),
  'one row': np.repeat(np.float32([[0], [1]]), T, 1),
} | {f'{n} of 320': first(n) for n in (1, 127, 128, 129, 255, 256, 257, 319)}


def dense(x, w, labels, weights, terms):
  logits = jnp.einsum('BTD,VD->BTV', x, w)
  logp = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(logp, labels[..., None], -1)[..., 0]
  e, z = terms.label_smoothing, jax.nn.logsumexp(logits, axis=-1)
  loss = (1 - e) * nll - e * logp.mean(-1) + terms.z_loss * z**2
  return (loss * weights).sum(), (nll * weights).sum()


SHAPED = LogitSpec(vocab=V - 3, scale=0.5, soft_cap=4.0)


def dense_shaped(x, w, labels, weights, temperature):
  """The log-probs and entropies of SHAPED, from all logits of its V - 3 ids."""
  logits = 4 * jnp.tanh(jnp.einsum('BTD,VD->BTV', x, w)[..., :-3] * 0.5 / 4) / temperature
  logp = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(logp, labels[..., None], -1)[..., 0]
  return jnp.where(weights != 0, picked, 0), jnp.where(
    weights != 0, -(jnp.exp(logp) * logp).sum(-1), 0
  )


def on_mesh(x, w, labels, weights):
  return (
    place(x, 'batch', 'seq', 'act_embed'),
    place(w, 'vocab', 'embed'),
    place(labels, 'batch', 'seq'),
    place(weights, 'batch', 'seq'),
  )


both = jax.jit(
  jax.value_and_grad(head.cross_entropy_sums, argnums=(0, 1), has_aux=True), static_argnums=(4, 5)
)
dense_both = jax.jit(jax.value_and_grad(dense, argnums=(0, 1), has_aux=True), static_argnums=4)


@pytest.mark.parametrize('terms', TERMS, ids=str)
def test_loss_and_gradients_are_those_of_dense_logits(terms):
  x, w, labels = example()
  for name, weights in MASKS.items():
    got = both(*on_mesh(x, w, labels, weights), terms)
    expected = dense_both(x, w, labels, weights, terms)
    np.testing.assert_allclose(got[0], expected[0], rtol=5e-6, err_msg=name)
    for g, e in zip(got[1], expected[1], strict=True):
      np.testing.assert_allclose(g, e, atol=5e-6 * max(1.0, np.abs(e).max()), err_msg=name)
    if name == 'none':
      assert float(got[0][0]) == 0 and all((np.asarray(g) == 0).all() for g in got[1])


def test_unsupervised_tokens_have_no_gradient_and_their_labels_no_meaning():
  x, w, labels = example()
  weights = ragged()
  sums, (dx, dw) = both(*on_mesh(x, w, labels, weights), LossConfig(0.1, 0.01))
  assert (np.asarray(dx)[weights == 0] == 0).all()
  assert (np.abs(np.asarray(dx)[weights != 0]).max(-1) > 0).all()
  other = both(*on_mesh(x, w, np.where(weights, labels, -7), weights), LossConfig(0.1, 0.01))
  jax.tree.map(np.testing.assert_array_equal, (sums, (dx, dw)), other)


def test_the_gradient_is_scaled_by_its_cotangent_and_the_nll_has_none():
  arrays = on_mesh(*example(), MASKS['all'])

  def scaled(x, w, factor):
    loss, nll = head.cross_entropy_sums(x, w, *arrays[2:], LossConfig())
    return factor * loss + 5 * jax.lax.stop_gradient(nll)

  gradient = jax.jit(jax.grad(scaled, argnums=(0, 1)))
  one, three = gradient(*arrays[:2], 1.0), gradient(*arrays[:2], 3.0)
  for a, b in zip(one, three, strict=True):
    np.testing.assert_allclose(3 * np.asarray(a), b, rtol=1e-6, atol=1e-7)


def test_bfloat16_states_have_float32_sums():
  """Loss and gradient of bfloat16 states and a float32 table, near those of the rounded numbers."""
  x, w, labels = example()
  rounded = [np.float32(jnp.asarray(a, jnp.bfloat16)) for a in (x, w)]
  expected = dense_both(*rounded, labels, MASKS['all'], LossConfig())
  arrays = on_mesh(x.astype(jnp.bfloat16), w, labels, MASKS['all'])
  (loss, _), (dx, dw) = both(*arrays, LossConfig())
  assert (loss.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
  assert float(loss) == pytest.approx(float(expected[0][0]), rel=2e-6)
  for g, e in zip((dx, dw), expected[1], strict=True):
    assert np.abs(np.float32(g) - e).max() <= 2**-7 * np.abs(e).max()


def test_token_logprobs_are_those_of_dense_logits():
  x, w, labels = example()
  logp = np.asarray(jax.nn.log_softmax(jnp.einsum('BTD,VD->BTV', x, w)))
  expected = np.take_along_axis(logp, labels[..., None], -1)[..., 0]
  run = jax.jit(head.token_logprobs)
  for name, weights in MASKS.items():
    got = run(*on_mesh(x, w, labels, weights))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.where(weights, expected, 0), atol=1e-5, err_msg=name)


def dense_readout(x, w, labels, weights, temperature):
  logp = jax.nn.log_softmax(jnp.einsum('BTD,VD->BTV', x, w) / temperature)
  picked = jnp.take_along_axis(logp, labels[..., None], -1)[..., 0]
  entropy = -(jnp.exp(logp) * logp).sum(-1)
  return jnp.where(weights != 0, picked, 0), jnp.where(weights != 0, entropy, 0)


def readout_sum(logprobs_and_entropy):
  """A number that every log-prob and entropy counts in differently, with its gradient."""
  p, h = np.random.default_rng(2).normal(size=(2, B, T)).astype(np.float32)

  def value(x, w, labels, weights, temperature):
    logp, entropy = logprobs_and_entropy(x, w, labels, weights, temperature)
    spread = [jax.sharding.reshard(jnp.asarray(a), jax.typeof(logp).sharding.spec) for a in (p, h)]
    return (logp * spread[0] + entropy * spread[1]).sum(), (logp, entropy)

  return jax.jit(
    jax.value_and_grad(value, argnums=(0, 1), has_aux=True), static_argnames='temperature'
  )


@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_logprobs_and_entropies_have_the_gradients_of_dense_logits(temperature):
  x, w, labels = example()
  ours, theirs = readout_sum(head.logprobs_and_entropies), readout_sum(dense_readout)
  for name, weights in MASKS.items():
    (_, values), gradients = ours(*on_mesh(x, w, labels, weights), temperature)
    (_, dense_values), dense_gradients = theirs(x, w, labels, weights, temperature)
    for g, e in zip(values, dense_values, strict=True):
      np.testing.assert_allclose(g, e, atol=1e-5, err_msg=name)
    for g, e in zip(gradients, dense_gradients, strict=True):
      np.testing.assert_allclose(g, e, atol=1e-5 * max(1.0, np.abs(e).max()), err_msg=name)


@pytest.mark.parametrize('sizes', [{}, {'fsdp': 2, 'tensor': 2, 'context': 2}])
def test_scaled_and_capped_logits_with_padding(sizes, use_mesh):
  """Log-probs, entropies, loss, divergence and logits, and their gradients, against dense ones."""
  x, w, labels = example()
  labels, weights, w = labels % (V - 3), ragged(), w * 3
  theirs = readout_sum(dense_shaped)(x, w, labels, weights, 0.7)
  nll = jax.value_and_grad(
    lambda x, w: -(dense_shaped(x, w, labels, weights, 1.0)[0] * weights).sum(), argnums=(0, 1)
  )(x, w)
  if sizes:
    use_mesh(**sizes)
  placed = on_mesh(x, w, labels, weights)
  shaped = functools.partial(head.logprobs_and_entropies, logit_spec=SHAPED)
  ours = readout_sum(shaped)(*placed, 0.7)
  loss = both(*placed, LossConfig(), SHAPED)
  alike = functools.partial(np.testing.assert_allclose, rtol=1e-5)
  alike(loss[0][0], nll[0])
  for g, e in zip(
    (*ours[0][1], *ours[1], *loss[1]), (*theirs[0][1], *theirs[1], *nll[1]), strict=True
  ):
    alike(g, e, atol=1e-5 * max(1.0, np.abs(e).max()))
  plain = dataclasses.replace(SHAPED, soft_cap=None)
  model = (*placed[:2], None)
  divergence = functools.partial(head.divergence_sums, model, model, placed[3])
  assert abs(jax.jit(divergence, static_argnums=0)(SHAPED)) < 1e-4
  assert not np.allclose(both(*placed, LossConfig(), plain)[0][0], loss[0][0], rtol=1e-2)


def test_scaled_and_capped_logits_of_the_last_states():
  x, w, _ = example()
  arguments = place(x[:, -1], 'batch', None), place(w, 'vocab', 'embed')
  got = jax.jit(head.logits, static_argnums=2)(*arguments, SHAPED)
  np.testing.assert_allclose(got[:, :-3], 4 * np.tanh(x[:, -1] @ w[:-3].T / 8), atol=1e-5)
  assert np.isneginf(got[:, -3:]).all()


def test_logprobs_without_entropy_have_the_same_gradient():
  """Also where labels and cotangents of what does not count are nonsense."""
  x, w, labels = example()
  weights = ragged()
  scale = np.random.default_rng(3).normal(size=(B, T)).astype(np.float32)

  def value(logprobs_and_entropy, x, w, labels, scale):
    return (jnp.where(weights != 0, logprobs_and_entropy(x, w, labels, weights), 0) * scale).sum()

  args = on_mesh(x, w, np.where(weights, labels, -7), weights)
  grad = jax.jit(jax.grad(value, argnums=(1, 2)), static_argnums=0)
  got = grad(head.token_logprobs, *args[:3], np.where(weights, scale, np.float32(1e30)))
  dense_one = lambda *a: dense_readout(*a, 1.0)[0]  # noqa: E731
  expected = grad(dense_one, x, w, labels, np.where(weights, scale, 0))
  for g, e in zip(got, expected, strict=True):
    np.testing.assert_allclose(g, e, atol=1e-5 * np.abs(e).max())
  assert (np.asarray(got[0])[weights == 0] == 0).all()


@pytest.mark.parametrize(
  'sizes', [{'fsdp': 2, 'tensor': 2}, {'data': 2, 'context': 2, 'tensor': 2}]
)
def test_gradients_of_logprobs_on_a_mesh_as_on_one_device(sizes, use_mesh):
  x, w, labels = example()
  weights = ragged() * np.float32([[0], [1]])
  expected = readout_sum(dense_readout)(x, w, labels, weights, 0.7)
  use_mesh(**sizes)
  got = readout_sum(head.logprobs_and_entropies)(*on_mesh(x, w, labels, weights), 0.7)
  (_, values), gradients = got
  (_, dense_values), dense_gradients = expected
  pairs = zip((*values, *gradients), (*dense_values, *dense_gradients), strict=True)
  for g, e in pairs:
    np.testing.assert_allclose(g, e, atol=1e-5 * max(1.0, np.abs(e).max()))


def test_logits_of_the_last_states():
  x, w, _ = example()
  got = jax.jit(head.logits)(place(x[:, -1], 'batch', None), place(w, 'vocab', 'embed'))
  np.testing.assert_allclose(got, x[:, -1] @ w.T, atol=1e-5)


@pytest.mark.parametrize(
  'sizes', [{'fsdp': 2, 'tensor': 2}, {'data': 2, 'context': 2, 'tensor': 2}]
)
def test_on_a_mesh_as_on_one_device(sizes, use_mesh):
  """Each shard sorts and counts its own tokens: one row has none."""
  x, w, labels = example()
  weights = ragged() * np.float32([[0], [1]])
  expected = both(*on_mesh(x, w, labels, weights), LossConfig(0.1, 0.01))
  logp = jax.jit(head.token_logprobs)(*on_mesh(x, w, labels, weights))
  use_mesh(**sizes)
  got = both(*on_mesh(x, w, labels, weights), LossConfig(0.1, 0.01))
  np.testing.assert_allclose(got[0], expected[0], rtol=2e-6)
  for g, e in zip(got[1], expected[1], strict=True):
    np.testing.assert_allclose(g, e, atol=2e-6 * np.abs(e).max())
  there = jax.jit(head.token_logprobs)(*on_mesh(x, w, labels, weights))
  np.testing.assert_allclose(there, logp, atol=1e-5)


@pytest.mark.parametrize(
  ('vocab', 'tokens', 'expected'),
  [
    (49152, 16384, 512),
    (128256, 16384, 128),
    (49152, 100, 100),
    (256, 10**6, 98304),
    (10**7, 999, 128),
  ],
)
def test_chunk_sizes(vocab, tokens, expected, monkeypatch):
  monkeypatch.setattr(logit_chunks, 'CHUNK_BYTES', 96 * 2**20)
  assert logit_chunks.chunk_tokens(vocab, tokens) == expected


# The step's memory: a vocabulary far wider than everything else.
(_BLOCK,) = TINY.stacks[0][0]
WIDE = dataclasses.replace(TINY, vocab_size=8192, stacks=(((_BLOCK,), 1),))


def sft(arch, rows, length=64):
  """value_and_grad of an SFT loss and its arguments."""

  def loss(params, tokens, where, labels, weights):
    x = kinds.apply(arch, params, tokens, where, dtype=jnp.float32)
    return head.cross_entropy_sums(x, params['embed']['w'], labels, weights, LossConfig(0.1, 1e-3))[
      0
    ]

  tokens = place(np.zeros((rows, length), np.int32), 'batch', 'seq')
  weights = place(np.ones((rows, length), np.float32), 'batch', 'seq')
  where = tokens_at(np.ones((rows, length)))
  return jax.value_and_grad(loss), (init(arch), tokens, where, tokens, weights)


def preference(arch, rows, length=64):
  """The same of a loss of log-probs and entropies."""

  def loss(params, tokens, where, labels, weights):
    x = kinds.apply(arch, params, tokens, where, dtype=jnp.float32)
    logp, h = head.logprobs_and_entropies(x, params['embed']['w'], labels, weights, 0.7)
    return jnp.log1p(jnp.exp(logp)).sum() + h.sum()

  return jax.value_and_grad(loss), sft(arch, rows, length)[1]


def largest(jaxpr):
  """The largest array that a jaxpr or one it calls mentions, in elements."""
  sizes = [
    v.aval.size for e in jaxpr.eqns for v in (*e.invars, *e.outvars) if hasattr(v.aval, 'size')
  ]
  return max(sizes + [largest(j) for e in jaxpr.eqns for j in jaxprs_in_params(e.params)])


def test_no_array_of_tokens_by_vocabulary_is_traced():
  """1,024 tokens and 8,192 words: nothing is larger than one chunk's logits, an eighth of that."""
  for made in (sft, preference):
    fn, args = made(WIDE, rows=16)
    assert largest(jax.make_jaxpr(fn)(*args).jaxpr) == 128 * WIDE.vocab_size
  # The same walk sees them where they are.
  shapes = ((16, 64, D), (8192, D), (16, 64), (16, 64))
  arrays = [np.zeros(s, t) for s, t in zip(shapes, 'ffif', strict=True)]
  dense_fn = jax.value_and_grad(lambda *a: dense(*a, LossConfig())[0], argnums=(0, 1))
  assert largest(jax.make_jaxpr(dense_fn)(*arrays).jaxpr) == 1024 * WIDE.vocab_size


def temporaries(made, rows):
  fn, args = made(WIDE, rows)
  return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('made', [sft, preference])
def test_temporaries_grow_with_tokens_times_width_not_vocabulary(made):
  """1,024 tokens more at a fixed chunk: 32 MiB if they were multiplied with the vocabulary. A block
  keeps about 30 arrays of D or F numbers a token, and its scores, N * T a token.
  """
  growth = temporaries(made, 32) - temporaries(made, 16)
  per_token = 40 * _BLOCK.mlp.ffn_dim + 4 * _BLOCK.mixer.num_heads * 64
  assert 0 < growth <= 1024 * per_token * 4 < 1024 * WIDE.vocab_size * 4 / 2
