"""Which checkpoints stay, which one counts after a crash, and that they come back bit for bit."""

import errno
import json
import logging
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.runtime.errors import DataError
from ftjax.storage import files, snapshots
from ftjax.storage.checkpoint import Checkpoints, Retention
from ftjax.training.state import create

LAST_TWO = Retention(keep=2, metric='', mode='min')


def state_of(number=0.0):
  number = float(number)
  params = {'block': {'w': jnp.arange(32.0).reshape(8, 4) / 7 + number}, 'scale': jnp.ones(8)}
  return create(params, {'table': jnp.full((16, 8), number)}, optax.adam(0.1), with_ema=True)


def abstract(state):
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def equal_bits(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype


@pytest.fixture
def opened(tmp_path):
  """`opened(retention)` opens the folder of this test, again after a close."""
  made = []

  def make(retention=LAST_TWO, folder=tmp_path / 'checkpoints'):
    made.append(Checkpoints(str(folder), retention))
    return made[-1]

  yield make
  for checkpoints in made:
    checkpoints.close()


def save(checkpoints, step, metric=None):
  checkpoints.save(step, state_of(step), {'step': step}, metric)
  checkpoints.wait()


def test_state_and_meta_come_back(opened):
  c = opened()
  meta = {'step': 3, 'cursor': 24, 'config': {'a': [1, 2], 'b': None}, 'value': 0.1}
  c.save(3, state_of(3), meta, None)
  c.wait()
  equal_bits(c.restore(3, abstract(state_of())), state_of(3))
  assert c.meta(3) == meta and c.latest() == 3 and c.steps() == [3] and c.best() is None


def test_an_empty_folder_has_no_latest(opened):
  c = opened()
  assert c.latest() is None and c.steps() == [] and c.best() is None
  assert opened(Retention(1, 'eval/loss', 'min')).best() is None


def test_what_is_saved_may_be_donated_at_once(opened):
  """save returns when the arrays are copied: the next step overwrites them."""
  c = opened()
  state = {'w': jnp.arange(1000.0)}
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  c.save(1, state, {}, None)
  overwrite(state)
  c.wait()
  restored = c.restore(1, {'w': jax.ShapeDtypeStruct((1000,), jnp.float32)})
  np.testing.assert_array_equal(restored['w'], np.arange(1000.0))


# Which stay


def test_the_latest_n_stay(opened):
  c = opened()
  for step in range(1, 6):
    save(c, step)
  assert c.steps() == [4, 5]


@pytest.mark.parametrize(
  ('mode', 'values', 'kept', 'best'),
  [
    ('min', [3.0, 1.0, 2.0, 4.0, 5.0], [2, 4, 5], 2),
    ('max', [3.0, 1.0, 2.0, 2.5, 0.0], [1, 4, 5], 1),
    ('min', [5.0, 4.0, 3.0, 2.0, 1.0], [4, 5], 5),
    ('min', [3.0, 1.0, None, None, None], [2, 4, 5], 2),
    ('min', [3.0, float('nan'), 4.0, 5.0, float('nan')], [1, 4, 5], 1),
  ],
)
def test_the_best_is_kept_with_the_latest(opened, mode, values, kept, best):
  retention = Retention(keep=2, metric='eval/loss', mode=mode)
  c = opened(retention)
  for step, value in enumerate(values, 1):
    save(c, step, value)
  assert c.steps() == kept and c.best() == best
  # Another process, which never saw the values, knows them, and does not drop the best.
  again = opened(retention)
  assert again.best() == best
  save(again, 6)
  save(again, 7)
  assert again.steps() == [best, 6, 7] and again.best() == best
  equal_bits(again.restore(best, abstract(state_of())), state_of(best))


def test_opening_deletes_only_what_a_crash_tore(opened, tmp_path):
  c = opened(Retention(keep=4, metric='', mode='min'))
  for step in range(1, 5):
    save(c, step)
  folder = tmp_path / 'checkpoints'
  (folder / 'notes.txt').write_text('mine')
  before = sorted(p.relative_to(folder) for p in folder.rglob('*'))
  (folder / '9.orbax-checkpoint-tmp').mkdir()
  smaller = opened(Retention(keep=1, metric='', mode='min'))
  assert smaller.steps() == [1, 2, 3, 4]
  assert sorted(p.relative_to(folder) for p in folder.rglob('*')) == before


# After a crash


def half_written(folder: pathlib.Path, name: str, like: pathlib.Path):
  """What a crash in the middle of a save leaves: some files of a step, under its temporary name."""
  torn = folder / name
  (torn / 'state').mkdir(parents=True)
  source = next(p for p in sorted((like / 'state').rglob('*')) if p.is_file() and p.stat().st_size)
  (torn / 'state' / source.name).write_bytes(source.read_bytes()[: source.stat().st_size // 2])


def test_the_newest_finalized_step_wins(opened, tmp_path):
  c = opened()
  save(c, 1)
  save(c, 2)
  c.close()
  folder = tmp_path / 'checkpoints'
  for name in ('3.orbax-checkpoint-tmp', '4.orbax-checkpoint-tmp-1764000000'):
    half_written(folder, name, folder / '2')
  again = opened()
  assert again.latest() == 2
  equal_bits(again.restore(2, abstract(state_of())), state_of(2))
  # The step that was torn is trained and saved again.
  save(again, 3)
  save(again, 4)
  assert again.steps() == [3, 4]
  equal_bits(again.restore(4, abstract(state_of())), state_of(4))


def test_files_are_on_the_disk_before_a_step_counts(opened, tmp_path, monkeypatch):
  """Else a machine that loses its power may leave a finished step of empty files."""
  synced, before_rename = set(), []
  fsync, rename = os.fsync, os.rename

  def seen(number):
    synced.add(os.fstat(number).st_ino)
    fsync(number)

  def renamed(source, target, **settings):
    if os.fspath(target).endswith('checkpoints/1'):
      before_rename.append(set(synced))
    rename(source, target, **settings)

  monkeypatch.setattr(os, 'fsync', seen)
  monkeypatch.setattr(os, 'rename', renamed)
  c = opened()
  save(c, 1)
  found = [p for p in (tmp_path / 'checkpoints' / '1').rglob('*') if not p.is_dir()]
  (early,) = before_rename
  late = {p.name for p in found if p.stat().st_ino not in early}
  assert late <= {'commit_success.txt', '_CHECKPOINT_METADATA'}  # Orbax writes these last
  assert (tmp_path / 'checkpoints').stat().st_ino in synced
  assert {p.stat().st_ino for p in found} <= synced


@pytest.mark.parametrize('name', ['_CHECKPOINT_METADATA', 'meta/metadata', 'state/_METADATA'])
@pytest.mark.parametrize('content', ['', '{"a": [1, ', None])
def test_a_torn_newest_step_gives_way_to_the_one_before(opened, tmp_path, caplog, name, content):
  c = opened()
  save(c, 1)
  save(c, 2)
  c.close()
  folder = tmp_path / 'checkpoints'
  if content is None:
    (folder / '2' / name).unlink()
  else:
    (folder / '2' / name).write_text(content)
  again = opened()
  assert again.latest() == 1 and again.steps() == [1]
  assert f'2 cannot be read ({name}' in caplog.text
  (aside,) = folder.glob('torn.2.*')
  assert (aside / 'state').is_dir()
  equal_bits(again.restore(1, abstract(state_of())), state_of(1))
  save(again, 2)
  equal_bits(opened().restore(2, abstract(state_of())), state_of(2))


def test_a_step_that_cannot_be_read_just_now_stays(opened, tmp_path, monkeypatch):
  """A mount that hiccups, a right that is missing: nothing is wrong with the file."""
  c = opened()
  save(c, 1)
  save(c, 2)

  def refused(path):
    raise PermissionError(errno.EACCES, 'Permission denied', str(path))

  monkeypatch.setattr(files, 'read_text', refused)
  with pytest.raises(PermissionError):
    c.latest()
  monkeypatch.undo()
  assert c.latest() == 2


def test_where_no_step_can_be_read_nothing_begins_anew(opened, tmp_path):
  c = opened()
  save(c, 1)
  (tmp_path / 'checkpoints' / '1' / 'meta' / 'metadata').write_text('')
  with pytest.raises(DataError, match=r'1 cannot be read .*begin anew'):
    c.latest()
  assert (tmp_path / 'checkpoints' / '1').is_dir()


def test_a_missing_step_is_reported_with_the_existing_ones(opened, tmp_path):
  c = opened()
  save(c, 1)
  save(c, 2)
  folder = tmp_path / 'checkpoints'
  half_written(folder, '7.orbax-checkpoint-tmp', folder / '2')
  with pytest.raises(DataError, match=r'step 7 is not a finalized checkpoint; there are \[1, 2\]'):
    c.restore(7, abstract(state_of()))


@pytest.mark.parametrize('kept', [0, 50])
def test_damaged_arrays_are_reported_with_the_folder_to_remove(opened, tmp_path, kept):
  c = opened()
  save(c, 1)
  save(c, 2)
  state = tmp_path / 'checkpoints' / '2' / 'state'
  for path in state.rglob('d/*'):
    path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(DataError, match='checkpoints/2') as error:
    c.restore(2, abstract(state_of()))
  assert 'Remove that folder to go on from step 1' in str(error.value)
  assert len(str(error.value)) < 700 + len(str(tmp_path))
  wanted = {'params': abstract(state_of()).params}
  with pytest.raises(DataError, match=r'checkpoints/2/state cannot be read'):
    snapshots.read(str(tmp_path), 2, wanted)


def test_a_state_of_another_shape_is_refused(opened):
  c = opened()
  save(c, 1)
  other = abstract(create({'other': jnp.ones(3)}, {}, optax.sgd(0.1), False))
  with pytest.raises(DataError, match='not of this config'):
    c.restore(1, other)
  wider = abstract(state_of())
  wider.params['scale'] = jax.ShapeDtypeStruct((9,), jnp.float32)
  with pytest.raises(DataError, match='not of this config'):
    c.restore(1, wider)


def test_a_failed_commit_does_not_stop_later_saves(opened, monkeypatch, caplog):
  """The last rename of step 2 fails, in the background."""
  c = opened()
  save(c, 1)
  rename = os.rename

  def full(source, target, **settings):
    if os.fspath(target).endswith('checkpoints/2'):
      raise OSError(errno.ENOSPC, 'the disk is full')
    rename(source, target, **settings)

  monkeypatch.setattr(os, 'rename', full)
  c.save(2, state_of(2), {'step': 2}, None)
  with caplog.at_level(logging.ERROR):
    c.save(3, state_of(3), {'step': 3}, None)
  c.wait()
  assert 'not committed: [Errno 28] the disk is full; saving step 3' in caplog.text
  assert c.latest() == 3 and 2 not in c.steps()
  equal_bits(c.restore(3, abstract(state_of())), state_of(3))
  assert opened().latest() == 3


def test_two_failed_commits_in_a_row_end_the_run(opened, monkeypatch):
  c = opened()
  save(c, 1)

  def full(source, target, **settings):
    raise OSError(errno.ENOSPC, 'the disk is full')

  monkeypatch.setattr(os, 'rename', full)
  c.save(2, state_of(2), {'step': 2}, None)
  c.save(3, state_of(3), {'step': 3}, None)
  with pytest.raises(OSError, match='the disk is full'):
    c.save(4, state_of(4), {'step': 4}, None)


@pytest.mark.parametrize('error', [TimeoutError('slow'), KeyError('a client of its own kind')])
def test_any_failed_commit_is_forgiven_once(opened, monkeypatch, error):
  c = opened()
  save(c, 1)

  def broken(folder):
    raise error

  monkeypatch.setattr(files, 'sync_tree', broken)
  c.save(2, state_of(2), {'step': 2}, None)
  c.save(3, state_of(3), {'step': 3}, None)
  with pytest.raises(type(error)):
    c.save(4, state_of(4), {'step': 4}, None)
  monkeypatch.undo()
  save(c, 5)
  assert c.steps() == [1, 5]


def test_a_step_that_cannot_be_removed_is_no_failed_save(opened, monkeypatch, caplog):
  from orbax.checkpoint._src.path import deleter

  def busy(self, path, **settings):
    raise OSError(errno.ENOTEMPTY, 'Directory not empty', str(path))

  monkeypatch.setattr(deleter.PathDeleter, 'delete', busy)
  c = opened(Retention(keep=1, metric='', mode='min'))
  for step in range(1, 6):
    save(c, step)
  assert c.steps() == [1, 2, 3, 4, 5] and 'tidying up failed' in caplog.text
  assert 'not committed' not in caplog.text


def test_a_refusal_to_clear_up_at_the_start_ends_no_run(opened, tmp_path, monkeypatch, caplog):
  def refused(path, **settings):
    raise OSError(errno.EACCES, 'Permission denied', str(path))

  (tmp_path / 'checkpoints' / '3.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
  monkeypatch.setattr(shutil, 'rmtree', refused)
  c = opened()
  monkeypatch.undo()
  assert 'a torn save, failed' in caplog.text
  save(c, 4)
  assert c.latest() == 4


@pytest.mark.parametrize('limit, seconds', [(0.5, 1), (5400.0, 5400), (0.0, 30 * 24 * 3600)])
def test_the_limit_of_a_save_is_the_configs(opened, monkeypatch, tmp_path, limit, seconds):
  """Orbax's own twenty minutes would let no large or slow save come to its end."""
  from orbax.checkpoint._src.checkpointers import async_checkpointer

  made, seen = async_checkpointer._AsyncManager.__init__, []

  def init(self, **settings):
    seen.append(settings['timeout_secs'])
    made(self, **settings)

  monkeypatch.setattr(async_checkpointer._AsyncManager, '__init__', init)
  Checkpoints(str(tmp_path / 'checkpoints'), LAST_TWO, limit).close()
  assert seen == [seconds]


def test_a_step_is_not_saved_twice(opened):
  c = opened()
  save(c, 1)
  c.save(1, state_of(99), {'step': 99}, None)
  c.wait()
  equal_bits(c.restore(1, abstract(state_of())), state_of(1))


def test_meta_is_json_on_disk(opened, tmp_path):
  save(opened(), 1)
  text = (tmp_path / 'checkpoints' / '1' / 'meta' / 'metadata').read_text()
  assert json.loads(text) == {'step': 1}


# Other meshes


def on_mesh(state, mesh):
  """`state` on a mesh of n devices, split along its first axis where that divides."""
  ways = mesh.shape['fsdp']

  def where(a):
    return NamedSharding(mesh, P('fsdp') if a.ndim and a.shape[0] % ways == 0 else P())

  return jax.tree.map(lambda a: jax.device_put(np.asarray(a), where(a)), state)


@pytest.mark.parametrize('count', [1, 2, 4, 8])
def test_saved_on_eight_devices_restored_on_others(opened, tmp_path, use_mesh, count):
  state = state_of(0.3)
  c = opened()
  c.save(5, on_mesh(state, use_mesh(fsdp=8)), {}, None)
  c.wait()
  target = abstract(on_mesh(state, use_mesh(fsdp=count)))
  restored = opened().restore(5, target)
  equal_bits(restored, state)
  for leaf, want in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
    assert leaf.sharding == want.sharding
