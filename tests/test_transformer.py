"""The decoder as its specs describe it: initial values, stacks and patterns, every field of a spec,
what remat computes again. test_family_invariants.py has the invariants. In float32 at matmul
precision highest.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tiny_model import (
  QWEN2,
  TINY,
  UNTIED,
  decoded,
  decoder,
  ids,
  init,
  logits,
  place,
  tokens_at,
  with_mixer,
)

from ftjax.models import head, kinds
from ftjax.models.architecture import AttentionSpec, BlockSpec, GatedMlpSpec, Norm
from ftjax.models.mixer_spec import RelativeBias
from ftjax.models.rope_spec import QueryScaling, Rope, RopeScaling
from ftjax.runtime import trees

B, T = 3, 24
ONE_EACH = np.ones((B, T), np.int32)


@pytest.fixture(scope='module')
def params():
  return init(TINY)


def test_positions_count_from_any_number_in_angles_alone(params):
  """Rotary positions are relative: a document that starts at 50 is the same document."""
  tokens = ids(B, T)
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  expected = logits(TINY, params, tokens, tokens_at(ONE_EACH, positions))
  shifted = logits(TINY, params, tokens, tokens_at(ONE_EACH, positions + 50))
  np.testing.assert_allclose(shifted, expected, atol=5e-5)
  stretched = logits(TINY, params, tokens, tokens_at(ONE_EACH, positions * 2))
  assert np.abs(stretched - expected).max() > 0.1


def loss_of(arch, remat):
  def loss(params, tokens, where, weights):
    x = kinds.apply(arch, params, tokens, where, dtype=jnp.float32, remat=remat)
    return head.cross_entropy_sums(
      x, kinds.head_weights(arch, params), tokens, weights, head.LossConfig()
    )[0]

  return jax.value_and_grad(loss)


def batch():
  weights = place(np.ones((B, T), np.float32), 'batch', 'seq')
  return place(ids(B, T), 'batch', 'seq'), tokens_at(ONE_EACH), weights


def products(jaxpr):
  """How many matrix products are written in a jaxpr and all that it calls."""
  inner = sum(products(j) for e in jaxpr.eqns for j in jaxprs_in_params(e.params))
  return inner + sum(e.primitive.name == 'dot_general' for e in jaxpr.eqns)


def test_remat_recomputes_by_its_policy(params):
  """'dots' computes the two products of attention again (they have batch dimensions), 'full' the
  projections of a block too: q, k, v, o, gate, up; the last one's result is not needed.
  """
  none, dots, full = (
    products(jax.make_jaxpr(loss_of(TINY, remat))(params, *batch()).jaxpr)
    for remat in ('none', 'dots', 'full')
  )
  assert (dots - none, full - none) == (2, 8)


# Few different shapes: drawing numbers of a new shape compiles for a while.
SMALL = decoder(
  vocab_size=256,
  model_dim=16,
  num_layers=3,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  ffn_dim=16,
  tied=False,
)


@pytest.fixture(scope='module')
def drawn():
  return trees.flatten(kinds.init(SMALL, jax.random.key(0)))


def test_init_depends_on_key_and_name_alone(drawn):
  """A model without a head has the same other leaves; no two leaves are alike."""
  tied = dataclasses.replace(SMALL, tied=True)
  without = trees.flatten(kinds.init(tied, jax.random.key(0)))
  other = trees.flatten(kinds.init(tied, jax.random.key(1)))
  assert drawn.keys() - without.keys() == {'head/w'}
  for name, x in without.items():
    np.testing.assert_array_equal(x, drawn[name], err_msg=name)
    assert 'norm' in name or (np.asarray(x) != np.asarray(other[name])).all(), name
  matrices = [np.asarray(x).flat[0] for name, x in drawn.items() if 'norm' not in name]
  assert len(set(matrices)) == len(matrices)


def test_init_has_variance_one_over_fan_in(drawn):
  for name, x in drawn.items():
    if 'norm' in name:
      assert (np.asarray(x) == 1).all(), name
    else:  # all contracted sizes of SMALL are 16; five standard errors of a standard deviation
      assert np.std(x) * 4 == pytest.approx(1, abs=5 / np.sqrt(2 * x.size)), name


def test_init_of_biases_is_zero_and_leaves_the_rest_as_it_was(drawn):
  biased = with_mixer(SMALL, qkv_bias=True)
  got = trees.flatten(kinds.init(biased, jax.random.key(0)))
  for name, x in got.items():
    np.testing.assert_array_equal(x, 0 if name.endswith('/b') else drawn[name], err_msg=name)
  assert {n[-8:] for n in got.keys() - drawn.keys()} == {'attn/q/b', 'attn/k/b', 'attn/v/b'}


def test_init_is_the_same_on_every_mesh(drawn, use_mesh):
  use_mesh(fsdp=2, tensor=2)
  for name, x in trees.flatten(kinds.init(SMALL, jax.random.key(0))).items():
    np.testing.assert_array_equal(x, drawn[name], err_msg=name)


def test_abstract_axes_and_init_have_one_structure():
  shapes, axes = (
    trees.flatten(kinds.abstract(UNTIED)),
    trees.flatten(kinds.axes(UNTIED)),
  )
  made = trees.flatten(jax.eval_shape(lambda k: kinds.init(UNTIED, k), jax.random.key(0)))
  assert shapes.keys() == axes.keys() == made.keys()
  for name, x in made.items():
    assert (x.shape, x.dtype) == (shapes[name].shape, shapes[name].dtype)
    assert len(axes[name]) == len(x.shape)
    assert ('layers' in axes[name]) == name.startswith('stack')


_apply = functools.partial(jax.jit, static_argnames=('arch', 'dtype'))(kinds.apply)


def full(arch, params, tokens, segments, noise=None, dtype=jnp.float32):
  noise = np.zeros((B, T, TINY.model_dim), np.float32) if noise is None else noise
  noise = place(noise, 'batch', 'seq', 'act_embed')
  tokens = place(tokens, 'batch', 'seq')
  return np.asarray(_apply(arch, params, tokens, tokens_at(segments), dtype=dtype, noise=noise))


def left_padded():
  """Prompts of 10, 3 and 7 tokens ending at one place, and what follows."""
  segments = np.ones((B, T), np.int32)
  for b, n in enumerate((10, 3, 7)):
    segments[b, : 10 - n] = 0
  return ids(B, T), segments


@pytest.mark.parametrize('leaf', ['q', 'k', 'v'])
def test_every_bias_matters(leaf):
  params, tokens = init(QWEN2), ids(B, T)
  flat = trees.flatten(params)
  name = f'stack0/block0/attn/{leaf}/b'
  other = trees.unflatten(flat | {name: -flat[name]})
  before, after = (full(QWEN2, p, tokens, ONE_EACH) for p in (params, other))
  assert np.abs(after - before)[:, 1:].max() > 1e-3


def test_stacks_and_patterns_are_only_another_way_to_store_layers(params):
  """Three layers as a stack of a pattern of two and a stack of one."""
  (block,) = set(TINY.layers())
  arch = dataclasses.replace(TINY, stacks=(((block, block), 1), ((block,), 1)))
  flat = trees.flatten(params)
  other = {n: x for n, x in flat.items() if not n.startswith('stack')}
  for layer, (block, row) in enumerate(arch.layer_slots()):
    assert row == 0
    for name, x in flat.items():
      if name.startswith('stack'):
        other[name.replace('stack0/block0', block)] = x[layer : layer + 1]
  other = trees.unflatten(other)
  tokens, segments = left_padded()
  inside, expected = segments > 0, full(TINY, params, tokens, segments)
  np.testing.assert_allclose(
    full(arch, other, tokens, segments)[inside], expected[inside], atol=1e-5
  )
  np.testing.assert_allclose(
    decoded(arch, other, tokens, segments, 10)[inside], expected[inside], atol=1e-5
  )


def test_noise_is_added_to_the_embeddings(params):
  """Noise that turns each token's embedding into another's gives that other text's states."""
  one, two = ids(B, T), ids(B, T, seed=5)
  table = np.asarray(params['embed']['w'])
  moved = full(TINY, params, one, ONE_EACH, table[two] - table[one])
  np.testing.assert_allclose(moved, full(TINY, params, two, ONE_EACH), atol=2e-5)


def test_bfloat16_computes_in_bfloat16_near_float32(params):
  x = full(TINY, params, ids(B, T), ONE_EACH, dtype=jnp.bfloat16)
  assert x.dtype == jnp.bfloat16
  x, exact = np.float32(x), full(TINY, params, ids(B, T), ONE_EACH)
  sizes = np.linalg.norm(x, axis=-1) * np.linalg.norm(exact, axis=-1)
  assert ((x * exact).sum(-1) / sizes).min() >= 0.999


_ROPE = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=8)
# For each field of a block's specs another value than Llama's.
CHANGES = {
  'AttentionSpec.num_heads': 2,
  'AttentionSpec.num_kv_heads': 4,
  'AttentionSpec.head_dim': 16,
  'AttentionSpec.rope': None,
  'AttentionSpec.qkv_bias': True,
  'AttentionSpec.out_bias': True,
  'AttentionSpec.window': 2,
  'AttentionSpec.scale': 0.1,
  'AttentionSpec.soft_cap': 0.5,
  'AttentionSpec.qk_norm': Norm(),
  'AttentionSpec.qk_norm_width': 'all',
  'AttentionSpec.gate': True,
  'AttentionSpec.causal': False,
  'AttentionSpec.relative': RelativeBias('decoder', 8, 20),
  'GatedMlpSpec.ffn_dim': 32,
  'GatedMlpSpec.activation': 'gelu',
  'GatedMlpSpec.bias': True,
  'Rope.theta': 100.0,
  'Rope.scaling': _ROPE,
  'Rope.fraction': 0.5,
  'Rope.query': QueryScaling(beta=0.3, original_len=8),
  'Norm.eps': 0.5,
  'Norm.kind': 'layer',
  'Norm.offset': 1.0,
  'Norm.bias': True,
  'BlockSpec.mixer': None,  # its own fields are here
  'BlockSpec.mlp': None,
  'BlockSpec.norm': None,
  'BlockSpec.norm_placement': 'after',
  'BlockSpec.residual_scale': 0.5,
  'BlockSpec.mixer_norm': False,
  'BlockSpec.cross': None,
}


def test_every_field_of_a_spec_has_a_case():
  classes = (AttentionSpec, GatedMlpSpec, Rope, Norm, BlockSpec)
  assert CHANGES.keys() == {
    f'{k.__name__}.{f.name}' for k in classes for f in dataclasses.fields(k)
  }


def changed(spec, owner, field, value):
  """The spec with one field of one of its parts replaced, at every place."""
  if type(spec).__name__ == owner:
    return dataclasses.replace(spec, **{field: value})
  if not dataclasses.is_dataclass(spec):
    return spec
  parts = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
  return dataclasses.replace(spec, **{n: changed(v, owner, field, value) for n, v in parts.items()})


@pytest.mark.parametrize(
  ('name', 'value'), [(n, v) for n, v in CHANGES.items() if not (v is None and 'Block' in n)]
)
def test_every_field_of_a_spec_changes_the_model(name, value, params):
  """No field that nothing reads: leaves other than Llama's, or other hidden states from the same
  ones.
  """
  plain = TINY
  if 'qk_norm_' in name:  # a field that says how another is meant
    plain = with_mixer(TINY, qk_norm=Norm())
  arch = plain.with_blocks(lambda block: changed(block, *name.split('.'), value))
  declared = [{n: p[:4] for n, p in kinds.declared(a).items()} for a in (arch, plain)]
  if declared[0] != declared[1]:
    return
  tokens = ids(B, T)
  before, after = (full(a, params, tokens, ONE_EACH) for a in (plain, arch))
  assert np.abs(after - before).max() > 1e-3


@pytest.mark.parametrize('placement', ['after', 'both', 'residual'])
def test_norms_after_a_branch_decode_as_they_train(placement):
  arch = TINY.with_blocks(lambda block: dataclasses.replace(block, norm_placement=placement))
  params, (tokens, segments) = init(arch), left_padded()
  expected = full(arch, params, tokens, segments)
  found = decoded(arch, params, tokens, segments, 10)
  np.testing.assert_allclose(found[segments > 0], expected[segments > 0], atol=1e-5)
  names = {n.split('/')[2] for n in trees.flatten(params) if n.startswith('stack')}
  before = {'attn_norm', 'mlp_norm'} if placement == 'both' else set()
  wanted = {'attn_out_norm', 'mlp_out_norm'} | before
  assert {n for n in names if 'norm' in n} == wanted


def test_layers_of_two_rotary_embeddings_and_of_none():
  """A pattern whose layers differ equals Llama where its specs do, and not where one differs."""
  (block,) = set(TINY.layers())
  none = changed(block, 'AttentionSpec', 'rope', None)
  other = changed(block, 'Rope', 'theta', 100.0)
  arch = dataclasses.replace(TINY, stacks=(((block, none, other), 1),))
  params = init(arch)
  tokens, segments = left_padded()
  expected = full(arch, params, tokens, segments)
  found = decoded(arch, params, tokens, segments, 10)
  np.testing.assert_allclose(found[segments > 0], expected[segments > 0], atol=1e-5)
  plain = dataclasses.replace(TINY, stacks=(((block, block, block), 1),))
  assert np.abs(full(plain, params, tokens, segments) - expected)[segments > 0].max() > 1e-3
