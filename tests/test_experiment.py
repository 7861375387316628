"""What a config is brought to before anything is trained."""

import os
import threading

from ftjax import config, experiment
from ftjax.runtime import files, watchdog


def tiny():
  c = config.default()
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
