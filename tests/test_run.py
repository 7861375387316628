"""What a config is brought to before anything is trained."""

import fractions
import math
import os
import threading

import pytest

from ftjax.cluster import watchdog
from ftjax.config import keys
from ftjax.experiment import run as experiment
from ftjax.storage import files


def tiny():
  c = keys.default()
  c.model.random = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
  )
  c.data.train = 'sums:20'
  c.batch_size = c.eval.batch_size = 8
  c.mesh.fsdp = 1
  c.mesh.data = -1
  c.seq_len = 64
  c.compile_cache = False
  return c


def test_a_relative_workdir_is_made_absolute(tmp_path, monkeypatch):
  """Orbax commits nothing under a relative path, and says so only in its background thread."""
  monkeypatch.chdir(tmp_path)
  run = experiment.start(tiny(), 'here')
  assert run.workdir == str(tmp_path / 'here') and os.path.isdir(run.workdir)


def test_a_folder_that_does_not_answer_has_a_limit(tmp_path, monkeypatch):
  """A mount that hangs, at the very first look into the workdir."""
  told, ended = [], threading.Event()

  def end(message):
    told.append(message)
    ended.set()

  monkeypatch.setattr(watchdog, '_end', end)
  monkeypatch.setattr(files, 'probe', lambda _: ended.wait(30))
  c = tiny()
  c.watchdog.restore = 0.5
  experiment.start(c, str(tmp_path))
  assert 'watchdog.restore' in told[0]


EPOCHS = (
  '1.1',
  '2.2',
  '0.1',
  '3.3',
  '1/3',
  '5/3',
  '0.7',
  '1.15',
  '0.29',
  '1',
  '4.35',
  '0.123456789',
)


@pytest.mark.parametrize('epochs', EPOCHS)
def test_fractions_of_epochs_are_counted_exactly(epochs):
  """As if the config's number were the one that was written: no float error adds a batch."""
  exact = fractions.Fraction(epochs)
  for rows in (1, 7, 30, 100, 300, 990, 1000, 12345, 10**6, 3 * 10**9):
    for batch_size in (1, 3, 8, 10, 64, 1000):
      found = experiment.batches_in(float(exact), rows, batch_size)
      assert found == max(1, math.ceil(exact * rows / batch_size)), (rows, batch_size)


def test_the_steps_of_a_run_are_those_of_its_epochs(tmp_path):
  c = tiny()
  c.data.train, c.data.packing, c.batch_size = 'sums:400', False, 40
  run = experiment.start(c, str(tmp_path))
  for epochs, steps in ((1.1, 11), (2.2, 22), (0.1, 1), (3.3, 33), (0.7, 7), (1.0, 10)):
    c.epochs = epochs
    assert run.steps == steps
