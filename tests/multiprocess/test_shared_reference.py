"""Two processes compute a cached reference together, one writes it, and both train like one."""

import os
import sys

import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(__file__))

import tiny_run
from cluster import run


def arguments(workdir, cache):
  settings = (
    'mesh.fsdp=4',
    'steps=4',
    'data.train=pairs:60',
    'data.eval_fraction=0.2',
    'eval.every=0',
    'eval.prompts=()',
  )
  settings += (
    'dpo.reference=cache',
    'checkpoint.every=2',
    f'data.cache={cache}',
    'optim.warmup_steps=0',
  )
  return ['--config=tiny_dpo', f'--workdir={workdir}', *(f'--config.{s}' for s in settings)]


@pytest.mark.full
def test_two_processes_make_one_cache_and_train_like_one(tmp_path):
  for name, count in (('one', 1), ('two', 2)):
    run(count, arguments(tmp_path / name, tmp_path / f'{name}_cache'), tmp_path / f'{name}_logs')
  made = [sorted((tmp_path / f'{n}_cache').glob('reference-*/*.bin')) for n in ('one', 'two')]
  assert [p.parts[-2:] for p in made[0]] == [p.parts[-2:] for p in made[1]] and made[0]
  for one, two in zip(*made, strict=True):
    values = [np.frombuffer(p.read_bytes()[32:], '<f4') for p in (one, two)]
    np.testing.assert_allclose(*values, rtol=1e-5)
  ours, theirs = (tiny_run.metrics(tmp_path / w) for w in ('two', 'one'))
  assert ours.keys() == theirs.keys()
  for key in ours:
    for name in ('loss', 'grad_norm'):
      if name in ours[key]:
        np.testing.assert_allclose(ours[key][name], theirs[key][name], rtol=1e-3, atol=1e-6)
  # The second process has a folder of its own, and takes what the first one finds.
  caches = [[f'--config.data.cache={tmp_path / n}'] for n in ('one_cache', 'own_cache')]
  run(2, arguments(tmp_path / 'again', ''), tmp_path / 'again_logs', own=caches)
  told = ''.join(p.read_text() for p in (tmp_path / 'again_logs').iterdir())
  assert told.count(' 0 computed, in ') == 2, 'of training and evaluation pairs'
  assert not list((tmp_path / 'own_cache').glob('reference-*'))
