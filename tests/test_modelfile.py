"""The Modelfile beside a GGUF file gives Ollama the conversations of the chat template."""

import re
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_files

from ftjax.data import chat_template
from ftjax.data.tokenizer import Tokenizer
from ftjax.hf import modelfile

TEMPLATES = Path(__file__).parent / 'templates'


def run_go(template, messages):
  """The part of Go's templates that a Modelfile here uses."""
  lead, loop, rest = re.fullmatch(
    r'(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)', template, re.DOTALL
  ).groups()
  cases = re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)\{\{ (?:else |end \}\})', loop, re.DOTALL)
  turns = [dict(cases)[m['role']].replace('{{ .Content }}', m['content']) for m in messages]
  return lead + ''.join(turns) + rest


@pytest.mark.parametrize(
  ('name', 'has_template', 'system'),
  [
    ('chatml', True, ''),
    ('smollm2', True, 'You are S.'),
    ('qwen2_5', True, 'You are a model named Q.'),
    ('llama3', True, ''),
    ('zephyr', True, ''),
    ('llama2', False, ''),  # the system message is inside of a user turn
    ('qwen3', False, ''),  # reasoning of earlier turns is left out
  ],
)
def test_modelfile(name, has_template, system):
  files = tiny_files((TEMPLATES / f'{name}.jinja').read_text(), adds_bos=name == 'llama3')
  tokenizer = Tokenizer(files)
  text = modelfile.text('mine.gguf', tokenizer)
  assert text.startswith(modelfile.MARK + 'FROM ./mine.gguf\n')
  assert text.endswith('PARAMETER stop "<|im_end|>"\n')
  found = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
  assert (found is not None) == has_template
  assert ('# No TEMPLATE' in text) != has_template
  default = re.search(r'^SYSTEM """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
  assert (default[1] if default else '').startswith(system) and bool(default) == bool(system)
  if not found:
    return
  for messages in (
    [{'role': 'user', 'content': 'Hi <b>'}],
    [{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': 'U\n\nV'}],
    [{'role': r, 'content': r[:2]} for r in ('user', 'assistant', 'user', 'assistant', 'user')],
  ):
    expected = chat_template.trace(
      tokenizer.template, messages, generation_prompt=True, special_tokens=tokenizer.special_texts
    ).text
    if default and messages[0]['role'] != 'system':
      messages = [{'role': 'system', 'content': default[1]}, *messages]
    # Where the tokenizer adds BOS, llama.cpp does.
    bos = tokenizer.bos_token if tokenizer.prefix_ids else ''
    assert bos + run_go(found[1], messages) == expected


def test_modelfile_of_a_base_model():
  text = modelfile.text('x.gguf', Tokenizer(tiny_files(None)))
  assert 'TEMPLATE """{{ .Prompt }}"""\n' in text
