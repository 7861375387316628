"""docs/from_*.md: the tables from other tools name keys that exist, with their defaults, and agree
with the names that ftjax recognizes in a config.
"""

import ast
import pathlib
import re

import pytest

from ftjax.config import choices, hints, keys, section

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / 'docs').glob('from_*.md'))
DEFAULTS = section.flat(keys.default())
HEADER = ('default there', 'ftjax', 'default here', 'what differs')

_SPAN = re.compile(r'`([^`]+)`')
# Rows whose key is another one than the key that a hint gives to the name alone, without its tool.
BY_CONTEXT = {
  'algorithm': 'dpo.loss',  # of Tunix's DPOTrainer
  'dtype': 'model.param_dtype',  # of TRL's models
  'finetuning_type': 'lora.rank',
  'hf_path': 'data.train',  # of MaxText
  'max_response_length': 'seq_len',  # of Tunix's DPOTrainer
  'pure_bf16': 'model.param_dtype',
  'train_micro_batch_size': 'grad_accum',
}
# The section of a name changes its meaning, and a hint sees the name alone.
SEVERAL = {
  'batch_size', 'beta', 'epsilon', 'loss_type', 'max_new_tokens', 'reward_model', 'temperature',
}  # fmt: skip


def rows(page):
  """[(their names, the keys here, defaults here, the row)] of the tables of a page."""
  out, is_table = [], False
  for line in page.read_text(encoding='utf-8').splitlines():
    cells = [c.strip() for c in line.split('|')[1:-1]]
    if tuple(cells[1:]) == HEADER:
      is_table = True
    elif not cells:
      is_table = False
    elif is_table and set(cells[0]) != {'-'}:
      assert len(cells) == 5, line
      theirs, _, here, default, _ = cells
      out.append((_SPAN.findall(theirs), _SPAN.findall(here), _SPAN.findall(default), line))
  return out


def test_there_is_a_page_for_each_tool():
  names = ['from_axolotl', 'from_llama_factory', 'from_maxtext', 'from_trl', 'from_tunix']
  assert [p.stem for p in PAGES] == names
  assert all(len(rows(page)) > 30 for page in PAGES)


@pytest.mark.parametrize('page', PAGES, ids=[p.stem for p in PAGES])
def test_a_page_names_the_version_that_was_read(page):
  head = page.read_text(encoding='utf-8').split('\n\n')[1]
  assert re.match(r'Read for this page: .*(\d+\.\d+\.\d+|commit `[0-9a-f]{7}`)', head, re.DOTALL)


def test_keys_exist_with_these_defaults_and_values():
  wrong = []
  for page in PAGES:
    for theirs, here, default, line in rows(page):
      if not theirs:
        wrong.append(line)
      found = [k.partition('=') for k in here if not k.startswith('--')]
      expected = [DEFAULTS.get(key, 'no such key') for key, _, _ in found]
      if [ast.literal_eval(d) for d in default] != expected:
        wrong.append(f'{page.name}: {line}\n  expected {expected}')
      for key, _, value in found:
        if value and key in choices.CHOICES and value not in choices.CHOICES[key]:
          wrong.append(f'{page.name}: {key}={value}: expected one of {choices.CHOICES[key]}')
  assert not wrong, '\n'.join(wrong)


def test_values_in_notes_exist():
  """`KEY=VALUE` in the text of a page, where KEY has a list of values."""
  wrong = []
  for page in PAGES:
    for span in _SPAN.findall(page.read_text(encoding='utf-8')):
      key, _, value = span.partition('=')
      if value and key in choices.CHOICES and value not in choices.CHOICES[key]:
        wrong.append(f'{page.name}: {span}')
  assert not wrong


def test_the_pages_agree_with_the_names_that_a_config_recognizes():
  wrong = []
  for page in PAGES:
    for theirs, here, _, line in rows(page):
      found = {k.partition('=')[0] for k in here}
      for full_name in theirs:
        name = full_name.rpartition(':')[2]
        key, _ = hints.BY_NAME.get(name, (None, ''))
        is_usual = key is None or key in found or not here or name in SEVERAL
        if not is_usual and BY_CONTEXT.get(name) not in found:
          wrong.append(f'{page.name}: {line}\n  a hint names {key}')
  assert not wrong, '\n'.join(wrong)
