"""The sandboxed renderer: known texts, hostile templates, and no second renderer anywhere."""

import pathlib
import time

import pytest
from tiny_tokenizer import CHATML

from ftjax.data import chat
from ftjax.runtime.errors import DataError

LLAMA3 = (
  '{% set loop_messages = messages %}{% for message in loop_messages %}'
  "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
  " + message['content'] | trim + '<|eot_id|>' %}"
  '{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}'
  '{{ content }}{% endfor %}{% if add_generation_prompt %}'
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TALK = [{'role': 'user', 'content': ' hi '}, {'role': 'assistant', 'content': 'yes'}]


def render(template, messages=TALK, prompt=False, tools=None):
  return chat.render(
    template, messages, generation_prompt=prompt, bos_token='<s>', eos_token='</s>', tools=tools
  )


def test_chatml_and_llama3_by_hand():
  assert render(CHATML) == (
    '<|im_start|>user\n hi <|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n'
  )
  assert render(LLAMA3, TALK[:1], prompt=True) == (
    '<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>'
    '<|start_header_id|>assistant<|end_header_id|>\n\n'
  )


def test_what_templates_use():
  assert render("{{ {'b': 'é<', 'a': [1]} | tojson }}") == '{"b": "é<", "a": [1]}'
  assert render('{{ [1, {}] | tojson(indent=2) }}') == '[\n  1,\n  {}\n]'
  assert render("{% generation %}{{ 'x' }}{% endgeneration %}y") == 'xy'
  assert (
    render('{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}')
    == '012'
  )
  assert (
    render(
      '{% set n = namespace(a=1) %}'
      '{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}'
    )
    == '3'
  )
  assert render("{{ 'a-b'.split('-')[1] ~ ' a'.strip() ~ eos_token }}") == 'ba</s>'
  assert render("{{ ['a', 'b'] | join(', ') }} {{ 'aa' | replace('a', 'bc') }}") == 'a, b bcbc'
  assert (
    render("{{ messages | map(attribute='content') | list | length }}{{ tools is none }}")
    == '2True'
  )
  assert (
    render('{{ "%s-%d" % ("a", 3) }}{{ "{}".format(4) }}{{ "a\nb" | indent(2) }}') == 'a-34a\n  b'
  )
  assert render('  {% if true %}\nx\n  {% endif %}\n') == 'x\n'  # trim_blocks and lstrip_blocks


def test_the_date_is_fixed():
  assert render("{{ strftime_now('%d %b %Y') }}") == '26 Jul 2024'


def test_generation_block_has_its_own_scope():
  source = "{% set x = 'a' %}{% generation %}{% set x = 'b' %}{{ x }}{% endgeneration %}{{ x }}"
  assert render(source) == 'ba'


@pytest.mark.parametrize(
  'template',
  [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    '{{ messages.__class__.__base__ }}',
    "{{ ''['__class__'] }}x{{ ''|attr('__class__') }}",
    '{{ raise_exception.__globals__ }}',
    '{{ raise_exception.__globals__["__builtins__"]["open"]("/etc/passwd") }}',
    '{{ namespace.__init__.__globals__ }}',
    '{{ lipsum.__globals__["os"].popen("id").read() }}',
    '{{ cycler.__init__.__globals__.os }}',
    '{{ joiner.__init__.__globals__ }}',
    '{{ self.__init__.__globals__ }}',
    '{{ self._TemplateReference__context.environment }}y{{ self._x.y }}',
    '{{ range.__globals__.x }}',
    '{{ (1).__class__.__bases__ }}',
    "{{ '{0.__class__.__init__.__globals__}'.format(range) }}",
    '{% set x = messages.append({}) %}',
    "{% set x = messages[0].update({'role': 'system'}) %}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
  ],
)
def test_no_way_out(template):
  try:
    text = render(template)
  except DataError as error:
    assert 'chat template' in str(error)
  else:  # an undefined value renders as nothing; anything else would have leaked
    assert text.strip('xy') == ''


# Sixty steps, each of which makes a text twice as long or a list with twice the leaves.
DOUBLING = "{%% set n = namespace(x='ab') %%}{%% for i in range(60) %%}%s{%% endfor %%}"
STRING_STEPS = (
  '{% set n.x = n.x ~ n.x %}',
  '{% set n.x = n.x + n.x %}',
  '{% set n.x = [n.x, n.x] | join %}',
  "{% set n.x = n.x | replace('a', n.x) %}",
  "{% set n.x = n.x.replace('a', n.x) %}",
  "{% set n.x = ''.join([n.x, n.x]) %}",
  '{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}',
)
NESTING = (
  '{%% set n = namespace(x=[1]) %%}'
  '{%% for i in range(60) %%}{%% set n.x = [n.x, n.x] %%}{%% endfor %%}%s'
)
LIST_ENDS = ('{{ n.x | tojson }}', '{{ n.x }}', '{{ n.x | string }}', "{{ '' ~ n.x }}")


@pytest.mark.parametrize(
  'template',
  [
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
    '{% set r = range(99999) %}{% for i in r %}{% for j in r if false %}{% endfor %}{% endfor %}',
    '{% set r = range(99999) %}{% for i in r %}{% set x = r | sum %}{% endfor %}',
    "{{ 'a' * 999999999 }}",
    '{{ [1] * 999999999 }}',
    '{{ range(999999999) | list }}',
    "{{ 'a' | center(999999999) }}",
    "{{ 'a'.ljust(999999999) }}",
    "{{ 'a'.encode() * 999999999 }}",
    "{{ (1).to_bytes(999999999, 'big') }}",
    '{{ [1] | batch(999999999, 0) | first | length }}',
    '{{ ([[0] * 1000] * 1000) | sum(start=[]) }}',
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=999999999) }}",
    "{{ 'a' | indent(999999999) | indent(999999999) ~ ('a' * 64000001) }}",
    '{{ 9 ** (9 ** 9) }}',
    *(DOUBLING % step for step in STRING_STEPS),
    *(NESTING % end for end in LIST_ENDS),
    '{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}',
    '{% for i in range(90000) %}' + 'x' * 5000 + '{% endfor %}',
    'x' * 1_000_001,
  ],
)
def test_no_explosion(template):
  started = time.process_time()  # other processes may be at work beside this one
  with pytest.raises(DataError, match='chat template'):
    render(template)
  assert time.process_time() - started < 4


def test_deadline_holds_when_steps_do_not(monkeypatch):
  monkeypatch.setattr(chat, 'MAX_SECONDS', 0.05)
  monkeypatch.setattr(chat, 'MAX_STEPS', 10**12)
  loops = '{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}'
  with pytest.raises(DataError, match='seconds'):
    render(loops)


def test_errors_name_the_template_and_its_reason():
  with pytest.raises(DataError, match=r'chat template .*sha256.*roles must alternate'):
    render("{{ raise_exception('roles must alternate') }}")
  with pytest.raises(DataError, match='chat template'):
    render('{% if %}')
  with pytest.raises(DataError, match='TypeError'):
    render('{{ 1 + "a" }}')


def test_one_renderer_only():
  package = pathlib.Path(chat.__file__).parents[1]
  for path in package.rglob('*.py'):
    if path != pathlib.Path(chat.__file__):
      assert 'jinja2' not in path.read_text(), path
