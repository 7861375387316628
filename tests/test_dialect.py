"""What a chat template can show, found by probing: roles, reasoning, tool calls, lost content."""

import json

import pytest
from test_encode import QWEN25, THINK, make, one, runs, talk
from tiny_tokenizer import CHATML

from ftjax.data import dialect, encode, sentinels, spans
from ftjax.data.formats import Bad, Chat

USER = {'role': 'user', 'content': '12 + 30 ='}
ANSWER = {'role': 'assistant', 'content': '42'}
# Knows three roles, and refuses others.
STRICT = (
  "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
  "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
  "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = STRICT.replace("('system', ", '(')
# Renders reasoning from the key KEY, in every turn.
REASONS = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
  "{% if m.KEY is defined and m.KEY %}{{ '<think>' + m.KEY + '</think>' }}{% endif %}"
  "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Reasoning as a part of the content; no key of the message.
PARTS = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
  '{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}'
  "{% if p.type == 'thinking' %}{{ '[THINK]' + p.thinking + '[/THINK]' }}"
  "{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
  "{{ '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def calling(print_arguments):
  """A template with tool calls, whose arguments are printed by an expression."""
  return CHATML.replace(
    "+ '<|im_end|>'",
    '}}{% for c in message.tool_calls %}{% set f = c.function %}'
    "{{ '<call>' + f.name + ':' }}" + print_arguments + '{% endfor %}'
    "{{ '<|im_end|>'",
  )


XML = calling(
  '{% for k, v in f.arguments | items %}'
  "{{ '<arg=' + k + '>' + (v if v is string else v | tojson) + '</arg>' }}{% endfor %}"
)
EITHER = calling('{{ f.arguments if f.arguments is string else f.arguments | tojson }}')


def text_of(chat, template):
  t = make(template)
  return t.decode(one(chat, t).tokens, skip_special=False)


def unrendered(chat, template):
  return one(chat, make(template)).unrendered


def test_reasoning_that_a_template_does_not_render_is_named():
  for key, value in (
    ('reasoning_content', 'twelve plus thirty'),
    ('reasoning', '42'),  # also where the same words stand in the answer
    ('thinking', 'a\nb'),
  ):
    chat = Chat((USER, ANSWER | {key: value}))
    assert unrendered(chat, CHATML) == (f'messages[1].{key}',)
    assert unrendered(chat, QWEN25) == (f'messages[1].{key}',)


def test_keys_of_a_message_that_hold_content_are_named_and_metadata_is_not():
  chat = Chat(
    (
      USER | {'name': 'Ann', 'id': 'm1', 'timestamp': '2024', 'created_at': 1, 'uuid': 'u'},
      ANSWER | {'refusal': 'no', 'notes': ['x', {'y': 'z'}], 'annotations': [], 'score': 0.5},
    )
  )
  places = ('messages[0].name', 'messages[1].refusal', 'messages[1].notes[0]')
  assert unrendered(chat, CHATML) == (*places, 'messages[1].notes[1].y')
  assert unrendered(chat, REASONS.replace('KEY', 'refusal')) == (
    'messages[0].name',
    'messages[1].notes[0]',
    'messages[1].notes[1].y',
  )


def test_what_is_dropped_later_by_design_is_rendered():
  """Qwen3's form: reasoning of earlier turns is taken off; each turn shows its own once."""
  chat = talk('q', '<think>\nhm\n</think>\n\none', 'r', '<think>\nho\n</think>\n\ntwo')
  (found,) = encode.encode([chat], make(THINK), 'assistant')
  assert [e.unrendered for e in found] == [(), ()]


def test_reasoning_cut_off_in_every_turn_is_named():
  """DeepSeek-R1's form: the text before </think> is never rendered."""
  template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
  assert unrendered(talk('q', '<think>hm</think>one'), template) == ('messages[1].content',)
  assert unrendered(talk('q', 'one'), template) == ()


@pytest.mark.parametrize(
  'content, cut, places',
  [
    ('one two three four', "message['content'][:12]", 1),
    ('one', "message['content'][:12]", 0),
    ('one two three', "('' if 'two' in message['content'] else message['content'])", 1),
    (' one\n\n two  ', "message['content'] | trim | replace('\n', ' ')", 0),
    ('say "é" <b>', "message['content'] | tojson", 0),
    ('say "é" <b>', "('' ~ message['content'] | escape)", 0),
    ('one /no_think', "message['content'] | replace('/no_think', '') | trim", 0),
  ],
)
def test_a_content_of_which_a_part_is_lost_is_named(content, cut, places):
  template = CHATML.replace("message['content']", cut)
  chat = Chat(({'role': 'user', 'content': content}, ANSWER))
  assert unrendered(chat, template) == ('messages[0].content',) * places


def test_tools_of_which_a_part_is_not_rendered():
  parameters = {
    'type': 'object',
    'properties': {
      'city': {'type': 'string', 'description': 'Name of it', 'enum': ['Paris', 'Rome']},
      'days': {'type': 'integer', 'minimum': 1, 'default': 3},
    },
    'required': ['city'],
  }
  function = {'name': 'weather', 'description': 'Tells it', 'parameters': parameters}
  chat = Chat((USER, ANSWER), ({'type': 'function', 'function': function},))
  assert unrendered(chat, QWEN25) == ()
  names = (
    "{% if tools %}{% for t in tools %}{{ t.function.name + '(' + "
    "(t.function.parameters.properties | join(', ')) + ')\n' }}{% endfor %}{% endif %}" + CHATML
  )
  start = 'tools[0].function.'
  assert unrendered(chat, names) == (
    start + 'description',
    *(f'{start}parameters.properties.city.{k}' for k in ('description', 'enum[0]', 'enum[1]')),
    *(f'{start}parameters.properties.days.{k}' for k in ('minimum', 'default')),
  )
  assert unrendered(chat, CHATML)[:2] == (start + 'name', start + 'description')


def test_tools_are_put_into_the_form_that_is_shown():
  function = {'name': 'weather', 'description': 'Tells it'}
  head = '{% for t in tools or [] %}[{{ SHOWN }}]{% endfor %}'
  for tool in (function, {'type': 'function', 'function': function}):
    chat = Chat((USER, ANSWER), (tool,))
    for shown in (
      "t.function.name ~ ': ' ~ t.function.description",
      "t.name ~ ': ' ~ t.description",
    ):
      template = head.replace('SHOWN', shown) + CHATML
      assert text_of(chat, template).startswith('[weather: Tells it]')
      assert unrendered(chat, template) == ()
    as_given = head.replace('SHOWN', 't | tojson') + CHATML
    assert text_of(chat, as_given).startswith(f'[{json.dumps(tool)}]')


def test_developer_is_system_where_only_system_is_rendered():
  talk_of = lambda role: Chat(  # noqa: E731
    ({'role': role, 'content': 'Answer in French only.'}, USER, ANSWER)
  )
  unknown = QWEN25.replace(
    '{%- else %}\n        {{- ', "{%- elif message.role != 'developer' %}\n        {{- "
  )
  for template in (STRICT, unknown):
    developer = text_of(talk_of('developer'), template)
    assert developer == text_of(talk_of('system'), template)
    assert 'system\nAnswer in French only.' in developer
    assert unrendered(talk_of('developer'), template) == ()
  assert '<|im_start|>developer\nAnswer in French' in text_of(talk_of('developer'), CHATML)
  (bad,) = encode.encode([talk_of('developer')], make(NO_SYSTEM), 'assistant')
  assert isinstance(bad, Bad) and 'unknown role developer' in bad.reason
  ignored = STRICT.replace("{{ raise_exception('unknown role ' + m.role) }}", '{% continue %}')
  ignored = ignored.replace("('system', ", '(')
  assert unrendered(talk_of('developer'), ignored) == ('messages[0].content',)


@pytest.mark.parametrize('shown', ['reasoning_content', 'reasoning', 'thinking'])
@pytest.mark.parametrize('given', ['reasoning_content', 'reasoning', 'thinking'])
def test_names_of_reasoning_are_aliases(given, shown):
  chat = Chat((USER, ANSWER | {given: 'twelve plus thirty'}))
  template = REASONS.replace('KEY', shown)
  assert '<think>twelve plus thirty</think>42' in text_of(chat, template)
  assert unrendered(chat, template) == ()
  assert '[THINK]twelve plus thirty[/THINK]42' in text_of(chat, PARTS)
  assert unrendered(chat, PARTS) == ()


def test_two_names_of_reasoning():
  template = REASONS.replace('KEY', 'reasoning')
  both = ANSWER | {'reasoning': 'a b', 'reasoning_content': 'a b'}
  assert unrendered(Chat((USER, both)), template) == ()
  differ = ANSWER | {'reasoning': 'a b', 'reasoning_content': 'c d'}
  assert unrendered(Chat((USER, differ)), template) == ('messages[1].reasoning_content',)


ARGUMENTS = {'city': 'Paris', 'at': {'hours': [1, 2.5], 'utc': True, 'zone': None}}


@pytest.mark.parametrize('wrapped', [True, False])
@pytest.mark.parametrize('form', ['object', 'text', 'compact text'])
def test_arguments_are_put_into_the_form_that_is_printed(form, wrapped):
  separators = (',', ':') if form == 'compact text' else None
  given = ARGUMENTS if form == 'object' else json.dumps(ARGUMENTS, separators=separators)
  call = {'name': 'get_weather', 'arguments': given}
  call = {'type': 'function', 'function': call} if wrapped else call
  chat = Chat(
    (USER, {'role': 'assistant', 'content': '', 'tool_calls': [call, call]}, USER, ANSWER)
  )
  bare = '{% set f = c.function if c.function is defined else c %}'
  wanted = json.dumps(ARGUMENTS)
  for template, printed in (
    (QWEN25, f'"arguments": {wanted}}}'),
    (calling('{{ f.arguments | tojson }}'), f'<call>get_weather:{wanted}'),
    (calling('{{ f.arguments }}'), f'<call>get_weather:{given if form != "object" else wanted}'),
    (calling("{{ '```' + f.arguments + '```' }}"), '```{"city":'),
    (XML, '<arg=city>Paris</arg><arg=at>{"hours": [1, 2.5], "utc": true, "zone": null}</arg>'),
    (EITHER, f'<call>get_weather:{given if form != "object" else wanted}'),
  ):
    template = template.replace('{% set f = c.function %}', bare)
    text = text_of(chat, template)
    assert text.count(printed) == 2, (template, text)
    assert unrendered(chat, template) == ()


def test_empty_arguments_are_an_object():
  for given, printed in (('', '{}'), ('{}', '{}')):
    call = {'function': {'name': 'f', 'arguments': given}}
    chat = Chat((USER, {'role': 'assistant', 'content': '', 'tool_calls': [call]}))
    assert f'"arguments": {printed}}}' in text_of(chat, QWEN25)


def test_an_argument_that_is_not_printed_is_named_by_its_own_name():
  first = calling(
    '{% for k, v in f.arguments | items %}{% if loop.first %}{{ k + v }}{% endif %}{% endfor %}'
  )
  for names in (('city', 'hour'), ('x', 'y')):  # of one shape; the second is looked up
    call = {'function': {'name': 'f', 'arguments': dict.fromkeys(names, 'v')}}
    chat = Chat((USER, {'role': 'assistant', 'content': '', 'tool_calls': [call]}))
    assert unrendered(chat, first) == (f'messages[1].tool_calls[0].function.arguments.{names[1]}',)


def test_a_template_that_checks_values_is_asked_with_the_row_itself():
  picky = STRICT.replace(
    "{{ '<|im_start|>' +",
    "{% if m.content not in ('12 + 30 =', '42') %}"
    "{{ raise_exception('unknown') }}{% endif %}{{ '<|im_start|>' +",
    1,
  )
  assert unrendered(Chat((USER, ANSWER)), picky) == ()
  chat = Chat((USER, ANSWER | {'reasoning': 'twelve plus thirty'}))
  assert unrendered(chat, picky) == ('messages[1].reasoning',)


def test_prompts_are_refused_or_sampled_all_the_same():
  t = make()
  prompt = Chat((USER | {'name': 'Ann'},))
  with pytest.raises(
    ValueError, match=r"does not render messages\[0\]\.name; .*on_unrendered='warn'"
  ):
    encode.encode_prompt(prompt, t)
  assert encode.encode_prompt(prompt, t, 'warn') == encode.encode_prompt(Chat((USER,)), t)


def test_template_arguments():
  template = CHATML.replace(
    "'<|im_start|>assistant\n'",
    "'<|im_start|>assistant\n' + ('' if enable_thinking | default(true) else '<think></think>')",
  )
  t = make(template)
  off = Chat((USER,), template_kwargs={'enable_thinking': False})
  assert encode.encode_prompt(off, t) == [
    *encode.encode_prompt(Chat((USER,)), t),
    *t.encode('<think></think>'),
  ]
  shown = make('{{ date_string }}{{ style | tojson }}{{ documents }}' + CHATML)
  kwargs = {'date_string': '1 May', 'style': {'a': 1}}
  found = one(Chat((USER, ANSWER), template_kwargs=kwargs), shown)
  assert shown.decode(found.tokens).startswith('1 May{"a": 1}None')
  for name in ('messages', 'tools', 'bos_token', 'add_generation_prompt', 'raise_exception', '_x'):
    (bad,) = encode.encode([Chat((USER, ANSWER), template_kwargs={name: 'x'})], t, 'assistant')
    assert isinstance(bad, Bad) and f"'{name}' is set by the rendering itself" in bad.reason


def test_one_shape_is_learned_once(monkeypatch):
  t = make(QWEN25)
  rows = [talk(f'question {i}', f'answer {i}') for i in range(50)]
  renderings = []
  inner = dialect.Dialect.trace
  monkeypatch.setattr(
    dialect.Dialect, 'trace', lambda *args, **kw: renderings.append(1) or inner(*args, **kw)
  )
  found = encode.encode(rows, t, 'assistant')
  assert [runs(e, t) for (e,) in found] == [[f'answer {i}<|im_end|>'] for i in range(50)]
  assert len(renderings) <= 50 + 3


def test_one_reason_a_line():
  places = [f'messages[{i}].name' for i in range(11)]
  reason = encode.unrendered_reason(places, make())
  assert 'messages[7].name and 3 more' in reason and '\n' not in reason
  places = [f'messages[1].tool_calls[{i}].function.arguments.city' for i in range(6)]
  assert sentinels.list_places([*places, 'tools[0].function.name']) == (
    'messages[1].tool_calls, tools[0]'
  )
  assert spans.turns(Chat((USER, ANSWER)), 'assistant') == [1]


@pytest.mark.parametrize(
  ('arguments', 'reason'),
  [
    ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
    ('{"a": {"b": 1, "b": 1}}', "the key 'b' occurs twice"),
    ('[1, 2]', 'is no JSON object'),
    ('not json', 'is no JSON object'),
    ('{"a": ', 'is no JSON object'),
  ],
)
def test_arguments_that_have_no_form_are_refused(arguments, reason):
  call = {'type': 'function', 'function': {'name': 'add', 'arguments': arguments}}
  messages = (
    {'role': 'user', 'content': 'q'},
    {'role': 'assistant', 'content': '', 'tool_calls': [call]},
  )
  (found,) = encode.encode([Chat(messages)], make(QWEN25), 'assistant')
  assert isinstance(found, Bad) and reason in found.reason
