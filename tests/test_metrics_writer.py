"""telemetry/metrics_writer.py: exact floats, strict JSON, rows cut at resume, no secrets."""

import json
import math
import os
import struct
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from ftjax.runtime.errors import ConfigError
from ftjax.telemetry import metrics_writer

SENTINEL = 'hf_Zx9Qw3rT7uP1sD5fG8hJ2kL4'


def _writer(workdir, step=-1, drop_eval=False, **options):
  writer = metrics_writer.MetricsWriter(workdir, **{'config': {'seed': 0}, **options})
  writer.cut(step, drop_eval)
  writer.open()
  return writer


def _strict(text):
  """Parses like readers that know no NaN."""

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _events(folder):
  """(event.step, tag, value) and session starts of all event files, read without TensorBoard."""
  scalars, starts = [], []
  for name in sorted(os.listdir(folder)):
    data = (folder / name).read_bytes()
    at = 0
    while at < len(data):
      (size,) = struct.unpack_from('<Q', data, at)
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      at += 12 + size + 4
      scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
      if event.HasField('session_log'):
        starts.append(event.step)
  return scalars, starts


def test_floats_read_back_bitwise(tmp_path):
  rng = np.random.default_rng(0)
  values = rng.standard_normal(200).astype(np.float32) * np.float32(10) ** rng.integers(
    -38, 38, 200
  )
  values = np.concatenate([values, np.float32([0.1, -0.0, 1e-45, 3.4028235e38])]).astype(np.float32)
  writer = _writer(tmp_path)
  for step, value in enumerate(values):
    writer.write(step, 'train', {'loss': value})
  writer.write(len(values), 'train', {'loss': jnp.float32(values[0])})
  writer.close()
  rows = _strict((tmp_path / 'metrics.jsonl').read_text())
  got = np.array([row['loss'] for row in rows[:-1]], np.float32)
  np.testing.assert_array_equal(got.view(np.uint32), values.view(np.uint32))
  assert rows[-1] == {'step': 204, 'split': 'train', 'loss': float(values[0])}


def test_kinds_of_values():
  assert metrics_writer.to_json_value(np.int32(7)) == 7
  assert type(metrics_writer.to_json_value(np.int32(7))) is int
  assert metrics_writer.to_json_value(jnp.bool_(True)) is True
  assert metrics_writer.to_json_value('text') == 'text'
  assert metrics_writer.to_json_value(jnp.bfloat16(0.5)) == 0.5
  with pytest.raises(ValueError, match=r'shape \(3,\)'):
    metrics_writer.to_json_value(np.zeros(3))


def test_non_finite_values_are_strict_json_and_read_back(tmp_path):
  writer = _writer(tmp_path)
  writer.write(1, 'train', {'a': math.nan, 'b': np.float32('inf'), 'c': -math.inf, 'd': 1.0})
  writer.close()
  (row,) = _strict((tmp_path / 'metrics.jsonl').read_text())
  assert (
    math.isnan(float(row['a'])) and float(row['b']) == math.inf and float(row['c']) == -math.inf
  )
  # TensorBoard gets what it can draw.
  assert _events(tmp_path / 'tensorboard')[0] == [(1, 'train/d', 1.0)]


def test_a_row_is_in_the_file_when_write_returns(tmp_path):
  code = (
    'import os, sys\n'
    'from ftjax.telemetry.metrics_writer import MetricsWriter\n'
    'w = MetricsWriter(sys.argv[1], config={})\n'
    'w.open()\n'
    'w.write(3, "train", {"loss": 0.5})\n'
    'os.kill(os.getpid(), 9)\n'
  )
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=False)
  assert done.returncode == -9
  rows = _strict((tmp_path / 'metrics.jsonl').read_text())
  assert rows == [{'step': 3, 'split': 'train', 'loss': 0.5}]


def test_resumed_file_equals_the_uninterrupted_one(tmp_path):
  def steps(writer, numbers):
    for step in numbers:
      writer.write(step, 'train', {'loss': 1 / (step + 3)})
      if step % 2 == 0:
        writer.write(step, 'eval', {'loss': 2 / (step + 3)})

  whole = _writer(tmp_path / 'whole')
  steps(whole, range(1, 11))
  whole.close()
  first = _writer(tmp_path / 'cut')
  steps(first, range(1, 8))
  first.close()
  with open(tmp_path / 'cut' / 'metrics.jsonl', 'a') as f:
    f.write('{"step": 8, "split": "train", "lo')  # killed while it wrote
  second = _writer(tmp_path / 'cut', step=4)
  steps(second, range(5, 11))
  second.close()
  expected = (tmp_path / 'whole' / 'metrics.jsonl').read_text()
  assert (tmp_path / 'cut' / 'metrics.jsonl').read_text() == expected


def test_a_fresh_start_drops_the_rows_of_a_run_that_saved_nothing(tmp_path):
  first = _writer(tmp_path)
  first.write(0, 'eval', {'loss': 1.0})
  first.close()
  _writer(tmp_path).close()
  assert (tmp_path / 'metrics.jsonl').read_text() == ''


def test_cut_lines_by_hand():
  text = '{"step": 1}\n{"step": 3}\nnoise\n[1]\n{"step": 2}\n{"step": 2, "x'
  assert metrics_writer.cut_lines(text, 2) == ('{"step": 1}\n{"step": 2}\n', 3)
  assert metrics_writer.cut_lines('{"step": 1}', 1) == ('{"step": 1}\n', 0)
  assert metrics_writer.cut_lines('', 5) == ('', 0)
  text = (
    '{"step": 1, "split": "eval"}\n{"step": 2, "split": "train"}\n{"step": 2, "split": "eval"}\n'
  )
  assert metrics_writer.cut_lines(text, 2) == (text, 0)
  assert metrics_writer.cut_lines(text, 2, drop_eval=True) == (text[: text.rindex('{')], 0)


def test_tensorboard_events_are_hidden_from_the_restored_step_on(tmp_path):
  first = _writer(tmp_path)
  for step in (1, 2, 3):
    first.write(step, 'train', {'loss': step / 4, 'note': 'text stays out'})
  first.close()
  second = _writer(tmp_path, step=2)
  second.write(3, 'train', {'loss': 9.0})
  second.close()
  scalars, starts = _events(tmp_path / 'tensorboard')
  assert sorted(scalars) == [
    (1, 'train/loss', 0.25),
    (2, 'train/loss', 0.5),
    (3, 'train/loss', 0.75),
    (3, 'train/loss', 9.0),
  ]
  # "hidden from this step on": 0 at the fresh start, 3 where step 2 was restored.
  assert sorted(set(starts)) == [0, 3]


def test_other_processes_write_nothing(tmp_path):
  writer = _writer(tmp_path, is_main=False, sinks=('wandb',))
  writer.write(1, 'train', {'loss': 1.0})
  writer.close()
  assert list(tmp_path.iterdir()) == []


def test_reserved_names_and_unknown_sinks_are_refused(tmp_path):
  with pytest.raises(ValueError, match='step'):
    _writer(tmp_path).write(1, 'train', {'step': 2})
  with pytest.raises(ConfigError, match=r'log\.sinks.*tensorbored.*mlflow.*wandb') as e:
    _writer(tmp_path, sinks=('tensorbored',))
  assert e.value.exit_code == 2


@pytest.mark.parametrize('name', ['wandb', 'mlflow'])
def test_a_tracker_that_is_not_installed_is_reported(tmp_path, monkeypatch, name):
  monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
  with pytest.raises(ConfigError, match=rf'log\.sinks.*{name}.*pip install') as e:
    _writer(tmp_path, sinks=(name,))
  assert e.value.exit_code == 2


class _FakeRun:
  """Stands for a W&B run; writes what it was given into the workdir, as offline mode does."""

  def __init__(self, folder):
    self._file = open(os.path.join(folder, 'offline.txt'), 'a')  # noqa: SIM115 (finish closes)

  def define_metric(self, *_, **__):
    pass

  def log(self, values):
    self._file.write(json.dumps(values) + '\n')

  def finish(self):
    self._file.close()


def _fake_wandb(calls):
  def init(**options):
    calls.append(options)
    run = _FakeRun(options['dir'])
    run.log(options['config'])
    return run

  return types.SimpleNamespace(init=init, Settings=lambda **options: options)


def test_no_secret_reaches_a_file_or_the_screen(tmp_path, monkeypatch, capfd):
  calls = []
  monkeypatch.setitem(sys.modules, 'wandb', _fake_wandb(calls))
  monkeypatch.setenv('HF_TOKEN', SENTINEL)
  monkeypatch.setenv('WANDB_API_KEY', SENTINEL)
  config = {
    'seed': 3,
    'hub_token': SENTINEL,
    'data': {'train': (f'https://me:{SENTINEL}@host/a.jsonl', f'gs://b/{SENTINEL}/x')},
    'max_tokens': 99,
  }
  writer = _writer(tmp_path, config=config, sinks=('wandb',))
  writer.write(1, 'train', {'loss': 0.5})
  writer.close()
  found = [p for p in tmp_path.rglob('*') if p.is_file()]
  assert len(found) == 4  # metrics, events, tracker id, the fake's file
  for path in found:
    assert SENTINEL.encode() not in path.read_bytes(), path
  out = capfd.readouterr()
  assert SENTINEL not in out.out + out.err
  assert calls[0]['config']['seed'] == 3 and calls[0]['config']['max_tokens'] == 99
  assert '"train/loss": 0.5' in (tmp_path / 'offline.txt').read_text()


def test_a_resumed_run_keeps_its_tracker_id(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setitem(sys.modules, 'wandb', _fake_wandb(calls))
  for step in (-1, 5, -1):
    _writer(tmp_path, step, sinks=('wandb',)).close()
  first, resumed, fresh = (c['id'] for c in calls)
  assert first == resumed != fresh


def test_a_tracker_whose_server_is_away_ends_no_run(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(sys.modules, 'wandb', _fake_wandb([]))

  def away(*_):
    raise ConnectionError('no route to host')

  writer = _writer(tmp_path, sinks=('wandb',))
  monkeypatch.setattr(_FakeRun, 'log', away)
  monkeypatch.setattr(_FakeRun, 'finish', away)
  writer.write(1, 'train', {'loss': 0.5})
  writer.write(2, 'train', {'loss': 0.25})
  writer.close()
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 2
  assert caplog.text.count('Wandb: ConnectionError: no route to host') == 1
