"""Raw rows: what each format becomes, and why a row is refused."""

import json

import pytest

from ftjax.data.formats import FORMATS, Chat, Completion, Text, detect, from_cells, parse, unread
from ftjax.data.prompt_rows import ends_with_assistant, read_prompt, with_answer


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
    ({'messages': [U(), A('', weight=1)]}, 'messages', r'messages\[1\]: .* has empty content'),
    ({'messages': [U(), A(' \n')]}, 'messages', 'has empty content'),
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


def test_the_first_turn_may_be_the_assistants():
  assert isinstance(parse({'messages': [A('welcome'), U(), A()]}, 'messages', True), Chat)


CALL = {'name': 'f', 'arguments': {'x': 1}}
CALLED = [{'type': 'function', 'function': CALL}]


@pytest.mark.parametrize(
  'call',
  [
    {'function_call': CALL},
    {'function_call': json.dumps(CALL)},
    {'function_call': CALL, 'tool_calls': None},
    {'tool_calls': CALLED},
    {'tool_calls': json.dumps(CALLED)},
  ],
)
def test_the_older_function_call_is_a_tool_call(call):
  row = {'messages': [U(), A(None) | call, {'role': 'function', 'name': 'f', 'content': '2'}, A()]}
  found = parse(row, 'messages', True).messages
  assert found[1] == A('', tool_calls=CALLED)
  assert found[2] == {'role': 'tool', 'name': 'f', 'content': '2'}


def test_keys_that_stand_twice_in_json_text_are_refused():
  tools = '[{"name": "f", "name": "g"}]'
  with pytest.raises(ValueError, match=r"'tools'.*the key 'name' occurs twice"):
    parse({'messages': [U(), A()], 'tools': tools}, 'messages', True)


def test_a_bare_call_gets_the_form_of_the_others():
  call = {'name': 'f', 'arguments': {'a': 1}, 'id': 'c1'}
  found = parse({'messages': [U(), A(None, tool_calls=[call])]}, 'messages', True).messages
  function = {'name': 'f', 'arguments': {'a': 1}}
  assert found[1]['tool_calls'] == [{'type': 'function', 'function': function, 'id': 'c1'}]


@pytest.mark.parametrize('key', ['reasoning_content', 'reasoning', 'thinking'])
def test_reasoning_has_three_names(key):
  found = parse({'messages': [U(), A('a', **{key: 'why'})]}, 'messages', True)
  assert found.messages[1] == A('a', reasoning_content='why')


def test_keys_of_a_message_that_nobody_knows_are_kept():
  turns = [{'from': 'human', 'value': 'q', 'mood': 'sad'}, {'from': 'gpt', 'value': 'a'}]
  for row, form in (
    ({'messages': [U() | {'mood': 'sad'}, A()]}, 'messages'),
    ({'conversations': turns}, 'sharegpt'),
    ({'prompt': [U() | {'mood': 'sad'}], 'completion': 'a'}, 'prompt_completion'),
  ):
    assert parse(row, form, True).messages == (U() | {'mood': 'sad'}, A())


@pytest.mark.parametrize('kwargs', [{'style': 'dry', 'n': 0}, '{"style": "dry", "n": 0}'])
@pytest.mark.parametrize('tools', [[{'name': 'f'}], '[{"name": "f"}]'])
def test_columns_of_a_conversation_are_read_with_any_messages(kwargs, tools):
  more = {'system': 'S', 'tools': tools, 'chat_template_kwargs': kwargs}
  for row, form in (
    ({'messages': [U(), A()]}, 'messages'),
    ({'messages': json.dumps([U(), A()])}, 'messages'),
    ({'conversations': [{'from': 'human', 'value': 'q'}, {'role': 'assistant', 'content': 'a'}]},
     'sharegpt'),
    ({'prompt': [U()], 'completion': [A()]}, 'prompt_completion'),
    ({'prompt': [U()], 'completion': 'a'}, 'prompt_completion'),
    ({'instruction': 'q', 'output': 'a'}, 'alpaca'),
  ):  # fmt: skip
    chat = parse(row | more, form, True)
    assert chat.messages == ({'role': 'system', 'content': 'S'}, U(), A()), row
    assert chat.tools == ({'name': 'f'},)
    assert chat.template_kwargs == {'style': 'dry', 'n': 0}
    assert chat.trained == (False, False, True)
    asked = read_prompt(row | more, True).asked
    assert (asked.messages, asked.tools) == (chat.messages[:2], chat.tools)
    assert asked.template_kwargs == chat.template_kwargs and asked.trained is None


@pytest.mark.parametrize(
  'row, form, reason',
  [
    ({'messages': [{'role': 'system', 'content': 's'}, U(), A()], 'system': 'S'}, 'messages',
     "both the column 'system' and a system message"),
    ({'messages': [{'role': 'developer', 'content': 's'}, U(), A()], 'system': 'S'}, 'messages',
     'and a developer message'),
    ({'conversations': [{'from': 'system', 'value': 's'}, {'from': 'gpt', 'value': 'a'}],
      'system': 'S'}, 'sharegpt', 'and a system message'),
    ({'prompt': 'a', 'completion': 'b', 'system': 'S'}, 'prompt_completion', "'system' belongs"),
    ({'prompt': 'a', 'completion': 'b', 'tools': [{'name': 'f'}]}, 'prompt_completion', "'tools'"),
    ({'prompt': 'a', 'completion': 'b', 'chat_template_kwargs': {'a': 1}}, 'prompt_completion',
     "'chat_template_kwargs' belongs"),
    ({'messages': [U(), A()], 'chat_template_kwargs': [1]}, 'messages', 'list, expected an object'),
    ({'messages': [U(), A()], 'chat_template_kwargs': '{'}, 'messages', 'not JSON'),
    ({'messages': [U(), A(thinking='a', reasoning='b')]}, 'messages', 'both hold the reasoning'),
    ({'messages': [U(), A(thinking=['a'])]}, 'messages', "'thinking' is list"),
    ({'messages': [U(), A(function_call=CALL, tool_calls=CALLED)]}, 'messages', 'keep one of them'),
    ({'messages': [U(), A('', tool_calls='f()')]}, 'messages', "'tool_calls' is a string but not"),
    ({'messages': [U(), A('', tool_calls=['f'])]}, 'messages', 'no list of objects'),
    ({'messages': [U([{'type': 'text', 'text': 'a', 'url': 'b'}]), A()]}, 'messages', "key 'url'"),
    ({'messages': [{'role': ['user'], 'content': 'a'}, A()]}, 'messages', "role is \\['user'"),
    ({'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}],
      'tools': 'f'}, 'sharegpt', 'not JSON'),
  ],
)  # fmt: skip
def test_two_sources_of_truth_are_refused(row, form, reason):
  with pytest.raises(ValueError, match=reason):
    parse(row, form, True)


KTO = r"algorithm='dpo' with dpo\.loss='kto'"


@pytest.mark.parametrize(
  'row, reason',
  [
    ({'prompt': 'a', 'completion': 'b', 'label': False}, KTO),
    ({'prompt': 'a', 'completion': 'b', 'label': 0}, KTO),
    ({'instruction': 'a', 'output': 'b', 'kto_tag': True}, 'PATH::alpaca'),
    ({'messages': [U(), A()], 'label': True}, KTO),
    ({'messages': [U(), A()], 'label': 'false'}, KTO),  # CSV
    ({'conversations': [], 'kto_tag': False}, KTO),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}, "set algorithm='dpo'"),
    ({'chosen': [U(), A()], 'rejected': [U(), A('b')], 'messages': [U(), A()]}, 'algorithm=.dpo'),
    ({'instruction': 'a', 'output': ['b', 'c']}, "algorithm='dpo'"),
    ({'prompt': 'a', 'completion': 'b', 'score': 0.5}, "algorithm='reward_model'"),
    ({'messages': [U(), A()], 'score': -1.5}, "algorithm='reward_model'"),
    ({'prompt': 'a', 'completion': 'b', 'score': '0.5'}, "algorithm='reward_model'"),  # CSV
  ],
)
def test_labeled_rows_are_no_plain_rows(row, reason):
  with pytest.raises(ValueError, match=reason):
    detect(row)
  with pytest.raises(ValueError, match=reason):
    parse(row, 'messages', True)  # also where an earlier row has settled the format


@pytest.mark.parametrize(
  'more',
  [{'label': 3}, {'label': 'sports'}, {'score': 0.93}, {'label': 1, 'score': 4}, {'chosen': 2}],
)
def test_metadata_is_no_judgement(more):
  row = {'messages': [U(), A()]} | more
  assert detect(row) == 'messages'
  assert isinstance(parse(row, 'messages', True), Chat)
  assert unread(row, 'messages') == set(more)
  others = {'prompt': 'a', 'completion': 'b', 'label': 1, 'source': 'web'}
  assert detect(others) == 'prompt_completion'  # a class, say


def test_a_named_format_reads_labeled_rows():
  row = {'messages': [U(), A()], 'chosen': 'a', 'rejected': 'b', 'label': True}
  assert parse(row, 'messages', True, is_named=True).messages == (U(), A())


def test_columns_that_are_not_read():
  row = {'instruction': 'a', 'input': '', 'output': 'b', 'id': 3, 'source': 'x', 'note': None}
  assert unread(row, 'alpaca') == {'id', 'source'}
  assert unread({'text': 'a', 'meta': {}, 'messages': []}, 'text') == {'meta', 'messages'}
  assert unread({'messages': [], 'tools': [], 'system': ''}, 'messages') == set()


def test_detection_looks_past_null():
  assert detect({'messages': None, 'prompt': 'a', 'completion': 'b'}) == 'prompt_completion'
  with pytest.raises(ValueError, match="'messages' is NoneType"):
    parse({'messages': None}, detect({'messages': None}), True)


def test_prompts_are_separated_from_completions():
  row = {'messages': [U(), A('gold')], 'answer': 'x'}
  found = read_prompt(row, True)
  assert (found.asked.messages, found.answer) == ((U(),), 'gold')
  assert ends_with_assistant(row) and not ends_with_assistant({'prompt': 'a'})
  plain = read_prompt({'prompt': 'a', 'completion': 'b'}, True)
  assert (plain.asked, plain.answer) == ('a', 'b')
  assert with_answer('a', 'b') == Completion('a', 'b')
  assert with_answer(found.asked, 'b').messages == (U(), A('b'))
  layout = read_prompt({'instruction': 'Go.', 'input': 'x', 'output': 'b'}, False)
  assert layout.asked.endswith('### Input:\nx\n\n### Response:') and layout.answer == 'b'


def test_a_prompt_that_repeats_the_first_question_is_no_second_one():
  row = {'prompt': 'q', 'messages': [U(), A()]}
  assert read_prompt(row, True).asked.messages == (U(),)
  with pytest.raises(ValueError, match='all hold a prompt; name the format'):
    read_prompt(row | {'prompt': 'other'}, True)
  assert read_prompt(row | {'prompt': 'other'}, True, 'prompt_completion').asked == 'other'
  with pytest.raises(ValueError, match="'system' belongs"):
    read_prompt({'prompt': 'q', 'system': 'S'}, True)


def test_cells_of_csv():
  messages = [U(), A()]
  row = {'prompt': json.dumps(messages), 'completion': '[1]', 'system': '', 'text': '', 'id': '7'}
  assert from_cells(row) == {'prompt': messages, 'completion': '[1]', 'text': '', 'id': '7'}
