"""Forty-eight chat templates, with the constructs of published ones, times twenty-one
conversations: ids and masks are those of transformers, or what is not rendered is named."""

import functools
import json
import re

import numpy as np
import pytest
import template_cases as cases
from parity.make_template_goldens import digest, runs

from ftjax.data import dialect, encode, formats
from ftjax.data.formats import Bad, Chat
from ftjax.data.tokenizer import Tokenizer

# Rows that transformers renders and that are refused here: (template, conversation or None for all,
# a part of the reason).
_PROMPT = 'is not how the conversation with'
_NO_STOP = 'without a special token'
REFUSED = (
  ('glm4', None, _NO_STOP),  # a turn ends where the next role begins
  # The prompt opens a block of reasoning that the conversation does not have.
  *(('qwq', c, _PROMPT) for c in cases.CONVERSATIONS if c != 'reasoning inside'),
  ('deepseek_r1', None, _PROMPT),
  # Words beside a call are not rendered, so where the turn begins is not known.
  ('mistral_v3', 'call with words', 'It does not render messages[0].content, messages[2].content'),
)
# The prompt brings a block of reasoning, or its beginning, which a tag counts as the answer's.
SUPPLIED = (
  *((name, 'no thinking') for name in ('qwen3', 'qwen3_5', 'glm4_5')),
  ('qwq', 'reasoning inside'),
)


@functools.cache
def goldens():
  return json.loads(cases.GOLDEN.read_text())


def example_of(name):
  messages, tools, kwargs = cases.CONVERSATIONS[name]
  found = formats.parse({'messages': messages, 'tools': tools}, 'messages', True)
  return Chat(found.messages, found.tools, found.trained, kwargs)


def refusal(template, conversation):
  return next((r for t, c, r in REFUSED if t == template and c in (None, conversation)), None)


def places(unrendered):
  """'messages[1].tool_calls' of 'messages[1].tool_calls[0].function.name'."""
  found = [re.match(r'tools\[\d+\]|messages\[\d+\]\.\w+', p) for p in unrendered]
  return {re.sub('reasoning_content|thinking', 'reasoning', m.group()) for m in found if m}


def says_nothing(golden, messages):
  """Whether nothing of an assistant turn is rendered."""
  return any(
    not m['content'] and f'messages[{i}].tool_calls' in golden.get('lost', ())
    for i, m in enumerate(messages)
  )


def check_masks(found, golden):
  """One example of all turns, or one for each, as if nothing followed it."""
  tokens = [[digest(e.tokens), runs(e.supervised.astype(int).tolist())] for e in found]
  if len(found) == 1:
    assert tokens == [golden['turns'][-1]]
    return
  assert len(found) == len(golden['turns'])
  for (ids, mask), (golden_ids, golden_mask) in zip(tokens, golden['turns'], strict=True):
    assert ids == golden_ids
    assert mask == golden_mask.split()[-1]


@pytest.mark.parametrize('name', cases.SETTINGS)
def test_ids_and_masks_are_those_of_transformers(name):
  t = Tokenizer(cases.files(name), name=name)
  examples = [example_of(c) for c in cases.CONVERSATIONS]
  for conversation, example, found in zip(
    cases.CONVERSATIONS, examples, encode.encode(examples, t, 'assistant'), strict=True
  ):
    golden = goldens()[name][conversation]
    why = (name, conversation, golden, found)
    reason = refusal(name, conversation)
    if says_nothing(golden, example.messages):
      reason = reason or 'nothing but the stop token'
      assert places(golden['lost']) <= places(found.reason.split()), why
    if 'error' in golden or reason is not None:
      assert isinstance(found, Bad), why
      assert reason is None or reason in found.reason, why
      continue
    assert not isinstance(found, Bad), why
    if (name, conversation) in SUPPLIED:
      start = int(found[-1].supervised.argmax())
      assert digest(found[-1].tokens[:start]) == golden['prompt']
      assert [digest(e.tokens) for e in found] == [ids for ids, _ in golden['turns']]
      end = golden['turns'][-1][1].split('-')[-1]
      assert runs(found[-1].supervised.astype(int).tolist()) == f'{start}-{end}'
    else:
      check_masks(found, golden)
    assert places(found[0].unrendered) == places(golden['lost']), why
    last = max(i for i, m in enumerate(example.messages) if m['role'] == 'assistant')
    prompt = Chat(example.messages[:last], example.tools, None, example.template_kwargs)
    assert digest(encode.encode_prompt(prompt, t, 'warn')) == golden['prompt'], why


def test_probing_finds_what_reading_a_template_finds():
  for name, known in cases.SETTINGS.items():
    facts = dialect.of(Tokenizer(cases.files(name), name=name)).facts
    assert facts.developer == known.developer, name
    assert facts.arguments == known.arguments, name
    assert facts.tools == known.tools, name
    assert facts.reasoning_parts == (known.reasoning == 'parts'), name
    if known.reasoning not in ('', 'parts'):
      assert known.reasoning in facts.reasoning, name


def test_a_tagged_template_is_rendered_as_the_plain_one():
  row = example_of('turns')
  for name in ('llama3', 'qwen3', 'jamba', 'gpt_oss'):
    both = [
      encode.encode([row], Tokenizer(cases.files(name, tagged)), 'assistant')[0]
      for tagged in (False, True)
    ]
    for plain, tagged in zip(*both, strict=True):
      assert np.array_equal(plain.tokens, tagged.tokens)
      assert np.array_equal(plain.supervised, tagged.supervised)


def test_the_matrix_has_the_documented_size():
  assert len(cases.SETTINGS) == 48 == len(list(cases.TEMPLATES.glob('*.jinja')))
  assert len(cases.CONVERSATIONS) == 21 and set(goldens()) == set(cases.SETTINGS)
