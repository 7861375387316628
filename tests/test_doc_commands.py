"""Every command of README and docs is executed, or run up to where it would begin to work.

doc_commands.py collects them and puts each into a class, for which there is a test here; a command
of no class fails. What can be neither executed nor run dry stands in doc_commands.ELSEWHERE, with
the reason. test_doc_runs.py executes the longer ones.
"""

import itertools
import json
import multiprocessing.pool
import os
import re
import shutil
import subprocess
import sys
import tomllib

import doc_commands
import launchers
import pytest
from doc_commands import ELSEWHERE, ROOT, SMALL, all_commands, kind, of_kind, saved, write_rows
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# What an entry prints where its model or run is not there, which is looked for after all checks.
NOT_THERE = re.compile(
  r'no such (local path|file or folder)|is no workdir of a run|there is no config\.json in it'
  r'|HF_HUB_OFFLINE is set; unset it to upload'
)
# Words in place of what a reader fills in.
PLACES = {'--config=CONFIG': '--config=tiny_sft', '--topology=SLICE': '--topology=v5e:1x1'}
MY_ALGORITHM = """import dataclasses
from ftjax.config import algorithms
FOCAL = dataclasses.replace(algorithms.ALGORITHMS['sft'], module=__name__, keys={'gamma': 2.0})
def make_loss(): ...
def build(): ...
"""


def listed(lines):
  """A message that pytest does not shorten."""
  return '\n' + '\n'.join(lines)


# The collection


def test_every_command_is_in_a_class():
  """Label a block of output or of a formula `text`; a new kind of command needs a test here."""
  left = [str(c) for c in all_commands() if kind(c) is None]
  assert not left, listed(left)
  assert len(all_commands()) > 100


def test_no_block_is_left_unread():
  wrong = [
    f'{page.relative_to(ROOT)}:{line}: {why}'
    for page in doc_commands.find_pages()
    for line, why in doc_commands.unread(page.read_text())
  ]
  assert not wrong, listed(wrong)


@pytest.mark.parametrize(
  'block',
  [
    '- item\n\n  ```\n  make demo\n  ```\n',
    '```shell-session\n$ make demo\n```\n',
    '~~~\nmake demo\n~~~\n',
    '```text\nmake demo\n```\n',
  ],
)
def test_a_block_that_is_not_read_is_found(block):
  assert doc_commands.unread(f'# P\n\n{block}')


def test_what_is_not_run_is_in_the_docs_and_has_its_reason():
  used = {doc_commands.elsewhere(c) for c in all_commands()}
  assert not ELSEWHERE.keys() - used, 'no page has these; take them out of the table'
  named = re.findall(r'tests/\w+\.py', ' '.join(ELSEWHERE.values()))
  assert named and not [n for n in named if not (ROOT / n).exists()]


def test_commands_of_a_page_are_found():
  page = """# P
`make test` and `make …`, `ftjax train`, `python -m ftjax.plan`, `python x.py A`
```
A=1 git clone X y && cd y   # comment
python -m ftjax.lm_eval run \\
  --tasks a > out.txt
```
```text
rm -rf /
```
```
$ make demo
cp: output
```
"""
  found = doc_commands.commands(page, 'p.md')
  assert [(c.line, c.text, c.is_span) for c in found] == [
    (4, 'git clone X y', False),
    (4, 'cd y', False),
    (5, 'python -m ftjax.lm_eval run --tasks a', False),
    (12, 'make demo', False),
    (2, 'make test', True),
    (2, 'python x.py A', True),
  ]
  assert found[0].before == (('A', '1'),)


def test_what_a_command_starts_is_a_command_too():
  line = 'python -m ftjax.supervise --preflight -- python -m ftjax.train --config=x'
  found = doc_commands.commands(f'```\n{line}\n```\n', 'p.md')
  assert [c.words[2] for c in found] == ['ftjax.supervise', 'ftjax.train']


@pytest.mark.parametrize('line', ['rm -rf x', 'accuracy 0.9 [0.8, 1.0]', 'python -m http.server'])
def test_other_lines_are_in_no_class(line):
  (found,) = doc_commands.commands(f'```\n{line}\n```\n', 'p.md')
  assert kind(found) is None


# Entries and scripts


def dry_run(rows):
  """What doc_dry_run.py reports of [(words, folder)], in order."""
  script = ROOT / 'tests' / 'doc_dry_run.py'
  sent = json.dumps([{'words': words, 'folder': str(folder)} for words, folder in rows])
  # Without the tests' own flags of XLA, and with nothing of a user.
  clean = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_', 'HF_'))}
  command = [sys.executable, str(script)]
  done = subprocess.run(command, input=sent, env=clean, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.fixture(scope='module')
def folder_of(tmp_path_factory):
  """`folder_of(page)` is a folder with the files that the page asks its reader to save."""
  root = tmp_path_factory.mktemp('a reader')

  def make(page):
    folder = root / (page if saved(page) else 'any page')
    if not folder.exists():
      folder.mkdir(parents=True)
      files = {'my_algorithm.py': MY_ALGORITHM} | saved('README.md') | saved(page)
      for name, content in files.items():
        (folder / name).write_text(content)
    return folder

  return make


def standard(words):
  """Words with the interpreter as `python`, and placeholders filled in."""
  return [doc_commands.program_of(words[0]), *(PLACES.get(w, w) for w in words[1:])]


def problem(words, found):
  """What is wrong with a command, by its report; '' where nothing is."""
  if found['reached']:
    named = [w.partition('=')[0] for w in words]
    is_trained = '--config' in named and found['reached'] == 'jax'
    is_right = found['checked'] if is_trained else found['reached'] != 'a process'
  elif found['code'] in (2, 3):
    is_right = NOT_THERE.search(found['message'])
  else:
    is_right = found['code'] == 0 and words[-1] in ('--help', '--version')
  return '' if is_right else json.dumps(found)


def test_entries_and_scripts_have_the_right_flags_configs_and_keys(folder_of):
  found = of_kind('entry', 'script')
  rows = [(standard(command.words), folder_of(command.page)) for command in found]
  reports = dry_run(rows)
  assert len(reports) == len(found) > 60
  wrong = {
    str(command): why
    for command, (words, _), report in zip(found, rows, reports, strict=True)
    if (why := problem(words, report))
  }
  assert not wrong, listed(f'{command}\n  {why}' for command, why in wrong.items())
  assert sum(report['checked'] for report in reports) > 40


WRONG = [
  'python -m ftjax.train --config=tiny_sft --wrokdir=DIR',
  'python -m ftjax.train --config=tiny_sft --workdir=DIR --config.optim.lr=fast',
  'python -m ftjax.train --config=tiny_sft --workdir=DIR --config.grad_accum=3',
  'python -m ftjax.train --config=tiny_dpo --workdir=DIR --config.dpo.loss=sigmod',
  'python -m ftjax.evaluate --config=no_such_config --workdir=DIR',
  'python -m ftjax.plan --config=tiny_sft --topology=v9e:2x4',
  'python -m ftjax.preview --config=my_config.py --row=3',
  'python -m ftjax.generate --prompt=Hello',
  'python -m ftjax.convert --source=runs/mine',
  'python -m ftjax.convert --source=runs/mine --target=x --dtype=int3',
  'python -m ftjax.supervise --bakcoff=3 -- python x.py',
  'python -m ftjax.lm_eval run --model ftjax --taks arc_easy',
  'python benchmarks/accelerator_check.py --out=check --budgets=540',
  'python benchmarks/evaluation_tables.py',
  'python -m ftjax.trian --config=tiny_sft',
  'ftjax trian --config=tiny_sft',
]  # fmt: skip


def test_wrong_commands_are_found(folder_of):
  rows = [(line.split(), folder_of('README.md')) for line in WRONG]
  reports = dry_run(rows)
  unseen = [w for (w, _), r in zip(rows, reports, strict=True) if not problem(w, r)]
  assert not unseen


def small_files(folder):
  """What the small scripts read."""
  write_rows(
    folder / 'train.jsonl', [{'question': f'{i}?', 'answer': f'#### {i}'} for i in range(700)]
  )
  shutil.copy(folder / 'train.jsonl', folder / 'test.jsonl')
  rows = [
    {
      'messages': [
        {
          'role': 'user',
          'content': f'Is this review positive or negative?\n\nFilm {i} was a bore.',
        },
        {'role': 'assistant', 'content': 'negative'},
      ],
      'choices': ['negative', 'positive'],
      'label': 'negative',
    }
    for i in range(310)
  ]
  for name in ('train', 'test'):
    write_rows(folder / '.cache/data/sentiment' / f'{name}.jsonl', rows)
  write_rows(folder / 'TRAIN.jsonl', [{'messages': row['messages']} for row in rows])
  results = [
    {'model': model, 'id': label, 'label': label, 'prediction': label, 'values': {'right': [1.0]}}
    | {'scores': [-1.0, -2.0] if label == 'a' else [-2.0, -1.0]}
    for model in ('base', 'tuned')
    for label in 'ab'
  ]
  write_rows(folder / 'runs/gemma/eval/sentiment.jsonl', results)


def run_python(words, folder):
  """Python with the repository on its path, in a folder."""
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  command = [sys.executable, *words]
  done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, (words, done.stderr)
  return done.stdout


def test_small_scripts_run_as_they_stand(folder_of):
  found = of_kind('small script')
  for command in found:
    small_files(folder := folder_of(command.page))
    script, *rest = command.words[1:]
    printed = run_python([str(ROOT / script), *rest], folder)
    wanted = SMALL[script]
    assert printed if wanted is None else (folder / wanted).stat().st_size
  assert {command.words[1] for command in found} == SMALL.keys()


def test_programs_of_one_line_run_as_they_stand(folder_of):
  for command in of_kind('program'):
    run_python(command.words[1:], folder_of(command.page))


# Launchers, make, pytest and gcloud


def test_launchers_run_dry(folder_of):
  found = of_kind('launcher')
  folders = [folder_of(command.page) for command in found]

  def dry(command, folder):
    for name in ('my_config.py', 'my_rewards.py'):  # of the reader, where the page has none
      (folder / name).touch()
    more = [w for w in command.words[1:] if w != '--dry-run']
    launcher = command.words[0].removeprefix('launch/')
    return launchers.run(launcher, '--dry-run', *more, cwd=folder)

  with multiprocessing.pool.ThreadPool(os.cpu_count()) as pool:
    results = pool.starmap(dry, zip(found, folders, strict=True))
  wrong = {str(c): r[2] for c, r in zip(found, results, strict=True) if r[0] or not r[1]}
  assert len(found) > 12 and not wrong


def test_make_knows_the_targets():
  wrong = {}
  for command in of_kind('make'):
    words = ['make', '-n', *command.words[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
      wrong[str(command)] = done.stderr
  assert not wrong and len(of_kind('make')) > 10


def test_tests_that_pages_name_are_there():
  files = [w for c in of_kind('pytest') for w in c.words[3:] if not w.startswith('-')]
  assert not [file for file in files if not (ROOT / file.partition('::')[0]).exists()]


@pytest.mark.full
@pytest.mark.skipif(not shutil.which('gcloud'), reason='no gcloud on PATH')
def test_gcloud_knows_the_commands():
  """By an unknown flag that is added: gcloud must name it alone."""
  for command in of_kind('gcloud'):
    words = [*command.words, '--ftjax-probe']
    done = subprocess.run(words, capture_output=True, text=True)
    assert 'unrecognized arguments: --ftjax-probe' in done.stderr, (str(command), done.stderr)


# Packages


def pip_problem(words):
  """What is wrong with the words after `pip`; '' where nothing is."""
  commands = pytest.importorskip('pip._internal.commands', reason='an environment without pip')
  try:
    options, names = commands.create_command(words[0]).parse_args(list(words[1:]))
  except SystemExit:
    return 'pip does not know these flags'
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  extras = project['optional-dependencies']
  needed = itertools.chain(project['dependencies'], *extras.values())
  known = {canonicalize_name(Requirement(r).name) for r in needed} - {'ftjax'}
  for file in options.requirements:
    if not (ROOT / file).is_file():
      return f'{file}: no such file'
    if options.require_hashes and '--hash=sha256:' not in (ROOT / file).read_text():
      return f'{file} has no hashes'
  for name in names:
    if name.endswith('.whl'):
      wheel = os.path.basename(name)
      version = re.search(r"__version__ = '(.+)'", (ROOT / 'ftjax/__init__.py').read_text())[1]
      if wheel not in ('*.whl', f'ftjax-{version}-py3-none-any.whl'):
        return f'{wheel}: make wheel makes ftjax-{version}-py3-none-any.whl'
    elif local := re.fullmatch(r'\.(?:\[([\w,]+)\])?', name):
      if missing := set((local[1] or '').split(',')) - extras.keys() - {''}:
        return f'{name}: no extra {missing}'
    elif canonicalize_name(Requirement(name).name) not in known:
      return f'{name}: no dependency of ftjax'
  return '' if names or options.requirements else 'nothing to install'


def _after_pip(words):
  return words[words.index('pip') + 1 :]


def test_pip_knows_the_flags_and_pyproject_the_extras():
  found = of_kind('pip')
  wrong = {str(c): why for c in found if (why := pip_problem(_after_pip(c.words)))}
  assert not wrong and len(found) > 10


@pytest.mark.parametrize(
  'line',
  [
    'install .[nosuch]',
    'install --require-hashs .',
    'install ftjax',
    'install -r requirements.txt',
    'install --require-hashes -r third_party/requirements/docs.in',
    'install dist/ftjax-99-py3-none-any.whl',
    'install',
  ],
)
def test_a_wrong_install_is_found(line):
  assert pip_problem(line.split())
