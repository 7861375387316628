"""Online DPO: the best against the worst of each prompt, nothing from prompts without either."""

import math

import numpy as np
import pytest
import tiny_rollouts

from ftjax.runtime.errors import ConfigError


@pytest.fixture(scope='module')
def usual(tmp_path_factory):
  s = tiny_rollouts.Steps(tmp_path_factory.mktemp('online'), 'online_dpo')
  return s, tiny_rollouts.host(s.batch())


def test_a_row_holds_the_best_and_the_worst_of_a_prompt(usual):
  """Lengths pay here, 4 tokens most: the chosen side is the nearer to it."""
  s, batch = usual
  assert batch['tokens'].shape == (1, 4, 96) and set(batch) >= {'values'}
  pairs = 0
  for row in range(4):
    segments, weights = batch['segments'][0, row], batch['weights'][0, row]
    if not segments.any():
      continue
    pairs += 1
    lengths = [int(weights[segments == i].sum()) for i in (1, 2)]
    assert abs(lengths[0] - 4) < abs(lengths[1] - 4)
    prompt = s.run.data.prompt(row).ids
    for i in (1, 2):
      side = batch['tokens'][0, row][segments == i]
      assert side[: len(prompt)].tolist() == prompt
      assert (batch['positions'][0, row][segments == i] == np.arange(len(side))).all()
  assert pairs == s.rows[0][1]['pairs'] > 0


def test_step_0_is_that_of_dpo(usual):
  s, _ = usual
  _, metrics = s.step(s.trainer.fresh(), s.batch())
  assert float(metrics['loss']) == pytest.approx(math.log(2), abs=1e-6)
  assert float(metrics['rewards/margin']) == 0


def test_equal_rewards_make_no_pair(tmp_path):
  s = tiny_rollouts.Steps(tmp_path, 'online_dpo', **{'rollout.rewards': 'length:at_most=99'})
  batch = s.batch()
  assert not tiny_rollouts.host(batch)['segments'].any()
  _, metrics = s.step(s.state, batch)
  assert float(metrics['grad_norm']) == 0 and bool(metrics['ok'])
  assert s.rows[0][1]['pairs'] == 0


def test_updates_follow_the_reference_of_the_start(usual):
  s, _ = usual
  state = s.trainer.fresh()
  before = tiny_rollouts.host(state.frozen['reference'])
  for _ in range(2):
    state, metrics = s.step(state, s.batch())
  assert float(metrics['rewards/margin']) > 0
  after = tiny_rollouts.host(state.frozen['reference'])
  assert all((before[k] == after[k]).all() for k in before)
  assert 'reference' not in s.trainer.model(state)


@pytest.mark.parametrize(
  ('settings', 'told'),
  [
    ({'dpo.loss': 'kto'}, 'makes pairs'),
    ({'rollout.group': 1}, 'expected at least 2'),
    ({'rollout.max_tokens': 48}, '2 completions share a row'),
  ],
)
def test_settings_that_cannot_be(settings, told):
  with pytest.raises(ConfigError, match=told):
    tiny_rollouts.tiny('online_dpo', **settings)
