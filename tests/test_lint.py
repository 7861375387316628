"""third_party/lint.sh: scripts, YAML and the Dockerfile against their linters, where these are
found: on PATH, or in the environment that `make lint-launch` makes.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import tiny_run

ROOT = tiny_run.ROOT
PATH = f'{ROOT}/.venv-lint/bin:{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
BAD = {
  'shellcheck': ('a b.sh', '#!/usr/bin/env bash\nrm $1\n', 'SC2086'),
  'yamllint': ('a b.yaml', '---\na:   1\n', 'colons'),
  'hadolint': ('a b/Dockerfile', 'FROM python:3.12\nRUN cd /tmp\n', 'DL3003'),
}


def lint(tool, folder=ROOT):
  if shutil.which(tool, path=PATH) is None:
    pytest.skip(f'{tool} is not installed; make lint-launch')
  return subprocess.run(
    [f'{folder}/third_party/lint.sh', tool],
    env=os.environ | {'PATH': PATH},
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  'tool', [pytest.param('shellcheck', marks=pytest.mark.full), 'yamllint', 'hadolint']
)
def test_all_files_pass(tool):
  done = lint(tool)
  assert done.returncode == 0, done.stdout + done.stderr
  if tool == 'shellcheck' and (ROOT / '.git').exists():  # a script is known by its first line
    listed = subprocess.check_output(['git', 'ls-files'], cwd=ROOT, text=True).splitlines()
    scripts = {f for f in listed if f.endswith(('.sh', '.sbatch'))} | {'.ci/run'}
    assert int(done.stdout.split()[1]) >= len(scripts) > 20


@pytest.mark.parametrize('tool', BAD)
def test_a_fault_is_found(tool, tmp_path):
  """In sources without git, in a name with a space."""
  name, text, rule = BAD[tool]
  folder = tmp_path / 'third_party'
  folder.mkdir()
  for file in ('lint.sh', 'yamllint.yaml'):
    shutil.copy2(ROOT / 'third_party' / file, folder)
  bad = tmp_path / name
  bad.parent.mkdir(exist_ok=True)
  bad.write_text(text)
  done = lint(tool, tmp_path)
  assert done.returncode == 1 and rule in done.stdout + done.stderr, done.stdout + done.stderr


def test_a_missing_tool_or_no_files_are_errors(tmp_path):
  def run(*words, folder=ROOT):
    command = [f'{folder}/third_party/lint.sh', *words]
    env = {'PATH': '/usr/bin:/bin'}
    return subprocess.run(command, env=env, capture_output=True, text=True)

  done = run('nosuchtool')
  assert done.returncode == 2 and 'nosuchtool is not on PATH' in done.stderr
  (tmp_path / 'third_party').mkdir()
  shutil.copy2(ROOT / 'third_party/lint.sh', tmp_path / 'third_party')
  done = run('bash', folder=tmp_path)
  assert done.returncode == 2 and 'expected shellcheck, yamllint or hadolint' in done.stderr
