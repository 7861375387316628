"""third_party/requirements/: the locks agree with pyproject.toml, each other and the imports."""

import ast
import collections
import functools
import re
import sys
import tomllib

import pytest
import tiny_run
from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

sys.path.append(str(tiny_run.ROOT / 'third_party'))
import bill_of_materials  # the folder is no package

LOCKS = tiny_run.ROOT / 'third_party' / 'requirements'
PROJECT = tomllib.loads((tiny_run.ROOT / 'pyproject.toml').read_text())['project']
EXTRAS = PROJECT['optional-dependencies']
PYTHONS = ('3.11', '3.12', '3.13')
JAX = {'3.11': '0.10.', '3.12': '0.12.', '3.13': '0.12.'}  # 3.11 has no newer one
MACHINES = ('x86_64', 'aarch64')

# What each lock holds besides the dependencies.
_RUNS = ('gcs', 'rewards', 'eval')
LOCKED = {
  'cpu': _RUNS,
  'tpu': (*_RUNS, 'tpu'),
  'cuda': (*_RUNS, 'cuda'),
  'plan': (*_RUNS, 'plan'),
  'test': ('test',),
}
# Locks without ftjax's own dependencies.
ALONE = ('build', 'docs', 'lint')
# Extras that no lock holds: services that most users do without.
NOT_LOCKED = {'wandb', 'mlflow'}

# Distributions whose module has another name.
MODULES = {
  'absl-py': 'absl',
  'gcp-storage-emulator': 'gcp_storage_emulator',
  'google-api-core': 'google.api_core',
  'google-auth': 'google.auth',
  'google-cloud-storage': 'google.cloud',
  'google-re2': 're2',
  'orbax-checkpoint': 'orbax',
  'pyyaml': 'yaml',
  'scikit-learn': 'sklearn',
  'tensorboardx': 'tensorboardX',
}
# Declared, and imported by name only, or by another package.
NOT_IMPORTED = {
  'gcsfs': 'storage/gcs.py looks whether it is there; etils and fsspec use it',
  'mlflow': 'telemetry/metrics_writer.py imports the tracker that log.sinks names',
  'wandb': 'telemetry/metrics_writer.py imports the tracker that log.sinks names',
  'libtpu': 'jax loads it',
  'sentencepiece': 'transformers reads tokenizer.model files with it',
  'tiktoken': 'transformers reads tiktoken files with it',
}
# Imported where it is found, and declared nowhere.
NOT_DECLARED = {
  'zstandard': 'storage/program_cache.py: where jax finds it, jax packs programs with it',
}


def environment(python, machine='x86_64'):
  """What markers are compared with, on Linux."""
  platform = {'sys_platform': 'linux', 'platform_system': 'Linux', 'platform_machine': machine}
  return (
    default_environment()
    | platform
    | {
      'python_version': python,
      'python_full_version': f'{python}.9',
    }
  )


@functools.cache
def pins(name):
  return bill_of_materials.read_lock((LOCKS / f'{name}.txt').read_text())


def installed(name, python, machine='x86_64'):
  """Name: pin of what pip installs from a lock. No name may occur twice."""
  here = environment(python, machine)
  kept = [p for p in pins(name) if not p.requirement.marker or p.requirement.marker.evaluate(here)]
  assert len({p.name for p in kept}) == len(kept)
  return {p.name: p for p in kept}


def asked(extras):
  """What the dependencies and some extras ask for, with extras of ftjax itself opened."""
  found = [Requirement(text) for text in PROJECT['dependencies']]
  left = list(extras)
  while left:
    for requirement in map(Requirement, EXTRAS[left.pop()]):
      if requirement.name == 'ftjax':
        left += requirement.extras
      else:
        found.append(requirement)
  return found


def problems(lock, extras, python):
  """Sentences about requirements that a lock does not meet."""
  held = installed(lock, python)
  found = []
  for requirement in asked(extras):
    pin = held.get(canonicalize_name(requirement.name))
    if pin is None:
      found.append(f'{lock}.txt lacks {requirement}; run make lock')
    elif not requirement.specifier.contains(pin.version, prereleases=True):
      found.append(f'{lock}.txt has {pin.requirement}, not {requirement}; run make lock')
    elif not requirement.extras <= pin.requirement.extras:
      found.append(f'{lock}.txt has {pin.requirement} without extras of {requirement}')
  return found


@pytest.mark.parametrize('python', PYTHONS)
@pytest.mark.parametrize('lock', LOCKED)
def test_locks_meet_pyproject(lock, python):
  assert not problems(lock, LOCKED[lock], python)
  assert installed(lock, python)['jax'].version.startswith(JAX[python])


def test_a_requirement_that_a_lock_does_not_meet_is_found(monkeypatch):
  monkeypatch.setitem(PROJECT, 'dependencies', ['numpy>=99', 'nosuchpackage', 'jax[k8s]'])
  found = problems('cpu', (), '3.12')
  assert len(found) == 3
  assert all(word in text for word, text in zip(('numpy', 'lacks', 'k8s'), found, strict=True))


def test_every_extra_is_locked_or_left_out_by_name():
  opened = set()
  left = [e for extras in LOCKED.values() for e in extras]
  while left:
    opened.add(extra := left.pop())
    inner = [r for r in map(Requirement, EXTRAS[extra]) if r.name == 'ftjax']
    left += [e for r in inner for e in r.extras]
  assert opened | NOT_LOCKED == set(EXTRAS) and not opened & NOT_LOCKED


@pytest.mark.parametrize('python', PYTHONS)
def test_one_version_of_each_package_in_all_locks(python):
  """Except for libtpu: a plan is made by the newest compiler, a TPU has the one that jax names."""
  versions = collections.defaultdict(set)
  for lock in (*LOCKED, *ALONE):
    for name, pin in installed(lock, python).items():
      versions[name].add(pin.version)
  assert {name for name, found in versions.items() if len(found) > 1} <= {'libtpu'}


@pytest.mark.parametrize('lock', [*LOCKED, *ALONE])
def test_locks_are_closed_and_name_no_place(lock):
  """A package that others need, by uv's comments, is there wherever one of these is."""
  text = (LOCKS / f'{lock}.txt').read_text()
  assert not re.search(r'://|^-|--index|--find-links|--trusted', text, re.MULTILINE)
  names = {p.name for p in pins(lock)} | {'ftjax'}
  for pin in pins(lock):
    assert pin.hashes and (set(pin.via) <= names), pin.name
    assert pin.via or lock in ALONE, pin.name
  for python in PYTHONS:
    x86, arm = (set(installed(lock, python, machine)) for machine in MACHINES)
    assert x86 == arm


def test_build_holds_the_backend_that_pyproject_names():
  backend = tomllib.loads((tiny_run.ROOT / 'pyproject.toml').read_text())['build-system']
  for requirement in map(Requirement, [*backend['requires'], *EXTRAS['build']]):
    assert requirement.specifier.contains(installed('build', '3.11')[requirement.name].version)


def test_the_lock_of_linters_holds_what_lint_in_names():
  lines = (LOCKS / 'lint.in').read_text().splitlines()
  named = [Requirement(line) for line in lines if not line.startswith('#')]
  held = {pin.name: pin for pin in pins('lint')}
  assert named
  for requirement in named:
    pin = held[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin.version), f'{requirement}; run make lock'
  roots = {r.name for r in named}
  assert all(pin.via or pin.name in roots for pin in held.values())


@pytest.mark.parametrize('python', PYTHONS)
def test_docs_holds_what_docs_in_asks_for(python):
  lines = (LOCKS / 'docs.in').read_text().splitlines()
  asked_for = [Requirement(line) for line in lines if not line.startswith('#')]
  held = installed('docs', python)
  assert asked_for and all(r.specifier.contains(held[r.name].version) for r in asked_for)


@pytest.mark.parametrize(
  ('text', 'match'),
  [
    ('numpy>=2 \\\n    --hash=sha256:' + 'a' * 64, 'expected NAME==VERSION'),
    ('numpy==2.* \\\n    --hash=sha256:' + 'a' * 64, 'expected NAME==VERSION'),
    ('numpy==2.0', 'with hashes'),
  ],
)
def test_a_line_that_locks_nothing_is_an_error(text, match):
  with pytest.raises(ValueError, match=match):
    bill_of_materials.read_lock(text)
  with pytest.raises(InvalidRequirement):
    bill_of_materials.read_lock('--index-url x')


# Imports


def imported(folder):
  """Modules of other projects that the files of a folder import: {module: files}."""
  found = collections.defaultdict(set)
  own = sys.stdlib_module_names | {'compression', 'ftjax'}  # compression: Python 3.14's
  for path in sorted(folder.rglob('*.py')):
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
        if node.module == 'google':
          names = [f'google.{alias.name}' for alias in node.names]
      for name in names:
        parts = name.split('.')
        module = '.'.join(parts[: 2 if parts[0] == 'google' else 1])
        if parts[0] not in own:
          found[module].add(path.relative_to(tiny_run.ROOT).as_posix())
  return found


def declared():
  """{module: distribution} of the dependencies and all extras but those of tests and builds."""
  runs = [extra for extra in EXTRAS if extra not in ('test', 'build')]
  names = {canonicalize_name(r.name) for r in asked(runs)}
  return {MODULES.get(name, name.replace('-', '_')): name for name in names}


def test_every_import_is_declared_and_every_declaration_imported():
  imports, modules = imported(tiny_run.ROOT / 'ftjax'), declared()
  missing = {m: f for m, f in imports.items() if m not in modules and m not in NOT_DECLARED}
  assert not missing, 'declare the package of these in pyproject.toml'
  unused = {name for module, name in modules.items() if module not in imports}
  assert unused == NOT_IMPORTED.keys(), 'not imported, and not in NOT_IMPORTED with a reason'
  assert not NOT_DECLARED.keys() - imports.keys()


def test_a_new_import_is_found(tmp_path):
  folder = tmp_path / 'package'
  folder.mkdir()
  (folder / 'a.py').write_text(
    'def f():\n  from newlibrary.x import y\n  from google import auth\n'
  )
  root = tiny_run.ROOT
  try:
    tiny_run.ROOT = tmp_path
    assert set(imported(folder)) == {'newlibrary', 'google.auth'}
  finally:
    tiny_run.ROOT = root
