"""The BUILD files agree with the imports, layers.toml and targets.toml; what they cannot hold is an
error in one line.
"""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = 'third_party/bazel/make_build_files.py'
sys.path.insert(0, str(ROOT / 'third_party' / 'bazel'))
import make_build_files  # noqa: E402
import tests_targets  # noqa: E402


def run(root, *flags):
  command = [sys.executable, '-B', str(root / SCRIPT), *flags]
  return subprocess.run(command, cwd='/', capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path):
  """A copy of a few folders of the project, with a space in its path."""
  root = tmp_path / 'a checkout'
  for folder in ('ftjax', 'configs', 'third_party'):
    left_out = shutil.ignore_patterns('__pycache__', 'node_modules')
    shutil.copytree(ROOT / folder, root / folder, ignore=left_out)
  shutil.copy(ROOT / 'layers.toml', root)
  targets = root / 'third_party' / 'bazel' / 'targets.toml'
  text = targets.read_text()
  targets.write_text(text[: text.index('[ci]')] + '[ci]\n')
  assert run(root).returncode == 0
  return root


def test_the_files_agree_with_the_imports():
  found = run(ROOT, '--check')
  assert found.returncode == 0, f'{found.stdout[-3000:]}{found.stderr}\nrun python {SCRIPT}'


def test_ci_has_a_test_of_each_folder():
  project = make_build_files.Project(ROOT)
  chosen = project.targets['ci']
  folders = {file.rpartition('/')[0] for file in project.sources.files}
  of_ftjax = {'/'.join(f.split('/')[:2]) for f in folders if f.startswith('ftjax/')}
  tests = {f.rpartition('/')[0] for f in project.sources.files if make_build_files.is_test(f)}
  assert chosen.keys() == of_ftjax | tests
  for folder, test in chosen.items():
    own = tests_targets.modules(project, test)
    reached = own.union(*(project.sources.imported(file)[0] for file in own))
    assert make_build_files.is_test(test), test
    assert any(file.startswith(f'{folder}/') for file in reached), (folder, test)


@pytest.mark.full
def test_an_import_that_is_not_declared_is_found(checkout):
  assert run(checkout, '--check').returncode == 0
  file = checkout / 'ftjax' / 'rl' / 'measurements.py'
  file.write_text(f'from ftjax.rl import rollout_files\n{file.read_text()}')
  found = run(checkout, '--check')
  assert found.returncode == 1 and '+        ":rollout_files",' in found.stdout.splitlines()
  assert run(checkout).returncode == 0 and run(checkout, '--check').returncode == 0


@pytest.mark.full
@pytest.mark.parametrize(
  'line, message',
  [
    ('import ftjax.training.step', 'layers.toml does not let losses import training'),
    ('from ftjax.models import rope as r', 'layers.toml does not let losses import models'),
    ('import not_installed.part', 'requirements/test.txt has no not-installed'),
    ('from . import masked', 'losses/policy.py:1: a relative import'),
  ],
)
def test_an_import_that_may_not_be_is_refused(checkout, line, message):
  file = checkout / 'ftjax' / 'losses' / 'policy.py'
  file.write_text(f'{line}\n{file.read_text()}')
  found = run(checkout, '--check')
  assert found.returncode == 1 and message in found.stderr, found.stderr
  assert found.stderr.count('\n') == 1


@pytest.mark.full
def test_files_that_need_each_other_are_one_target(checkout):
  folder = checkout / 'ftjax' / 'losses'
  (folder / 'one.py').write_text('from ftjax.losses import two\n')
  (folder / 'two.py').write_text('def f():\n  from ftjax.losses import one\n')
  (folder / 'three.py').write_text('import ftjax.losses.two\n')
  assert run(checkout).returncode == 0
  text = (folder / 'BUILD').read_text()
  assert '        "one.py",\n        "two.py",\n' in text and 'name = "two"' not in text
  three = text[text.index('name = "three"') :]
  assert '":one",' in three.partition(')')[0]


@pytest.mark.full
def test_a_file_that_is_gone_leaves_no_build_file(checkout):
  folder = checkout / 'ftjax' / 'spare'
  folder.mkdir()
  (folder / 'BUILD').write_text('# old\n')
  assert '-# old' in run(checkout, '--check').stdout.splitlines()
