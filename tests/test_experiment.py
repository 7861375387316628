"""What a config is brought to before anything is trained."""

import os

from ftjax import config, experiment


def test_a_relative_workdir_is_made_absolute(tmp_path, monkeypatch):
  """Orbax commits nothing under a relative path, and says so only in its background thread."""
  monkeypatch.chdir(tmp_path)
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
  run = experiment.start(c, 'here')
  assert run.workdir == str(tmp_path / 'here') and os.path.isdir(run.workdir)
