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
    kinds = {'pip': 'pip', 'venv': 'shell'}
    return 'entry' if module.startswith('ftjax.') else kinds.get(module)
  if program == 'python' and len(words) > 1 and words[1].endswith('.py'):
    return 'small script' if words[1] in SMALL else 'script'
  if program.startswith('launch/') and program.endswith('.sh'):
    return 'launcher'
  kinds = {'ftjax': 'entry', 'pip': 'pip', 'make': 'make'} | dict.fromkeys(SHELL, 'shell')
  return kinds.get(program)


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
  """{words: the first command with them} of some classes."""
  found = {}
  for command in all_commands():
    if _kind(command) in kinds:
      found.setdefault(command.words, command)
  assert found, kinds
  return found


def my_config():
  """The config of the README, as a page asks to save it."""
  (block,) = [
    b
    for b in re.findall(r'^```python\n(.*?)^```$', (ROOT / 'README.md').read_text(), re.S | re.M)
    if 'def get_config' in b
  ]
  return block


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


def dry_run(rows, folder):
  """What doc_dry_run.py reports of [words], in order."""
  script = ROOT / 'tests' / 'doc_dry_run.py'
  sent = json.dumps([{'words': words, 'folder': str(folder)} for words in rows])
  # Without the tests' own flags of XLA, and with nothing of a user.
  clean = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_', 'HF_'))}
  command = [sys.executable, str(script)]
  done = subprocess.run(command, input=sent, env=clean, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.fixture(scope='module')
def scratch(tmp_path_factory):
  """A folder with the files that pages ask a reader to make."""
  folder = tmp_path_factory.mktemp('a reader')
  (folder / 'my_config.py').write_text(my_config())
  (folder / 'my_algorithm.py').write_text(MY_ALGORITHM)
  return folder


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


def test_entries_and_scripts_have_the_right_flags_configs_and_keys(scratch):
  found = of_kind('entry', 'script')
  rows = [standard(words) for words in found]
  reports = dry_run(rows, scratch)
  assert len(reports) == len(rows) > 60
  wrong = {
    str(command): why
    for command, words, report in zip(found.values(), rows, reports, strict=True)
    if (why := problem(words, report))
  }
  assert not wrong
  trained = [w for w, r in zip(rows, reports, strict=True) if r['checked']]
  assert len(trained) > 40


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


def test_wrong_commands_are_found(scratch):
  rows = [line.split() for line in WRONG]
  reports = dry_run(rows, scratch)
  unseen = [w for w, r in zip(rows, reports, strict=True) if not problem(w, r)]
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


def test_small_scripts_run_as_they_stand(scratch):
  small_files(scratch)
  found = of_kind('small script')
  for words in found:
    command = [sys.executable, str(ROOT / words[1]), *words[2:]]
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stderr)
    wanted = SMALL[words[1]]
    assert done.stdout if wanted is None else (scratch / wanted).stat().st_size
  assert {words[1] for words in found} == SMALL.keys()


# Launchers and make


def test_launchers_run_dry():
  def dry(words):
    more = [w for w in words[1:] if w != '--dry-run']
    return launchers.run(words[0].removeprefix('launch/'), '--dry-run', *more)

  found = of_kind('launcher')
  with multiprocessing.pool.ThreadPool(os.cpu_count()) as pool:
    results = pool.map(dry, found)
  wrong = {str(c): r[2] for c, r in zip(found.values(), results, strict=True) if r[0] or not r[1]}
  assert len(found) > 12 and not wrong


def test_make_knows_the_targets():
  found = of_kind('make')
  wrong = {}
  for words, command in found.items():
    done = subprocess.run(['make', '-n', *words[1:]], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
      wrong[str(command)] = done.stderr
  assert not wrong and len(found) > 10


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
  wrong = {str(c): why for w, c in found.items() if (why := pip_problem(_after_pip(w)))}
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
  pages = {command.page for command in of_kind('shell').values()}
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
  for words in of_kind('entry'):
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
  (tmp_path / 'my_config.py').write_text(my_config())
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
