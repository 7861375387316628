"""The metadata server's notice, from a server on loopback; who holds a TPU."""

import http.server
import subprocess
import sys
import threading

import pytest

from ftjax.cluster import preemption, tpu_lock
from ftjax.runtime.errors import ConfigError


@pytest.fixture
def metadata():
  """(address, answers by question, headers that were sent)."""
  answers = {'preempted': ['FALSE', 'TRUE'], 'maintenance-event': ['NONE']}
  seen, lock, hold = [], threading.Lock(), threading.Event()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      question = self.path.split('?')[0].rsplit('/', 1)[1]
      with lock:
        seen.append((self.headers['Metadata-Flavor'], self.path))
        left = answers[question]
        value = left.pop(0) if left else None
      if value is None:  # nothing changes any more
        hold.wait(20)
        value = 'NONE'
      self.send_response(200)
      self.send_header('ETag', str(len(seen)))
      self.end_headers()
      self.wfile.write(value.encode())

    def log_message(self, *_): ...

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  yield f'127.0.0.1:{server.server_port}', answers, seen
  hold.set()
  server.shutdown()
  thread.join()
  server.server_close()


def hear(address):
  """The notices that came within a while."""
  told, event = [], threading.Event()

  def notice(reason):
    told.append(reason)
    event.set()

  preemption.listen(address, notice)
  event.wait(10)
  return told


def test_preemption_is_reported_once(metadata):
  address, _, seen = metadata
  assert hear(address) == ['preempted=TRUE']
  assert all(flavor == 'Google' and 'wait_for_change=true' in path for flavor, path in seen)


def test_whether_the_notice_was_given(metadata):
  address, answers, seen = metadata
  answers['preempted'] = ['FALSE', 'TRUE\n']
  assert [preemption.is_preempted(address) for _ in range(2)] == [False, True]
  assert seen[0][0] == 'Google' and 'wait_for_change' not in seen[0][1]
  assert not preemption.is_preempted('127.0.0.1:1')  # no server


def test_maintenance_that_ends_the_machine_is_reported(metadata):
  address, answers, _ = metadata
  answers['preempted'] = ['FALSE']
  answers['maintenance-event'] = ['NONE', 'MIGRATE_ON_HOST_MAINTENANCE']
  answers['maintenance-event'] += ['TERMINATE_ON_HOST_MAINTENANCE']
  assert hear(address) == ['maintenance-event=TERMINATE_ON_HOST_MAINTENANCE']


def test_maintenance_that_was_announced_before_the_start_is_waited_for(metadata, caplog):
  address, answers, _ = metadata
  answers['maintenance-event'] = ['TERMINATE_ON_HOST_MAINTENANCE']
  answers['preempted'] = ['FALSE', 'FALSE', 'TRUE']
  assert hear(address) == ['preempted=TRUE']
  answers['preempted'] = ['TRUE']  # of a machine that has half a minute left, at once
  answers['maintenance-event'] = ['NONE']
  assert hear(address) == ['preempted=TRUE']


def test_only_machines_of_that_cloud_ask(monkeypatch, tmp_path):
  monkeypatch.delenv('GCE_METADATA_HOST', raising=False)
  product = tmp_path / 'product_name'
  monkeypatch.setattr(preemption, '_PRODUCT', product)
  assert preemption.server() is None
  product.write_text('Standard PC\n')
  assert preemption.server() is None
  product.write_text('Google Compute Engine\n')
  assert preemption.server() == 'metadata.google.internal'
  monkeypatch.setenv('GCE_METADATA_HOST', 'localhost:1')
  assert preemption.server() == 'localhost:1'


def test_the_holder_of_a_tpu_is_named(tmp_path, monkeypatch):
  lock = tmp_path / 'libtpu_lockfile'
  monkeypatch.setattr(tpu_lock, 'LOCKFILE', str(lock))
  code = f"f = open({str(lock)!r}, 'w'); print('held', flush=True); input()"
  with subprocess.Popen(
    [sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as other:
    assert other.stdout.readline() == 'held\n'
    error = RuntimeError('ABORTED: The TPU is already in use by another process\nmore')
    with pytest.raises(ConfigError, match=f'process {other.pid}: .*libtpu_lockfile') as caught:
      tpu_lock.explain(error)
    assert 'Message of libtpu: ABORTED' in str(caught.value)
    other.communicate('\n')
  with pytest.raises(ConfigError, match='may not see'):
    tpu_lock.explain(RuntimeError('Internal error when accessing libtpu multi-process lockfile.'))
  tpu_lock.explain(RuntimeError('something else'))
