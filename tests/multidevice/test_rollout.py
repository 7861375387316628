"""The engine's completions on meshes of eight devices against those on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import QWEN2, TINY, ids, init

from ftjax.generation import weights
from ftjax.generation.engine import Engine
from ftjax.generation.sampling import Sampling

PROMPTS = [ids(1, n, seed=n)[0].tolist() for n in (5, 1, 12, 3, 21)]
STOPS = tuple(range(0, 256, 13))


def generate(params, slots, arch=TINY, **limits):
  engine = Engine(arch, jnp.float32, STOPS, 0, slots=slots, tokens_per_dispatch=4, **limits)
  return engine.generate(
    params, PROMPTS, group=3, max_tokens=12, sampling=Sampling(0.8), seed=1
  ).completions


@pytest.fixture(scope='module')
def one_device():
  return generate(init(TINY), 3)


def check(completions, expected):
  for row, other in zip(completions, expected, strict=True):
    for a, b in zip(row, other, strict=True):
      assert a.tokens == b.tokens and a.truncated == b.truncated
      np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize(
  'sizes',
  [{'data': 8}, {'fsdp': 2, 'expert': 2, 'tensor': 2}, {'data': 2, 'tensor': 2, 'fsdp': 2}],
  ids=str,
)
def test_completions_are_those_of_one_device(sizes, use_mesh, one_device):
  """Three slots: rounded up to the ways of the batch; prompts are read in runs of so many rows."""
  use_mesh(**sizes)
  check(generate(init(TINY), 3), one_device)


def test_of_qwen2_with_ids_that_are_never_drawn(use_mesh):
  expected = generate(init(QWEN2), 3, QWEN2, vocab_size=171)
  use_mesh(fsdp=2, tensor=2)
  check(generate(init(QWEN2), 3, QWEN2, vocab_size=171), expected)


def test_on_a_mesh_of_its_own(use_mesh, one_device):
  """Training splits the sequence and the model; the rollout's mesh does neither."""
  mesh = use_mesh(context=2, fsdp=2, tensor=2)
  params = init(TINY)
  copy = weights.rollout_params(params, TINY, weights.rollout_mesh(mesh), jnp.float32)
  check(generate(copy, 4), one_device)
  assert jax.sharding.get_mesh() == mesh
