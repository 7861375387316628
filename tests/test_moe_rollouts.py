"""Rollouts of a model with experts: which of them the sampler's routers choose, against the
trainer's, and the load-balance loss in the losses on rollouts.
"""

import jax
import numpy as np
import pytest
import tiny_rollouts

from ftjax.experiment.model import open_model
from ftjax.runtime import trees

pytestmark = pytest.mark.full

SIZES = dict(
  model_type='qwen3_moe',
  hidden_size=16,
  num_hidden_layers=2,
  num_attention_heads=2,
  num_key_value_heads=2,
  intermediate_size=32,
  moe_intermediate_size=16,
  num_local_experts=5,
  num_experts_per_tok=2,
  mlp_only_layers=[0],
  tie_word_embeddings=True,
  max_position_embeddings=64,
)


@pytest.fixture(scope='module')
def steps(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    # model.random has no keys of experts.
    patch.setattr(
      tiny_rollouts, 'open_model', lambda path, sizes, seed: open_model('', SIZES, seed)
    )
    return tiny_rollouts.Steps(tmp_path_factory.mktemp('run'))


def test_the_trainer_chooses_the_experts_of_the_sampler(steps):
  """In one dtype all of them; and fewer with other routers, so that the comparison can fail."""
  steps.batch()
  (_, metrics), *_ = steps.rows
  assert metrics['mismatch/same_experts'] == 1
  source, params = steps.source, steps.state.parameters()
  prompts = [steps.run.data.prompt(n) for n in range(2)]
  found = source.sampler.sample(params, prompts, range(2), seed=0, group=4)
  (first, *_), *_ = found.completions
  assert first.choices.shape == (len(first.tokens), 1, 2)
  assert first.choices.min() >= 0 and first.choices.max() < 5
  flat = trees.flatten(params)
  router = next(n for n in flat if n.endswith('router/w'))
  turned = jax.numpy.roll(flat[router], 1, axis=-1)
  others = trees.unflatten(flat | {router: turned})
  _, same = source.score(params, prompts, found, 0)
  _, apart = source.score(others, prompts, found, 0)
  assert same['mismatch/same_experts'] == 1 and apart['mismatch/same_experts'] < 0.8


def test_a_step_on_a_rollout_balances_the_load(steps):
  state, metrics = steps.step(steps.state, steps.batch())
  assert np.isfinite(metrics['loss']) and 1 <= metrics['moe/max_load'] <= 5
  # Each of the two experts of a token counts: without loss of balance it is 2.
  assert 1 < metrics['moe/balance'] < 10
  assert int(state.step) == 1
