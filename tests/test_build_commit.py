"""runtime/build_commit.py: the commit of a wheel, of a checkout, of neither."""

import os
import subprocess
import sys

import pytest
import tiny_run

from ftjax.runtime import build_commit
from ftjax.runtime.build_commit import BuildCommit

SHA = '0123456789abcdef0123456789abcdef01234567'


def git(folder, *words):
  environment = {k: v for k, v in os.environ.items() if not k.startswith('GIT_')}
  command = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-C', folder, *words]
  run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  return run.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
  folder = tmp_path / 'a folder'
  (folder / 'ftjax').mkdir(parents=True)
  (folder / 'ftjax' / 'a.py').write_text('a = 1\n')
  git(folder, 'init', '-q')
  git(folder, 'add', '.')
  git(folder, 'commit', '-qm', 'a')
  return folder


def test_a_checkout_is_asked(checkout, monkeypatch):
  commit = git(checkout, 'rev-parse', 'HEAD')
  assert build_commit.find(checkout) == BuildCommit(commit)
  (checkout / 'notes.txt').write_text('not tracked\n')
  assert not build_commit.find(checkout).is_modified
  (checkout / 'ftjax' / 'a.py').write_text('a = 2\n')
  found = build_commit.find(checkout)
  assert found == BuildCommit(commit, True) and found.text() == f'commit {commit}, modified'
  monkeypatch.setenv('GIT_DIR', str(tiny_run.ROOT / '.git'))  # as in a hook of another repository
  assert build_commit.find(checkout) == found
  monkeypatch.setenv('PATH', '')
  assert build_commit.find(checkout) == BuildCommit()


def test_files_that_differ_from_a_commit(checkout):
  commit = git(checkout, 'rev-parse', 'HEAD')
  assert build_commit.changed_files(checkout, commit, 'ftjax') == []
  (checkout / 'ftjax' / 'a.py').write_text('a = 2\n')
  assert build_commit.changed_files(checkout, commit, 'ftjax') == ['ftjax/a.py']
  assert build_commit.changed_files(checkout, SHA, 'ftjax') == []
  assert build_commit.changed_files(checkout / 'ftjax', commit, 'ftjax') == []


def test_a_folder_inside_another_checkout_is_not_of_its_commit(checkout):
  inner = checkout / 'site-packages'
  (inner / 'ftjax').mkdir(parents=True)
  assert build_commit.find(inner).text() == 'commit unknown'


def test_a_repository_without_a_commit_or_damaged_is_unknown(tmp_path):
  git(tmp_path, 'init', '-q')
  assert not build_commit.find(tmp_path).is_known
  (tmp_path / '.git' / 'HEAD').write_text('x')
  assert not build_commit.find(tmp_path).is_known


@pytest.mark.parametrize('is_modified', [False, True])
def test_a_wheel_carries_it(checkout, is_modified):
  file = checkout / 'ftjax' / build_commit.FILE
  file.write_text(BuildCommit(SHA, is_modified).to_json())
  assert build_commit.find(checkout) == BuildCommit(SHA, is_modified)


@pytest.mark.parametrize('text', ['', '{', '[]', '{"commit": 1}', '{"commit": "abc"}', '\0'])
def test_a_damaged_file_is_unknown(tmp_path, text):
  (tmp_path / 'ftjax').mkdir()
  (tmp_path / 'ftjax' / build_commit.FILE).write_text(text)
  assert build_commit.find(tmp_path) == BuildCommit()


def test_it_imports_neither_jax_nor_anything_installed():
  code = 'import sys; from ftjax.runtime import build_commit; print("jax" in sys.modules)'
  command = [sys.executable, '-S', '-c', code]
  run = subprocess.run(command, cwd=tiny_run.ROOT, capture_output=True, text=True, check=True)
  assert run.stdout == 'False\n'
