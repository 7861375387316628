"""Logits and gradients of imported models against HF torch's (golden/, made by make_goldens.py), in
float32.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import logits, place, tokens_at

from ftjax.families import table as families
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.hf import layout, load
from ftjax.models import head, kinds
from ftjax.runtime import sharding, trees

GOLDEN = Path(__file__).parent / 'golden'
TINY = ('llama_tied', 'llama_untied_gqa', 'llama3_rope', 'qwen2_tied', 'qwen2_untied')
SMOLLM2 = Path(__file__).parents[2] / '.cache' / 'smollm2'


def open_model(folder):
  arch = families.architecture(load.read_config(folder))
  places = sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))
  return arch, load.load_params(folder, arch, places, np.float32)


def complete(arch, params, prompts, most):
  """Greedy completions without stop tokens."""
  engine = Engine(arch, jnp.float32, (), 0, slots=len(prompts))
  found = engine.generate_at_once(params, prompts, max_tokens=most, sampling=Sampling())
  return [c.tokens for c in found]


@pytest.mark.parametrize('name', TINY)
def test_tiny_models(name):
  """96 tokens; llama3_rope was made for 32, so two thirds lie beyond its original context."""
  arch, params = open_model(GOLDEN / name)
  stored = np.load(GOLDEN / name / 'logits.npz')
  got = logits(arch, params, stored['ids'], tokens_at(np.ones_like(stored['ids'])))
  assert np.abs(got - stored['logits']).max() <= 1e-5 * np.abs(stored['logits']).max()
  assert name != 'llama3_rope' or arch.layers()[0].mixer.rope.scaling.original_len == 32


@pytest.mark.parametrize('name', TINY)
def test_greedy_continuations_of_tiny_models(name):
  """The cache, against the likeliest tokens of HF's logits for the second half of each text."""
  arch, params = open_model(GOLDEN / name)
  stored = np.load(GOLDEN / name / 'logits.npz')
  prompts = [row[:n].tolist() for row in stored['ids'] for n in (33, 64, 96)]
  expected = [row[n - 1].argmax() for row in stored['logits'] for n in (33, 64, 96)]
  assert complete(arch, params, prompts, 1) == [[e] for e in expected]


@pytest.mark.parametrize('name', ['qwen2_tied', 'qwen2_untied'])
def test_loss_and_gradient_of_tiny_models(name):
  """Of the mean over each next token, as HF's `labels` has it; by every tensor of the file."""
  arch, params = open_model(GOLDEN / name)
  stored = np.load(GOLDEN / name / 'logits.npz')
  weights = np.ones(stored['ids'].shape, np.float32)
  weights[:, -1] = 0  # nothing follows
  tokens, labels, weights = (
    place(a, 'batch', 'seq') for a in (stored['ids'], np.roll(stored['ids'], -1, 1), weights)
  )
  where = tokens_at(np.ones_like(stored['ids']))

  @jax.jit
  @jax.value_and_grad
  def run(params):
    x = kinds.apply(arch, params, tokens, where, dtype=jnp.float32)
    table = kinds.head_weights(arch, params)
    return head.cross_entropy_sums(x, table, labels, weights, head.LossConfig())[0] / weights.sum()

  loss, gradient = run(params)
  assert float(loss) == pytest.approx(float(stored['loss']), rel=1e-6)
  leaves = {n: np.asarray(g) for n, g in trees.flatten(gradient).items()}
  bindings = layout.bindings(arch)
  assert {f'gradient/{b.hf}' for b in bindings} == {k for k in stored if k.startswith('gradient/')}
  for b in bindings:
    got = b.to_hf(leaves[b.leaf][b.at])
    expected = stored[f'gradient/{b.hf}']
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max() and expected.any(), b.hf


@pytest.fixture(scope='module')
def smollm2():
  if not (SMOLLM2 / 'model.safetensors').exists():
    pytest.skip('.cache/smollm2 is missing; `make assets` makes it')
  return open_model(SMOLLM2)


def test_smollm2_logits(smollm2):
  """512 tokens: max |delta| at the stored places <= 1e-5 max |logit|, and the same first token
  everywhere.
  """
  arch, params = smollm2
  stored = np.load(GOLDEN / 'smollm2_logits.npz')
  ids = place(stored['ids'][None], 'batch', 'seq')
  run = jax.jit(functools.partial(kinds.apply, arch, dtype=jnp.float32))
  x = run(params, ids, tokens_at(np.ones((1, 512))))
  got = np.asarray(jax.jit(head.logits)(x[0], kinds.head_weights(arch, params)))
  bar = 1e-5 * stored['max_abs']
  assert abs(np.abs(got).max() - stored['max_abs']) <= bar
  np.testing.assert_array_equal(got.argmax(-1), stored['top_ids'][:, 0])
  top = np.take_along_axis(got, stored['top_ids'], 1)
  assert np.abs(top - stored['top_logits']).max() <= bar
  assert np.abs(got[tuple(stored['points'].T)] - stored['point_logits']).max() <= bar


@pytest.mark.full
def test_smollm2_greedy_continuations(smollm2):
  """20 prompts, 24 tokens each, all identical; they run on past <|im_end|>, as the golden ones."""
  arch, params = smollm2
  stored = np.load(GOLDEN / 'smollm2_greedy.npz')
  ends = np.cumsum(stored['prompt_lengths'].astype(np.int64))
  prompts = [p.tolist() for p in np.split(stored['prompt_ids'], ends[:-1])]
  got = complete(arch, params, prompts, 24)
  np.testing.assert_array_equal(got, stored['continuations'])
