"""Runs on rollouts, killed for real after step k and run again: prompts, completions, losses and
exported bits are those of an uninterrupted run. GRPO's own are in test_grpo.py.
"""

import pytest
import tiny_rollouts
import tiny_run

SETTINGS = {
  'ppo': ('policy.kl_target=0.02',),
  'best_of_n': ('best_of_n.keep=2', 'rollout.redraws=1'),
  'online_dpo': ('rollout.group=4', 'rollout.minibatches=1'),
}


def arguments(algorithm, workdir):
  return tiny_rollouts.arguments(workdir, *SETTINGS[algorithm], algorithm=algorithm)


@pytest.fixture(scope='module', params=SETTINGS)
def reference(request, tmp_path_factory):
  """(algorithm, workdir of an uninterrupted run)."""
  workdir = tmp_path_factory.mktemp(request.param)
  code, told = tiny_run.run('train', arguments(request.param, workdir))
  assert code == 0, told
  return request.param, workdir


@pytest.mark.parametrize('k', [1, 4])
def test_killed_after_step_k_it_ends_bitwise_like_uninterrupted(k, reference, tmp_path):
  algorithm, whole = reference
  tiny_run.share_programs(whole, tmp_path)
  process = tiny_run.launch('train', arguments(algorithm, tmp_path), tmp_path / 'log')
  assert tiny_run.kill_when(process, (tmp_path / 'checkpoints' / str(k)).exists)
  steps = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
  assert max(steps) < 8
  code, told = tiny_run.run('train', arguments(algorithm, tmp_path))
  assert code == 0 and f'resuming after step {max(steps)} of 8' in told, told
  assert tiny_run.differences(tmp_path, whole) == []
  assert tiny_rollouts.rollouts(tmp_path) == tiny_rollouts.rollouts(whole)
