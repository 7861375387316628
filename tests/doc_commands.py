"""The commands of README, docs and the other pages, and the class of each, for test_doc_commands.py
and test_doc_runs.py.

A fenced block without a language, or of sh, bash, shell or console, holds commands, one a line; a
block that begins with `$ ` is a session, whose lines without `$ ` are output. Output and formulas
are labelled `text`. A code span is a command where it begins like one and has an argument.
"""

import dataclasses
import functools
import json
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHELLS = ('', 'sh', 'bash', 'shell', 'console')
_FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r'(?<!`)`([^`\n]+)`(?!`)')
_SPAN_COMMAND = re.compile(
  r'(?:\w+=\S+ )*(?:(?:\.venv/bin/)?python3? (?:-m [\w.]+ |\S+\.py\b)|ftjax \w+ -|make [a-z]|'
  r'(?:pip|docker|kubectl|gcloud|git|hf|ollama|srun|mpirun) \w+ \S|launch/\w+\.sh \S)'
)
_HIDDEN = (
  r'^(\$ .*|python3? -m (ftjax|pip).*|ftjax \w+ --.*|pip install .*|launch/\w+\.sh.*|make [a-z-]+)$'
)
_ENDS = {'&&', '||', '|', ';', '&'}


@dataclasses.dataclass(frozen=True)
class Command:
  """One simple command of a page.

  Attributes:
    page: below the root of the repository.
    line: its line there, from 1.
    words: program and arguments, without assignments and redirections.
    is_span: whether it stands in running text.
    before: the assignments before it, {name: value}.
  """

  page: str
  line: int
  words: tuple[str, ...]
  is_span: bool = False
  before: tuple[tuple[str, str], ...] = ()

  @property
  def text(self):
    """As one line."""
    return shlex.join(self.words)

  def __str__(self):
    return f'{self.page}:{self.line}: {self.text}'


def find_pages(root=ROOT):
  """The pages whose commands work today: all but CHANGELOG.md, a history."""
  found = [*root.glob('*.md'), *(root / 'docs').rglob('*.md')]
  return sorted(p for p in found if p.name != 'CHANGELOG.md')


def split(line):
  """[(assignments, words)] of the simple commands of a line of shell."""
  lexer = shlex.shlex(line, posix=True, punctuation_chars='|&;<>')
  lexer.whitespace_split = True
  found, words, skips = [], [], False
  for token in [*lexer, ';']:
    if skips:
      skips = False
    elif token in _ENDS:
      if words:
        found.append(words)
      words = []
    elif re.fullmatch(r'[<>]+&?', token):
      skips = True
    else:
      words.append(token)
  return [_assignments(words) for words in found]


def _assignments(words):
  before = []
  while words and re.fullmatch(r'[A-Za-z_]\w*=.*', words[0]):
    name, _, value = words.pop(0).partition('=')
    before.append((name, value))
  return tuple(before), tuple(words)


def _shell_lines(block):
  """[(number, line)] of the commands of a block, with continued lines joined."""
  is_session = block.startswith('$ ')
  found, kept, start = [], '', 0
  for number, line in enumerate(block.splitlines()):
    if not kept:
      if is_session and not line.startswith('$ '):
        continue
      line, start = line.removeprefix('$ '), number
    if line.endswith('\\'):
      kept += line[:-1]
      continue
    found.append((start, kept + line))
    kept = ''
  return found


def commands(text, page):
  """The commands of a page, in order: those of blocks, and those in running text."""
  lines, spans = [], text
  for match in _FENCE.finditer(text):
    first = text.count('\n', 0, match.start()) + 2
    spans = spans.replace(match[0], '\n' * match[0].count('\n'), 1)
    if match[1] in SHELLS:
      lines += [(first + n, line, False) for n, line in _shell_lines(match[2])]
  for match in _SPAN.finditer(spans):
    is_whole = '…' not in match[1] and '...' not in match[1]
    if is_whole and _SPAN_COMMAND.match(match[1]):
      lines.append((spans.count('\n', 0, match.start()) + 1, match[1], True))
  found = []
  for number, line, is_span in lines:
    try:
      simple = split(line)
    except ValueError:  # no shell: a quote that is not closed
      simple = [((), (line,))]
    for before, words in simple:
      found += [Command(page, number, part, is_span, before) for part in _opened(words)]
  return found


def _opened(words):
  """A command, and the one that it starts: supervise, srun, mpirun."""
  if '--' in words and 'ftjax.supervise' in words[:3]:
    at = words.index('--')
    is_placeholder = words[at + 1 :][:1] == ('COMMAND',)
    return [words] if is_placeholder else [words, *_opened(words[at + 1 :])]
  if words and words[0] in ('srun', 'mpirun'):
    inner = [i for i, w in enumerate(words) if w.startswith('python')]
    return [words[: inner[0]], *_opened(words[inner[0] :])] if inner else [words]
  return [words] if words else []


def unread(text):
  """[(line, why)] of the blocks of a page that `commands` does not read, and should."""
  found, inside = [], [(m.start(), m.end()) for m in _FENCE.finditer(text)]
  for mark in re.finditer(r'^ *(```|~~~).*$', text, re.MULTILINE):
    if not any(start <= mark.start() < end for start, end in inside):
      why = f'{mark[0]}: a block begins with ``` and at most one word, not indented'
      found.append((text.count('\n', 0, mark.start()) + 1, why))
  for match in _FENCE.finditer(text):
    hidden = match[1] == 'text' and re.search(_HIDDEN, match[2], re.MULTILINE)
    if hidden:
      why = f'{hidden[0]}: a command in a block labelled text'
      found.append((text.count('\n', 0, match.start()) + 1, why))
  return found


def saved_files(text):
  """{name: content} of the Python files that a page asks its reader to save.

  The line before such a block names `NAME.py`, or its first line is `# NAME.py`; a whole config is
  my_config.py.
  """
  found = {}
  for match in _FENCE.finditer(text):
    if match[1] == 'python':
      before = text[: match.start()].rstrip().rpartition('\n')[2]
      names = re.findall(r'`(\w+\.py)`', before) + re.findall(r'\A# (\w+\.py)\n', match[2])
      if names or 'def get_config():' in match[2]:
        found.setdefault(names[-1] if names else 'my_config.py', match[2])
  return found


def every_command(root=ROOT):
  """The commands of all pages."""
  return [
    command
    for page in find_pages(root)
    for command in commands(page.read_text(), page.relative_to(root).as_posix())
  ]


# Classes of commands

# Beginning of a command: why no test here runs it. A file that it names does.
ELSEWHERE = {
  'bazel run': 'Bazel 9 can be downloaded from no package index',
  'bazel test': 'the same',
  'gcloud auth application-default login': 'asks for a Google account in a browser',
  'hf auth login': 'asks for a token of the Hugging Face hub',
  'mpirun': 'MPI is not installed; the command that it starts is checked',
  'ollama create': 'Ollama is in no package index; tests/test_gguf_export.py checks the Modelfile',
  'ollama run': 'the same',
  'python benchmarks/label_errors.py': 'tests/test_benchmarks.py runs it on small rows',
  'python docs/make_config_keys.py': 'tests/test_config_keys.py calls it, and compares the page',
  'srun': 'SLURM is not installed; the command that it starts is checked',
  'third_party/bazel/debian.sh': 'needs Bazel: make bazel, and tests/test_build_files.py',
}  # fmt: skip

# Scripts that are executed on small files, and what they must write; the others are run dry.
SMALL = {
  'demo/canaries.py': 'TARGET_DIR/train.jsonl',
  'demo/gemma_sentiment.py': '.cache/data/sentiment_text/train.jsonl',
  'demo/gsm8k.py': 'data/gsm8k/test.jsonl',
  'demo/held_out_loss.py': None,
  'demo/sentiment_rewards.py': '.cache/data/sentiment_rewards/pairs.jsonl',
  'demo/tutorial_rows.py': 'data/shop/chat.jsonl',
}
SHELL = ('.', 'cd', 'git', 'sha256sum')


def kind(command):
  """The class of a command; None where it has none."""
  words = command.words
  if elsewhere(command):
    return 'elsewhere'
  program = program_of(words[0])
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


def program_of(word):
  return 'python' if word in ('python3', '.venv/bin/python') else word.removeprefix('.venv/bin/')


def elsewhere(command):
  """The beginning in ELSEWHERE; None where it is not there."""
  text = ' '.join([program_of(command.words[0]), *command.words[1:]])
  return next((b for b in ELSEWHERE if text == b or text.startswith(f'{b} ')), None)


@functools.cache
def all_commands():
  return every_command()


def of_kind(*kinds):
  """The commands of some classes, those with the same words on one page once."""
  found = {}
  for command in all_commands():
    if kind(command) in kinds:
      found.setdefault((command.words, bool(saved(command.page)) and command.page), command)
  return list(found.values())


@functools.cache
def saved(page):
  """{name: content} of the files that a page asks its reader to save."""
  return saved_files((ROOT / page).read_text())


def write_rows(file, rows):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(''.join(json.dumps(row) + '\n' for row in rows))


if __name__ == '__main__':
  for command in every_command():
    print(command, '  (span)' * command.is_span)
