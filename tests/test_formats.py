"""Raw rows: what each format becomes, and why a row is refused."""

import pytest

from ftjax.data.formats import FORMATS, Chat, Completion, Text, detect, parse


def U(text='q'):
  return {'role': 'user', 'content': text}


def A(text='a', **more):
  return {'role': 'assistant', 'content': text} | more


def test_messages_with_strings_and_parts():
  parts = {
    'role': 'user',
    'content': [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}],
  }
  row = {'messages': [{'role': 'system', 'content': 's'}, parts, A('yes', name=None)]}
  chat = parse(row, 'messages', True)
  assert [m['content'] for m in chat.messages] == ['s', 'ab', 'yes']
  assert 'name' not in chat.messages[2]  # an absent Parquet column
  assert chat.trained == (False, False, True) and chat.tools is None


def test_weight_takes_a_turn_out_of_the_loss_and_out_of_the_template():
  chat = parse({'messages': [U(), A('no', weight=0), U(), A('yes', weight=1)]}, 'messages', True)
  assert chat.trained == (False, False, False, True)
  assert 'weight' not in chat.messages[1]


def test_prompt_completion():
  assert parse({'prompt': '', 'completion': 'b'}, 'prompt_completion', True) == Completion('', 'b')
  row = {'prompt': [U(), A('old'), U()], 'completion': [A('new')]}
  assert parse(row, 'prompt_completion', True).trained == (False, False, False, True)


def test_alpaca_with_and_without_template():
  row = {'instruction': 'Add.', 'input': '1 2', 'output': '3'}
  assert parse(row, 'alpaca', True).messages == (U('Add.\n\n1 2'), A('3'))
  plain = parse(row, 'alpaca', False)
  assert plain.prompt.endswith('### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:')
  assert 'paired with an input' in plain.prompt and plain.completion == '3'
  bare = parse({'instruction': 'Go.', 'input': '', 'output': 'x'}, 'alpaca', False)
  assert '### Input' not in bare.prompt and 'paired' not in bare.prompt
  system = parse(row | {'system': 'S'}, 'alpaca', True)
  assert system.messages[0] == {'role': 'system', 'content': 'S'}


def test_sharegpt_with_tools():
  row = {
    'system': 'S',
    'tools': '[{"name": "f"}]',
    'conversations': [
      {'from': 'human', 'value': 'q'},
      {'from': 'function_call', 'value': '{"name": "f", "arguments": {"x": 1}}'},
      {'from': 'observation', 'value': '2'},
      {'from': 'gpt', 'value': 'two'},
    ],
  }
  chat = parse(row, 'sharegpt', True)
  assert [m['role'] for m in chat.messages] == ['system', 'user', 'assistant', 'tool', 'assistant']
  call = {'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}
  assert chat.messages[2] == A('', tool_calls=[call])
  assert chat.tools == ({'name': 'f'},)
  assert chat.trained == (False, False, True, False, True)


def test_text():
  assert parse({'text': 'a'}, 'text', False) == Text('a')


@pytest.mark.parametrize(
  'row, form',
  [
    ({'messages': []}, 'messages'),
    ({'conversations': []}, 'sharegpt'),
    ({'prompt': 'a', 'completion': 'b', 'text': 'c'}, 'prompt_completion'),
    ({'instruction': 'a', 'output': 'b'}, 'alpaca'),
    ({'text': 'a', 'id': 3}, 'text'),
  ],
)
def test_detect(row, form):
  assert detect(row) == form
  assert form in FORMATS


def test_detect_refuses_strangers():
  with pytest.raises(ValueError, match=r"\['label', 'sentence'\] fit no format"):
    detect({'sentence': 'a', 'label': 1})


@pytest.mark.parametrize(
  'row, form, reason',
  [
    ({'messages': []}, 'messages', 'empty'),
    ({'messages': 'x'}, 'messages', 'expected a list'),
    ({}, 'messages', 'expected a list'),
    ({'messages': ['x']}, 'messages', r'messages\[0\] is str'),
    ({'messages': [U()]}, 'messages', 'no assistant message'),
    ({'messages': [U(), A('', weight=1)]}, 'messages', r'messages\[1\]: .* says nothing'),
    ({'messages': [U(), A(' \n')]}, 'messages', 'says nothing'),
    ({'messages': [U(), {'role': 'assistant'}]}, 'messages', "no key 'content'"),
    ({'messages': [U(3), A()]}, 'messages', r"messages\[0\]: 'content' is int"),
    ({'messages': [{'role': 'bot', 'content': 'x'}]}, 'messages', "role is 'bot'"),
    ({'messages': [{'content': 'x'}]}, 'messages', 'role is None'),
    ({'messages': [U(), U(), A()]}, 'messages', 'two user messages'),
    ({'messages': [U(), A(), A()]}, 'messages', 'two assistant messages'),
    ({'messages': [U(), A(), {'role': 'system', 'content': 's'}]}, 'messages', 'a system message'),
    ({'messages': [U(), {'role': 'tool', 'content': 's'}, A()]}, 'messages', 'a tool message'),
    ({'messages': [U(), A(weight=0.5)]}, 'messages', 'weight is 0.5'),
    ({'messages': [U(), A(weight=0)]}, 'messages', 'no assistant message'),
    ({'messages': [U([{'type': 'image'}]), A()]}, 'messages', "type 'image'"),
    ({'messages': [U(), A()], 'tools': '{'}, 'messages', 'not JSON'),
    ({'messages': [U('\ud83d'), A()]}, 'messages', 'surrogate'),
    ({'prompt': 'a'}, 'prompt_completion', "no key 'completion'; got keys"),
    ({'prompt': 'a', 'completion': ''}, 'prompt_completion', "'completion' is empty"),
    ({'prompt': 'a', 'completion': [A()]}, 'prompt_completion', 'both'),
    ({'completion': 'a'}, 'prompt_completion', "no key 'prompt'"),
    ({'instruction': 'a', 'output': None}, 'alpaca', "'output' is NoneType"),
    ({'instruction': 'a', 'output': 'b', 'history': [['a', 'b']]}, 'alpaca', 'history'),
    ({'conversations': [{'from': 'bing', 'value': 'x'}]}, 'sharegpt', "'bing'"),
    ({'conversations': [{'from': 'gpt'}]}, 'sharegpt', "no key 'value'"),
    ({'conversations': [{'from': 'function_call', 'value': 'f('}]}, 'sharegpt', 'not JSON'),
    ({'text': '  '}, 'text', "'text' is empty"),
    ({'text': 5}, 'text', "'text' is int"),
  ],
)  # fmt: skip
def test_refused_with_a_reason(row, form, reason):
  with pytest.raises(ValueError, match=reason):
    parse(row, form, True)


def test_assistant_may_speak_first():
  assert isinstance(parse({'messages': [A('welcome'), U(), A()]}, 'messages', True), Chat)
