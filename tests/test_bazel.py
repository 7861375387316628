"""Bazel beside make: MODULE.bazel and the locks agree, buildifier finds nothing; and under Debian's
Bazel the wheel has the bytes of `make wheel`, and layers.toml holds by visibility.
"""

import ast
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
BAZEL = ROOT / 'third_party' / 'bazel'
sys.path.insert(0, str(BAZEL))
import run_pytest  # noqa: E402

PYTHONS = ['3.11', '3.12', '3.13']
LEFT_OUT = ('.git', '.venv*', '.cache', '.*_cache', '__pycache__', 'node_modules', 'runs', 'dist')

needs_bazel = pytest.mark.skipif(not shutil.which('bazel-4'), reason='make bazel installs bazel-4')
needs_git = pytest.mark.skipif(not (ROOT / '.git').exists(), reason='these sources are no checkout')


def run(*command, folder, code=0, **environment):
  """stdout and stderr of a command that exits with `code`."""
  done = subprocess.run(
    [str(word) for word in command],
    cwd=folder,
    env=os.environ | environment,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  assert done.returncode == code, done.stdout
  return done.stdout


def bazel(checkout, output, *words, code=0):
  script = checkout / 'third_party' / 'bazel' / 'debian.sh'
  return run(script, sys.executable, *words, folder='/', code=code, FTJAX_BAZEL_ROOT=str(output))


def sums(folder):
  files = [path for path in folder.iterdir() if path.is_file()]
  return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def calls(path):
  """[(called, {argument: value})] of the calls of a Starlark file, once for each turn of loops."""
  names, found = {}, []

  def value(node):
    return eval(compile(ast.Expression(node), path, 'eval'), {'__builtins__': {}}, dict(names))

  def visit(node):
    if isinstance(node, ast.ListComp):
      first, *others = node.generators
      inner = ast.ListComp(node.elt, others) if others else node.elt
      for item in value(first.iter):
        names[first.target.id] = item
        visit(inner)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) != 'use_extension':
      found.append((ast.unparse(node.func), {k.arg: value(k.value) for k in node.keywords}))

  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
      names[node.targets[0].id] = value(node.value)
    elif isinstance(node, ast.Expr):
      visit(node.value)
  return found


def test_modules_take_every_lock_on_every_python():
  """And the flags of .bazelrc name hubs and Pythons that there are."""
  found = calls(ROOT / 'MODULE.bazel')
  hubs = {(a['hub_name'], a['python_version']): a for name, a in found if name == 'pip.parse'}
  locks = {'test': 'ftjax_test', 'tpu': 'ftjax_tpu', 'cuda': 'ftjax_cuda'}
  assert hubs.keys() == {(hub, python) for hub in locks.values() for python in PYTHONS}
  for (hub, _), arguments in hubs.items():
    path = arguments['requirements_lock'].removeprefix('//third_party:')
    assert locks[pathlib.Path(path).stem] == hub
    pins = re.split(r'\n(?=[a-z])', (ROOT / 'third_party' / path).read_text())
    assert len(pins) > 50 and all('--hash=sha256:' in pin for pin in pins)
  assert [a['python_version'] for name, a in found if name == 'python.toolchain'] == PYTHONS
  assert ('pip.default', {'default_hub': 'ftjax_test'}) in found
  flags = (ROOT / '.bazelrc').read_text()
  assert set(re.findall(r':venv=(\w+)', flags)) == {'ftjax_tpu', 'ftjax_cuda'}
  assert set(re.findall(r':python_version=(\S+)', flags)) == set(PYTHONS[1:])
  version = (ROOT / '.bazelversion').read_text().strip()
  assert re.fullmatch(r'(8\.[7-9]|9\.[2-9])\.\d+', version)


def test_buildifier_finds_nothing():
  if not (BAZEL / 'node_modules' / '.bin' / 'buildifier').exists():
    pytest.skip('make lint-bazel installs buildifier')
  assert run(BAZEL / 'lint.sh', folder='/') == ''


@needs_git
def test_the_status_is_that_of_the_checkout(tmp_path):
  script = tmp_path / 'third_party' / 'bazel' / 'status.sh'
  script.parent.mkdir(parents=True)
  shutil.copy(BAZEL / 'status.sh', script)
  assert run(script, folder='/') == 'STABLE_FTJAX_COMMIT unknown\n'
  run('git', 'init', '-q', folder=tmp_path)
  assert run(script, folder='/') == 'STABLE_FTJAX_COMMIT unknown\n'
  run('git', 'add', '.', folder=tmp_path)
  author = ['-c', 'user.name=a', '-c', 'user.email=a@example.com']
  date = {'GIT_COMMITTER_DATE': '1790000001 +0530'}
  run('git', *author, 'commit', '-qm', 'first', folder=tmp_path, **date)
  commit = run('git', 'rev-parse', 'HEAD', folder=tmp_path)
  clean = f'STABLE_FTJAX_COMMIT {commit}STABLE_FTJAX_EPOCH 1790000001\n'
  assert run(script, folder='/') == clean
  (tmp_path / 'new.py').touch()
  assert run(script, folder='/') == f'{clean}STABLE_FTJAX_MODIFIED yes\n'


def test_the_packages_stay_on_the_path_and_the_runfiles_of_the_project_do_not(monkeypatch):
  """Bazel 9 has the packages in runfiles; with Bazel 4 they are the interpreter's."""
  monkeypatch.setenv('PYTHONPATH', '/b/t.runfiles/ftjax')
  of_python = ['/usr/lib/python3.11', '/venv/lib/python3.11/site-packages']
  path = ['/b/t.runfiles/ftjax/tests', '/b/t.runfiles', *of_python, '/b/t.runfiles/ftjax']
  run_pytest.keep_packages(path, pathlib.Path('/b/t.runfiles/ftjax'))
  assert path == of_python and 'PYTHONPATH' not in os.environ
  packages = [f'/b/t.runfiles/{d}/site-packages' for d in ('pip_311_jax', '_main/t.venv/lib')]
  path = ['/b/t.runfiles/_main', '/b/t.runfiles/python_3_11/lib/python3.11', *packages]
  run_pytest.keep_packages(path, pathlib.Path('/b/t.runfiles/_main'))
  assert path == ['/b/t.runfiles/python_3_11/lib/python3.11', *packages]
  assert os.environ['PYTHONPATH'] == os.pathsep.join(packages)


@pytest.mark.full
@needs_bazel
def test_an_import_against_the_layers_is_found_and_cannot_be_declared(tmp_path):
  checkout = tmp_path / 'checkout'
  shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*LEFT_OUT))
  source = checkout / 'ftjax' / 'losses' / 'policy.py'
  source.write_text(f'import ftjax.training.step\n{source.read_text()}')
  script = checkout / 'third_party' / 'bazel' / 'make_build_files.py'
  message = (
    'ftjax/losses/policy.py imports ftjax/training/step.py: layers.toml does not let losses'
    ' import training\n'
  )
  assert run(sys.executable, '-B', script, '--check', folder='/', code=1) == message

  build = source.with_name('BUILD')
  rule = build.read_text().partition('name = "policy",')[2].partition('\n)\n')[0]
  declared = rule.replace('deps = [', 'deps = [\n        "//ftjax/training:step",')
  build.write_text(build.read_text().replace(rule, declared))
  assert '"//ftjax/training:step"' in build.read_text()
  words = ('build', '--nobuild', '//ftjax/losses:policy')
  printed = bazel(checkout, tmp_path / 'output', *words, code=1)
  assert "target '//ftjax/training:step' is not visible from target" in printed
  assert "'//ftjax/losses:policy'" in printed

  build.write_text(
    build.read_text().replace('//ftjax/training:step', '//ftjax/losses:cross_entropy')
  )
  bazel(checkout, tmp_path / 'output', *words)


@pytest.mark.full
@needs_bazel
@needs_git
def test_the_wheel_has_the_bytes_of_make_wheel(tmp_path):
  """Of the same commit in a clone; and a change that is not committed is in it, and marked."""
  clone, output = tmp_path / 'clone', tmp_path / 'output'
  run('git', 'clone', '-q', '--depth=1', f'file://{ROOT}', clone, folder='/')
  run(clone / 'third_party' / 'wheel.sh', sys.executable, tmp_path / 'dist', folder='/')
  wanted = sums(tmp_path / 'dist')
  assert len(wanted) == 4
  bazel(clone, output, 'build', '//:wheel')
  (built,) = output.glob('*/execroot/ftjax/bazel-out/*-fastbuild/bin')
  assert {name: s for name, s in sums(built).items() if name in wanted} == wanted

  commit = run('git', 'rev-parse', 'HEAD', folder=clone).strip()
  (clone / 'configs' / 'one_more.py').write_text('x = 1\n')
  bazel(clone, output, 'build', '//:wheel')
  with zipfile.ZipFile(next(built.glob('*.whl'))) as wheel:
    assert wheel.read('ftjax/configs/one_more.py') == b'x = 1\n'
    assert json.loads(wheel.read('ftjax/commit.json')) == {'commit': commit, 'modified': True}
  bill = json.loads(next(built.glob('*.cdx.json')).read_text())
  marks = bill['metadata']['component']['properties']
  assert {'name': 'ftjax:modified', 'value': 'true'} in marks


@pytest.mark.full
@needs_bazel
def test_bazel_run_is_the_program(tmp_path):
  """In the folder where it is called, with a shipped config."""
  words = ['train', '--config=tiny_sft', '--workdir=a run', '--config.steps=2']
  words += ['--config.optim.warmup_steps=0']
  script = BAZEL / 'debian.sh'
  output = str(tmp_path / 'output')
  run(
    script, sys.executable, 'run', '//:ftjax', '--', *words,
    folder=tmp_path, FTJAX_BAZEL_ROOT=output, BUILD_WORKING_DIRECTORY=str(tmp_path),
  )  # fmt: skip
  assert (tmp_path / 'a run' / 'report.html').is_file()
