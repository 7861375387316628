"""Spans of long conversations, in linear work and the same as from all prefixes; what a left cut
keeps; conversations that begin with the assistant."""

import random

import numpy as np
import pytest
from test_chat_template import LLAMA3
from test_encode import EXTRA, NO_THINK, QWEN25, SMOLLM2, THINK, make, one, runs, talk
from tiny_tokenizer import CHATML

from ftjax.data import chat_template, dialect, encode, spans
from ftjax.data.encode import fit, head_length
from ftjax.data.formats import Bad, Chat, Completion

CALL = {'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1, 'b': 'é'}}}
# Mistral's form: what is rendered of a message depends on its neighbours, by index.
BY_INDEX = (
  '{{ bos_token }}{% for i in range(messages | length) %}{% set m = messages[i] %}'
  "{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
  "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
MACRO = (
  '{% macro show(m) %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endmacro %}'
  '{% for m in messages %}{{ show(m) }}{% endfor %}'
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CAPTURED = '{% set all %}' + CHATML + '{% endset %}{{ all }}'
PASSES = (
  '{% set ns = namespace(last=-1, system="") %}{% for m in messages %}'
  "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
  '{% for m in messages[::-1] %}{% set ns.system = m.role %}{% endfor %}'
  '{{ ns.system }}{% for m in messages if m.role != "system" recursive %}'
  "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The stop token is written where the next message begins, or at the end.
LATE_STOP = (
  "{% for m in messages %}{% if not loop.first %}{{ '<|im_end|>\n' }}{% endif %}"
  "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content }}"
  "{% if loop.last %}{{ '<|im_end|>\n' }}{% endif %}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
  'chatml': CHATML,
  'smollm2': SMOLLM2,
  'qwen2.5': QWEN25,
  'thinking': THINK,
  'no thinking': NO_THINK,
  'by index': BY_INDEX,
  'macro': MACRO,
  'captured': CAPTURED,
  'passes': PASSES,
  'late stop': LATE_STOP,
}


def tool_talk(turns):
  messages = [{'role': 'user', 'content': 'sum?'}]
  for i in range(turns):
    messages.append({'role': 'assistant', 'content': f'Call {i}.', 'tool_calls': [CALL]})
    messages.append({'role': 'tool', 'content': f'result {i}'})
  return Chat((*messages, {'role': 'assistant', 'content': 'Done.'}))


def from_prefixes(example, tokenizer, loss_on='assistant'):
  """Spans by definition: every prefix rendered."""
  own = dialect.of(tokenizer)
  messages, tools = own.translate(example.messages, example.tools)
  full = own.render(messages, tools)
  found = []
  for k in spans.turns(example, loss_on):
    prompt, whole = own.render(messages[:k], tools, True), own.render(messages[: k + 1], tools)
    found.append((prompt, whole))
  if all(full.startswith(w) and w.startswith(p) for p, w in found):
    return [(full, tuple((len(p), len(w)) for p, w in found))]
  return [(w, ((len(p), len(w)),)) for p, w in found]


def rendered(example, tokenizer):
  found = spans.pieces(example, tokenizer, 'assistant').pieces
  return [(p.text, p.spans) for p in found]


@pytest.mark.parametrize('name', TEMPLATES)
def test_spans_are_those_of_the_prefixes(name):
  rng = random.Random(name)
  words = ['a', ' b ', 'c\nd', '<think>x</think>y', 'assistant', '日本', '42', '|', 'Q.']
  t = make(TEMPLATES[name], extra_special=('[INST]', '[/INST]'))
  for _ in range(40):
    n = rng.choice([1, 1, 2, 3, 5, 9, 14])
    contents = [
      rng.choice(words) + rng.choice(['', ' ', '\n']) + str(rng.random())[:3] for _ in range(2 * n)
    ]
    example = talk(*contents, system=rng.choice([None, 'S', 'be brief']))
    assert rendered(example, t) == from_prefixes(example, t)


def test_spans_of_tool_turns_are_those_of_the_prefixes():
  t = make(QWEN25)
  for turns in (1, 2, 3, 10):
    example = tool_talk(turns)
    assert rendered(example, t) == from_prefixes(example, t)
    assert len(runs(one(example, t), t)) == turns + 1


def written_characters(monkeypatch, example, tokenizer):
  written = []
  inner = chat_template._render

  def counting(*args):
    text = inner(*args)
    written.append(len(text))
    return text

  monkeypatch.setattr(chat_template, '_render', counting)
  spans.pieces(example, tokenizer, 'assistant')
  monkeypatch.undo()
  return sum(written)


@pytest.mark.parametrize(
  'template, make_talk',
  [
    (QWEN25, tool_talk),
    (CHATML, lambda n: talk(*(f'word {i}' for i in range(2 * n)))),
    (SMOLLM2, lambda n: talk(*(f' word {i}\n' for i in range(2 * n)), system='Be brief.')),
    (BY_INDEX, lambda n: talk(*(f'word {i}' for i in range(2 * n)))),
  ],
)
def test_the_work_grows_with_the_turns(monkeypatch, template, make_talk):
  counts = []
  for turns in (250, 500):
    t = make(template, extra_special=('[INST]', '[/INST]'))
    assert dialect.of(t).facts  # probed once per template
    counts.append(written_characters(monkeypatch, make_talk(turns), t))
  assert counts[1] <= 2.2 * counts[0]


def test_a_turn_that_is_rendered_otherwise_later_is_found_wherever_it_stands():
  """One turn in a hundred loses its reasoning once others follow."""
  t = make(
    THINK.replace('{% if loop.last %}', '{% if false %}').replace(
      "{% set c = c.split('</think>')[-1].lstrip() %}",
      "{% if not loop.last %}{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}",
    )
  )
  contents = [f'word {i}' for i in range(200)]
  contents[77] = '<think>hm</think>one'
  example = talk(*contents)
  found = rendered(example, t)
  assert len(found) == 100 and found == from_prefixes(example, t)


ALTERNATES = (
  "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('roles must alternate') }}{% endif %}"
  "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_FIRST = (
  "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}"
  '{% endif %}{{ messages[0].role }}' + ALTERNATES
)


@pytest.mark.parametrize('template', [SMOLLM2, QWEN25, ALTERNATES, SYSTEM_FIRST])
@pytest.mark.parametrize('system', [None, 's'])
def test_a_conversation_that_begins_with_the_assistant(template, system):
  first = ({'role': 'system', 'content': system},) if system else ()
  greeting = Chat((*first, {'role': 'assistant', 'content': 'Welcome.'}, *talk('q', 'a').messages))
  t = make(template)
  (found,) = encode.encode([greeting], t, 'assistant')
  if template == ALTERNATES and system:
    assert 'roles must alternate' in found.reason  # it takes no system turn either
  elif isinstance(found, Bad):
    assert (
      f'messages[{len(first)}] is an assistant message, and this template expects' in found.reason
    )
    assert 'a user turn first' in found.reason
  else:
    assert system and template in (SMOLLM2, QWEN25)
    assert runs(found[0], t) == ['Welcome.<|im_end|>', 'a<|im_end|>']


def test_a_left_cut_keeps_bos_and_the_system_turn():
  t = make(LLAMA3, bos='<|endoftext|>', eos='<|eot_id|>', adds_bos=True, extra_special=EXTRA)
  e = one(talk(*('word ' * 40, 'first') * 2, 'q', 'second', system='Be brief.'), t)
  system = t.decode(e.tokens[: e.head], skip_special=False)
  assert system == '<|endoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>'
  assert e.bos == 1 and e.tokens[0] == t.bos_id
  seq_len = 2 * e.head + 8
  cut = fit(e, seq_len, 'truncate_left')
  assert len(cut.tokens) == seq_len and cut.head == e.head == head_length(e, seq_len)
  assert np.array_equal(cut.tokens[: e.head], e.tokens[: e.head])
  assert np.array_equal(cut.tokens[e.head :], e.tokens[len(e.tokens) - seq_len + e.head :])
  assert not cut.supervised[e.head] and runs(cut, t)[-1] == 'second<|eot_id|>'
  small = fit(e, e.head + 2, 'truncate_left')  # no room: BOS alone stays, which `head` shows
  assert small.tokens[0] == t.bos_id and small.head == 1 < e.head
  assert np.array_equal(small.tokens[1:], e.tokens[len(e.tokens) - e.head - 1 :])
  right = fit(e, len(e.tokens) - 1, 'truncate_right')
  assert np.array_equal(right.tokens, e.tokens[:-1]) and right.head == e.head


def test_what_stands_at_the_beginning():
  """BOS and system turn of templates that place them differently; of plain texts BOS alone."""
  t = make(QWEN25, bos=None)
  e = one(talk('q', 'a', system='Be brief.'), t)
  start = '<|im_start|>system\nBe brief.<|im_end|>\n'
  assert t.decode(e.tokens[: e.head], skip_special=False) == start and e.bos == 0
  assert one(talk('q', 'a'), t).head == 0
  inside = make(  # Llama 2's form: the system's text stands in the user's first turn
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ '[INST] ' + (s if loop.first else '') }}"
    "{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    '{% endfor %}',
    bos='<|endoftext|>',
    extra_special=('[INST]', '[/INST]'),
  )
  e = one(talk('q', 'a', system='Be brief.'), inside)
  assert (e.bos, e.head) == (1, 1)
  adds = make(None, bos='<|endoftext|>', adds_bos=True)
  for row in (Completion('Q: ', 'word ' * 30),):
    ((e,),) = encode.encode([row], adds, 'assistant')
    cut = fit(e, 10, 'truncate_left')
    assert (e.bos, e.head) == (1, 1) and cut.tokens[0] == adds.bos_id and len(cut.tokens) == 10
    assert cut.supervised.tolist() == [False, False] + [True] * 8


def test_the_system_turn_of_labeled_completions():
  t = make(LLAMA3, bos='<|endoftext|>', eos='<|eot_id|>', adds_bos=True, extra_special=EXTRA)
  chat_row = talk('q', 'a', system='Be brief.')
  (found,) = encode.encode_answers([chat_row], t)
  assert found.head == one(chat_row, t).head > 1 and found.bos == 1
