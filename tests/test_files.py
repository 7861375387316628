"""storage/files.py: files replaced whole or not at all; a workdir that refuses is found early."""

import errno
import os
import subprocess
import sys

import pytest

from ftjax.runtime.errors import ConfigError
from ftjax.storage import files


def test_write_replaces_whole_and_leaves_nothing_else(tmp_path):
  path = files.join(tmp_path, 'a.json')
  files.write_text(path, 'old')
  files.write_text(path, 'nëw\r\n\n')
  assert files.read_text(path) == 'nëw\r\n\n'
  assert files.listdir(tmp_path) == ['a.json']


@pytest.mark.parametrize('verb', ['fsync', 'replace'])
def test_a_failed_write_keeps_the_old_text(tmp_path, monkeypatch, verb):
  path = files.join(tmp_path, 'a.json')
  files.write_text(path, 'old')

  def refuse(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, verb, refuse)
  with pytest.raises(OSError, match='No space'):
    files.write_text(path, 'new')
  monkeypatch.undo()
  assert files.read_text(path) == 'old'
  assert files.listdir(tmp_path) == ['a.json']


def test_written_files_keep_the_umask(tmp_path):
  old = os.umask(0o022)
  try:
    files.write_text(files.join(tmp_path, 'a'), 'x')
  finally:
    os.umask(old)
  assert os.stat(tmp_path / 'a').st_mode & 0o777 == 0o644


def test_line_log_appends_and_is_readable_at_once(tmp_path):
  path = files.join(tmp_path, 'log')
  log = files.LineLog(path)
  log.write('one')
  assert files.read_text(path) == 'one\n'
  log.close()
  log = files.LineLog(path)
  log.write('two')
  log.close()
  log.close()
  assert files.read_text(path) == 'one\ntwo\n'
  with pytest.raises(ValueError, match='one line'):
    files.LineLog(path).write('a\nb')


def test_join():
  assert files.join('/a/', 'b', 'c') == '/a/b/c'
  assert files.join('gs://bucket/run', 'x') == 'gs://bucket/run/x'
  assert files.join('/', 'x') == '/x'
  for part in ('/etc', 'gs://other'):
    with pytest.raises(ValueError, match='absolute'):
      files.join('/a', part)


@pytest.mark.parametrize(
  'call',
  [
    files.read_text, files.exists, files.listdir, files.makedirs, files.remove, files.LineLog,
    files.probe, lambda p: files.write_text(p, 'x'),
  ],
)  # fmt: skip
def test_every_function_refuses_another_object_store_clearly(call):
  assert files.is_remote('s3://bucket/x') and not files.is_remote('/x')
  with pytest.raises(ConfigError, match=r's3://bucket.*only local paths and gs://') as e:
    call('s3://bucket/x')
  assert e.value.exit_code == 2


def test_probe_makes_the_folder_and_leaves_it_empty(tmp_path):
  workdir = tmp_path / 'runs' / 'new'
  assert 0 <= files.probe(workdir) < 30
  assert files.listdir(workdir) == []


def test_probe_refuses_a_workdir_that_is_a_file(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match=r'--workdir=.*file.*create the folder'):
    files.probe(tmp_path / 'file')
  with pytest.raises(ConfigError, match='create the folder'):
    files.probe(tmp_path / 'file' / 'below')


@pytest.mark.parametrize(
  ('verb', 'operation'),
  [
    ('makedirs', 'create the folder'),
    ('write_text', 'create .*probe'),
    ('listdir', 'list'),
    ('remove', 'delete'),
  ],
)
def test_probe_names_the_operation_that_was_denied(tmp_path, monkeypatch, verb, operation):
  def deny(*_):
    raise PermissionError(errno.EACCES, 'Permission denied')

  monkeypatch.setattr(files, verb, deny)
  with pytest.raises(
    ConfigError, match=f'{tmp_path.name}.*cannot {operation}.*Permission denied'
  ) as e:
    files.probe(tmp_path)
  assert e.value.exit_code == 2


def test_probe_notices_a_listing_that_hides_files(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'listdir', lambda _: [])
  with pytest.raises(ConfigError, match='listing does not show'):
    files.probe(tmp_path)


def test_a_second_process_is_kept_out_of_a_folder_in_use(tmp_path):
  held = files.Lock(tmp_path)
  code = f'from ftjax.storage import files; files.Lock({str(tmp_path)!r})'
  again = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert again.returncode and f'in use by process {os.getpid()}' in again.stderr
  held.release()
  subprocess.run([sys.executable, '-c', code], check=True)


def test_the_lock_goes_with_a_killed_process(tmp_path):
  code = (
    'import os, signal; from ftjax.storage import files; '
    f'held = files.Lock({str(tmp_path)!r}); os.kill(os.getpid(), signal.SIGKILL)'
  )
  subprocess.run([sys.executable, '-c', code], check=False)
  files.Lock(tmp_path).release()
