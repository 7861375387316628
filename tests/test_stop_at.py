"""stop_at: a start that ends before the last step, and the one that resumes there."""

import pathlib

import pytest
import tiny_run

STEPS = ('steps=8', 'data.train=sums:40', 'eval.every=0', 'checkpoint.every=0', 'log.every=1')


def train(workdir, *overrides):
  return tiny_run.run('train', tiny_run.arguments(workdir, *STEPS, *overrides))


@pytest.mark.full
def test_a_start_that_stop_at_ends_is_saved_evaluated_and_resumed(tmp_path):
  code, text = train(tmp_path, 'stop_at=3')
  assert code == 0, text
  assert 'this start ends after step 3 of 8, evaluated and saved' in text
  assert pathlib.Path(tmp_path / 'checkpoints' / '3').is_dir()
  assert not (tmp_path / 'export').exists() and not (tmp_path / 'eval').exists()
  assert [k for k in tiny_run.metrics(tmp_path) if k[0] == 'eval'] == [('eval', 3)]
  code, text = train(tmp_path)
  assert code == 0, text
  assert 'resuming after step 3 of 8' in text and 'changed since the checkpoint' not in text
  assert [k[1] for k in tiny_run.metrics(tmp_path) if k[0] == 'train'] == list(range(1, 9))
  assert (tmp_path / 'export').is_dir()


@pytest.mark.full
def test_stops_change_no_bit_of_the_training(tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  assert train(whole)[0] == 0
  for stop_at in (2, 2, 5, 0):  # the same one twice: nothing is left to do
    code, text = train(parts, f'stop_at={stop_at}')
    assert code == 0, text
  ours, theirs = tiny_run.metrics(parts), tiny_run.metrics(whole)
  assert {k: v for k, v in ours.items() if k[0] == 'train'} == {
    k: v for k, v in theirs.items() if k[0] == 'train'
  }
  assert ours['eval', 8]['loss'] == theirs['eval', 8]['loss']
  assert tiny_run.results(parts) == tiny_run.results(whole)
