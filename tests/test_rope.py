"""Rotary angles against float64, the llama3 rule against hand arithmetic, rotation itself, and the
lengths of documents. The other rules' numbers are compared with transformers' in
parity/test_rope.py.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY, ids, init, logits, place, tokens_at, with_mixer

from ftjax.models import kinds, rope
from ftjax.models.rope_spec import (
  DynamicScaling,
  LinearScaling,
  LongScaling,
  ProportionalScaling,
  QueryScaling,
  Rope,
  RopeScaling,
  YarnScaling,
)
from ftjax.runtime import sharding
from ftjax.runtime.errors import DataError


def llama3(theta=10000.0, **changes):
  rule = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=8192) | changes
  return Rope(theta, RopeScaling(**rule))


@pytest.mark.parametrize('theta', [10000.0, 500000.0])
def test_frequencies_against_float64(theta):
  freq = rope.inverse_frequencies(Rope(theta), 64)
  assert freq.dtype == np.float32
  np.testing.assert_allclose(freq, theta ** (-np.arange(0, 64, 2) / 64), rtol=5e-7)


@pytest.mark.parametrize('spec', [Rope(), llama3(500000.0)])
def test_angles_up_to_position_8191_against_float64(spec):
  """cos and sin to 1e-6 of the float32 angle, which is position times frequency rounded once (what
  HF computes); that one rounding is up to half a unit in the last place of 8191, 2.4e-4.
  """
  positions = np.array([[0, 1, 2, 255, 257, 4095, 8190, 8191]], np.int32)
  cos, sin = (np.asarray(a) for a in rope.angles(spec, 64, jnp.asarray(positions)))
  assert cos.dtype == sin.dtype == np.float32 and cos.shape == (1, 8, 32)
  exact = positions[..., None].astype(np.float64) * rope.inverse_frequencies(spec, 64)
  rounded = exact.astype(np.float32).astype(np.float64)
  assert np.abs(cos - np.cos(rounded)).max() <= 1e-6
  assert np.abs(sin - np.sin(rounded)).max() <= 1e-6
  assert np.abs(cos - np.cos(exact)).max() <= 2.45e-4
  assert np.abs(sin - np.sin(exact)).max() <= 2.45e-4


def test_llama3_rule_by_hand():
  """H 8, theta 1000, original length 100: wavelengths 2 pi * 1000^(i/4) are 6.3, 35.3, 198.7, 1117.

  Below 100 / 4 = 25 one stays, above 100 / 1 the last two turn 8 times slower, and the one between
  is blended with (100 / 35.3 - 1) / (4 - 1) = 0.6103.
  """
  spec = llama3(1000.0, original_len=100)
  plain = 1000.0 ** (-np.arange(4) / 4)
  smooth = (100 / (2 * math.pi / plain[1]) - 1) / 3
  assert smooth == pytest.approx(0.6100, abs=5e-4)
  expected = [
    plain[0],
    (1 - smooth) * plain[1] / 8 + smooth * plain[1],
    plain[2] / 8,
    plain[3] / 8,
  ]
  np.testing.assert_allclose(rope.inverse_frequencies(spec, 8), expected, rtol=5e-7)


def test_llama3_rule_at_its_borders_and_limits():
  """Continuous where the branches meet, so nothing jumps with rounding; factor 1 is no scaling."""
  freq = np.float64(2 * math.pi) / 8192 * np.array([1.0, 4.0])
  plain = rope.inverse_frequencies(Rope(), 8)
  np.testing.assert_array_equal(
    rope.inverse_frequencies(llama3(factor=1.0), 8) / plain, np.ones(4, np.float32)
  )
  for f, scale in zip(freq, [1 / 8, 1.0], strict=True):
    for side in (1 - 1e-6, 1 + 1e-6):
      # H 4 has the frequencies 1 and theta^-1/2.
      at = llama3(float((f * side) ** -2))
      assert rope.inverse_frequencies(at, 4)[1] / (f * side) == pytest.approx(scale, abs=1e-5)


def vectors(seed, shape=(1, 6, 2, 8)):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rotated(x, positions):
  return rope.rotate(x, *rope.angles(Rope(), 8, jnp.asarray(positions, jnp.int32)[None]))


def test_pairs_are_halves_apart():
  """HF's layout: coordinate i turns with i + H/2, as complex numbers turn."""
  x, positions = vectors(0), np.array([0, 1, 2, 3, 50, 100])
  turn = np.exp(1j * positions[:, None] * rope.inverse_frequencies(Rope(), 8).astype(np.float64))
  z = (np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])) * turn[None, :, None]
  expected = np.concatenate([z.real, z.imag], -1)
  np.testing.assert_allclose(rotated(x, positions), expected, atol=2e-6)


def test_position_zero_is_the_identity():
  np.testing.assert_array_equal(rotated(vectors(1), [0] * 6), vectors(1))


def test_products_depend_on_the_distance_alone():
  q, k = vectors(2), vectors(3)
  near = (rotated(q, range(5, 11)) * rotated(k, range(1, 7))).sum(-1)
  far = (rotated(q, range(105, 111)) * rotated(k, range(101, 107))).sum(-1)
  np.testing.assert_allclose(near, far, atol=2e-5)
  other = (rotated(q, range(6, 12)) * rotated(k, range(1, 7))).sum(-1)
  assert np.abs(np.asarray(near - other)).max() > 0.1


def test_bfloat16_is_rotated_in_float32():
  """Positions 8190 and 8191 are both 8192 in bfloat16; the rotation is rounded once, at its end."""
  x = vectors(4).astype(jnp.bfloat16)
  out = rotated(x, range(8186, 8192))
  assert out.dtype == jnp.bfloat16
  expected = rotated(x.astype(jnp.float32), range(8186, 8192)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(out.astype(jnp.float32), expected.astype(jnp.float32))


def test_a_part_of_the_head_is_rotated():
  """Half of it: the first four coordinates as a head of four would be, and the last four stay."""
  x, positions = vectors(5), jnp.arange(6, dtype=jnp.int32)[None]
  out = rope.rotate(x, *rope.angles(Rope(fraction=0.5), 8, positions))
  small = rope.rotate(x[..., :4], *rope.angles(Rope(), 4, positions))
  np.testing.assert_array_equal(out[..., :4], small)
  np.testing.assert_array_equal(out[..., 4:], x[..., 4:])


def test_proportional_turns_the_first_pairs_with_the_frequencies_of_the_whole_head():
  plain = rope.inverse_frequencies(Rope(), 8)
  found = rope.inverse_frequencies(Rope(scaling=ProportionalScaling(2.0), fraction=0.5), 8)
  np.testing.assert_allclose(found, [plain[0] / 2, plain[1] / 2, 0, 0], rtol=3e-7)
  assert not found[2:].any()


def test_yarn_by_hand():
  """H 8, theta 1e4, original length 100, kept above 4 turns, slowed by 8 below 1, no truncation.

  Pair i turns 100 / (2 pi 10^i) times: 15.9, 1.59, 0.159, 0.0159. So pair 0 is kept, 2 and 3 are
  slowed; the ramp goes from the pair of 4 turns, log10(15.9 / 4) = 0.6, to that of one, 1.2.
  """
  rule = YarnScaling(8.0, 100, 1.5, beta_fast=4.0, beta_slow=1.0, truncate=False)
  low, high = (math.log10(100 / (2 * math.pi * turns)) for turns in (4, 1))
  slowed = (1 - low) / (high - low)
  assert (low, high, slowed) == pytest.approx((0.5998, 1.2018, 0.6648), abs=5e-4)
  expected = [1, 0.1 * (slowed / 8 + 1 - slowed), 0.01 / 8, 0.001 / 8]
  spec = Rope(10000.0, rule)
  np.testing.assert_allclose(rope.inverse_frequencies(spec, 8), expected, rtol=5e-7)
  cos, sin = rope.angles(spec, 8, jnp.full((1, 1), 3, jnp.int32))
  np.testing.assert_allclose(np.hypot(cos, sin), 1.5, rtol=1e-6)


def test_queries_grow_in_steps_and_keys_do_not():
  rule = Rope(query=QueryScaling(0.5, 4))
  q, positions = jnp.ones((1, 10, 2, 8)), jnp.arange(10, dtype=jnp.int32)[None]
  out = np.asarray(rope.scale_queries(rule, q, positions))
  steps = [1 + 0.5 * math.log(1 + t // 4) for t in range(10)]
  np.testing.assert_allclose(out[0, :, 1, 3], steps, rtol=1e-6)
  np.testing.assert_array_equal(out[:, :4], 1)
  assert rope.scale_queries(Rope(), q, positions) is q
  assert rope.scale_queries(rule, q.astype(jnp.bfloat16), positions).dtype == jnp.bfloat16


LONG = LongScaling((1.0, 1.25, 1.5, 1.5), (2.0, 3.0, 5.0, 9.0), 12, 1.2)
BY_LENGTH = {'dynamic': Rope(scaling=DynamicScaling(4.0, 12)), 'longrope': Rope(scaling=LONG)}


def test_lengths_of_documents_in_any_order():
  """Packed, padded on either side, permuted, and with positions that do not begin at 0."""
  segments = np.array([[1, 1, 1, 2, 2, 0, 0, 0], [0, 0, 3, 3, 3, 3, 3, 3], [1] * 8], np.int32)
  positions = np.array([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, *range(6)], range(50, 58)], np.int32)
  expected = np.array([[3, 3, 3, 2, 2, 0, 0, 0], [0, 0, *[6] * 6], [58] * 8])
  for order in (np.arange(8), np.random.default_rng(0).permutation(8)):
    arrays = (place(a[:, order], 'batch', 'seq') for a in (segments, positions))
    found = np.asarray(rope.document_lengths(*arrays))
    inside = segments[:, order] > 0
    np.testing.assert_array_equal(found[inside], expected[:, order][inside])


@pytest.mark.parametrize('sizes', [dict(context=4), dict(data=2, context=2), dict(fsdp=2)])
def test_lengths_where_a_row_is_split(sizes, use_mesh):
  rng = np.random.default_rng(1)
  segments = np.sort(rng.integers(0, 5, (4, 16)), 1).astype(np.int32)
  positions = np.asarray(tokens_at(segments).positions)
  expected = np.asarray(rope.document_lengths(*map(jnp.asarray, (segments, positions))))
  use_mesh(**sizes)
  order = sharding.zigzag(16, sizes.get('context', 1))
  arrays = (place(a[:, order], 'batch', 'seq') for a in (segments, positions))
  found = jax.jit(rope.document_lengths)(*arrays)
  assert found.sharding.spec == sharding.spec('batch', 'seq')
  np.testing.assert_array_equal(found, expected[:, order])


def test_short_documents_have_the_short_frequencies_exactly():
  lengths = jnp.asarray([[1, 11, 12, 13, 40]], jnp.int32)
  for name, spec in BY_LENGTH.items():
    short = rope.inverse_frequencies(spec, 8)
    found = np.asarray(rope.frequencies_of(spec, 8, lengths))[0]
    np.testing.assert_array_equal(found[:3], [short] * 3, err_msg=name)
    assert (found[3, 1:] < short[1:]).all() and (found[4, 1:] < short[1:]).all(), name
  # H 8: the base grows by (4 * 40 / 12 - 3) ** (8 / 6), here in float64.
  base = 10000.0 * (4 * 40 / 12 - 3) ** (8 / 6)
  exact = base ** (-np.arange(0, 8, 2) / 8)
  dynamic = rope.frequencies_of(BY_LENGTH['dynamic'], 8, lengths)
  np.testing.assert_allclose(dynamic[0, 4], exact, rtol=5e-7)


@functools.cache
def params():
  return init(TINY)


@pytest.mark.parametrize('name', BY_LENGTH)
def test_a_document_is_computed_as_if_alone(name):
  """Documents of 20, 12 and 5 tokens, of which the first alone is beyond the original length:
  packed in one row, or padded on either side beside each other. And they are not what a batch's
  longest document would make of them.
  """
  arch = with_mixer(TINY, rope=BY_LENGTH[name])
  lengths, width, tokens = (20, 12, 5), 37, ids(3, 37)
  row, mark = np.zeros((3, width), np.int32), np.zeros((3, width), np.int32)
  at = 0
  for d, n in enumerate(lengths):
    row[0, at : at + n], mark[0, at : at + n] = tokens[d, :n], d + 1
    at += n
  right, left = (np.zeros((3, width), np.int32) for _ in range(2))
  ones = [np.zeros((3, width), np.int32) for _ in range(2)]
  for d, n in enumerate(lengths):
    right[d, :n], ones[0][d, :n] = tokens[d, :n], 1
    left[d, width - n :], ones[1][d, width - n :] = tokens[d, :n], 1
  packed, padded, other = (
    logits(arch, params(), t, tokens_at(s))
    for t, s in ((row, mark), (right, ones[0]), (left, ones[1]))
  )
  at = 0
  for d, n in enumerate(lengths):
    np.testing.assert_allclose(packed[0, at : at + n], padded[d, :n], atol=2e-5)
    np.testing.assert_allclose(other[d, width - n :], padded[d, :n], atol=2e-5)
    at += n
  # The short ones as in a model without the rule for long documents, the long one not.
  short = (
    Rope() if name == 'dynamic' else Rope(scaling=dataclasses.replace(LONG, original_len=10**6))
  )
  plain = logits(with_mixer(TINY, rope=short), params(), right, tokens_at(ones[0]))
  for d, n in enumerate(lengths):
    same = np.abs(plain[d, :n] - padded[d, :n]).max() <= 2e-5
    assert same == (d > 0)


@pytest.mark.parametrize('name', BY_LENGTH)
def test_a_split_row_is_computed_as_on_one_device(name, use_mesh):
  """In zigzag order, with a long document that every shard has a part of, and a short one."""
  arch, tokens = with_mixer(TINY, rope=BY_LENGTH[name]), ids(2, 32)
  segments = np.repeat([[1, 2], [1, 0]], 16, axis=1).astype(np.int32)
  segments[:, 14:22] = 1
  positions = np.asarray(tokens_at(segments).positions)
  expected = logits(arch, params(), tokens, tokens_at(segments))
  use_mesh(context=4)
  order = sharding.zigzag(32, 4)
  where = tokens_at(segments[:, order], positions[:, order])
  found = logits(arch, init(TINY), tokens[:, order], where)
  inside = segments > 0
  np.testing.assert_allclose(found[:, np.argsort(order)][inside], expected[inside], atol=2e-5)


def test_models_that_use_no_length_compute_none():
  """The program of a plain rope has no scatter, with a rule by length one."""
  tokens, where = place(ids(1, 8), 'batch', 'seq'), tokens_at(np.ones((1, 8)))

  def program(spec):
    run = functools.partial(kinds.apply, with_mixer(TINY, rope=spec), dtype=jnp.float32)
    return str(jax.make_jaxpr(run)(params(), tokens, where))

  rules = [None, LinearScaling(2.0), YarnScaling(2.0, 4, 1.2), llama3().scaling]
  assert not any('scatter' in program(Rope(scaling=rule)) for rule in rules)
  assert 'scatter' in program(BY_LENGTH['longrope'])


@pytest.mark.parametrize(
  ('spec', 'head_dim', 'named'),
  [
    (Rope(fraction=0.3), 10, 'partial_rotary_factor=0.3 rotates 3 of head_dim=10'),
    (Rope(fraction=0.1), 8, 'rotates 0 of head_dim=8'),
    (Rope(fraction=1.5), 8, 'partial_rotary_factor=1.5'),
    (Rope(), 7, 'rotates 7 of head_dim=7'),
    (Rope(scaling=DynamicScaling(2.0, 8), fraction=0.25), 8, 'dynamic.*not defined for 2'),
    (Rope(scaling=LONG), 16, 'short_factor has 4 numbers; expected 8'),
    (Rope(scaling=dataclasses.replace(LONG, long_factors=(1.0,))), 8, 'long_factor has 1 numbers'),
  ],
)
def test_a_rule_that_does_not_fit_the_head_is_refused(spec, head_dim, named):
  with pytest.raises(DataError, match=named):
    with_mixer(TINY, rope=spec, head_dim=head_dim)
