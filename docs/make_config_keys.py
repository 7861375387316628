"""Writes docs/config_keys.md, a table of every config key, from the comments in ftjax/config/.

python docs/make_config_keys.py; tests/test_config_keys.py fails while the file is out of date.
"""

import ast
import io
import pathlib
import sys
import tokenize

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftjax.config import algorithms, choices, hints, keys, section, validation  # noqa: E402

TARGET = ROOT / 'docs' / 'config_keys.md'
_SOURCES = [
  ROOT / 'ftjax' / 'config' / name for name in ('keys.py', 'label_keys.py', 'optim_keys.py')
]
_HEAD = """# Config keys

Made by `python docs/make_config_keys.py` from the comments in
[ftjax/config/keys.py](../ftjax/config/keys.py) and the files beside it: edit those. How a config
file looks, and how keys are changed on the command line, is described in [config.md](config.md).

`batch_size` is global: the number of packed sequences, pairs or prompts of one optimizer update,
over all devices. `grad_accum` divides it into micro-batches and does not multiply it.
"""
_NAMES_HEAD = """
## Names in other tools

What users of TRL and the Hugging Face Trainer, LLaMA-Factory, Axolotl, Tunix and MaxText type, and
the key that has the meaning here. One of these names, on the command line or in a config file, is
an error that names the key.

| their name | here | note |
|---|---|---|
"""


def comments(text: str) -> dict[str, str]:
  """{'c.section.key': its comment}: the one at the end of its line, else the lines above it."""
  lines = text.split('\n')
  at_end, whole = {}, {}
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type == tokenize.COMMENT:
      target = whole if token.line.strip().startswith('#') else at_end
      target[token.start[0]] = token.string.lstrip('# ')
  found = {}
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Assign) and lines[node.lineno - 1].strip().startswith('c.'):
      above, line = [], node.lineno - 1
      while line in whole:
        above.insert(0, whole[line])
        line -= 1
      inside = [at_end[n] for n in range(node.lineno, node.end_lineno + 1) if n in at_end]
      found[ast.unparse(node.targets[0])] = ' '.join(above + inside)
  return found


def described() -> dict[str, str]:
  """{dotted key or section: its meaning}."""
  out = {}
  for source in _SOURCES:
    for target, text in comments(source.read_text()).items():
      out[target.removeprefix('c.')] = text
  return out


def cell(text: str) -> str:
  """A text in a cell of a table."""
  return text.replace('|', '\\|')


def values(key: str, default: object) -> str:
  """What may stand under a key, where that is a short list or a bound."""
  allowed = {'algorithm': algorithms.ALGORITHMS} | choices.CHOICES
  if key in allowed:
    more = ' or `module:object`' if key == 'algorithm' or key in choices.OBJECTS else ''
    return ', '.join(f'`{v}`' for v in allowed[key]) + more
  if isinstance(default, bool):
    return '`True`, `False`'
  if key in validation.POSITIVE:
    return 'at least 1'
  if key in validation.NOT_NEGATIVE or key.startswith('watchdog.'):
    return 'at least 0'
  return ''


def document() -> str:
  """The whole text of docs/config_keys.md."""
  defaults, meanings = section.flat(keys.default()), described()
  sections = dict.fromkeys(k.rpartition('.')[0] for k in meanings if k in defaults or '.' in k)
  out = [_HEAD]
  for head in ('', *(s for s in sections if s)):
    title = f'`{head}`' if head else 'Top level'
    out.append(f'\n## {title}\n')
    if about := meanings.get(head):
      out.append(f'\n{about[0].upper()}{about[1:]}\n')
    out.append('\n| key | default | meaning | values |\n|---|---|---|---|\n')
    for key in (k for k in meanings if k in defaults and k.rpartition('.')[0] == head):
      default = {} if key == 'model.random' else defaults[key]
      row = (f'`{key}`', f'`{default!r}`', meanings[key].rstrip('.'), values(key, defaults[key]))
      out.append('| ' + ' | '.join(cell(x) for x in row) + ' |\n')
  out.append(_NAMES_HEAD)
  for names, key, note in hints.ROWS:
    row = (', '.join(f'`{n}`' for n in names), f'`{key}`' if key else '', note)
    out.append('| ' + ' | '.join(cell(x) for x in row) + ' |\n')
  return ''.join(out)


if __name__ == '__main__':
  TARGET.write_text(document())
