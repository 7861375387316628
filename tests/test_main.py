"""The console script `ftjax`: its list of entries, dispatch, and what the package installs."""

import ast
import subprocess
import sys
import tomllib

import pytest
import tiny_run

import ftjax
from ftjax import __main__
from ftjax.runtime import build_commit

PROJECT = tomllib.loads((tiny_run.ROOT / 'pyproject.toml').read_text())


def call(*arguments):
  """(exit code, stdout, stderr) of `python -m ftjax`."""
  command = [sys.executable, '-m', 'ftjax', *arguments]
  done = subprocess.run(command, cwd=tiny_run.ROOT, capture_output=True, text=True, check=False)
  return done.returncode, done.stdout, done.stderr


def test_every_entry_is_listed_with_one_line():
  files = [p for p in (tiny_run.ROOT / 'ftjax').glob('*.py') if p.stem != '__main__']
  assert {p.stem for p in files if '__main__' in p.read_text()} == set(__main__.ENTRIES)
  lines = __main__.usage().splitlines()
  for name in __main__.ENTRIES:
    assert len([line for line in lines if line.startswith(f'  {name} ')]) == 1
  assert all(len(line) <= 100 for line in lines)


def test_help_imports_only_the_standard_library():
  tree = ast.parse((tiny_run.ROOT / 'ftjax' / '__main__.py').read_text())
  at_once = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
  names = {alias.name for n in at_once for alias in n.names}
  assert names == {'difflib', 'importlib', 'sys', 'ftjax'}
  init = ast.parse((tiny_run.ROOT / 'ftjax' / '__init__.py').read_text())
  assert not [n for n in ast.walk(init) if isinstance(n, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize(
  ('arguments', 'code', 'text'),
  [
    (['--help'], 0, 'Usage: ftjax ENTRY'),
    (['trian', '--config=tiny_sft'], 2, 'error: trian: there is no such entry; entries: train, '),
    (['trian'], 2, 'did you mean train?'),
    (['Train'], 2, 'did you mean train?'),
    (
      ['xyz'],
      2,
      'entries: train, preview, plan, evaluate, generate, convert, study, teacher, supervise, '
      'lm_eval\n',
    ),
    ([], 2, 'error: an entry is missing'),
    (['--config=tiny_sft'], 2, 'ftjax ENTRY --config=tiny_sft'),
  ],
)
def test_the_first_argument(arguments, code, text, capsys, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['ftjax', *arguments])
  left = 0
  try:
    __main__.main()
  except SystemExit as error:
    left = error.code
  printed = capsys.readouterr()
  assert left == code and text in (printed.err if code else printed.out)


@pytest.mark.parametrize('name', sorted(__main__.ENTRIES.keys() - {'lm_eval'}))  # whose is its own
def test_help_of_an_entry_shows_its_own_flags(name):
  code, out, err = call(name, '--help')
  assert code == 0 and err == ''
  about = ast.get_docstring(ast.parse((tiny_run.ROOT / 'ftjax' / f'{name}.py').read_text()))
  assert about.startswith(f'python -m ftjax.{name} --')
  assert out.startswith(about.splitlines()[0].replace('python -m ftjax.', 'ftjax '))
  if name == 'convert':
    assert call('help', name) == (0, out, '')
  defined = {'train': 'heartbeat_s', 'preview': 'rows', 'plan': 'topology', 'evaluate': 'workdir'}
  defined |= {
    'study': 'workdir',
    'teacher': 'coordinator',
    'generate': 'prompts',
    'convert': 'target',
    'supervise': 'max_idle_starts',
  }
  assert f'\n  --{defined[name]}  ' in out


def test_errors_of_an_entry_are_as_with_python_m():
  wrong = ['--config=tiny_sft', '--workdir=x', '--config.optim.warmup_step=3']
  code, _, err = call('train', *wrong)
  assert code == 2 and err == (
    'error: --config.optim.warmup_step: there is no such key; did you mean optim.warmup_steps?\n'
  )


def test_the_script_and_the_packages_that_are_installed():
  assert PROJECT['project']['scripts'] == {'ftjax': 'ftjax.__main__:main'}
  root = tiny_run.ROOT / 'ftjax'
  folders = {
    '.'.join(('ftjax', *p.parent.relative_to(root).parts)) for p in root.rglob('__init__.py')
  }
  assert {
    '.'.join(('ftjax', *p.parent.relative_to(root).parts)) for p in root.rglob('*.py')
  } == folders
  targets = PROJECT['tool']['hatch']['build']['targets']
  assert targets['wheel']['only-include'] == ['ftjax', 'configs', 'launch']
  assert targets['wheel']['sources'] == {'configs': 'ftjax/configs', 'launch': 'ftjax/launch'}


def test_version_names_the_commit():
  words = f'ftjax {ftjax.__version__}, {build_commit.find().text()}\n'
  assert call('--version') == (0, words, '')
  assert 'version' not in PROJECT['project'] and 'version' in PROJECT['project']['dynamic']
