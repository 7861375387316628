"""Two processes sample, pay and train like one."""

import os
import sys

import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(__file__))

import tiny_rollouts
import tiny_run
from cluster import run


def arguments(algorithm, workdir):
  settings = ('mesh.fsdp=4', 'batch_size=4', 'steps=4', 'eval.batch_size=8')
  return tiny_rollouts.arguments(workdir, *settings, algorithm=algorithm)


@pytest.mark.full
@pytest.mark.parametrize('algorithm', ['grpo', 'ppo'])
def test_two_processes_sample_and_train_like_one(algorithm, tmp_path):
  """The same completions and rewards of both rollouts, losses within rounding."""
  run(1, arguments(algorithm, tmp_path / 'one'), tmp_path / 'one_logs')
  run(2, arguments(algorithm, tmp_path / 'two'), tmp_path / 'two_logs')
  ours, theirs = (tiny_rollouts.rollouts(tmp_path / w) for w in ('two', 'one'))
  assert ours.keys() == theirs.keys()
  assert all(ours[k] == theirs[k] for k in ours if isinstance(k, str)), 'completions and rewards'
  ours, theirs = (tiny_run.metrics(tmp_path / w) for w in ('two', 'one'))
  assert ours.keys() == theirs.keys()
  for key in ours:
    if key[0] == 'train':
      for name in ('loss', 'grad_norm'):
        np.testing.assert_allclose(ours[key][name], theirs[key][name], rtol=1e-3, atol=1e-6)
