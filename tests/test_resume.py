"""Killed for real and run again: the same losses, batches and exported bits as without the kill.

One trial of many: tests/exhaustive_kill.py does more than twenty. Packing, accumulation and EMA are
on.
"""

import json
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_run
from tiny_run import BATCH, EPOCH_STEPS, STEPS

from ftjax.config import keys
from ftjax.experiment import data as examples
from ftjax.experiment.model import open_model
from ftjax.families import table as families
from ftjax.hf import load
from ftjax.models import kinds
from ftjax.runtime import sharding, trees

pytestmark = pytest.mark.usefixtures('users_programs')


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """The workdir of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp('reference')
  code, told = tiny_run.run('train', tiny_run.arguments(workdir), share_cache=False)
  assert code == 0, told
  return workdir


@pytest.fixture(scope='module')
def killed(reference, tmp_path_factory):
  """(workdir of a run killed after step 17, in its third epoch, and run again; what that said)."""
  workdir = tmp_path_factory.mktemp('killed')
  tiny_run.share_programs(reference, workdir)
  process = tiny_run.launch('train', tiny_run.arguments(workdir), workdir / 'log')
  assert tiny_run.kill_when(process, lambda: tiny_run.logged(workdir) >= 17)
  assert process.returncode == -9
  finished = [int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()]
  assert finished and max(finished) < STEPS and not (workdir / 'export').exists()
  # A line that the kill might have torn, of a step that was not saved.
  with open(workdir / 'metrics.jsonl', 'a') as rows:
    rows.write('{"step": 19, "split": "train", "lo')
  code, told = tiny_run.run('train', tiny_run.arguments(workdir))
  assert code == 0, told
  return workdir, told, max(finished)


def test_a_killed_run_ends_bitwise_like_an_uninterrupted_one(reference, killed):
  assert tiny_run.differences(killed[0], reference) == []
  rows = tiny_run.metrics(killed[0])
  assert [s for split, s in rows if split == 'train'] == list(range(1, STEPS + 1))
  assert [s for split, s in rows if split == 'eval'] == [6, 12, 18, 24, 26]
  assert any('safetensors' in name for name in tiny_run.results(killed[0]))


@pytest.mark.full
def test_a_stopped_run_makes_up_its_pending_evaluation(reference, tmp_path):
  """SIGTERM where every step is followed by an evaluation: none is missing in the end, none twice,
  and those of the uninterrupted run are the same.
  """
  tiny_run.share_programs(reference, tmp_path)
  arguments = tiny_run.arguments(tmp_path, 'eval.every=1')
  process = tiny_run.launch('train', arguments, tmp_path / 'log')
  stopped = lambda: tiny_run.logged(tmp_path) >= 9  # noqa: E731
  assert tiny_run.kill_when(process, stopped, number=signal.SIGTERM)
  assert process.returncode == 75, (tmp_path / 'log').read_text()
  at = max(step for _, step in tiny_run.metrics(tmp_path))
  assert (tmp_path / 'checkpoints' / str(at)).exists() and at < STEPS
  code, told = tiny_run.run('train', arguments)
  assert code == 0 and f'after step {at} of {STEPS}' in told
  ours, theirs = tiny_run.metrics(tmp_path), tiny_run.metrics(reference)
  assert list(ours) == [(split, s) for s in range(1, STEPS + 1) for split in ('train', 'eval')]
  for key, row in theirs.items():
    row.pop('gap', None)  # to the training loss since the evaluation before
    assert row.items() <= ours[key].items()


def test_the_resume_prints_its_step(killed):
  _, told, step = killed
  told = next(line for line in told.splitlines() if 'resuming' in line)
  assert f'after step {step} of {STEPS}: epoch {step / EPOCH_STEPS:.2f}' in told
  assert f'{step * BATCH} packed sequences consumed' in told
  assert re.search(r'the next example is \S*sums-108.jsonl:\d+$', told)


def test_what_was_fed_is_the_schedule(reference):
  """The checksums in metrics.jsonl are those of the pure function of the step, for every step; no
  batch comes twice, also not in another epoch.
  """
  c = tiny_config(reference)
  model = open_model('', c.model.random.to_dict(), c.seed)
  data = examples.open_data(c, model.tokenizer, str(reference))
  assert data.mixture.rows_per_epoch == BATCH * EPOCH_STEPS
  rows = tiny_run.metrics(reference)
  fed = [rows['train', step + 1]['batch_checksum'] for step in range(STEPS)]
  assert fed == [tiny_run.checksum(data.stream.batch(s)['tokens']) for s in range(STEPS)]
  assert len(set(fed)) == STEPS
  seen = [data.mixture.row(i) for i in range(STEPS * BATCH)]
  for epoch in range(STEPS // EPOCH_STEPS):
    rows = seen[epoch * EPOCH_STEPS * BATCH : (epoch + 1) * EPOCH_STEPS * BATCH]
    ids = [example for row in rows for example in row.examples if row.epoch == epoch]
    assert sorted(ids) == list(range(len(data.corpora[0])))  # each once an epoch


def tiny_config(workdir):
  """The config of a run, from its config.json."""
  c = keys.default()
  plain = json.loads((workdir / 'config.json').read_text())
  with c.unlocked():
    for key, value in plain.items():
      if key == 'model.random':
        c.model.random = value
      else:
        c.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
  return c


def test_the_average_is_what_is_exported(reference):
  """The moving average of the last checkpoint, bit by bit, and not its parameters."""
  export = str(reference / 'export')
  arch = families.architecture(load.read_config(export))
  where = sharding.shardings(jax.sharding.get_mesh(), kinds.axes(arch))
  exported = trees.flatten(load.load_params(export, arch, where, jnp.float32))
  with ocp.StandardCheckpointer() as checkpointer:
    saved = checkpointer.restore(reference / 'checkpoints' / str(STEPS) / 'state')
  ema, params = (trees.flatten(saved[k]) for k in ('ema', 'params'))
  assert exported.keys() == ema.keys()
  for name, value in exported.items():
    np.testing.assert_array_equal(value, ema[name])
    assert not np.array_equal(value, params[name])


def test_another_run_in_the_same_folder_is_refused(reference):
  """What fixes the data or the state may not change; each change is listed."""
  before = {p: p.stat().st_mtime_ns for p in (reference / 'checkpoints').iterdir()}
  changes = ['seed=1', 'batch_size=4', 'grad_accum=1', 'optim.ema_decay=0.0', 'data.train=sums:90']
  code, told = tiny_run.run('train', tiny_run.arguments(reference, *changes))
  assert code == 2
  for part in (
    'seed: 0 -> 1',
    'batch_size: 8 -> 4',
    'optim.ema_decay switched on or off',
    'data order: other content',
    '--config.init_from=OLD_WORKDIR',
  ):
    assert part in told
  assert 'grad_accum' not in told
  assert before == {p: p.stat().st_mtime_ns for p in (reference / 'checkpoints').iterdir()}


def test_a_finished_run_is_exported_again_without_training(reference):
  rows, results = (reference / 'metrics.jsonl').read_bytes(), tiny_run.results(reference)
  code, told = tiny_run.run('train', tiny_run.arguments(reference))
  assert code == 0 and 'step compiled' not in told
  assert (reference / 'metrics.jsonl').read_bytes() == rows
  assert tiny_run.results(reference) == results
