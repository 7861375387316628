"""Scoring continuations from one read of the prompt equals scoring each whole sequence."""

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import family_cases
from tiny_model import TINY, init, logits, place, tokens_at

from ftjax.generation.scorer import Scorer
from ftjax.models import head, kinds
from ftjax.runtime.errors import ConfigError


def _questions():
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 256, n).tolist() for n in (5, 17, 22)]
  return prompts, [[rng.integers(0, 256, n).tolist() for n in (1, 4)] for _ in prompts]


def _score(prompts, choices):
  mesh = jax.sharding.get_mesh()
  return Scorer(TINY, jnp.float32, mesh).score(init(TINY), prompts, choices)


def _whole(params, prompts, choices, arch=TINY):
  """The same by reading each sequence as one, without a cache; float32[B, C]."""
  rows = [(p, p + c) for p, cs in zip(prompts, choices, strict=True) for c in cs]
  length = max(len(ids) for _, ids in rows) - 1
  tokens, labels, segments = np.zeros((3, len(rows), length), np.int32)
  weights = np.zeros((len(rows), length), np.float32)
  for i, (prompt, ids) in enumerate(rows):
    n = len(ids) - 1
    tokens[i, :n], labels[i, :n], segments[i, :n] = ids[:-1], ids[1:], 1
    weights[i, len(prompt) - 1 : n] = 1
  x = kinds.apply(
    arch, params, place(tokens, 'batch', 'seq'), tokens_at(segments), dtype=jnp.float32
  )
  labels, weights = (place(a, 'batch', 'seq') for a in (labels, weights))
  logp = head.token_logprobs(x, kinds.head_weights(arch, params), labels, weights)
  return np.asarray(logp).sum(-1).reshape(len(prompts), -1)


def test_scores_equal_whole_sequences():
  prompts, choices = _questions()
  expected = _whole(init(TINY), prompts, choices)
  np.testing.assert_allclose(_score(prompts, choices), expected, rtol=0, atol=2e-5)


def test_other_rows_and_padding_do_not_matter():
  prompts, choices = _questions()
  together = _score(prompts, choices)
  alone = _score(prompts[:1], choices[:1])
  np.testing.assert_allclose(alone[0], together[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize('name', ['gpt2', pytest.param('phi3_longrope', marks=pytest.mark.full)])
def test_padding_behind_a_choice_has_no_positions_of_its_own(name):
  """The padded choices would reach beyond the table of positions of GPT-2, which gives NaN, and
  beyond the length from which on longrope has other frequencies.
  """
  arch, rng = family_models.architecture(name), np.random.default_rng(0)
  params = family_models.params(name, arch)
  most = family_cases.CASES[name].short or arch.max_len
  sizes = {most - 4: (1, 4), 4: (5, 1)}
  prompts = [rng.integers(0, arch.vocab_size, n).tolist() for n in sizes]
  choices = [[rng.integers(0, arch.vocab_size, n).tolist() for n in ns] for ns in sizes.values()]
  found = Scorer(arch, jnp.float32, jax.sharding.get_mesh()).score(params, prompts, choices)
  expected = _whole(params, prompts, choices, arch)
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_the_same_on_a_mesh(use_mesh):
  prompts, choices = _questions()
  expected = _score(prompts, choices)
  use_mesh(fsdp=2, tensor=2)
  np.testing.assert_allclose(_score(prompts, choices), expected, rtol=0, atol=2e-5)


def test_a_split_sequence_cannot_be_decoded(use_mesh):
  prompts, choices = _questions()
  use_mesh(context=2)
  with pytest.raises(ConfigError, match=r'mesh\.context'):
    _score(prompts, choices)


def _greedy(params, prompt, count):
  """`count` tokens, each the likeliest after those before it, from all logits."""
  ids = list(prompt)
  for _ in range(count):
    ids.append(
      int(logits(TINY, params, np.array([ids]), tokens_at([[1] * len(ids)]))[0, -1].argmax())
    )
  return ids[len(prompt) :]


@pytest.mark.full
def test_a_choice_is_greedy_where_each_of_its_tokens_is_the_likeliest(use_mesh):
  prompts, choices = _questions()
  best = [_greedy(init(TINY), p, 3) for p in prompts]
  choices = [
    [*cs, ids, ids[:1], [*ids[:2], (ids[2] + 1) % 256]]
    for cs, ids in zip(choices, best, strict=True)
  ]
  expected = [[False, False, True, True, False]] * 3
  plain = _score(prompts, choices)
  for axes in ({}, {'fsdp': 2, 'tensor': 2}):
    use_mesh(**axes)
    scorer = Scorer(TINY, jnp.float32, jax.sharding.get_mesh())
    found = scorer.score_greedy(init(TINY), prompts, choices)
    np.testing.assert_array_equal(found.is_greedy, expected)
    np.testing.assert_allclose(found.logp, plain, rtol=0, atol=2e-5)


def test_of_equally_likely_tokens_the_first_is_the_likeliest(use_mesh):
  """A table of equal rows makes all logits equal, on every part of a split vocabulary too."""
  x, w = np.ones((1, 4, 8), np.float32), np.ones((16, 8), np.float32)
  labels, weights = np.array([[0, 1, 8, 0]], np.int32), np.array([[1, 1, 1, 0]], np.float32)
  for axes in ({}, {'tensor': 2}):
    use_mesh(**axes)
    arrays = (place(x, 'batch', 'seq', 'act_embed'), place(w, 'vocab', 'embed'))
    found = head.logprobs_and_matches(
      *arrays, place(labels, 'batch', 'seq'), place(weights, 'batch', 'seq')
    )
    np.testing.assert_allclose(found[0], [[-np.log(16)] * 3 + [0]], rtol=1e-6)
    np.testing.assert_array_equal(found[1], [[1, 0, 0, 0]])


def test_log_probabilities_are_added_in_float64():
  """Of 500 equal ones, a float32 sum of 2,773 nats would be off by up to 1.2e-4."""
  params = jax.tree.map(jnp.zeros_like, init(TINY))
  scorer = Scorer(TINY, jnp.float32, jax.sharding.get_mesh())
  (one,), (many,) = (scorer.score(params, [[5, 6, 7]], [[[8] * n]])[0] for n in (1, 500))
  assert one == np.float32(one) == pytest.approx(-np.log(256))
  assert many == 500 * one != np.float32(many)
