"""A preference run killed for real and run again ends like one that was not: same losses, same
exported bits, though its reference is not in the checkpoint.
"""

import pytest
import tiny_run

STEPS = 12


def arguments(workdir):
  settings = ['eval.prompts=()', 'eval.every=0', 'checkpoint.every=1', f'steps={STEPS}']
  settings += ['data.train=pairs:100', 'grad_accum=2']
  return ['--config=tiny_dpo', f'--workdir={workdir}', *(f'--config.{s}' for s in settings)]


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """The workdir of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp('reference')
  code, told = tiny_run.run('train', arguments(workdir))
  assert code == 0, told
  return workdir


@pytest.mark.parametrize('k', [1, 4])
def test_killed_after_step_k_it_ends_bitwise_like_uninterrupted(k, reference, tmp_path):
  tiny_run.share_programs(reference, tmp_path)
  process = tiny_run.launch('train', arguments(tmp_path), tmp_path / 'log')
  assert tiny_run.kill_when(process, lambda: tiny_run.logged(tmp_path) >= k)
  assert process.returncode == -9 and not (tmp_path / 'export').exists()
  code, told = tiny_run.run('train', arguments(tmp_path))
  assert code == 0, told
  saved = [p for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
  assert tiny_run.differences(tmp_path, reference) == []
  assert not any('reference' in str(p) for s in saved for p in s.rglob('*'))
