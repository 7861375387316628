"""files.py on gs://, against a server on loopback: the same promises as on a disk, or the ones that
docs/gcs.md gives in their place.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from fake_gcs import BUCKET, PRINCIPAL

from ftjax.rl.rollout_files import RolloutFiles
from ftjax.runtime.errors import ConfigError
from ftjax.storage import files, gcs, gcs_lock, gcs_probe

# Line ends, boundaries and zeros that a careless upload would touch.
BYTES = b'\r\n\0--boundary\r\rx\xff\xfe\n\n' * 1000 + b'\r'
RUN = f'gs://{BUCKET}/run'


def test_files_are_written_whole_read_listed_and_removed(bucket):
  path = files.join(RUN, 'a.json')
  with pytest.raises(FileNotFoundError):
    files.read_text(path)
  files.makedirs(RUN)
  assert not files.exists(path) and not files.exists(RUN)
  for text in ('old', 'nëw\r\n\n'):
    files.write_text(path, text)
    assert files.read_text(path) == text
  files.write_text(files.join(RUN, 'eval', 'b'), '')
  gcs.GcsPath(RUN).blob().bucket.blob('run/').upload_from_string(b'')  # a console's empty folder
  assert files.listdir(RUN) == ['a.json', 'eval']
  assert files.exists(RUN) and files.exists(path) and files.exists(files.join(RUN, 'eval'))
  assert not files.exists(RUN + '/a') and not files.exists(f'gs://{BUCKET}/ru')
  files.remove(path)
  with pytest.raises(FileNotFoundError):
    files.remove(path)
  with pytest.raises(FileNotFoundError):
    files.listdir(f'gs://{BUCKET}/nothing')
  assert files.listdir(RUN) == ['eval'] and files.absolute(RUN) == RUN


@pytest.mark.parametrize('path', ['gs://', 'gs:///x', 'gs://b/a/../c', 'gs://b/./a', 'gs://b//a'])
def test_names_that_a_bucket_would_take_by_their_letters_are_refused(path):
  with pytest.raises(ConfigError, match='expected gs://BUCKET/PATH'):
    files.as_path(path)


def test_a_path_behaves_like_one_of_pathlib(bucket, tmp_path):
  bucket_path, local = files.as_path(RUN), files.as_path(tmp_path)
  for name in ('m-1.safetensors', 'x.jsonl.gz', 'tokenizer', '.lock'):
    for folder in (bucket_path, local):
      (folder / name).write_bytes(BYTES)
    ours, theirs = bucket_path / name, local / name
    assert (ours.name, ours.suffix, ours.suffixes) == (theirs.name, theirs.suffix, theirs.suffixes)
    assert ours.read_bytes() == BYTES and ours.stat().st_size == theirs.stat().st_size
    assert ours.is_file() and not ours.is_dir() and ours.parent == bucket_path
  names = [[p.name for p in sorted(f.iterdir())] for f in (bucket_path, local)]
  assert names[0] == names[1]
  assert [p.name for p in bucket_path.glob('*.safetensors')] == ['m-1.safetensors']
  assert list((bucket_path / 'no').glob('*')) == []


def test_reads_are_ranges_and_large_ones_several_at_once(bucket, monkeypatch):
  content = bytes(range(256)) * 200
  path = gcs.GcsPath(RUN) / 'a'
  path.write_bytes(content)
  with path.open('rb', buffering=0) as file:
    file.seek(1000)
    assert file.read(24) == content[1000:1024] and file.tell() == 1024
  assert bucket.sent() == 24
  monkeypatch.setattr(gcs, '_PIECE', 1000)
  with path.open('rb', buffering=4096) as file:
    assert file.read() == content and file.read() == b''
  assert len([r for r in bucket.requests if r.is_content]) == 1 + -(-len(content) // 1000)
  assert path.open(newline='', encoding='latin-1').read() == content.decode('latin-1')


def test_an_object_replaced_while_it_is_read_is_an_error(bucket):
  path = gcs.GcsPath(RUN) / 'a'
  path.write_bytes(b'one' * 100)
  reader = path.open('rb', buffering=0)
  files.write_text(path, 'two' * 100)
  with pytest.raises(FileNotFoundError):
    reader.read(3)


def test_a_stream_makes_an_object_only_when_it_is_closed_well(bucket):
  path = gcs.GcsPath(RUN) / 'a'
  with path.open('wb') as out:
    for _ in range(3):
      out.write(memoryview(BYTES))
    files.to_disk(out)
    assert not bucket.names()
  assert bucket.read('run/a') == 3 * BYTES
  with pytest.raises(ZeroDivisionError), path.open('wb') as out:
    out.write(b'half')
    raise ZeroDivisionError
  assert bucket.read('run/a') == 3 * BYTES


@pytest.mark.parametrize('size', [4, 1 << 26])  # the second has sent a piece before it is refused
def test_what_a_stream_could_not_write_is_not_written_later(bucket, size):
  def write():
    with (gcs.GcsPath(RUN) / 'a').open('wb') as out:
      out.write(bytes(size))
      bucket.deny = {'objects.create'}

  with pytest.raises(PermissionError):
    write()
  bucket.deny = set()
  count = len(bucket.requests)
  gc.collect()  # the client's file closes itself
  assert len(bucket.requests) == count and not bucket.names()


def test_refusals_are_os_errors_that_name_the_object(bucket):
  path = files.join(RUN, 'a')
  bucket.deny = {'objects.create', 'objects.get'}
  for call in (lambda: files.write_text(path, 'x'), lambda: files.read_text(path)):
    with pytest.raises(PermissionError, match=r'Forbidden.*gs://bucket/run/a'):
      call()


def test_a_line_log_is_uploaded_whole_at_sync_and_continues(bucket):
  path = files.join(RUN, 'metrics.jsonl')
  log = files.LineLog(path)
  for i in range(100):
    log.write(f'row {i}')
  uploads = [r for r in bucket.requests if r.permission == 'objects.create']
  assert len(uploads) == 1 and files.read_text(path) == 'row 0\n'  # the pace: ten seconds
  log.sync()
  assert files.read_text(path) == ''.join(f'row {i}\n' for i in range(100))
  count = len(bucket.requests)
  log.sync()
  assert len(bucket.requests) == count  # nothing new, nothing sent
  log.close()
  log = files.LineLog(path)
  log.write('last')
  log.close()
  assert files.read_text(path).endswith('row 99\nlast\n')
  with pytest.raises(ValueError, match='one line'):
    log.write('a\nb')


def test_a_line_log_outlives_a_refusal(bucket, caplog):
  log = files.LineLog(files.join(RUN, 'log'))
  bucket.deny = {'objects.create'}
  log.write('one')
  assert 'upload failed, tried again later' in caplog.text
  with pytest.raises(PermissionError):
    log.sync()
  bucket.deny = set()
  log.write('two')
  log.close()
  assert bucket.read('run/log') == b'one\ntwo\n'


def test_the_pace_follows_what_an_upload_costs(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])
  pace = gcs.Pace(10)
  assert pace.is_due()
  with pace.upload():
    now[0] += 3
  now[0] += 59
  assert not pace.is_due()
  now[0] += 2
  assert pace.is_due()


def test_staged_files_are_pushed_when_they_grow(bucket):
  staged = files.Staged(files.join(RUN, 'tensorboard'))
  for name, size in (('a', 10), ('b/c', 5)):
    path = os.path.join(staged.folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as f:
      f.write(b'x' * size)
  assert staged.is_due() and staged.is_remote
  staged.push()
  assert bucket.names() == ['run/tensorboard/a', 'run/tensorboard/b/c'] and not staged.is_due()
  count = len(bucket.requests)
  staged.push()
  assert len(bucket.requests) == count
  with open(os.path.join(staged.folder, 'a'), 'ab') as f:
    f.write(b'y')
  staged.push()
  assert bucket.read('run/tensorboard/a') == b'x' * 10 + b'y'
  staged.close()
  assert not os.path.exists(staged.folder)


def test_a_local_staged_folder_is_the_folder(tmp_path):
  staged = files.Staged(tmp_path / 'a')
  assert staged.folder == str(tmp_path / 'a') and not staged.is_due()
  staged.push()
  staged.close()
  assert not (tmp_path / 'a').exists()


def test_mirrors_of_folders_do_not_meet(tmp_path, monkeypatch):
  monkeypatch.setenv('FTJAX_CACHE', str(tmp_path))
  mirrors = {files.local_mirror(f'gs://{n}') for n in ('a/b', 'a/c', 'b/b')}
  assert len(mirrors) == 3 and all(tmp_path in m.parents for m in mirrors)
  assert files.local_mirror('/data') == files.as_path('/data')


def test_a_folder_without_its_mark_is_not_fetched(bucket, tmp_path):
  source, target = tmp_path / 'source', tmp_path / 'target'
  source.mkdir()
  target.mkdir()
  for name in ('tokens.bin', 'meta.json', 'z.bin'):
    (source / name).write_bytes(BYTES + name.encode())
  files.put_folder(source, RUN, 'meta.json')
  written = [r.key for r in bucket.requests if r.permission == 'objects.create' and r.key]
  assert list(dict.fromkeys(written)) == ['run/tokens.bin', 'run/z.bin', 'run/meta.json']
  assert files.fetch_folder(RUN, target, 'meta.json')
  assert all((target / p.name).read_bytes() == p.read_bytes() for p in source.iterdir())
  count = len(written)
  files.put_folder(source, RUN, 'meta.json')
  assert count == len([r for r in bucket.requests if r.permission == 'objects.create' and r.key])
  files.remove(files.join(RUN, 'meta.json'))
  assert not files.fetch_folder(RUN, target, 'meta.json')
  assert not files.fetch_folder(source, target, 'meta.json')


# The lock


@pytest.fixture
def hold(bucket):
  """`hold(told)` takes the lock of RUN; a loss is told to the list, and ends no test process."""
  made = []

  def make(told=None):
    lost = [] if told is None else told
    made.append(gcs_lock.BucketLock(RUN, beat=0.05, lost=lost.append))
    return made[-1]

  yield make
  for held in made:
    held._released.set()
    held._thread.join()


def test_a_second_process_is_kept_out(bucket, hold):
  held = hold()
  start = time.monotonic()
  with pytest.raises(ConfigError, match=f'in use by process {os.getpid()} on') as e:
    gcs_lock.BucketLock(RUN, beat=0.05, patience=30)
  assert e.value.exit_code == 2 and time.monotonic() - start < 25
  held.release()
  assert bucket.names() == []
  files.Lock(RUN).release()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(bucket):
  code = (
    'import os, signal; from ftjax.storage import files; '
    f'held = files.Lock({RUN!r}); os.kill(os.getpid(), signal.SIGKILL)'
  )
  killed = subprocess.run([sys.executable, '-c', code], check=False)
  assert killed.returncode == -signal.SIGKILL and bucket.names() == ['run/.lock']
  start = time.monotonic()
  files.Lock(RUN).release()
  assert time.monotonic() - start < 30


def foreign_lock(**changes):
  holder = {'host': 'other', 'process': 7, 'started': '1', 'machine': 'another', 'nonce': 'x'}
  files.write_text(files.join(RUN, '.lock'), json.dumps(holder | changes))


def test_a_silent_lock_of_another_machine_is_taken_over_after_the_patience(bucket):
  foreign_lock()
  start = time.monotonic()
  gcs_lock.BucketLock(RUN, patience=1.0).release()
  assert time.monotonic() - start >= 1.0


@pytest.mark.parametrize('content', ['', '[]', '{"process": "x"}'])
def test_a_lock_without_content_is_taken_over_too(bucket, content):
  files.write_text(files.join(RUN, '.lock'), content)
  gcs_lock.BucketLock(RUN, patience=0.2).release()


def test_of_two_that_take_over_one_wins(bucket, monkeypatch):
  foreign_lock()
  real = gcs_lock.BucketLock._take

  def late(self, generation):
    if generation:
      foreign_lock(host='third', nonce='y')  # somebody was quicker
    return real(self, generation)

  monkeypatch.setattr(gcs_lock.BucketLock, '_take', late)
  with pytest.raises(ConfigError, match='in use by'):
    gcs_lock.BucketLock(RUN, patience=0.2)
  assert json.loads(bucket.read('run/.lock'))['nonce'] == 'y'


def test_a_holder_that_was_taken_for_dead_reports_it_and_keeps_the_new_lock(bucket, hold, caplog):
  told = []
  held = hold(told)
  foreign_lock()
  held._thread.join(30)
  assert not held._thread.is_alive() and 'took over the lock of this folder' in caplog.text
  assert len(told) == 1 and 'gs://bucket/run/.lock' in told[0]
  held.release()
  assert json.loads(bucket.read('run/.lock'))['nonce'] == 'x'


def test_a_run_whose_folder_was_taken_over_ends(bucket):
  code = (
    'import sys, time; from ftjax.storage import gcs_lock; '
    f'held = gcs_lock.BucketLock({RUN!r}, beat=0.05); print("held", flush=True); time.sleep(60)'
  )
  with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE) as run:
    assert run.stdout.readline() == b'held\n'
    foreign_lock()
    assert run.wait(50) == 75


def test_a_lock_that_was_deleted_is_made_again(bucket, hold):
  told = []
  held = hold(told)
  files.remove(files.join(RUN, '.lock'))
  deadline = time.monotonic() + 30
  while not bucket.names() and time.monotonic() < deadline:
    time.sleep(0.02)
  assert bucket.names() == ['run/.lock'] and not told
  held.release()
  assert bucket.names() == []


def test_a_lock_that_is_renewed_as_it_is_read_is_held(bucket, hold, monkeypatch):
  """Between the look at an object and the reading of that generation of it."""
  held, read, renewed = hold(), gcs.GcsPath.read_bytes, []

  def late(path):
    if path.key.endswith('.lock') and not renewed:
      renewed.append(bucket.object('run/.lock')['generation'])
      deadline = time.monotonic() + 30
      while bucket.object('run/.lock')['generation'] == renewed[0] and time.monotonic() < deadline:
        time.sleep(0.02)
    return read(path)

  monkeypatch.setattr(gcs.GcsPath, 'read_bytes', late)
  generation, holder = held._holder()
  assert renewed and generation and holder['process'] == os.getpid()


def test_the_lock_shows_life(bucket, hold):
  held = hold()
  first = bucket.object('run/.lock')['generation']
  deadline = time.monotonic() + 30
  while bucket.object('run/.lock')['generation'] == first and time.monotonic() < deadline:
    time.sleep(0.02)
  assert bucket.object('run/.lock')['generation'] != first
  bucket.deny = {'objects.create'}
  time.sleep(0.2)
  bucket.deny = set()
  assert held._thread.is_alive()  # a refusal is no loss
  held.release()
  assert bucket.names() == []


# The probe


def test_the_probe_is_quick_and_leaves_nothing(bucket):
  assert 0 <= files.probe(RUN) < 5
  assert bucket.names() == []
  asked = {r.permission for r in bucket.requests}
  assert asked == {'objects.create', 'objects.get', 'objects.list', 'objects.delete', 'buckets.get'}


@pytest.mark.parametrize(
  ('verb', 'role'),
  [
    ('objects.create', 'objectUser'),
    ('objects.get', 'objectUser'),
    ('objects.list', 'objectUser'),
    ('objects.delete', 'objectUser'),
    ('buckets.get', 'legacyBucketReader'),
  ],
)
def test_each_refused_request_is_reported_with_account_bucket_and_remedy(bucket, verb, role):
  bucket.deny = {verb}
  start = time.monotonic()
  with pytest.raises(ConfigError) as e:
    files.probe(RUN)
  assert time.monotonic() - start < 30 and e.value.exit_code == 2
  told = str(e.value)
  assert f'--workdir={RUN}: {PRINCIPAL} lacks storage.{verb} on gs://{BUCKET}.' in told
  assert (
    f'gcloud storage buckets add-iam-policy-binding gs://{BUCKET} '
    f'--member=serviceAccount:{PRINCIPAL} --role=roles/storage.{role}'
  ) in told
  assert 'http' not in told.replace('https://', 'http') and 'Bearer' not in told


def test_a_server_that_does_not_answer_is_reported_within_five_seconds(bucket):
  bucket.hangs = True
  start = time.monotonic()
  with pytest.raises(ConfigError, match=r'storage\.objects\.create.*reach storage.googleapis.com'):
    files.probe(RUN)
  assert time.monotonic() - start < 30


def test_the_limit_holds_whatever_the_client_does(bucket, monkeypatch):
  forever = [('storage.objects.list', lambda: time.sleep(60))]
  monkeypatch.setattr(gcs_probe, '_attempts', lambda _: forever)
  start = time.monotonic()
  with pytest.raises(
    ConfigError, match=r'no answer within 4 s while trying storage\.objects\.list'
  ):
    files.probe(RUN)
  assert time.monotonic() - start < 30


def test_a_bucket_that_is_not_there(bucket):
  with pytest.raises(ConfigError, match='there is no bucket missing'):
    files.probe('gs://missing/run')


def test_an_access_scope_is_another_remedy_than_a_role():
  told = gcs_probe._refusal('b', 'storage.objects.create', 'ACCESS_TOKEN_SCOPE_INSUFFICIENT')
  assert '--scopes=cloud-platform' in told and 'add-iam-policy' not in told


def test_who_asks_is_never_a_token(bucket, monkeypatch):
  class Credentials:
    service_account_email = 'default'
    account = 'me@example.com'
    token = 'ya29.secret'

  client = gcs.client()
  monkeypatch.setattr(client, '_credentials', Credentials(), raising=False)
  told = gcs_probe._refusal('b', 'storage.objects.get', 'no names here, Authorization: ya29.secret')
  assert '--member=user:me@example.com' in told and 'secret' not in told
  Credentials.account = 'ya29.secret'
  told = gcs_probe._refusal('b', 'storage.objects.get', '')
  assert 'MEMBER: your account, see gcloud auth list' in told and 'secret' not in told
  assert gcs_probe._principal('Anonymous caller does not have x').startswith('an anonymous')


@pytest.mark.parametrize('package', ['gcsfs', 'google.cloud.storage'])
def test_without_the_extra_a_path_names_it(package, bucket):
  code = (
    f'import sys; sys.modules[{package!r}] = None\n'
    'from ftjax.storage import files\n'
    f'files.probe({RUN!r})'
  )
  ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert ran.returncode and 'ConfigError' in ran.stderr and "'.[gcs]'" in ran.stderr


def test_local_paths_import_nothing_of_google(tmp_path):
  code = (
    'import sys; from ftjax.storage import files\n'
    f'files.probe({str(tmp_path)!r}); files.Lock({str(tmp_path)!r}); files.exists("/x")\n'
    'print([m for m in sys.modules if m.startswith(("google.", "gcsfs", "requests"))])'
  )
  ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert ran.stdout.strip() == '[]'


def test_missing_credentials_are_reported(monkeypatch):
  from google.auth.exceptions import DefaultCredentialsError
  from google.cloud import storage

  for error, told in (
    (DefaultCredentialsError('no'), 'application-default login'),
    (OSError('Project was not passed'), 'GOOGLE_CLOUD_PROJECT'),
  ):
    with monkeypatch.context() as patch:

      def fail(error=error):
        raise error

      patch.setattr(storage, 'Client', fail)
      with pytest.raises(ConfigError, match=told):
        gcs.client.__wrapped__()


def test_files_of_rollouts_in_a_bucket_are_made_and_cut(bucket):
  """Also before there is one: a folder without files is not there."""
  made = RolloutFiles(RUN, 1)
  made.cut(-1)
  for number in range(3):
    made.write_rows(str(number), [{'prompt': 'p'}])
    made.write_arrays(number, {'tokens': np.zeros(2)})
  RolloutFiles(RUN, 1).cut(1)
  assert bucket.names('run/rollouts/') == ['run/rollouts/0.jsonl']
