"""Logits and greedy continuations of SmolLM2 against HF torch's (golden/, made by make_goldens.py),
in float32. test_families.py has the small models of all families.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import place, tokens_at

from ftjax.families import table as families
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling
from ftjax.hf import load
from ftjax.models import head, kinds
from ftjax.runtime import sharding

GOLDEN = Path(__file__).parent / 'golden'
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
