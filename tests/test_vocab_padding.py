"""A vocabulary padded in memory: everything but the sizes of the tables is as without padding."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY, UNTIED, ids, init, place, tokens_at

from ftjax.families import table
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.generation.scorer import Scorer
from ftjax.hf import export, load
from ftjax.hf.safetensors import SafetensorsFolder
from ftjax.losses.cross_entropy import LossConfig
from ftjax.models import counts, head, kinds, logit_chunks
from ftjax.models.architecture import LogitSpec
from ftjax.models.forward import Forward
from ftjax.runtime import sharding, trees
from ftjax.runtime.errors import ConfigError
from ftjax.training import optimizer

GOLDEN = Path(__file__).parent / 'parity' / 'golden'
# On four ways the third holds two tokens, and the fourth none.
B, T, D, V, ROWS = 2, 80, 32, 130, 256


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(logit_chunks, 'CHUNK_BYTES', 1)


def example():
  """States [B, T, D], a table [ROWS, D] whose padding is rubbish, labels and weights [B, T]."""
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(B, T, D)), rng.normal(size=(ROWS, D)) * 0.3
  w[V:] *= 100
  weights = rng.uniform(0.1, 3, (B, T)) * (rng.random((B, T)) < 0.7)
  return np.float32(x), np.float32(w), rng.integers(0, V, (B, T), np.int32), np.float32(weights)


def placed(x, w, labels, weights):
  rows = ('batch', 'seq')
  return (
    place(x, *rows, 'act_embed'),
    place(w, 'vocab', 'embed'),
    place(labels, *rows),
    place(weights, *rows),
  )


def loss(x, w, labels, weights, vocab=None):
  logit_spec = LogitSpec(vocab)
  """All that the head computes of a table, as one number, and its parts."""
  terms = LossConfig(label_smoothing=0.1, z_loss=1e-2)
  sums = head.cross_entropy_sums(x, w, labels, weights, terms, logit_spec)
  logp, entropy = head.logprobs_and_entropies(x, w, labels, weights, 0.7, logit_spec)
  alone = head.token_logprobs(x, w, labels, weights, logit_spec=logit_spec)
  scale = jax.sharding.reshard(jnp.cos(jnp.arange(T, dtype=jnp.float32)), jax.P())[None]
  scale = jax.sharding.reshard(jnp.broadcast_to(scale, (B, T)), sharding.spec('batch', 'seq'))
  value = sums[0] + (scale * (logp + 0.5 * entropy - 2 * alone)).sum()
  return value, (sums, logp, entropy, alone)


both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=4)


@pytest.mark.parametrize('sizes', [{}, {'tensor': 4}, {'fsdp': 2, 'tensor': 2}], ids=str)
def test_losses_logprobs_and_entropies_are_those_of_the_table_without_padding(sizes, use_mesh):
  x, w, labels, weights = example()
  expected = both(*placed(x, w[:V], labels, weights))
  if sizes:
    use_mesh(**sizes)
  got = both(*placed(x, w, labels, weights), V)
  for g, e in zip(jax.tree.leaves(got[0]), jax.tree.leaves(expected[0]), strict=True):
    np.testing.assert_allclose(g, e, rtol=2e-5, atol=2e-5)
  dx, dw = map(np.asarray, got[1])
  np.testing.assert_allclose(dx, expected[1][0], atol=2e-5 * np.abs(dx).max())
  np.testing.assert_allclose(dw[:V], expected[1][1], atol=2e-5 * np.abs(dw).max())
  assert (dw[V:] == 0).all()


def test_probabilities_of_the_true_vocabulary_sum_to_one(use_mesh):
  x, w, _, _ = example()
  use_mesh(tensor=4)
  logits = jax.jit(head.logits, static_argnums=2)(
    place(x[:, -1], 'batch', None), place(w, 'vocab', 'embed'), LogitSpec(V)
  )
  assert logits.shape == (B, ROWS) and (np.asarray(logits)[:, V:] == -np.inf).all()
  np.testing.assert_allclose(np.asarray(jax.nn.softmax(logits))[:, :V].sum(-1), 1, rtol=1e-6)
  np.testing.assert_allclose(np.asarray(logits)[:, :V], x[:, -1] @ w[:V].T, rtol=1e-5, atol=1e-4)


PADDED = dataclasses.replace(UNTIED, vocab_size=250, vocab_multiple=64)
PLAIN = dataclasses.replace(PADDED, vocab_multiple=1)


def test_random_weights_do_not_depend_on_padding():
  key = jax.random.key(3)
  plain, padded = (trees.flatten(kinds.init(arch, key)) for arch in (PLAIN, PADDED))
  assert plain.keys() == padded.keys()
  for name, value in plain.items():
    other = np.asarray(padded[name])
    np.testing.assert_array_equal(other[: value.shape[0]], value)
    assert not other[value.shape[0] :].any()
  assert padded['embed/w'].shape == padded['head/w'].shape == (256, D)


def test_padding_is_counted_nowhere():
  for count in (counts.num_params, counts.head_params, counts.matmul_params):
    assert count(PLAIN) == count(PADDED)
  assert PADDED.vocab_rows == 256 and PLAIN.vocab_rows == 250


def with_rubbish(arch):
  """Parameters whose padding would be the likeliest tokens."""
  params = init(arch)
  w = np.array(params['head']['w'])
  w[250:] = 50
  return params | {'head': {'w': place(w, 'vocab', 'embed')}}


@pytest.mark.parametrize(
  'sampling',
  [
    pytest.param(Sampling(), marks=pytest.mark.full),
    pytest.param(Sampling(1.0), marks=pytest.mark.full),
    Sampling(0.8, 20, 0.9),
  ],
  ids=str,
)
def test_completions_and_their_logprobs_are_those_without_padding(sampling):
  def complete(arch):
    engine = Engine(arch, jnp.float32, (), 0, slots=4, tokens_per_dispatch=4)
    prompts = [list(row) for row in ids(3, 5, vocab=250)]
    return engine.generate_at_once(
      with_rubbish(arch), prompts, max_tokens=12, sampling=sampling, seed=1, prompt_ids=range(3)
    )

  for got, expected in zip(complete(PADDED), complete(PLAIN), strict=True):
    assert got.tokens == expected.tokens and max(got.tokens) < 250
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=2e-5)


def test_scores_and_measurements_are_those_without_padding():
  tokens, labels = (ids(2, 16, seed=s, vocab=250) for s in (0, 1))
  where = tokens_at(np.ones((2, 16), np.int32))
  arrays = {'tokens': tokens, 'labels': labels, 'weights': np.ones((2, 16), np.float32)}
  batch = {k: place(a, 'batch', 'seq') for k, a in arrays.items()}
  batch |= {'segments': where.segments, 'positions': where.positions}

  @functools.partial(jax.jit, static_argnums=0)
  def measure(arch, params):
    forward = Forward(arch, jnp.dtype('float32'))
    logp, entropy = forward.logprobs_and_entropy(params, batch, 0.7)
    sums = forward.cross_entropy(params, batch, LossConfig())
    return sums, logp, entropy, forward.token_logprobs(params, batch)

  def score(arch):
    prompts, choices = tokens[:, :8].tolist(), labels[:, None, :3].tolist()
    scorer = Scorer(arch, jnp.float32, jax.sharding.get_mesh())
    return scorer.score(with_rubbish(arch), prompts, choices)

  got, expected = (measure(arch, with_rubbish(arch)) for arch in (PADDED, PLAIN))
  for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(score(PADDED), score(PLAIN), atol=1e-5)


@pytest.mark.parametrize('model', ['llama_untied_gqa', 'qwen2_tied'])
@pytest.mark.parametrize('sizes', [{}, {'tensor': 2, 'fsdp': 2}], ids=str)
def test_a_folder_is_read_into_padded_tables_and_written_bit_for_bit(
  model, sizes, use_mesh, tmp_path, monkeypatch
):
  folder = GOLDEN / model
  plain = table.architecture(load.read_config(folder))
  arch = dataclasses.replace(plain, vocab_multiple=plain.vocab_size - 28)
  mesh = use_mesh(**sizes)
  monkeypatch.setattr(load, '_BLOCK_BYTES', 300)
  params = load.load_params(folder, arch, sharding.shardings(mesh, kinds.axes(arch)), np.float32)
  rows = np.asarray(params['embed']['w'])
  assert rows.shape[0] == 2 * (plain.vocab_size - 28) and not rows[plain.vocab_size :].any()
  export.export(
    params,
    arch,
    tmp_path / 'out',
    source_config=load.read_config(folder),
    tokenizer_files=load.tokenizer_files(folder),
    dtype=np.float32,
    stop_ids=(),
  )
  a, b = SafetensorsFolder(folder), SafetensorsFolder(tmp_path / 'out')
  assert a.tensors == b.tensors
  assert all(a.read(n).tobytes() == b.read(n).tobytes() for n in a.tensors)
  assert (tmp_path / 'out' / 'config.json').read_bytes() == (folder / 'config.json').read_bytes()


@pytest.mark.parametrize(
  ('name', 'moments'),
  [
    ('adamw', 'float32'),
    pytest.param('adamw', '8bit', marks=pytest.mark.full),
    *(
      pytest.param(n, 'float32', marks=pytest.mark.full)
      for n in optimizer.OPTIMIZERS
      if n != 'adamw'
    ),
  ],
)
def test_padding_stays_zero_under_every_optimizer(name, moments):
  """Steps with weight decay from a gradient that is 0 there."""
  declared = kinds.declared(PADDED)
  info = optimizer.leaves(declared, PADDED.layer_slots())
  numbers = {'b1': 0.9, 'b2': 0.99, 'eps': 1e-8, 'weight_decay': 0.1, 'clip_norm': 1.0}
  tables = {'decay': (('.*', 1.0),), 'multipliers': (('.*', 1.0),), 'freeze': (('.*', False),)}
  recipe = optimizer.OptimizerConfig(
    name=name, moments=moments, schedule=lambda k: 0.1, **numbers, **tables
  )
  rule = optimizer.make_optimizer(recipe, info, info)
  # Without the mesh's axes, as the transforms of whole matrices take them.
  params, gradient = (jax.tree.map(np.asarray, init(PADDED, seed)) for seed in (0, 1))
  state = rule.init(params)
  update = jax.jit(rule.update)
  for _ in range(2):
    steps, state = update(gradient, state, params)
    params = jax.tree.map(jnp.add, params, steps)
  for leaf in ('embed', 'head'):
    assert not np.asarray(params[leaf]['w'])[250:].any()
    assert (np.asarray(params[leaf]['w']) != np.asarray(init(PADDED)[leaf]['w']))[:250].all()


def test_a_vocabulary_that_does_not_divide_names_the_key(use_mesh):
  mesh = use_mesh(tensor=4)
  arch = dataclasses.replace(TINY, vocab_size=250)
  declared = kinds.declared(arch)
  axes, shapes = ({n: getattr(p, f) for n, p in declared.items()} for f in ('axes', 'shape'))
  axes, shapes = ({'embed/w': x['embed/w']} for x in (axes, shapes))
  with pytest.raises(ConfigError, match=r'embed/w: its vocab .* set model\.vocab_multiple=4 '):
    sharding.check_divides(axes, shapes, mesh)
