"""A run of every algorithm, killed for real after step k and run again: prompts, completions,
losses and exported bits are those of an uninterrupted run, though a reference is in no checkpoint.
Those of SFT and GRPO are in test_resume.py and test_grpo.py.
"""

import pytest
import tiny_rollouts
import tiny_run

SETTINGS = {
  'ppo': ('policy.kl_target=0.02',),
  'best_of_n': ('best_of_n.keep=2', 'rollout.redraws=1'),
  'online_dpo': ('rollout.group=4', 'rollout.minibatches=1'),
}


PAIRS = ('steps=8', 'checkpoint.every=1', 'checkpoint.keep=8', 'eval.every=0', 'eval.prompts=()')
PAIRS += ('data.train=pairs:100', 'grad_accum=2')


def arguments(algorithm, workdir):
  if algorithm == 'cached':
    return [*arguments('dpo', workdir), '--config.dpo.reference=cache']
  if algorithm in SETTINGS:
    return tiny_rollouts.arguments(workdir, *SETTINGS[algorithm], algorithm=algorithm)
  entry = [f'--config=tiny_{algorithm}', f'--workdir={workdir}']
  return [*entry, *(f'--config.{s}' for s in PAIRS)]


@pytest.fixture(scope='module', params=('dpo', 'cached', 'reward_model', *SETTINGS))
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
  names = [p.read_text() for p in (tmp_path / 'checkpoints').rglob('_METADATA')]
  assert names and all('params' in n and 'reference' not in n for n in names)
