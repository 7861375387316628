"""The renderer of chat templates: known texts, and hostile templates in bounded time and memory."""

import resource
import time

import pytest
from tiny_tokenizer import CHATML

from ftjax.data import chat_template, template_sandbox
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
  special = {'bos_token': '<s>', 'eos_token': '</s>'}
  return chat_template.trace(
    template, messages, generation_prompt=prompt, special_tokens=special, tools=tools
  ).text


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


# Expressions that templates of real models use, alone and inside of a loop, block and macro.
EXPRESSIONS = {
  "' /think a'.replace('/think', '')": '  a',
  "'aa'.replace('a', 'b', 1)": 'ba',
  "'aa' | replace('a', 'b', 1)": 'ba',
  "', '.join(['a', 'b'])": 'a, b',
  "'-'.join(messages | map(attribute='role'))": 'user-assistant',
  "['a', 'b'] | join('-')": 'a-b',
  "messages | join(', ', attribute='role')": 'user, assistant',
  "'a</x>b'.split('</x>')[-1]": 'b',
  "'a b c'.split(' ', 1) | last": 'b c',
  "'a.b.c'.rsplit('.', maxsplit=1)[0]": 'a.b',
  "'xay'.strip('xy') ~ ' a'.lstrip() ~ 'a\n'.rstrip('\n')": 'aaa',
  "'ab'.startswith(('a', 'x')) and 'ab'.endswith('b')": 'True',
  "'7'.zfill(3) ~ 'a'.ljust(3) ~ '|' ~ 'a'.rjust(2) ~ 'a'.center(3)": '007a  | a a ',
  "'a\tb'.expandtabs(2)": 'a b',
  "'aB'.upper() ~ 'aB'.lower() ~ 'ab'.capitalize() ~ 'a b'.title()": 'ABabAbA B',
  "'a,b'.partition(',')[2] ~ 'ab'.removeprefix('a') ~ 'ab'.find('b')": 'bb1',
  "'abc'.isalpha() ~ '12'.isdigit() ~ 'aa'.count('a')": 'TrueTrue2',
  "'a\nb'.splitlines() | length": '2',
  "'{}-{b}'.format('a', b='c')": 'a-c',
  "'**{}** {{x}} 2024: {:>3}{:*^5}'.format('a', 1, 2)": '**a** {x} 2024:   1**2**',
  "'{a}'.format_map({'a': 1})": '1',
  "'10000 %s *%d*' % ('a', 3)": '10000 a *3*',
  "'%s %s' | format('a', 'b')": 'a b',
  "'%.2f%%' | format(1.234)": '1.23%',
  "{'a': 1}.items() | list | length ~ ({'a': 1}.get('b', 2) | string)": '12',
  "dict(a=1, b=2) | dictsort | map('first') | join": 'ab',
  "dict.fromkeys(['a', 'b'], 0) | tojson": '{"a": 0, "b": 0}',
  "[1, 2, 3] | batch(2) | map('length') | join(' ')": '2 1',
  "[1, 2, 3] | slice(2) | map('length') | join(' ')": '2 1',
  '[3, 1] | sort | first ~ ([1, 2] | sum) ~ ([1, 2] | max)': '132',
  "['b', 'a', 'b'] | unique | list | tojson": '["b", "a"]',
  "messages | selectattr('role', 'equalto', 'user') | list | length": '1',
  "messages | rejectattr('role', 'in', ['user']) | map(attribute='role') | first": 'assistant',
  "messages | map(attribute='name', default='-') | join": '--',
  "(messages | groupby('role') | first)[0]": 'assistant',
  "messages[0] | attr('role') ~ messages[0]['role'] ~ messages[0].get('role')": 'useruser',
  "'a' is string and messages[0] is mapping and [] is iterable and 1 is number": 'True',
  "1.0.is_integer() ~ (3 | round(1)) ~ ('3' | int) ~ (2 // 2) ~ (5 % 3)": 'True3312',
  "'a b' | urlencode ~ ('abcdef' | truncate(4, true, '.', 0))": 'a%20babc.',
  "'a\n\nb\n' | indent(2, first=true, blank=true)": '  a\n  \n  b\n  ',
  "'<b>x</b>' | striptags ~ ('a' | center(3)) ~ ('A b' | wordcount)": 'x a 2',
  "(' a ' | trim) ~ ('aba' | trim('a')) ~ ('ab' | list | tojson)": 'ab["a", "b"]',
  "{'b': 1, 'a': [1]} | tojson(indent=2, separators=(',', ':'), sort_keys=true)": (
    '{\n  "a":[\n    1\n  ],\n  "b":1\n}'
  ),
  "range(1, 7, 2) | list | reverse | join(',')": '5,3,1',
  "(cycler('a', 'b')).next() ~ namespace(a=1).a": 'a1',
  "'a' if messages[-1].role != 'user' else 'b'": 'a',
  "undefined_name | default('x') ~ (none | default('y', true))": 'xy',
}
AROUND = (
  '{{ X }}',
  '{% for m in messages[:1] %}{{ X }}{% endfor %}',
  '{% for m in messages[:1] %}{% set v = X %}{{ v }}{% endfor %}',
  '{% for m in messages[:1] %}{% for n in messages[:1] %}{{ X }}{% endfor %}{% endfor %}',
  '{% block b scoped %}{{ X }}{% endblock %}',
  '{% macro f() %}{% for m in messages[:1] %}{{ X }}{% endfor %}{% endmacro %}{{ f() }}',
  '{% set n = namespace(v="") %}{% for m in messages[:1] %}{% set n.v = X %}{% endfor %}{{ n.v }}',
)


@pytest.mark.parametrize('around', AROUND)
def test_valid_expressions_are_never_refused(around):
  for expression, expected in EXPRESSIONS.items():
    assert render(around.replace('X', expression)) == expected, expression
  for given, expected in (('/no_think a', ' a'), ('a/think', 'a/think'), ('', '')):
    loop = "{% for m in messages %}{{ m.content.replace('/no_think', '') }}{% endfor %}"
    assert render(loop, [{'role': 'user', 'content': given}]) == expected


def test_arguments_of_the_template():
  template = '{{ date_string }}{{ documents | tojson }}{{ style.a }}{{ pad_token }}'
  kwargs = {'date_string': 'now', 'documents': [{'title': 't'}], 'style': {'a': 1}}
  special = {'bos_token': '', 'eos_token': '', 'pad_token': '<p>'}
  found = chat_template.trace(
    template, TALK, generation_prompt=False, special_tokens=special, kwargs=kwargs
  )
  assert found.text == 'now[{"title": "t"}]1<p>'
  for name in ('messages', 'tools', 'add_generation_prompt', 'eos_token', 'range', 'loop', '_x'):
    with pytest.raises(DataError, match=f'chat_template_kwargs: {name!r} is set by the rendering'):
      chat_template.check_kwargs({name: 1})


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
    "{{ 'a'.zfill(999999999) }}",
    "{{ 'a'.expandtabs(9) ~ '\t'.expandtabs(999999999) }}",
    "{{ ('a' * 60000).translate({97: 'b' * 60000}) }}",
    '{{ [1] | slice(999999999) | list | length }}',
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:*^999999999}'.format(1) }}",
    "{{ [[[1]]] | tojson(indent='x' * 99999) }}",
    "{{ range(99999) | list | tojson(separators=('x' * 9999, ':')) }}",
    '{% set n = namespace(x=range(99999) | list) %}{% for i in range(300) %}'
    '{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson(indent=16) }}',
    "{{ ('%(a(b))999999999d' % {'a(b)': 1}) | length }}",
    "{{ ('%%%(a).999999999d' % {'a': 1}) | length }}",
    "{{ ('%(' * 999999) % {} }}",
    "{{ 'a' | center(-5) | center(999999999) }}",
    '{{ 1.5 | round(999999999) }}',
    "{{ ('a' * 9999) | indent(9999, true) | length }}{{ ('\n' * 9999) | indent(99999) }}",
    "{% set s = 'a' * 9999999 %}{% set n = namespace(x=[]) %}"
    '{% for i in range(9999) %}{% set n.x = n.x + [s[1:]] %}{% endfor %}',
    "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    '{{ n.x | upper }}',
    '{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}',
    '{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}',
    *(DOUBLING % step for step in STRING_STEPS),
    *(NESTING % end for end in LIST_ENDS),
    '{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}',
    '{% for i in range(90000) %}' + 'x' * 5000 + '{% endfor %}',
    'x' * 1_000_001,
  ],
)
def test_time_and_memory_are_bounded(template, monkeypatch):
  monkeypatch.setattr(template_sandbox, 'MAX_SECONDS', 0.5)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  started = time.process_time()  # other processes may be at work on this machine
  with pytest.raises(DataError, match='chat template'):
    render(template)
  assert time.process_time() - started < 4
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB


def test_the_deadline_is_named_and_honest_templates_are_far_from_it(monkeypatch):
  monkeypatch.setattr(template_sandbox, 'MAX_SECONDS', 0.05)
  loops = '{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}'
  with pytest.raises(DataError, match=r'chat template .*takes more than 0.05 seconds'):
    render(loops)
  long = [{'role': 'user', 'content': 'word ' * 200}] * 100
  assert len(render(CHATML, long)) > 100_000


def test_a_busy_or_sleeping_machine_refuses_nothing(monkeypatch):
  """The deadline is in processor time of the rendering."""
  monkeypatch.setattr(template_sandbox, 'MAX_SECONDS', 0.05)
  monkeypatch.setitem(template_sandbox.ENVIRONMENT.globals, 'sleep', time.sleep)
  loop = '{% for i in range(200) %}{% if i == 0 %}{{ sleep(0.1) }}{% endif %}{% endfor %}'
  assert render(loop) == 'None'


def test_errors_name_the_template_and_its_reason():
  with pytest.raises(DataError, match=r'chat template .*sha256.*roles must alternate'):
    render("{{ raise_exception('roles must alternate') }}")
  with pytest.raises(DataError, match='chat template'):
    render('{% if %}')
  with pytest.raises(DataError, match='TypeError'):
    render('{{ 1 + "a" }}')
  with pytest.raises(DataError, match='expected length >= 9, got 5'):
    render("{{ 'a' | truncate(5, true, '123456789') }}")
  deep = '{{ ' + '(' * 20_000 + '1' + ')' * 20_000 + ' }}'
  with pytest.raises(DataError, match='RecursionError'):
    render(deep)
  assert chat_template.find_tags(deep) == ()
