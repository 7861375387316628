"""Masks: hand-made goldens per template, random conversations, borders, BOS, over-length
policies."""

import json
import pathlib
import random

import numpy as np
import pytest
from test_chat_template import LLAMA3
from tiny_tokenizer import CHATML, tiny_files

from ftjax.data.encode import Encoded, encode, encode_prompt, fit, turn_end
from ftjax.data.formats import Bad, Chat, Completion, Text
from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError, DataError

# SmolLM2's: a default system message; each turn ends with a newline after the stop token.
SMOLLM2 = (
  "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nYou are a helper<|im_end|>\n' }}{% endif %}"
  "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3's habit: reasoning is dropped from all turns but the last, which always shows a block.
THINK = (
  '{% for m in messages %}{% set c = m.content %}'
  "{% if m.role == 'assistant' %}{% set t = '' %}"
  "{% if '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1].strip() %}"
  "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
  "{% if loop.last %}{% set c = '<think>\n' ~ t ~ '\n</think>\n\n' ~ c %}{% endif %}{% endif %}"
  "{{ '<|im_start|>' ~ m.role ~ '\n' ~ c ~ '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt itself supplies an empty block (reasoning switched off).
NO_THINK = CHATML.replace(
  "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n\n</think>\n\n'"
).replace(
  "message['content']",
  "('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '') + message['content']",
)
# Qwen2.5's form: a default system turn, which shows the tools; calls in an assistant's turn behind
# its words, if there are any; answers of tools side by side in one user turn.
QWEN25 = """
{%- set first = messages[0] %}
{%- if first.role == 'system' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|im_start|>system\n' }}
{{- first.content if first.role == 'system' else 'You are Q.' }}
{%- if tools %}
    {{- '\n\nTools:' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in rest %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or rest[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<result>\n' + message.content + '\n</result>' }}
        {%- if loop.last or rest[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}
                {%- set call = call.function %}
            {%- endif %}
            {{- '\n<call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\n</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
NO_STOP = (
  "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
EXTRA = ('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>')


def make(template=CHATML, **more):
  return Tokenizer(tiny_files(template, **more), name='tiny')


def talk(*contents, system=None):
  messages = [{'role': 'system', 'content': system}] if system else []
  for i, content in enumerate(contents):
    messages.append({'role': ('user', 'assistant')[i % 2], 'content': content})
  return Chat(tuple(messages))


def one(example, tokenizer, loss_on='assistant') -> Encoded:
  (result,) = encode([example], tokenizer, loss_on)
  assert not isinstance(result, Bad), result
  (encoded,) = result
  return encoded


def runs(encoded, tokenizer):
  """Texts of the maximal runs of supervised tokens."""
  out, ids = [], []
  for token, on in zip(encoded.tokens, encoded.supervised, strict=True):
    if on:
      ids.append(token)
    elif ids:
      out.append(tokenizer.decode(ids, skip_special=False))
      ids = []
  return out + ([tokenizer.decode(ids, skip_special=False)] if ids else [])


def test_golden_chatml():
  """Every token written out: 'a' and 'b' are bytes, the newline after <|im_end|> is not learned."""
  t = make(SMOLLM2, vocab_size=259)  # bytes and three special tokens, no merges
  e = one(talk('a', 'b\n'), t)
  text = (
    '<|im_start|>system\nYou are a helper<|im_end|>\n<|im_start|>user\na<|im_end|>\n'
    '<|im_start|>assistant\nb\n<|im_end|>\n'
  )
  assert t.decode(e.tokens, skip_special=False) == text
  assert len(e.tokens) == 6 + len(text.replace('<|im_start|>', '').replace('<|im_end|>', ''))
  assert e.supervised.tolist() == [False] * (len(e.tokens) - 4) + [True, True, True, False]
  assert e.tokens[e.supervised].tolist() == [*t.encode('b\n'), 2]
  assert e.tokens.dtype == np.int32 and e.supervised.dtype == bool


def test_golden_real_smollm2():
  folder = pathlib.Path(__file__).parents[1] / '.cache' / 'smollm2'
  if not (folder / 'tokenizer.json').is_file():
    pytest.skip('no .cache/smollm2; `make assets` fetches it')
  files = ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'config.json')
  t = Tokenizer({n: (folder / n).read_bytes() for n in files if (folder / n).is_file()})
  e = one(talk('Hi', 'Hello there!\n', 'Bye', '再见 😀'), t)
  assert runs(e, t) == ['Hello there!\n<|im_end|>', '再见 😀<|im_end|>']
  assert (t.bos_id, t.eos_id) == (1, 2)
  assert e.tokens[:3].tolist() == t.encode('<|im_start|>system\n')
  assert encode_prompt(talk('Hi'), t) == t.encode(
    '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face'
    '<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
  )


def test_golden_llama3():
  t = make(LLAMA3, bos='<|endoftext|>', eos='<|eot_id|>', adds_bos=True, extra_special=EXTRA)
  e = one(talk('q', ' first ', 'q2', 'second', system='s'), t)
  assert runs(e, t) == ['first<|eot_id|>', 'second<|eot_id|>']
  assert e.tokens[0] == t.bos_id and (e.tokens == t.bos_id).sum() == 1
  assert runs(one(talk('q', 'x', 'q2', 'y'), t, 'completion'), t) == ['y<|eot_id|>']
  assert one(talk('q', 'x'), t, 'all').supervised.tolist()[:2] == [False, True]


def test_golden_template_that_rewrites_history():
  """One example a turn, each as it would be sampled; earlier reasoning is gone from later
  prompts."""
  t = make(THINK)
  chat = talk('q', '<think>\nhm\n</think>\n\none', 'r', 'two')
  (results,) = encode([chat], t, 'assistant')
  texts = [t.decode(e.tokens, skip_special=False) for e in results]
  assert [runs(e, t) for e in results] == [
    ['<think>\nhm\n</think>\n\none<|im_end|>'],
    ['<think>\n\n</think>\n\ntwo<|im_end|>'],
  ]
  assert 'hm' in texts[0] and 'hm' not in texts[1] and 'one' in texts[1]
  prompt = Chat(chat.messages[:3])
  sampled_from = encode_prompt(prompt, t)
  assert results[1].tokens[: len(sampled_from)].tolist() == sampled_from
  assert not results[1].supervised[: len(sampled_from)].any()
  assert len(encode([chat], t, 'completion')[0]) == 1


def test_golden_generation_prompt_with_an_empty_block():
  t = make(NO_THINK)
  e = one(talk('q', 'one', 'r', 'two'), t)
  assert '<think>' in t.decode(e.tokens)
  assert runs(e, t) == ['one<|im_end|>', 'two<|im_end|>']


def test_golden_qwen25_with_tools():
  """One example of all turns: calls are supervised with a turn's words, tools' answers are not."""
  t = make(QWEN25)
  call = {'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1, 'b': 'é'}}}
  messages = (
    {'role': 'user', 'content': 'sum?'},
    {'role': 'assistant', 'content': '', 'tool_calls': [call, call]},
    {'role': 'tool', 'content': '3'},
    {'role': 'tool', 'content': '4'},
    {'role': 'assistant', 'content': 'Once more.', 'tool_calls': [call]},
    {'role': 'tool', 'content': '5'},
    {'role': 'assistant', 'content': 'It is 5.'},
  )
  chat = Chat(messages, ({'name': 'add'},))
  e = one(chat, t)
  written = '\n<call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</call>'
  assert runs(e, t) == [
    f'{written[1:]}{written}<|im_end|>',
    f'Once more.{written}<|im_end|>',
    'It is 5.<|im_end|>',
  ]
  text = t.decode(e.tokens, skip_special=False)
  assert text.startswith(
    '<|im_start|>system\nYou are Q.\n\nTools:\n{"name": "add"}<|im_end|>\n<|im_start|>user\nsum?'
  )
  assert (
    '<|im_start|>user\n<result>\n3\n</result>\n<result>\n4\n</result><|im_end|>\n<|im_start|>as'
    in text
  )
  for k in (1, 4, 6):  # what sampling starts from is what training saw
    prompt = encode_prompt(Chat(messages[:k], chat.tools), t)
    assert e.tokens[: len(prompt)].tolist() == prompt


def test_golden_qwen25_without_tools():
  t = make(QWEN25, bos=None)
  e = one(talk('a', 'b', 'c', 'd', system='s'), t)
  assert t.decode(e.tokens, skip_special=False).startswith('<|im_start|>system\ns<|im_end|>\n')
  assert runs(e, t) == ['b<|im_end|>', 'd<|im_end|>']
  assert t.bos_id is None and t.token(turn_end(t)) == '<|im_end|>'
  assert t.decode(encode_prompt(talk('a'), t), skip_special=False) == (
    '<|im_start|>system\nYou are Q.<|im_end|>\n<|im_start|>user\na<|im_end|>\n'
    '<|im_start|>assistant\n'
  )


def test_masks_hold_where_the_tokenizer_normalizes():
  """Qwen2.5's does NFC: e + U+0301 is one character after it, and spans count those before."""
  files = tiny_files(QWEN25)
  model = json.loads(files['tokenizer.json'])
  files['tokenizer.json'] = json.dumps(model | {'normalizer': {'type': 'NFC'}}).encode()
  t = Tokenizer(files, name='tiny')
  e = one(talk('e\u0301' * 3, 'ye\u0301s', 'e\u0301', 'no e\u0301'), t)
  assert runs(e, t) == ['y\u00e9s<|im_end|>', 'no \u00e9<|im_end|>'] and e.boundary_tokens == 0


def test_template_without_stop_token_is_refused_by_name():
  (bad,) = encode([talk('q', 'yes')], make(NO_STOP), 'assistant')
  assert isinstance(bad, Bad)
  assert 'without a special token' in bad.reason and 'of tiny' in bad.reason


def test_template_whose_prompt_is_not_a_prefix_is_refused_by_name():
  template = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>model\n' }}")
  (bad,) = encode([talk('q', 'yes')], make(template), 'assistant')
  assert isinstance(bad, Bad) and 'messages[1]' in bad.reason and "'model" in bad.reason


def test_assistant_first_needs_a_template_that_can():
  opening = Chat(({'role': 'assistant', 'content': 'welcome'},))
  t = make(CHATML)
  assert runs(one(opening, t), t) == ['welcome<|im_end|>']
  (bad,) = encode([opening], make(SMOLLM2), 'assistant')
  assert isinstance(bad, Bad) and 'begin the row with' in bad.reason


def test_random_conversations():
  """Supervised text == assistant text + stop token, for 1,500 conversations and three templates."""
  rng = random.Random(0)
  alphabet = [*'ab .,\n\t1é日😀', 'hello', ' world', '\n\n', '  ', 'The', '<', '|>']
  words = lambda: 'x' + ''.join(rng.choice(alphabet) for _ in range(rng.randint(0, 12))) + 'y'  # noqa: E731
  for template, stop, more in (
    (SMOLLM2, '<|im_end|>', {}),
    (QWEN25, '<|im_end|>', {'bos': None}),
    (LLAMA3, '<|eot_id|>', {'bos': '<|endoftext|>', 'adds_bos': True, 'extra_special': EXTRA}),
  ):
    t = make(template, eos=stop, **more)
    chats = [
      talk(*(words() for _ in range(2 * rng.randint(1, 4))), system=rng.choice([None, words()]))
      for _ in range(500)
    ]
    for chat, result in zip(chats, encode(chats, t, 'assistant'), strict=True):
      answers = [m['content'] + stop for m in chat.messages if m['role'] == 'assistant']
      assert runs(result[0], t) == answers
      assert result[0].boundary_tokens == 0


def test_untrained_turns_are_context():
  t = make()
  chat = talk('q', 'bad', 'r', 'good')
  only_last = Chat(chat.messages, None, (False, False, False, True))
  assert runs(one(only_last, t), t) == ['good<|im_end|>']
  only_first = Chat(chat.messages, None, (False, True, False, False))
  assert isinstance(encode([only_first], t, 'completion')[0], Bad)


def test_mask_is_by_position_not_by_id():
  """An answer that holds the stop token's id, with pad == eos == stop: all of it is supervised."""
  t = make()
  assert t.pad_id == t.eos_id == 2
  e = one(talk('q', 'a<|im_end|>b'), t)
  assert runs(e, t) == ['a<|im_end|>b<|im_end|>']


def test_completion_counts():
  """Supervised == tokens of the completion + EOS, also for answers of one token."""
  t = make(adds_bos=True)
  for answer in ('x', ' yes', 'hello world\n'):
    e = one(Completion('Q: ', answer), t)
    assert e.tokens[0] == t.bos_id and e.tokens[-1] == t.eos_id
    prompt = [*t.prefix_ids, *t.encode('Q: ')]
    assert e.tokens[: len(prompt)].tolist() == prompt  # what sampling starts from
    assert not e.supervised[: len(prompt)].any() and e.supervised[len(prompt) :].all()
    assert runs(e, t) == [answer + '<|im_end|>']


def test_completion_border_inside_a_token():
  """'wor' + 'ld': the whole text has one token over the border; the prompt keeps its own ids."""
  t = make()
  assert t.encode(' world')[: len(t.encode(' wor'))] != t.encode(' wor')
  e = one(Completion(' wor', 'ld'), t)
  assert e.boundary_tokens == 1
  assert e.tokens.tolist() == [*t.encode(' wor'), *t.encode('ld'), t.eos_id]
  assert runs(e, t) == ['ld<|im_end|>']


def test_chat_border_inside_a_token_is_counted_or_refused():
  template = CHATML.replace('assistant\n', 'assistant wor').replace(
    "+ '\n' + message['content']",
    "+ (' wor' if message['role'] == 'assistant' else '\n') + message['content']",
  )
  t = make(template)
  e = one(talk('q', 'ld wide'), t)
  assert e.boundary_tokens == 1 and runs(e, t) == [' wide<|im_end|>']
  (bad,) = encode([talk('q', 'ld')], t, 'assistant')  # its only token is the prompt's as well
  assert 'nothing but the stop token' in bad.reason and "'ld' shares a token" in bad.reason


def test_text_rows():
  t = make(None, adds_bos=True)
  e = one(Text('hello'), t)
  assert e.tokens.tolist() == [t.bos_id, *t.encode('hello'), t.eos_id]
  assert e.supervised.tolist() == [False] + [True] * (len(e.tokens) - 1)
  bare = one(Text('hello'), make(None))
  assert bare.tokens.tolist() == [*t.encode('hello'), t.eos_id]


def test_one_bos():
  """The template renders BOS, or renders it twice, or never; the post-processor adds nothing to
  chats."""
  more = {'bos': '<|endoftext|>', 'adds_bos': True}
  for rendered, expected in ((0, 0), (1, 1), (2, 1)):
    t = make('{{ bos_token }}' * rendered + CHATML, **more)
    chat = talk('q', 'a')
    assert (one(chat, t).tokens == t.bos_id).sum() == expected
    assert encode_prompt(Chat(chat.messages[:1]), t).count(t.bos_id) == expected
    assert runs(one(chat, t), t) == ['a<|im_end|>']
  assert encode_prompt('q', t) == [t.bos_id, *t.encode('q')]
  repeated = one(talk('q', 'a'), make())  # SmolLM2's BOS opens every turn, and may
  assert (repeated.tokens == 1).sum() == 2


def test_texts_that_bring_bos_and_eos_along_get_no_second_one():
  t = Tokenizer(tiny_files(adds_bos=True))
  bos, eos = t.bos_token, t.eos_token
  plain, marked = encode([Text('one two'), Text(f'{bos}one two{eos}')], t, 'all')
  assert marked[0].tokens.tolist() == plain[0].tokens.tolist()
  assert marked[0].supervised.tolist() == plain[0].supervised.tolist()
  rows = [Completion('one', ' two'), Completion(f'{bos}one', f' two{eos}')]
  plain, marked = encode(rows, t, 'completion')
  assert marked[0].tokens.tolist() == plain[0].tokens.tolist()
  assert marked[0].supervised.tolist() == plain[0].supervised.tolist()
  assert encode_prompt(f'{bos}one', t) == encode_prompt('one', t)


def test_the_token_that_ends_a_turn_is_found_even_where_the_settings_name_another():
  """A base model with the template of its instruct sibling."""
  t = Tokenizer(tiny_files(eos='<|endoftext|>'))
  assert t.stop_ids == (t.eos_id,) and turn_end(t) not in t.stop_ids
  assert t.token(turn_end(t)) == '<|im_end|>'
  assert turn_end(Tokenizer(tiny_files(None))) is None


def test_what_the_tokenizer_lacks_is_named():
  with pytest.raises(DataError, match='tiny has no chat template'):
    encode([talk('q', 'a')], make(None), 'assistant')
  files = tiny_files()
  files['tokenizer_config.json'] = b'{}'
  with pytest.raises(DataError, match='names no eos_token'):
    encode([Text('a')], Tokenizer(files), 'all')
  with pytest.raises(ConfigError, match=r'data\.loss_on'):
    encode([], make(), 'user')


def test_tools_that_the_template_does_not_show_are_named():
  tools = Chat(talk('q', 'a').messages, ({'name': 'f'},))
  assert one(tools, make()).unrendered == ('tools[0].name',)
  call = {'role': 'assistant', 'content': 'x', 'tool_calls': [{'function': {'name': 'f'}}]}
  calls = Chat((talk('q').messages[0], call))
  assert one(calls, make()).unrendered == ('messages[1].tool_calls[0].function.name',)
  silent = Chat((talk('q').messages[0], call | {'content': ''}))
  assert 'nothing but the stop token' in encode([silent], make(), 'assistant')[0].reason


def test_kinds_mix_in_order():
  t = make()
  rows = [Text('one'), talk('q', 'two'), Completion('p', 'three'), Text('four')]
  texts = [t.decode(r[0].tokens[r[0].supervised]) for r in encode(rows, t, 'assistant')]
  assert texts[1:3] == ['two', 'three'] and 'four'.endswith(texts[3])


def example(n, first):
  return Encoded(np.arange(n, dtype=np.int32), np.arange(n) >= first, True)


def test_fit():
  long = example(10, 6)
  assert fit(long, 10, 'error') is long
  with pytest.raises(ValueError, match=r'10 tokens, more than seq_len=9.*data\.on_overlength'):
    fit(long, 9, 'error')
  assert fit(long, 9, 'drop') is None
  left = fit(long, 3, 'truncate_left')
  assert left.tokens.tolist() == [7, 8, 9] and left.supervised.tolist() == [False, True, True]
  right = fit(long, 7, 'truncate_right')
  assert right.tokens.tolist() == list(range(7)) and right.supervised.sum() == 1
  assert fit(long, 6, 'truncate_right') is None  # every supervised token would be gone
  assert fit(example(10, 0), 1, 'truncate_left') is None
