"""Two processes train an adapter on a packed base like one."""

import os
import sys

import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(__file__))

import cluster
import tiny_rollouts
import tiny_run
from cluster import run

SETTINGS = ('rank=4', 'alpha=8.0', 'merge_kl=1.0', 'train=embed/w')
NF4 = ('base=nf4', 'block=8', 'init=pissa')


def arguments(algorithm, workdir):
  if algorithm == 'sft':
    own, found = ('base=int8', 'dora=True', 'dropout=0.2'), cluster.arguments(workdir)
  else:
    settings = ('mesh.fsdp=4', 'batch_size=4', 'steps=4', 'eval.batch_size=8')
    own, found = NF4, tiny_rollouts.arguments(workdir, *settings, algorithm=algorithm)
  return [*found, *(f'--config.lora.{s}' for s in (*SETTINGS, *own))]


@pytest.mark.full
@pytest.mark.parametrize('algorithm', ['sft', 'grpo', 'ppo'])
def test_two_processes_train_an_adapter_like_one(algorithm, tmp_path):
  """The same losses, adapter and merged model within rounding; on rollouts the same completions."""
  run(1, arguments(algorithm, tmp_path / 'one'), tmp_path / 'one_logs')
  run(2, arguments(algorithm, tmp_path / 'two'), tmp_path / 'two_logs')
  ours, theirs = (tiny_run.metrics(tmp_path / w) for w in ('two', 'one'))
  assert ours.keys() == theirs.keys()
  for key in ours:
    for name in ('loss', 'grad_norm'):
      if name in theirs[key]:
        np.testing.assert_allclose(ours[key][name], theirs[key][name], rtol=1e-3, atol=1e-6)
  if algorithm != 'sft':
    ours, theirs = (tiny_rollouts.rollouts(tmp_path / w) for w in ('two', 'one'))
    assert all(ours[k] == theirs[k] for k in ours if isinstance(k, str)), 'completions and rewards'
  for file in ('export/adapter_model.safetensors', 'merged/model.safetensors'):
    ours, theirs = (tensors(tmp_path / w / file) for w in ('two', 'one'))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
      size = max(np.abs(expected).max(), 1e-3)
      np.testing.assert_allclose(ours[name], expected, atol=0.01 * size, err_msg=name)


def tensors(path):
  from safetensors.numpy import load_file

  return {n: np.asarray(x, np.float32) for n, x in load_file(path).items()}
