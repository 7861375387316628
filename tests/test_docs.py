"""README, docs and CHANGELOG: links, commands, config keys, example rows and words are right."""

import ast
import json
import pathlib
import re
import shlex

import pytest
from field_words import FORBIDDEN
from text_model import Says
from tiny_tokenizer import tiny_files

from ftjax.config import config_file, keys, section
from ftjax.data import formats, preference_rows, prompts
from ftjax.data.sources import Spec
from ftjax.data.tokenizer import Tokenizer
from ftjax.evaluation import kinds, run, tasks
from ftjax.evaluation.model import Draw
from ftjax.evaluation.safety_kinds import SAFETY_KINDS
from ftjax.runtime.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]
KEYS = set(section.flat(keys.default()))
PARTS = {key.rpartition('.')[0] for key in KEYS if key.count('.') > 1}  # sections of a section
SECTIONS = {k.partition('.')[0] for k in KEYS if '.' in k}

_FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r'`([^`\n]+)`')
_LINK = re.compile(r'\]\(([^)\s]+)\)')
_COMMAND = re.compile(r'python -m ftjax\.(\w+)')


def read(name):
  return (ROOT / name).read_text(encoding='utf-8')


def prose(text):
  """A page without code, whose words are not the page's own."""
  return _SPAN.sub('', _FENCE.sub('', text))


def code(text):
  """The code blocks and code spans of a page."""
  return [m[2] for m in _FENCE.finditer(text)] + _SPAN.findall(_FENCE.sub('', text))


# Links


def anchor(heading):
  """The anchor that GitHub gives a heading."""
  kept = re.sub(r'[^\w\- ]', '', heading.replace('`', '').strip().lower())
  return kept.replace(' ', '-')


def broken_link(page, target):
  """Why a link of a page leads nowhere; '' where it is right."""
  if re.match(r'https?:', target):
    return ''
  path, _, place = target.partition('#')
  file = (page.parent / path).resolve() if path else page
  if not file.exists():
    return f'{target}: no such file'
  if place:
    headings = re.findall(r'^#+ (.+)$', _FENCE.sub('', file.read_text()), re.MULTILINE)
    if place not in map(anchor, headings):
      return f'{target}: no such heading'
  return ''


@pytest.mark.parametrize('name', NAMES)
def test_links_lead_to_files_and_headings(name):
  targets = _LINK.findall(_FENCE.sub('', read(name)))
  assert not [why for t in targets if (why := broken_link(ROOT / name, t))]


def test_the_readme_links_every_page():
  targets = _LINK.findall(read('README.md'))
  assert not [n for n in NAMES if n != 'README.md' and n not in targets]


# Files

_PATH = re.compile(r'(?:ftjax|tests|configs|docs|demo|benchmarks|third_party)/[\w./*-]*[\w/*]')


def test_paths_of_the_repository_exist():
  wrong = []
  for name in (n for n in NAMES if n != 'CHANGELOG.md'):
    for span in code(read(name)):
      for path in _PATH.findall(span):
        before = span[: span.index(path)][-1:]
        if (not before or before in ' \n(=`') and not list(ROOT.glob(path.rstrip('/'))):
          wrong.append(f'{name}: {path}')
  assert not wrong


# Commands


def defined_flags(path, function=None):
  """Names of the flags that a module, or one of its functions, defines."""
  tree = ast.parse(path.read_text())
  if function:
    tree = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
  found = set()
  for node in ast.walk(tree):
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
      continue
    is_definition = node.func.attr.startswith('DEFINE_')
    if is_definition and node.args and isinstance(node.args[0], ast.Constant):
      found.add(node.args[0].value)
    elif function is None and node.func.attr in ('define_config', 'define_processes'):
      found |= defined_flags(ROOT / 'ftjax' / 'cli.py', node.func.attr)
  return found


def wrong_flag(entry, word):
  """What is wrong with one --name=value of a command; '' where it is right."""
  name, _, value = word.removeprefix('--').partition('=')
  key = name.removeprefix('config.')
  if name != key:
    is_known = key in KEYS or key == 'KEY' or key.startswith('custom.')
    return '' if is_known else f'{word}: no such config key'
  if name == 'help':
    return ''
  if name not in defined_flags(ROOT / 'ftjax' / f'{entry}.py'):
    return f'{word}: {entry} has no such flag'
  if name == 'config' and not re.fullmatch(r'my_(small_)?config\.py|[A-Z_]+|\.\.\.|…', value):
    try:
      config_file.find(value)
    except ConfigError as error:
      return str(error)
  return ''


def wrong_command(line):
  """What is wrong with a line that holds a command of ours; '' where nothing is."""
  found = _COMMAND.search(line)
  entry, rest = found[1], line[found.end() :]
  path = ROOT / 'ftjax' / f'{entry}.py'
  if not path.is_file() or '__main__' not in path.read_text():
    return f'{line}: there is no such entry'
  if entry == 'lm_eval':  # its arguments are those of lm-eval
    return ''
  words = shlex.split(re.split(r' > | \| ', rest)[0], comments=True)
  if entry == 'supervise' and '--' in words:  # followed by a command
    line = shlex.join(words[words.index('--') + 1 :])
    words = words[: words.index('--')]
    if _COMMAND.search(line) and (why := wrong_command(line)):
      return why
  if '--compare' in words:  # followed by folders
    words = words[: words.index('--compare') + 1]
  wrong = [f'{w}: expected --name=value' for w in words if w != '…' and not w.startswith('--')]
  wrong += [why for w in words if w.startswith('--') and (why := wrong_flag(entry, w))]
  return '; '.join(wrong)


def commands(text):
  found = []
  for block in code(text):
    lines = block.replace('\\\n', ' ').splitlines()
    found += [line for line in lines if _COMMAND.search(line)]
  return found


@pytest.mark.parametrize('name', NAMES)
def test_commands_have_entries_flags_configs_and_keys_that_exist(name):
  assert not [why for line in commands(read(name)) if (why := wrong_command(line))]


def test_commands_of_comments_in_configs():
  texts = [p.read_text() for p in sorted((ROOT / 'configs').glob('*.py'))]
  lines = [s for text in texts for s in re.findall(r'`([^`]+)`', text) if _COMMAND.search(s)]
  assert lines and not [why for line in lines if (why := wrong_command(line))]


@pytest.mark.parametrize(
  'line',
  [
    'python -m ftjax.trian --config=tiny_sft',
    'python -m ftjax.train --config=no_such_config --workdir=DIR',
    'python -m ftjax.train --config=tiny_sft --wrokdir=DIR',
    'python -m ftjax.train --config=tiny_sft --config.optim.rate=1',
    'python -m ftjax.train tiny_sft',
    'python -m ftjax.supervise -- python -m ftjax.train --config=tiny_sft --wrokdir=DIR',
    'python -m ftjax.config.keys --config=tiny_sft',
  ],
)
def test_a_wrong_command_is_found(line):
  assert wrong_command(line)


def test_make_targets_exist():
  targets = re.findall(r'^([a-z-]+):', read('Makefile'), re.MULTILINE)
  named = [m for n in NAMES for s in code(read(n)) for m in re.findall(r'^make ([a-z-]+)', s, re.M)]
  assert named and not set(named) - set(targets)


def test_installs_name_extras_that_exist_and_no_package_of_ours_on_an_index():
  table = read('pyproject.toml').partition('[project.optional-dependencies]')[2].partition('\n[')[0]
  extras = re.findall(r'^(\w+) = ', table, re.MULTILINE)
  for name in NAMES:
    text = read(name)
    for listed in re.findall(r"""['"]?\.\[([\w,]+)\]""", text):
      assert set(listed.split(',')) <= set(extras), (name, listed)
    assert not re.findall(r"""pip install (?:-U )?['"]?ftjax""", text), name


# Config keys


def keys_named(text):
  """Config keys that code of a page names: SECTION.NAME, and attributes of `c`."""
  found = []
  for span in code(text):
    if 'there is no such key' in span:  # a message about a wrong one
      continue
    for m in re.finditer(r'(?<![\w./*-])(\w+)\.([a-z_0-9]+)(?![\w(/\[*-])', span):
      if m[1] in SECTIONS and m[2] not in ('json', 'jsonl', 'py', 'md', 'gguf', 'csv', 'parquet'):
        found.append(m[0])
    found += re.findall(r'^\s*c\.([\w.]+) = ', span, re.MULTILINE)
  return [
    key for key in found if not key.endswith(('.tsv', '.arrow', '.zip', '.txt', '.safetensors'))
  ]


@pytest.mark.parametrize('name', [n for n in NAMES if n not in ('CHANGELOG.md',)])
def test_config_keys_exist(name):
  text = read(name)
  if name == 'docs/config_keys.md':
    text = text.partition('## Names in other tools')[0]
  assert not [key for key in keys_named(text) if key not in KEYS | PARTS]


# Example rows


def section(text, heading):
  return text.partition(f'\n## {heading}\n')[2].partition('\n## ')[0]


def rows_of(heading, page='docs/data.md'):
  """(what the line begins with, row) of every row in a section of a page."""
  found = []
  for line in section(read(page), heading).splitlines():
    for span in _SPAN.findall(line):
      if span.startswith('{"') and '…' not in span and '...' not in span:
        row = json.loads(span)
        if not {'type', 'enable_thinking'} & row.keys():
          found.append(((_SPAN.findall(line) or [''])[0], row))
  assert len(found) > 3
  return found


def test_training_rows_of_the_docs_are_what_they_are_called():
  for name, row in rows_of('Training rows'):
    assert formats.detect(row) == name
    formats.parse(row, name, has_template=True)


def test_preference_rows_of_the_docs_are_read():
  shapes = {'labelled': 'label', 'scored': 'score'}
  for name, row in rows_of('Preference rows'):
    preference_rows.parse(row, shapes.get(name, 'pair'), None)


def test_prompt_rows_of_the_docs_give_an_answer(tmp_path):
  file = tmp_path / 'rows.jsonl'
  found = [row for _, row in rows_of('Prompt rows')]
  file.write_text('\n'.join(map(json.dumps, found)))
  read_rows = prompts.read(Spec(str(file)), tiny(), 512, 'error').rows
  assert [p.columns['answer'] for p in read_rows] == ['5'] * len(found)


def test_evaluation_rows_of_the_docs_are_read(tmp_path):
  file = tmp_path / 'rows.jsonl'
  found = rows_of('Kinds of tasks', 'docs/evaluation.md')
  assert [kind for kind, _ in found] == [k for k in kinds.KINDS if k not in SAFETY_KINDS]
  for kind, row in found:
    file.write_text(json.dumps(row))
    [read_row] = tasks.load_task('docs', kind, str(file)).rows
    assert read_row.answer in json.dumps(row, ensure_ascii=False)


def test_the_kind_of_the_docs_scores(tmp_path, monkeypatch):
  [block] = [m[2] for m in _FENCE.finditer(read('docs/evaluation.md')) if 'Kind(' in m[2]]
  (tmp_path / 'my_module.py').write_text(block)
  (tmp_path / 'rows.jsonl').write_text('{"prompt": "Say it.", "limit": 3}')
  monkeypatch.syspath_prepend(tmp_path)
  task = tasks.load_task('short', 'my_module:SHORT', str(tmp_path / 'rows.jsonl'))
  found = run.evaluate(task, Says({'Say it.': 'four'}), draw=Draw(9), title='base')
  assert found[0].values == {'short': (0.0,), 'length': (4.0,)}


def tiny():
  return Tokenizer(tiny_files(), 'tiny')


# Words


@pytest.mark.parametrize('name', NAMES)
def test_pages_use_the_words_of_the_field(name):
  found = [
    f'{line.strip()[:60]!r}: {m[0]!r}'
    for line in prose(read(name)).splitlines()
    for m in FORBIDDEN.finditer(line)
  ]
  assert not found


def test_an_old_word_is_found():
  old = [
    'Teach the form first',
    'what the model says',
    'is paid 1',
    'no lesson',
    'GRPO and its kin',
  ]
  assert all(FORBIDDEN.search(text) for text in old)
  assert not FORBIDDEN.search(prose('the task `said` compares completions'))
