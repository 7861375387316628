"""Every command of README and docs is executed, or run up to where it would begin to work.

`doc_commands.py` collects them. `_kind` puts each into a class, and there is a test for each class;
a command of no class fails. What can be neither executed nor run dry stands in ELSEWHERE, with the
reason. The longer ones are executed by the tests marked `full`, at the end of this file.
"""

import collections
import functools
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
import tiny_run
from doc_commands import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Beginning of a command: why no test here runs it. A file that it names does.
ELSEWHERE = {
  'gcloud auth application-default login': 'asks for a Google account in a browser',
  'hf auth login': 'asks for a token of the Hugging Face hub',
  'mpirun': 'MPI is not installed; the command that it starts is checked',
  'ollama create': 'Ollama is in no package index; tests/test_gguf_export.py checks the Modelfile',
  'ollama run': 'the same',
  'python docs/make_config_keys.py': 'tests/test_config_keys.py calls it, and compares the page',
  'srun': 'SLURM is not installed; the command that it starts is checked',
  'third_party/bazel/debian.sh': 'needs Bazel: make bazel, and tests/test_build_files.py',
}  # fmt: skip

# What an entry prints where its model or run is not there, which is looked for after all checks.
NOT_THERE = re.compile(
  r'no such (local path|file or folder)|is no workdir of a run|there is no config\.json in it'
  r'|HF_HUB_OFFLINE is set; unset it to upload'
)
# Scripts that are executed on small files, and what they must write; the others are run dry.
SMALL = {
  'demo/canaries.py': 'TARGET_DIR/train.jsonl',
  'demo/gemma_sentiment.py': '.cache/data/sentiment_text/train.jsonl',
  'demo/gsm8k.py': 'data/gsm8k/test.jsonl',
  'demo/held_out_loss.py': None,
  'demo/sentiment_rewards.py': '.cache/data/sentiment_rewards/pairs.jsonl',
}
SHELL = ('.', 'cd', 'git', 'sha256sum')
# Words in place of what a reader fills in.
PLACES = {'--config=CONFIG': '--config=tiny_sft', '--topology=SLICE': '--topology=v5e:1x1'}
MY_ALGORITHM = """import dataclasses
from ftjax.config import algorithms
FOCAL = dataclasses.replace(algorithms.ALGORITHMS['sft'], module=__name__, keys={'gamma': 2.0})
def make_loss(): ...
def build(): ...
"""


def _kind(command):
  """The class of a command; None where it has none."""
  words = command.words
  if _elsewhere(command):
    return 'elsewhere'
  program = _program(words[0])
  if program == 'python' and words[1:2] == ('-m',):
    module = words[2]
    kinds = {'pip': 'pip', 'venv': 'shell', 'pytest': 'pytest'}
    return 'entry' if module.startswith('ftjax.') else kinds.get(module)
  if program == 'python' and len(words) > 1 and words[1].endswith('.py'):
    return 'small script' if words[1] in SMALL else _script(words[1])
  if program == 'python' and words[1:2] == ('-c',):
    return 'program'
  if program.startswith('launch/') and program.endswith('.sh'):
    return 'launcher'
  kinds = {name: name for name in ('gcloud', 'make', 'pip')} | dict.fromkeys(SHELL, 'shell')
  return 'entry' if program == 'ftjax' else kinds.get(program)


def _script(path):
  """'script' if a script can be stopped after it has parsed its arguments, else None."""
  file = ROOT / path
  return 'script' if file.is_file() and 'argparse' in file.read_text() else None


def _program(word):
  return 'python' if word in ('python3', '.venv/bin/python') else word.removeprefix('.venv/bin/')


def _elsewhere(command):
  """The beginning in ELSEWHERE; None where it is not there."""
  text = ' '.join([_program(command.words[0]), *command.words[1:]])
  return next((b for b in ELSEWHERE if text == b or text.startswith(f'{b} ')), None)


@functools.cache
def all_commands():
  return doc_commands.every_command()


def of_kind(*kinds):
  """The commands of some classes, those with the same words on one page once."""
  found = {}
  for command in all_commands():
    if _kind(command) in kinds:
      found.setdefault((command.words, bool(saved(command.page)) and command.page), command)
  return list(found.values())


@functools.cache
def saved(page):
  """{name: content} of the files that a page asks its reader to save."""
  return doc_commands.saved_files((ROOT / page).read_text())


def write_rows(file, rows):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(''.join(json.dumps(row) + '\n' for row in rows))


# The collection


def test_every_command_is_in_a_class():
  """Label a block of output or of a formula `text`; a new kind of command needs a test here."""
  assert not [str(c) for c in all_commands() if _kind(c) is None]
  assert len(all_commands()) > 100


def test_what_is_not_run_is_in_the_docs_and_has_its_reason():
  used = {_elsewhere(c) for c in all_commands()}
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
  assert _kind(found) is None


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
  return [_program(words[0]), *(PLACES.get(w, w) for w in words[1:])]


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
  assert not wrong
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


# Executed as they stand; all but the first take longer.


def shell_script(page):
  """The lines of shell of a page's blocks, in order; other commands are left out."""
  kept = collections.defaultdict(list)
  for command in all_commands():
    if command.page == page and not command.is_span and _kind(command) == 'shell':
      kept[command.line].append(command.text)
  return '\n'.join(' && '.join(parts) for _, parts in sorted(kept.items()))


@pytest.mark.full
@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='no git checkout to clone')
def test_checkouts_and_environments_are_made(tmp_path):
  pages = {command.page for command in all_commands() if _kind(command) == 'shell'}
  assert 'README.md' in pages
  for page in pages:
    (folder := tmp_path / page).mkdir(parents=True)
    text = shell_script(page).replace('REPOSITORY', str(ROOT))
    if 'sha256sum' in text:
      (folder / 'a').write_bytes(b'a')
      sums = subprocess.run(['sha256sum', 'a'], cwd=folder, capture_output=True, check=True).stdout
      (folder / 'SHA256SUMS').write_bytes(sums)
    done = subprocess.run(
      ['bash', '-euc', f'{text}\ncommand -v python'],
      cwd=folder,
      capture_output=True,
      text=True,
      stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, (page, text, done.stderr)
    if 'venv' in text:
      assert done.stdout.strip().startswith(str(folder))
    if 'git clone' in text:
      assert (folder / 'ftjax/pyproject.toml').exists()


def tiny_runs():
  """{workdir: [words]} of the commands that train a config of random weights, and what follows."""
  found = collections.defaultdict(list)
  for words in dict.fromkeys(command.words for command in of_kind('entry')):
    if words[2:3] == ('ftjax.train',) and any(w.startswith('--config=tiny_') for w in words):
      (workdir,) = [w.partition('=')[2] for w in words if w.startswith('--workdir=')]
      found[workdir].append(words)
  return found


@pytest.mark.full
@pytest.mark.parametrize('workdir', sorted(tiny_runs()))
def test_tiny_runs_of_the_docs_end_as_shown(workdir, tmp_path):
  for words in tiny_runs()[workdir]:
    code, log = tiny_run.run('train', words[3:], folder=tmp_path)
    # The page shows that the loss is not finite.
    assert code == (4 if workdir == 'runs/nan' else 0), log
    shutil.rmtree(tmp_path / workdir)


@pytest.mark.full
def test_the_commands_of_the_readme_work_one_after_another(tmp_path):
  """On rows and a model of random weights in place of the reader's own."""
  arguments = ['--config=tiny_sft', f'--workdir={tmp_path}/runs/tiny', '--config.steps=2']
  assert tiny_run.run('train', arguments, folder=tmp_path)[0] == 0
  (tmp_path / '.cache').mkdir()
  shutil.copytree(tmp_path / 'runs/tiny/export', tmp_path / '.cache/smollm2')
  (tmp_path / 'my_config.py').write_text(saved('README.md')['my_config.py'])
  rows = [
    {'messages': [{'role': 'user', 'content': f'{i} + 1 ='}, {'role': 'assistant', 'content': 'x'}]}
    for i in range(40)
  ]
  write_rows(tmp_path / 'train.jsonl', rows)
  asked = [{'messages': row['messages'][:1], 'answer': 'x'} for row in rows[:6]]
  write_rows(tmp_path / 'test.jsonl', asked)
  done = []
  for command in all_commands():
    is_mine = any('runs/mine' in w or 'my_config.py' in w for w in command.words)
    is_left_out = any(w.startswith(('--push', '--topology')) for w in command.words)  # see README
    if command.page != 'README.md' or _kind(command) != 'entry' or not is_mine or is_left_out:
      continue
    if any('runs/other' in w for w in command.words):
      shutil.copytree(tmp_path / 'runs/mine', tmp_path / 'runs/other')
    entry = command.words[2].removeprefix('ftjax.')
    code, log = tiny_run.run(entry, list(command.words[3:]), folder=tmp_path)
    assert code == 0, (str(command), log)
    done.append(entry)
  assert done[:3] == ['preview', 'train', 'evaluate'] and done.count('convert') == 2
  for file in (
    'runs/mine/report.html',
    'comparison.html',
    'gguf/mine.gguf',
    'models/mine/config.json',
  ):
    assert (tmp_path / file).stat().st_size, file
