"""third_party/build_wheel.py and wheel.sh: the same bytes anywhere, and all that an installed ftjax
needs.
"""

import configparser
import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import jsonschema
import pytest
import referencing
import tiny_run
from cyclonedx.schema import _res
from referencing.jsonschema import DRAFT7

import ftjax

ROOT = tiny_run.ROOT
SCRIPT = ROOT / 'third_party' / 'build_wheel.py'
SHA = '0123456789abcdef0123456789abcdef01234567'
EPOCH = 1790000001  # odd: a zip file holds even seconds
STEM = f'ftjax-{ftjax.__version__}'
WHEEL, SDIST, BILL = f'{STEM}-py3-none-any.whl', f'{STEM}.tar.gz', f'{STEM}.cdx.json'
FILES = {WHEEL, SDIST, BILL, 'SHA256SUMS'}
# Of the source archive, beside pyproject.toml.
ROOT_FILES = (
  'CHANGELOG.md',
  'CITATION.cff',
  'CONTRIBUTING.md',
  'LICENSE',
  'README.md',
  'SECURITY.md',
)

needs_git = pytest.mark.skipif(not (ROOT / '.git').exists(), reason='these sources are no checkout')


def run(*command, folder=ROOT, code=0, umask=0o022, **environment):
  """(stdout, stderr) of a command that exits with `code`."""
  done = subprocess.run(
    [str(word) for word in command],
    cwd=folder,
    env=os.environ | {'PYTHONPATH': ''} | environment,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    umask=umask,
    check=False,
  )
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout, done.stderr


def flags(source, output, epoch=EPOCH, commit=SHA):
  return [f'--source={source}', f'--output={output}', f'--epoch={epoch}', f'--commit={commit}']


def sums(folder):
  return {
    p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in pathlib.Path(folder).iterdir()
  }


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """A folder with what is built from the sources as they are."""
  folder = tmp_path_factory.mktemp('built')
  run(sys.executable, SCRIPT, *flags(ROOT, folder))
  return folder


def names(wheel):
  with zipfile.ZipFile(wheel) as archive:
    return set(archive.namelist())


def sources(folder, target=''):
  """Files of a folder of the sources as a wheel names them, without what tools leave there."""
  return {
    (target or folder) + path.relative_to(ROOT / folder).as_posix().join(['/', ''])
    for path in (ROOT / folder).rglob('*')
    if path.is_file()
    and path.name not in ('BUILD', 'BUILD.bazel')
    and '__pycache__' not in path.parts
    and not any(part.startswith('.') for part in path.relative_to(ROOT).parts)
  }


def test_the_wheel_holds_every_module_config_and_launcher_and_nothing_else(built):
  found = {n for n in names(built / WHEEL) if '.dist-info/' not in n}
  launchers = sources('launch', 'ftjax/launch')  # none where there is no such folder
  configs = sources('configs', 'ftjax/configs')
  assert found == sources('ftjax') | configs | launchers | {'ftjax/commit.json'}
  assert {'ftjax/configs/tiny_sft.py', 'ftjax/reporting/templates/page.html'} <= found
  assert not [n for n in found if 'test' in pathlib.PurePath(n).name.split('_')]


def test_the_entry_point_version_and_licence(built):
  with zipfile.ZipFile(built / WHEEL) as archive:
    info = f'{STEM}.dist-info'
    scripts = configparser.ConfigParser()
    scripts.read_string(archive.read(f'{info}/entry_points.txt').decode())
    assert dict(scripts['console_scripts']) == {'ftjax': 'ftjax.__main__:main'}
    assert f'Version: {ftjax.__version__}\n' in archive.read(f'{info}/METADATA').decode()
    assert archive.read(f'{info}/licenses/LICENSE') == (ROOT / 'LICENSE').read_bytes()
    assert json.loads(archive.read('ftjax/commit.json')) == {'commit': SHA, 'modified': False}


def test_times_and_modes_are_those_of_the_commit(built):
  with tarfile.open(built / SDIST) as archive:
    for member in archive:
      assert (member.uid, member.gid, member.mtime) == (0, 0, EPOCH), member.name
      is_script = archive.extractfile(member).read(2) == b'#!'
      assert member.isfile() and member.mode == (0o755 if is_script else 0o644), member.name
  with zipfile.ZipFile(built / WHEEL) as archive:
    assert {i.date_time for i in archive.infolist()} == {(2026, 9, 21, 14, 13, 20)}
    modes = {i.filename: i.external_attr >> 16 & 0o777 for i in archive.infolist()}
    assert {m for n, m in modes.items() if not n.startswith('ftjax/launch/')} == {0o644}
  assert {p.stat().st_mode & 0o777 for p in built.iterdir()} == {0o644}


def test_sums_are_what_sha256sum_reads(built):
  listed = dict(line.split('  ')[::-1] for line in (built / 'SHA256SUMS').read_text().splitlines())
  assert listed == {n: s for n, s in sums(built).items() if n != 'SHA256SUMS'}
  assert listed.keys() | {'SHA256SUMS'} == FILES


@functools.cache
def _validator():
  """Of CycloneDX 1.6, by the schema that the library ships."""
  folder = pathlib.Path(_res.__path__[0])

  def load(name):
    return json.loads((folder / f'{name}.SNAPSHOT.schema.json').read_text())

  others = {name: DRAFT7.create_resource(load(name)) for name in ('spdx', 'jsf-0.82')}
  registry = referencing.Registry().with_resources(
    [(f'http://cyclonedx.org/schema/{name}.SNAPSHOT.schema.json', r) for name, r in others.items()]
  )
  return jsonschema.Draft7Validator(load('bom-1.6'), registry=registry)


def test_the_bill_of_materials(built):
  bill = json.loads((built / BILL).read_text())
  _validator().validate(bill)
  with pytest.raises(jsonschema.ValidationError):
    _validator().validate(bill | {'specVersion': 6})
  root = bill['metadata']['component']
  assert root['hashes'] == [{'alg': 'SHA-256', 'content': sums(built)[WHEEL]}]
  assert root['properties'] == [{'name': 'ftjax:commit', 'value': SHA}]
  versions = {(c['name'], c['version']): c for c in bill['components']}
  jax = sorted(version for name, version in versions if name == 'jax')
  assert [v.split('.')[:2] for v in jax] == [['0', '10'], ['0', '12']]
  for component in bill['components']:
    assert component['hashes'] and component['purl'].startswith('pkg:pypi/')
  libtpu = [c for c in bill['components'] if c['name'] == 'libtpu']
  assert {p['value'] for c in libtpu for p in c['properties'] if p['name'] == 'ftjax:lock'} == {
    'tpu',
    'plan',
  }
  edges = {d['ref']: d.get('dependsOn', []) for d in bill['dependencies']}
  assert f'jax=={jax[0]}' in edges[root['bom-ref']]
  assert [r for r in edges[f'jax=={jax[0]}'] if r.startswith('ml-dtypes==')]
  reached, left = set(), [root['bom-ref']]
  while left:
    if (ref := left.pop()) not in reached:
      reached.add(ref)
      left += edges[ref]
  assert reached == {root['bom-ref'], *(c['bom-ref'] for c in bill['components'])}


@needs_git
def test_two_clones_give_the_same_bytes(tmp_path):
  """Other folders, times, umasks, locales, time zones; untracked and changed files; a .gitignore
  above the second, which would leave the configs out.
  """
  first, second = tmp_path / 'a', tmp_path / 'an other' / 'plaçe' / 'b'
  for clone, umask in ((first, 0o022), (second, 0o077)):
    clone.parent.mkdir(parents=True, exist_ok=True)
    run('git', 'clone', '-q', '--depth=1', f'file://{ROOT}', clone, umask=umask)
  (second.parent / '.gitignore').write_text('configs\n*.txt\n')
  (second / 'configs' / 'scratch.py').write_text('x = 1\n')
  (second / 'ftjax' / 'train.py').write_text('raise SystemExit\n')
  (second / 'ftjax' / '__pycache__').mkdir()
  (second / 'ftjax' / '__pycache__' / 'train.cpython-311.pyc').write_bytes(b'')
  for path in second.rglob('*.py'):
    os.utime(path, (1e9, 1e9))

  def build(clone, **how):
    script = clone / 'third_party' / 'wheel.sh'
    return run(script, sys.executable, 'dist', folder=clone, **how)

  _, quiet = build(first, LC_ALL='C', TZ='UTC')
  _, warned = build(
    second, umask=0o077, LC_ALL='tr_TR.UTF-8', TZ='Asia/Kolkata', PYTHONHASHSEED='7'
  )
  assert quiet == '' and 'not committed' in warned
  assert sums(first / 'dist') == sums(second / 'dist') and sums(first / 'dist').keys() == FILES


def test_the_source_archive_has_what_a_contributor_reads(built):
  with tarfile.open(built / SDIST) as archive:
    found = {n.partition('/')[2] for n in archive.getnames() if n.count('/') == 1}
  assert found == {*ROOT_FILES, 'pyproject.toml', 'PKG-INFO'}


def test_a_sandbox_of_links_and_an_unpacked_archive_give_the_same_bytes(built, tmp_path):
  links = tmp_path / 'links'
  with tarfile.open(built / SDIST) as archive:
    archive.extractall(tmp_path / 'unpacked', filter='data')
  tree = tmp_path / 'unpacked' / STEM
  for path in sorted(tree.rglob('*')):
    target = links / path.relative_to(tree)
    if path.is_file():
      target.parent.mkdir(parents=True, exist_ok=True)
      path.chmod(0o555)
      target.symlink_to(path)
  (links / 'ftjax' / 'BUILD').write_text('py_library(name = "ftjax")\n')
  (links / 'ftjax' / 'commit.json').unlink()
  output = tmp_path / 'dist'
  output.mkdir()
  (output / WHEEL).write_text('of an earlier build')
  run(sys.executable, SCRIPT, *flags(links, output), umask=0o077)
  assert sums(output) == sums(built)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'commit': 'HEAD'}, "got 'HEAD', expected all digits of a commit"),
    ({'epoch': 'now'}, "got 'now', expected seconds since 1970"),
    ({'epoch': 0}, "got '0', expected seconds since 1970"),
    ({'source': 'tests'}, 'has no pyproject.toml; give the root of the sources'),
  ],
)
def test_wrong_flags_exit_with_2(change, message, tmp_path):
  words = flags(**({'source': ROOT, 'output': tmp_path} | change))
  assert message in run(sys.executable, SCRIPT, *words, code=2)[1]
  assert not list(tmp_path.iterdir())


def test_an_error_in_the_sources_is_shown_and_leaves_nothing(tmp_path):
  tree = tmp_path / 'tree'
  shutil.copytree(ROOT / 'third_party', tree / 'third_party')
  (tree / 'ftjax' / 'runtime').mkdir(parents=True)
  (tree / 'configs').mkdir()
  for name in (*ROOT_FILES, 'ftjax/runtime/build_commit.py'):
    shutil.copyfile(ROOT / name, tree / name)
  (tree / 'pyproject.toml').write_text('[project')
  words = flags(tree, tmp_path / 'dist')
  assert 'TOMLDecodeError' in run(sys.executable, SCRIPT, *words, code=1)[1]
  assert not (tmp_path / 'dist').exists()


@pytest.fixture(scope='module')
def empty_environment(built, tmp_path_factory):
  """The python of an environment that holds the wheel alone."""
  venv = tmp_path_factory.mktemp('empty') / 'venv'
  run(sys.executable, '-m', 'venv', venv)
  run(venv / 'bin' / 'python', '-m', 'pip', 'install', '-q', '--no-deps', built / WHEEL)
  return venv / 'bin' / 'python'


@pytest.mark.full
def test_an_installed_wheel_names_its_commit_from_any_folder(empty_environment):
  words = (f'ftjax {ftjax.__version__}, commit {SHA}\n', '')
  script = empty_environment.with_name('ftjax')
  assert run(script, '--version', folder='/') == words
  assert run(empty_environment, '-m', 'ftjax', '--version', folder='/') == words
  assert run(script, '--version', folder='/', PATH='') == words


@pytest.mark.full
def test_an_installed_wheel_trains_a_shipped_config_from_any_folder(empty_environment, tmp_path):
  """With this environment's packages, and none of its ftjax."""
  packages = [p for p in sys.path if p.endswith('site-packages')]
  script = empty_environment.with_name('ftjax')
  words = ['--config=tiny_sft', f'--workdir={tmp_path / "a run"}', '--config.steps=2']
  words += ['--config.optim.warmup_steps=0']
  run(script, 'train', *words, folder='/', PYTHONPATH=os.pathsep.join(packages))
  assert (tmp_path / 'a run' / 'report.html').is_file()
  manifest = json.loads((tmp_path / 'a run' / 'manifest.json').read_text())
  assert (manifest['code']['commit'], manifest['code']['modified']) == (SHA, False)
  code = 'import ftjax; print(ftjax.__file__)'
  out, _ = run(empty_environment, '-c', code, folder='/', PYTHONPATH=os.pathsep.join(packages))
  assert str(empty_environment.parents[1]) in out


@pytest.mark.full
@needs_git
def test_pip_of_a_checkout_and_of_the_source_archive(built, tmp_path):
  """The commit of the checkout is written by the build; an archive keeps its own."""
  environment = {'PYTHONPATH': os.pathsep.join(p for p in sys.path if 'site-packages' in p)}
  pip = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation']
  clone = tmp_path / 'clone'
  run('git', 'clone', '-q', '--depth=1', f'file://{ROOT}', clone)
  head = run('git', 'rev-parse', 'HEAD')[0].strip()
  (clone / 'README.md').write_text('changed\n')
  for source, commit, is_modified in ((clone, head, True), (built / SDIST, SHA, False)):
    target = tmp_path / pathlib.Path(source).name
    run(*pip, '-w', target / 'w', source, SOURCE_DATE_EPOCH=str(EPOCH), **environment)
    with zipfile.ZipFile(target / 'w' / WHEEL) as archive:
      found = json.loads(archive.read('ftjax/commit.json'))
    assert found == {'commit': commit, 'modified': is_modified}
  assert sums(tmp_path / SDIST / 'w')[WHEEL] == sums(built)[WHEEL]
  assert not (clone / 'ftjax' / 'commit.json').exists()
